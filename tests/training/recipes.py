"""Runs of many kinds, each put together from nothing as often as it is started."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from taulearn import Pruning, parameter_groups
from taulearn.penalties import L1
from taulearn.training import History
from training.support import digits, network, run_fit

EPOCHS = 5
Options = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a run is put together, from nothing, each time it is started.

    Attributes:
        name: In the test's id.
        optimizer: From the model.
        options: From the model and its optimiser, further arguments of fit.
        network: Arguments of the network.
    """

    name: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    options: Callable[[nn.Module, torch.optim.Optimizer], Options] = lambda model, optimizer: {}
    network: Options | None = None

    def __str__(self) -> str:
        return self.name

    def run(self, folder: Path, **more: Any) -> tuple[nn.Module, History, Options]:
        """Start the run, or go on with it, after having spoilt every generator."""
        model = network(**self.network or {})
        optimizer = self.optimizer(model)
        options = {"train": digits(), "epochs": EPOCHS, "validation": digits(60)} | self.options(model, optimizer)
        torch.manual_seed(7)
        history = run_fit(model, options.pop("train"), optimizer, **{"run": folder} | options | more)
        return model, history, options


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(model, lr=0.01, tau_lr=0.005))


def loader(generator: torch.Generator | None) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*digits()), batch_size=40, shuffle=True, generator=generator)


def pruning(every: str | int) -> Callable[[nn.Module, torch.optim.Optimizer], Options]:
    return lambda model, optimizer: {"penalties": [L1(0.3, proximal=True)], "pruning": Pruning(0.05, every=every)}


def scheduled(
    kind: Callable[..., lr_scheduler.LRScheduler], *arguments: Any, **options: Any
) -> Callable[[nn.Module, torch.optim.Optimizer], Options]:
    return lambda model, optimizer: {"scheduler": kind(optimizer, *arguments, **options)}


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, total_iters=2),
        lr_scheduler.ExponentialLR(optimizer, 0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


UNEVEN = [0.3, 0.05, 0.2, 0.1, 0.35]
RECIPES = [
    Recipe("sgd", sgd),
    Recipe("plain sgd", lambda model: torch.optim.SGD(model.parameters(), lr=0.1)),
    Recipe("adam", adam),
    Recipe("adamw amsgrad", lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)),
    Recipe("named parameters", lambda model: torch.optim.Adam(model.named_parameters(), lr=0.01)),
    Recipe("rmsprop", lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5, centered=True)),
    Recipe("lbfgs", lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)),
    Recipe("tensor lr", lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))),
    Recipe("pruning per epoch", sgd, pruning("epoch"), {"init": UNEVEN}),
    Recipe("pruning per iteration", sgd, pruning(3), {"init": UNEVEN}),
    Recipe("dropout", sgd, network={"dropout": 0.2}),
    Recipe("dependent", sgd, network={"constraint": "dependent", "lower_bound": 0.05}),
    Recipe("simplex", adam, network={"constraint": "simplex"}),
    Recipe("fixed", adam, network={"constraint": "fixed"}),
    Recipe("step", sgd, scheduled(lr_scheduler.StepLR, 2, 0.5)),
    Recipe("multi-step", sgd, scheduled(lr_scheduler.MultiStepLR, [2, 4], 0.5)),
    Recipe("lambda", sgd, scheduled(lr_scheduler.LambdaLR, lambda epoch: 1.0 / (1.0 + epoch))),
    Recipe("cosine", adam, scheduled(lr_scheduler.CosineAnnealingLR, EPOCHS)),
    Recipe("warm restarts", adam, scheduled(lr_scheduler.CosineAnnealingWarmRestarts, 2)),
    Recipe("plateau", sgd, scheduled(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)),
    Recipe("sequential", sgd, lambda model, optimizer: {"scheduler": sequential(optimizer)}),
    Recipe("one cycle", sgd, scheduled(lr_scheduler.OneCycleLR, 0.2, total_steps=5 * EPOCHS)),
    Recipe("cyclic", adam, scheduled(lr_scheduler.CyclicLR, 1e-3, 1e-2, step_size_up=7, cycle_momentum=False)),
    Recipe("averaged", adam, lambda model, optimizer: {"averaged": AveragedModel(model)}),
    Recipe(
        "averaged and pruned",
        sgd,
        lambda model, optimizer: (
            pruning("epoch")(model, optimizer)
            | {"averaged": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))}
        ),
        {"init": UNEVEN},
    ),
    Recipe("loader", sgd, lambda model, optimizer: {"train": loader(None)}),
    Recipe(
        "loader with generator",
        sgd,
        lambda model, optimizer: {"train": loader(torch.Generator().manual_seed(3))},
        {"dropout": 0.2},
    ),
    Recipe("accumulated and clipped", adam, lambda model, optimizer: {"accumulate": 3, "clip_norm": 0.5}),
]
