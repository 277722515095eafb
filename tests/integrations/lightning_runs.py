"""Modules and trainings that the tests of Lightning's callback share; without the extra, these tests are skipped."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import taulearn
from taulearn import Pruning

pytest.importorskip("lightning", reason="pip install 'taulearn[lightning]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint as ModelCheckpoint

from taulearn.integrations.lightning import TimeStepsCallback

EPOCHS = 5


class Built(lightning.LightningModule):
    """A module with a network of the library."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make()

    def make(self) -> None:
        self.model = taulearn.nn.resnet(6, 8, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x)
        return output

    @property
    def steps(self) -> Any:
        return self.model.time_steps

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(taulearn.parameter_groups(self.model, lr=1e-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.tanh(self.linear(x)))


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*[Block() for _ in range(5)]), nn.Linear(8, 3))


class Wrapped(Built):
    """A module with a wrapped model, in which normalisations keep averages of their own."""

    def make(self) -> None:
        self.model = taulearn.wrap(host(), example_inputs=torch.zeros(2, 6))


class Itself(Built):
    """A module that is wrapped itself."""

    def make(self) -> None:
        self.network = host()
        taulearn.wrap(self, example_inputs=torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x)
        return output

    @property
    def steps(self) -> Any:
        return self.time_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(taulearn.parameter_groups(self, lr=1e-2))


class Late(Built):
    """A module whose network is made when training begins."""

    def make(self) -> None:
        pass

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = taulearn.nn.resnet(6, 8, 3, 5)


def batches() -> Any:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=12)


def trainer(*callbacks: Any, **options: Any) -> Any:
    defaults = {"max_epochs": EPOCHS, "accelerator": "cpu", "enable_checkpointing": False}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def pruning(**options: Any) -> TimeStepsCallback:
    return TimeStepsCallback(pruning=Pruning(**({"target_blocks": 2} | options)), progress=False)


def trained(module: Any, callback: Any, file: Path, **options: Any) -> Any:
    """Train the module, and save it."""
    training = trainer(callback)
    training.fit(module, batches())
    training.save_checkpoint(file, **options)
    return module


def loss_of(module: Any, **options: Any) -> float:
    return float(trainer().test(module, batches(), verbose=False, **options)[0]["loss"])


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if "taulearn" not in name}


def equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
