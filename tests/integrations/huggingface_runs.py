"""Models, data and trainers that the tests of the callback share; without the extra, these tests are skipped."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taulearn
from copies import copied
from taulearn import Pruning
from taulearn.penalties import L1

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install 'taulearn[huggingface]'")
pytest.importorskip("accelerate", reason="pip install 'taulearn[huggingface]'")

from taulearn.integrations.huggingface import TimeStepsCallback  # noqa: E402  it needs what is asked for above

BATCH = 20


def digits(number: int = 200) -> tuple[Tensor, Tensor]:
    inputs, targets = taulearn.data.load("digits")
    return inputs[:number], targets[:number]


class Items(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Digits as Trainer wants them."""

    def __init__(self, number: int = 200) -> None:
        self.inputs, self.targets = digits(number)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.inputs[i], "labels": self.targets[i]}


@copied
def vit(init: Any = (1.2, 0.55, 1.3, 0.9, 1.25), **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config)
    return taulearn.wrap(model, example_inputs=digits(2)[0], init=init, **options)


class Plain(nn.Module):
    """A model that is none of transformers: its checkpoints are plain state dicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = taulearn.nn.resnet(64, 12, 10, 5, activation="tanh", init=[0.5, 0.05, 0.3, 0.1, 0.2])

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def optimizer_of(model: nn.Module, weight_decay: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    model = getattr(model, "network", model)
    groups = taulearn.parameter_groups(model, lr=3e-3, tau_lr=2e-2, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, **options)


def trainer(model: Any, callback: TimeStepsCallback, folder: Path, **options: Any) -> Any:
    given, metrics = options.pop("optimizer", None), options.pop("compute_metrics", None)
    defaults: dict[str, Any] = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **defaults | options)
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=Items(),
        eval_dataset=None if metrics is None else Items(BATCH),
        compute_metrics=metrics,
        callbacks=[callback],
        optimizers=(given or optimizer_of(model), None),
    )


def pruning_callback(**options: Any) -> TimeStepsCallback:
    return TimeStepsCallback([L1(0.5, proximal=True)], Pruning(0.08, **options), progress=False)


def stopping(at: int, *, save: bool = False, error: type[BaseException] | None = None) -> Any:
    """A callback that ends the training, saves, or fails after a step."""

    class Stopping(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at:
                control.should_save = save
                control.should_training_stop = True
                if error is not None:
                    raise error

    return Stopping()
