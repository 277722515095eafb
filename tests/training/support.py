"""Shared by the tests of the training room: a small problem, and comparisons bit by bit."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taulearn import data, parameter_groups
from taulearn.nn import resnet
from taulearn.penalties import Penalty
from taulearn.training import EpochEnd, History, fit

LOSS = nn.functional.cross_entropy


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    samples = data.load("digits")
    return samples.inputs, samples.targets


def digits(number: int = 200, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The first digits, (number, 1, 8, 8), and their classes."""
    inputs, targets = _digits()
    return inputs[:number].to(dtype), targets[:number].clone()


def network(hidden_layers: int = 5, *, seed: int = 0, dropout: float = 0.0, **options: Any) -> Any:
    """A small residual network for the digits, the same for the same seed."""
    torch.manual_seed(seed)
    activation = nn.Sequential(nn.Tanh(), nn.Dropout(dropout)) if dropout else "tanh"
    return resnet(64, 12, 10, hidden_layers, **{"activation": activation} | options)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """Plain steepest descent."""
    return torch.optim.SGD(model.parameters(), lr=lr)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Nesterov's momentum, a learning rate for the steps, decay of the weights."""
    return torch.optim.SGD(parameter_groups(model, 0.05, 0.01, 1e-3), momentum=0.9, nesterov=True)


def run_fit(model: Any, train: Any, optimizer: torch.optim.Optimizer, **options: Any) -> History:
    """fit, quietly, with this room's defaults."""
    defaults = {"loss": LOSS, "epochs": 3, "batch_size": 40, "progress": False, "compile": "never"}
    return fit(model, train, optimizer=optimizer, **defaults | options)


def plain_loop(
    model: Any,
    train: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    orders: Sequence[Tensor],
    *,
    batch_size: int = 40,
    loss: Callable[[Tensor, Tensor], Tensor] = LOSS,
    penalties: Sequence[Penalty] = (),
    after_step: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """The loop that anyone would write; returns loss, total, penalties and tau of each iteration."""
    rows = []
    model.train()
    for order in orders:
        for index in order.split(batch_size):
            optimizer.zero_grad()
            data_loss = loss(model(train[0][index]), train[1][index])
            values = [penalty(model) for penalty in penalties]
            total = data_loss
            for penalty, value in zip(penalties, values, strict=True):
                if penalty.differentiated:
                    total = total + value
            total.backward()
            rows.append([float(v.detach()) for v in (data_loss, total, *values, *model.time_steps.tau)])
            optimizer.step()
            after_step()
    return rows


def assert_same_history(left: History, right: History) -> None:
    """All columns but the seconds, bit by bit."""
    assert (left.deletions, left.insertions) == (right.deletions, right.insertions)
    for name, columns in {
        "iterations": (left.iterations, right.iterations),
        "epochs": (left.epochs, right.epochs),
    }.items():
        ours, theirs = columns
        assert ours.keys() == theirs.keys()
        for column in ours:
            if column != "seconds":
                assert ours[column].dtype == theirs[column].dtype, (name, column)
                assert np.array_equal(ours[column], theirs[column], equal_nan=True), (name, column)


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    """The whole state dict, bit by bit."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class Crash(Exception):
    """The error that a test's callback raises to end a run."""


def crash_after(epoch: int) -> Callable[[EpochEnd], None]:
    """A callback that raises after this epoch, before the epoch's checkpoint."""

    def callback(end: EpochEnd) -> None:
        if end.epoch == epoch:
            raise Crash

    return callback


class Stubborn(torch.autograd.Function):
    """tanh, in a form that neither torch.compile nor torch.func takes."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x) if x.detach().sum().item() < 1e9 else x
        context.save_for_backward(y)
        return y

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (y,) = context.saved_tensors
        return gradients[0] * (1 - y * y)


class StubbornTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Stubborn.apply(x)
