"""Trainer's checkpoints of models that are saved by a method of their own, which Trainer does not call."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import taulearn
from integrations.huggingface_runs import digits, pruning_callback, trainer
from taulearn.integrations.checkpoints import mark_
from taulearn.integrations.huggingface import load_checkpoint
from wrapping.hosts import gpt2, tokens
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


def test_a_checkpoint_is_not_loaded_into_a_model_that_shares_what_it_holds_apart(tmp_path: Path) -> None:
    model = taulearn.wrap(gpt2(tie_word_embeddings=False), example_inputs=tokens())
    state = dict(model.state_dict())
    mark_(model, state)
    safetensors.torch.save_file({k: v.detach().clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    load_checkpoint(taulearn.wrap(gpt2(tie_word_embeddings=False), example_inputs=tokens()), tmp_path)
    tied = taulearn.wrap(gpt2(), example_inputs=tokens())
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    with pytest.raises(ValueError, match=r"lm_head.weight must have values of its own"):
        load_checkpoint(tied, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())
