"""Bad inputs of fit and evaluate: rows of the table in tests/refusals.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from refusals import INF, NAN, R, Refusal, on
from taulearn import Pruning, Refinement, wrap
from taulearn.nn import (
    densenet,
    feedforward,
    resnet,
)
from taulearn.optim import register_projection
from taulearn.penalties import L1
from taulearn.training import evaluate
from training.support import digits, network, run_fit, sgd


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(X, Z, strict=True)


class Items(Dataset[Any]):
    """A data set whose items a function makes of their number."""

    def __init__(self, item: Callable[[int], Any], number: int = 200) -> None:
        self.item, self.number = item, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


def but(values: Tensor, at: int, value: float) -> Tensor:
    values = values.clone()
    values[at] = value
    return values


X, Z = digits()
LATER: Any = DataLoader(TensorDataset(X, but(Z, 150, 12)), batch_size=40)
KEYS = Items(lambda i: {"x": X[i], "y": Z[i]})
NO_ITEMS = Items(lambda i: None, 0)

INPUTS: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    ((X.flatten(1)[:, :63], Z), ValueError, ("64", "(2, 63)")),
    ((X.long(), Z), TypeError, ("torch.int64",)),
]
DATA: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    ((X.double(), Z), TypeError, ("torch.float32", "torch.float64")),
    ((X.half(), Z), TypeError, ("torch.float16",)),
    ((X, but(Z, 17, 10)), ValueError, ("0 .. 9", "10", "sample 17")),
    ((X, but(Z, 3, -1)), ValueError, ("0 .. 9", "-1", "sample 3")),
    ((X[:0], Z[:0]), ValueError, ("none",)),
    ((X, Z[:-1]), ValueError, ("200", "199")),
    ((X, Z, Z), TypeError, ("3", "Tensor")),
    (X.numpy(), TypeError, ("ndarray", "torch.from_numpy")),
    ((X.numpy(), Z.numpy()), TypeError, ("ndarray", "torch.")),
    (([[1.0]], [1]), TypeError, ("list", "torch.as_tensor")),
    ((torch.tensor(1.0), torch.tensor(1)), ValueError, ("inputs",)),
    ((X, torch.tensor(1)), ValueError, ("targets",)),
    (Endless(), TypeError, ("Endless", "length")),
    (DataLoader(Endless()), TypeError, ("Endless", "length")),
    (NO_ITEMS, ValueError, ("empty",)),
    (DataLoader(TensorDataset(X, Z), batch_size=500, drop_last=True), ValueError, ("empty", "DataLoader")),
    ({"x": X}, TypeError, ("dict", "DataLoader")),
    ([{"x": X}, {"x": X}, {"x": X}], TypeError, ("of 3 (dict", "batch_size=None")),
    (KEYS, TypeError, ("'y'", "it takes x")),
    (DataLoader(KEYS, batch_size=5), TypeError, ("'y'", "it takes x")),
    (DataLoader(TensorDataset(X, Z, Z)), TypeError, ("3", "Tensor")),
    (DataLoader(TensorDataset(X)), TypeError, ("1", "Tensor")),
    (
        DataLoader(TensorDataset(X, Z), collate_fn=lambda items: (np.zeros((2, 64)), np.zeros(2))),
        TypeError,
        ("torch.from_numpy",),
    ),
    *[((but(X, 123, bad), Z), ValueError, ("inputs", "sample 123", "finite")) for bad in (NAN, INF, -INF)],
]


def fitting(make: Callable[[], Any] = network, optimizer: Any = sgd, train: Any = (X, Z), **options: Any) -> Any:
    """fit of a model that must be left as it was, into a folder that must not be made."""
    return on(make, lambda m: run_fit(m, train, optimizer(m), **{"run": "run"} | options))


def constantly(value: Any) -> Callable[[Any], Any]:
    return lambda model: value


def with_scheduler(scheduler: Callable[[Any], Any]) -> Callable[[], None]:
    def act(model: Any) -> None:
        optimizer = sgd(model)
        run_fit(model, (X, Z), optimizer, scheduler=scheduler(optimizer), run="run")

    return on(network, act)


def with_projection(model: Any) -> Any:
    optimizer = sgd(model)
    register_projection(optimizer, model, [L1(0.5, proximal=True)])
    return optimizer


def with_another_parameter(model: Any) -> Any:
    return SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)


def lbfgs(model: Any) -> Any:
    return torch.optim.LBFGS(model.parameters())


def without_steps(model: Any) -> Any:
    return SGD([p for p in model.parameters() if p is not model.time_steps.values], lr=0.1)


def as_option(name: str, error: type[Exception], *values: Any) -> list[Refusal]:
    return [R(error, name, fitting(**{name: value}), (repr(value),)) for value in values]


def normalised_by_batch() -> Any:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh()) for _ in range(2)]
    return wrap(nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 10)), ["1", "2"])


def regressing(outputs: int, targets: Tensor) -> Callable[[], None]:
    return fitting(lambda: resnet(64, 12, outputs, 3), train=(X, targets), loss=mse_loss)


CYCLE = {"anneal_strategy": "linear", "total_steps": 14}

FIT = [
    *[
        R(error, argument if named else "inputs", fitting(**{argument: given}), says)
        for argument in ("train", "validation")
        for named, rows in ((True, DATA), (False, INPUTS))
        for given, error, says in rows
    ],
    *as_option("epochs", ValueError, 0, 1.5, True),
    *as_option("batch_size", ValueError, 0),
    *as_option("accumulate", ValueError, 0),
    *as_option("checkpoint_every", ValueError, 0),
    *as_option("seed", ValueError, -1),
    *as_option("clip_norm", ValueError, 0.0, NAN, "1"),
    *as_option("pruning", TypeError, 0.01),
    *as_option("device", ValueError, "gpu", "meta"),
    R(ValueError, "compile", fitting(compile="alway"), ("'alway'", "'always'")),
    R(ValueError, "precision", fitting(precision="bf17"), ("'bf17'", "'bf16'")),
    R(ValueError, "metrics", fitting(metrics="acc")),
    R(TypeError, "metrics", fitting(metrics={"acc": "accuracy"}), ("'acc'",)),
    R(ValueError, "penalties", fitting(penalties=[L1(0.1), L1(0.2)]), ("'l1'",)),
    R(TypeError, "penalties", fitting(penalties=["l1"]), ("'l1'",)),
    R(TypeError, "penalties", fitting(penalties="l1"), ("'l1'",)),
    R(TypeError, "penalties", fitting(penalties=[L1]), ("L1",)),
    R(TypeError, "penalties", fitting(penalties=None), ("None",)),
    R(ValueError, "penalties", fitting(optimizer=with_projection), ("'l1'", "register_projection")),
    R(ValueError, "penalties", fitting(pruning=Pruning(target_blocks=3), penalties=[L1(0.1)]), ("L1", "target")),
    *[
        R(error, argument, fitting(make, refinement=policy, **more), says)
        for error, argument, make, policy, more, says in (
            (TypeError, "refinement", network, 9, {}, ("9", "taulearn.Refinement")),
            (ValueError, "target_blocks", network, Refinement(5), {}, ("5",)),
            (ValueError, "target_blocks", network, Refinement(3), {}, ("5", "3")),
            (ValueError, "until", network, Refinement(9, until=1, every=9), {}, ("5", "9")),
            (ValueError, "until", network, Refinement(20, until=2), {}, ("15 rounds", "10")),
            (ValueError, "until", network, Refinement(9, until=4), {}, ("3", "4")),
            (ValueError, "number", network, Refinement(9, number=1, every=3, until=1), {}, ("4", "1")),
            (ValueError, "every", network, Refinement(99, every=5, until=1), {}, ("1", "99")),
            (ValueError, "model", lambda: network(1), Refinement(3), {}, ("layer 0",)),
            (ValueError, "model", lambda: densenet(64, 12, 10, 3), Refinement(9), {}, ("dense",)),
            (ValueError, "model", lambda: network(constraint="fixed"), Refinement(9, by="insert"), {}, ("fixed",)),
            (ValueError, "model", lambda: network(lower_bound=0.15), Refinement(9), {}, ("0.15",)),
            (ValueError, "target_blocks", network, Refinement(7), {"pruning": Pruning(target_blocks=7)}, ("7",)),
            (ValueError, "by", network, Refinement(7), {"pruning": Pruning(target_blocks=3, by=0.5)}, ("until", "0.5")),
        )
    ],
    R(TypeError, "scheduler", fitting(scheduler="cosine"), ("'cosine'",)),
    R(TypeError, "scheduler", fitting(scheduler=lr_scheduler.StepLR), ("StepLR",)),
    R(TypeError, "scheduler", fitting(scheduler=lambda epoch: 0.1), ("function",)),
    R(ValueError, "scheduler", fitting(scheduler=lr_scheduler.StepLR(sgd(network()), 1)), ("optimizer",)),
    R(ValueError, "scheduler", with_scheduler(lambda o: lr_scheduler.OneCycleLR(o, 0.1, **CYCLE)), ("15", "14")),
    R(TypeError, "averaged", fitting(averaged=network()), ("TimeVariable",)),
    R(ValueError, "averaged", fitting(averaged=AveragedModel(network(3)))),
    R(TypeError, "callbacks", fitting(callbacks=print), ("function",)),
    R(TypeError, "callbacks", fitting(callbacks=["stop"]), ("'stop'",)),
    R(ValueError, "run", fitting(tensorboard=True, run=None), ("tensorboard",)),
    R(ValueError, "run", fitting(resume=True, run=None), ("resume",)),
    R(FileNotFoundError, "run", fitting(resume=True)),
    R(TypeError, "optimizer", fitting(optimizer=constantly("sgd")), ("'sgd'",)),
    R(TypeError, "optimizer", fitting(optimizer=constantly(torch.optim.Adam)), ("Adam",)),
    R(TypeError, "optimizer", fitting(optimizer=constantly(None)), ("None",)),
    R(ValueError, "optimizer", fitting(optimizer=lambda m: sgd(network()))),
    R(ValueError, "optimizer", fitting(optimizer=with_another_parameter), ("run",)),
    R(ValueError, "optimizer", fitting(optimizer=without_steps, pruning=Pruning(target_blocks=3)), ("time steps",)),
    R(ValueError, "clip_norm", fitting(optimizer=lbfgs, clip_norm=1.0), ("LBFGS",)),
    *[
        R(TypeError, "optimizer", fitting(optimizer=lambda m, kind=kind: kind([sgd(m), sgd(m)])), ("parameter_groups",))
        for kind in (list, tuple)
    ],
    *[
        R(error, "model", fitting(make, pruning=Pruning(0.01)), says)
        for make, error, says in (
            (lambda: densenet(64, 12, 10, 3), ValueError, ("dense",)),
            (lambda: feedforward(64, 12, 10, 3), ValueError, ("feedforward",)),
            (lambda: network(1), ValueError, ("single layer",)),
            (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), TypeError, ("time steps",)),
        )
    ],
    *[
        R(ValueError, argument, fitting(make, pruning=Pruning(**policy)), says)
        for argument, make, policy, says in (
            ("target_blocks", network, {"target_blocks": 5}, ("5",)),
            ("target_blocks", network, {"target_blocks": 7}, ("5", "7")),
            ("target_blocks", lambda: network(constraint="dependent"), {"target_blocks": 1}, ("2", "layer 0")),
            ("target_blocks", lambda: resnet(64, [12, 11, 10, 9], 10, 4), {"target_blocks": 2}, ("4",)),
            ("model", lambda: network(1), {"target_blocks": 1}, ("single layer",)),
            ("by", network, {"target_blocks": 3, "by": 9}, ("3", "9")),
            ("constraint", lambda: network(constraint="fixed"), {"target_blocks": 3}, ("'fixed'", "penalised='none'")),
            (
                "constraint",
                lambda: network(constraint="simplex"),
                {"target_blocks": 3, "penalised": "all"},
                ("'simplex'", "penalised='all'"),
            ),
        )
    ],
    *[
        R(ValueError, argument, fitting(normalised_by_batch, train=train, **options), ("batch normalisation", got))
        for argument, train, options, got in (
            ("train", DataLoader(TensorDataset(X[:41], Z[:41]), batch_size=10), {}, "41"),
            ("batch_size", (X, Z), {"batch_size": 1}, "1"),
            ("train", (X[:1], Z[:1]), {}, "1"),
        )
    ],
    R(
        ValueError,
        "validation",
        fitting(validation=DataLoader(TensorDataset(but(X, 44, NAN), Z), batch_size=50), run=None),
        ("inputs", "sample 44", "nan"),
    ),
    R(ValueError, "targets", regressing(1, X[:, 0, 0, 0]), ("train", "(n, 1)", "(200,)", "unsqueeze")),
    R(ValueError, "targets", regressing(1, but(X[:, 0, 0, :1], 31, NAN)), ("train", "sample 31", "nan")),
    *[R(ValueError, "targets", regressing(3, X[:, 0, 0, :n]), ("train", "torch.float32")) for n in (1, 2)],
    R(TypeError, "data", lambda: evaluate(network(), "a"), ("str",)),
    R(TypeError, "loss", lambda: evaluate(network(), (X, Z), loss="a"), ("'a'",)),
    R(ValueError, "data", lambda: evaluate(network(), LATER, loss=cross_entropy), ("0 .. 9", "12", "sample 30")),
    R(ValueError, "loss", fitting(loss=lambda output, target: cross_entropy(output.detach(), target))),
]
