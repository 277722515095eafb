"""Checks of the arguments of ``fit``, other than data: options, optimiser, scheduler, averaged weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from .._errors import positive_integer, unknown_name
from ..adaptivity.optimizer_state import bare, check_holds, check_holds_steps, with_inner
from ..adaptivity.policies import Pruning
from ..adaptivity.transaction import check_averaged
from ..nn.pruned_models import prunable_of
from ..nn.time_steps import time_steps_of
from ..optim.projections import searches
from ..penalties import Penalty

if TYPE_CHECKING:
    from ..adaptivity.refiner import Refinement

OVER_EPOCHS = "laid out over all epochs"
"""Among the terms of a run: what changes its course when the number of epochs does."""


Metric = Callable[[Any, Any], Any]
NAMED = ("accuracy", "perplexity")  # metrics that have a name


def check_metrics(metrics: str | Sequence[str] | Mapping[str, Metric]) -> None:
    """Refuse names that are unknown, and functions that cannot be called."""
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            if not callable(metric):
                raise TypeError(f"metrics must map names to functions of (output, target), got {metric!r} for {name!r}")
    elif isinstance(metrics, str):
        if metrics != "auto":
            raise ValueError(
                f"metrics must be 'auto', a list of {' and '.join(map(repr, NAMED))}, or a mapping of names to "
                f"functions, got {metrics!r}"
            )
    else:
        for name in metrics:
            if name not in NAMED:
                raise unknown_name("metrics", name, NAMED)


def check_options(
    counts: Mapping[str, int], names: Mapping[str, tuple[str, Sequence[str]]], clip_norm: float | None, seed: int
) -> None:
    """Refuse counts below one, unknown names, and a norm or seed out of range."""
    for name, value in counts.items():
        positive_integer(name, value)
    for name, (given, known) in names.items():
        if given not in known:
            raise unknown_name(name, given, known)
    if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, clip_norm: float | None) -> None:
    """Refuse what is no optimiser of this model."""
    check_holds(optimizer, model)
    check_holds_steps(optimizer, model)
    if clip_norm is not None and searches(optimizer):
        name = type(optimizer).__name__
        raise ValueError(f"clip_norm must be None with {name}, whose line search needs the true gradient")


def check_policies(pruning: Pruning | None, refinement: "Refinement | None", penalties: Iterable[Penalty]) -> None:
    """Refuse what is no policy, and an l1 penalty beside that of a target."""
    if refinement is not None:
        from ..adaptivity.refiner import Refinement

        if not isinstance(refinement, Refinement):
            raise TypeError(
                f"refinement must be a Refinement policy, got {refinement!r}: write refinement=taulearn.Refinement(12)"
            )
    if pruning is None:
        return
    if not isinstance(pruning, Pruning):
        raise TypeError(f"pruning must be a Pruning policy, got {pruning!r}: write pruning=taulearn.Pruning(0.01)")
    if pruning.survivors == "one" and refinement is not None:
        raise ValueError("survivors must be 'free' beside a refinement, whose new layers have small steps, got 'one'")
    if pruning.targeted and pruning.penalised != "none":
        from ..adaptivity.target import SteeredL1

        if any(each.name == SteeredL1.name for each in penalties):
            raise ValueError(
                "penalties must not contain L1 where pruning has a target: the controller finds its weight"
            )


def check_callbacks(callbacks: Sequence[Callable[..., Any]]) -> None:
    """Refuse callbacks that cannot be called."""
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        given = "one function" if callable(callbacks) else repr(callbacks)
        raise TypeError(f"callbacks must be a sequence of functions, got {given}: write callbacks=[...]")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks must be functions of an EpochEnd, got {callback!r}")


def check_parts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    averaged: AveragedModel | None,
    iterations: int,
) -> None:
    """Refuse a scheduler that belongs to another optimiser or ends too early, and averaged weights of another model."""
    if averaged is not None:
        check_averaged(averaged, model)
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler):
        given = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else repr(scheduler)
        raise TypeError(
            f"scheduler must be a torch scheduler of the optimizer, got {given}: "
            "write for instance torch.optim.lr_scheduler.StepLR(optimizer, 10)"
        )
    its = bare(getattr(scheduler, "optimizer", optimizer))
    if all(its is not each for each in with_inner([optimizer])):
        raise ValueError("scheduler must change the learning rate of optimizer, got one that was made for another")
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < iterations:
        raise ValueError(
            f"scheduler must cover all {iterations} iterations, got OneCycleLR with total_steps="
            f"{scheduler.total_steps}: make it with total_steps={iterations}; it steps each iteration"
        )


def bare_scheduler(scheduler: Any) -> Any:
    """The scheduler of torch in one that accelerate prepared; anything else as it is."""
    while not isinstance(scheduler, LRScheduler) and isinstance(getattr(scheduler, "scheduler", None), LRScheduler):
        scheduler = scheduler.scheduler
    return scheduler


def steps_each_iteration(scheduler: LRScheduler | None) -> bool:
    """Whether a scheduler counts iterations: OneCycleLR, CyclicLR, and any combination that contains one of them."""
    return any(isinstance(part, OneCycleLR | CyclicLR) for part in _parts(scheduler))


def _parts(scheduler: LRScheduler | None) -> Iterator[LRScheduler]:
    """A scheduler, and those it is composed of (SequentialLR, ChainedScheduler)."""
    if scheduler is None:
        return
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


def terms(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    penalties: Iterable[Penalty],
    pruning: Pruning | None,
    refinement: "Refinement | None",
    **plain: int | float | str | bool | None,
) -> dict[str, Any]:
    """The settings that a run is started with and must be resumed with, as plain data for its checkpoints."""
    found = list(penalties)
    policy = None if pruning is None else _policy(vars(pruning))
    by_share = pruning is not None and pruning.targeted and isinstance(pruning.by, float)
    until_share = refinement is not None and isinstance(refinement.until, float)
    return {
        **{name: _plain(value) for name, value in plain.items()},
        "model": _described(model),
        "optimizer": type(optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "penalties": [penalty.name for penalty in found],
        "pruning": policy,
        "refinement": None if refinement is None else _policy(vars(refinement)),
        OVER_EPOCHS: [penalty.name for penalty in found if penalty.scheduled]
        + ["pruning"] * by_share
        + ["refinement"] * until_share,
    }


def _policy(options: Mapping[str, Any]) -> dict[str, Any]:
    """A policy in plain words; checkpoints of earlier versions lack what has its default here."""
    plain = {name: _plain(value) for name, value in options.items()}
    late = {"data": None, "loss": None, "survivors": "free"}
    return {name: value for name, value in plain.items() if name not in late or value != late[name]}


def _described(model: nn.Module) -> str:
    """The settings of a model that its weights do not tell."""
    steps, scheme = time_steps_of(model), getattr(prunable_of(model), "scheme", None)
    bound = "" if steps.lower_bound is None else f", lower_bound={steps.lower_bound:g}"
    return f"{scheme!r} with constraint={steps.constraint!r}, horizon={steps.horizon:g}{bound}"


def _plain(value: Any) -> Any:
    """A value as JSON gives it back; an object by the name of its type."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, torch.Tensor):
        return "Tensor"
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) else int(value)
    if hasattr(value, "__index__"):
        return int(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else type(value).__name__
