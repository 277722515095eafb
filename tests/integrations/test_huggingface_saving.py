"""Trainer's checkpoints of models that are saved by a method of their own, which Trainer does not call."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import taulearn
from integrations.huggingface_runs import digits, pruning_callback, trainer
from taulearn.integrations.huggingface import load_checkpoint
from wrapping.test_save_pretrained import Hub


class HubDigits(Hub):
    """A model of huggingface_hub's mixin that classifies digits."""

    def __init__(self, number: int = 4) -> None:
        super().__init__(number)
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
        self.head = nn.Linear(6, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(super().forward(pixel_values))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


def wrapped() -> HubDigits:
    torch.manual_seed(0)
    return taulearn.wrap(HubDigits(), example_inputs=digits(2)[0], init=[1.2, 0.3, 1.3, 0.9])


def test_checkpoints_of_a_model_with_a_method_of_its_own_hold_which_layers_are_left(tmp_path: Path) -> None:
    model = wrapped()
    trainer(model, pruning_callback(), tmp_path, save_strategy="epoch", num_train_epochs=3).train()
    assert model.time_steps.num_steps < 4
    last = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))[-1]
    assert "taulearn.origin" in safetensors.torch.load_file(last / "model.safetensors")
    fresh = wrapped()
    load_checkpoint(fresh, last)
    assert fresh.time_steps.origin == model.time_steps.origin
    inputs = digits(4)[0]
    assert torch.equal(fresh.eval()(inputs), model.eval()(inputs))
