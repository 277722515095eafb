"""Adaptive pruning: a layer whose time step is near zero is the identity and is deleted with all its variables.

Rule (Herberg, Herzog, Koehne 2023, section 3): layer l goes when abs(tau_l)^p < threshold * sum_j abs(tau_j)^p, with
p = 1 for the residual and p = gamma for the fractional scheme (whose increment is proportional to tau^gamma); smallest
share first, shares recomputed after each deletion.

Three stages, one function each: the shares (:func:`shares`), the plan (:func:`plan`), the transaction (:func:`prune`).
"""

import math
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ._budget import Budget
from ._choice import Criterion as Criterion, normalised, plan as plan, scores_of, shares as shares, within_budget
from ._contribution import contribution as contribution
from ._deletion import WRAPPING, Prunable as Prunable, all_or_nothing, check_averaged, check_holds, delete, prunable_of
from ._distributed import expire_wrappers, refuse_distributed
from ._policy import THRESHOLD, Pruning as Pruning, check_one_decides, check_threshold


@dataclass(frozen=True)
class DeletedLayer:
    """One deleted layer.

    Attributes:
        layer: Its number at the start of training, from 0.
        share: abs(tau)^p over the sum of all layers that existed when it was chosen.
        factor: What multiplied its layer function: abs(tau), or tau^gamma Gamma(2-gamma); the deletion changes the
            state by this times the layer's value.
        parameters: Number of variables that went with it.
    """

    layer: int
    share: float
    factor: float
    parameters: int


@dataclass(frozen=True)
class PruneReport:
    """What a call of :func:`prune` did; prints as a few lines.

    Attributes:
        deleted: The deleted layers, in the order of deletion.
        kept: Positions, before the call, of the layers that stayed.
        layers_before: Number of layers before.
        layers_after: Number of layers after.
        parameters_before: Number of variables before.
        parameters_after: Number of variables after.
        optimizer: "none" (not given), "unchanged", "exact" (state of all survivors kept bit by bit) or "reset" (it
            keeps no state per parameter).
        note: What the reader should know of the accuracy of the deletion, or of an optimiser that was not given.

    Example:
        >>> from taulearn.nn import resnet
        >>> print(prune(resnet(2, 3, 1, 4), keep=[0, 2]))
        deleted layers 1, 3 (shares 0.25, 0.25): 4 -> 2 layers, 52 -> 26 parameters
    """

    deleted: tuple[DeletedLayer, ...]
    kept: tuple[int, ...]
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    optimizer: str
    note: str = ""

    def __bool__(self) -> bool:
        """Whether anything was deleted."""
        return bool(self.deleted)

    def __str__(self) -> str:
        if not self.deleted:
            return f"no layer deleted: {self.layers_after} layers, {self.parameters_after:,} parameters"
        plural = "s" if len(self.deleted) > 1 else ""
        layers = ", ".join(str(d.layer) for d in self.deleted)
        shares = ", ".join(f"{d.share:.2g}" for d in self.deleted)
        text = (
            f"deleted layer{plural} {layers} (share{plural} {shares}): "
            f"{self.layers_before} -> {self.layers_after} layers, "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        )
        if self.optimizer == "reset":
            text += "; the optimiser keeps no state per parameter and was reset"
        return text + (f"; {self.note}" if self.note else "")


def check_prunable(model: nn.Module) -> Prunable:
    """The model as something that can be pruned, or an error that says why it cannot.

    Args:
        model: A model with time steps.

    Returns:
        The same model, or its wrapping.

    Raises:
        TypeError: If it has no time steps, or is a wrapper of data parallel training.
        ValueError: If its scheme does not become the identity at tau = 0, it has a single layer, every layer must stay,
            or its parameters are sharded.

    Example:
        >>> from taulearn.nn import densenet
        >>> check_prunable(densenet(2, 3, 1, 4))
        Traceback (most recent call last):
        ...
        ValueError: model has the dense scheme, in which tau = 0 is not the identity: no layer can be deleted; use a ...
    """
    refuse_distributed("model", model)
    found = prunable_of(model)
    if not all(hasattr(found, name) for name in ("time_steps", "scheme", "fixed_layers", "keep_layers_")):
        raise TypeError(
            f"model must be a network with time steps, got {type(model).__name__}: build it with taulearn.nn or wrap "
            "it with taulearn.wrap, and hand over the network itself, not a wrapper around it"
        )
    prunable = cast(Prunable, found)
    if not prunable.scheme.deletes_exactly:
        raise ValueError(
            f"model has the {prunable.scheme.name} scheme, in which tau = 0 is not the identity: "
            "no layer can be deleted; use a residual or fractional network"
        )
    if prunable.time_steps.num_steps == 1:
        raise ValueError("model has a single layer, which must stay: start deeper, or train without pruning")
    fixed = prunable.fixed_layers()
    if len(fixed) == prunable.time_steps.num_steps and len(set(fixed.values())) == 1:
        raise ValueError(f"model must have a layer that can be deleted, got none: {next(iter(fixed.values()))}")
    return prunable


def prune(
    model: nn.Module,
    threshold: float | None = None,
    *,
    keep: Iterable[int] | None = None,
    criterion: str | Criterion | None = None,
    budget: Budget | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: AveragedModel | None = None,
) -> PruneReport:
    """Delete layers whose time step is near zero, in model, optimiser and averaged model, or in none of them.

    The optimiser goes on with the surviving parameters and their exact state: nothing is rebuilt. If anything fails,
    all is as before.

    Args:
        model: A residual or fractional network with time steps, or a wrapped model.
        threshold: Layers with a smaller share of sum abs(tau)^p are deleted, see the module's text; in (0, 1). None:
            0.01, where neither ``keep`` nor ``budget`` is given; one of the three decides.
        keep: Positions (now, from 0) of the layers to keep instead of the rule.
        criterion: What shares are taken of: "share", abs(tau); "power", abs(tau)^gamma with the scheme's gamma (1 for
            the residual scheme); a function (tau, model) -> one score >= 0 per layer, such as
            ``taulearn.contribution(inputs)``. None: "power" for the fractional scheme, else "share".
        budget: A number of layers to keep, or {"latency_ms": x, "example_inputs": inputs} for
            as many as a forward pass allows that takes at most x milliseconds, measured here and now in evaluation
            mode. The layers with the largest shares stay.
        optimizer: The optimiser of the model's parameters, any of torch.optim. None: there is none; one that was made
            before holds the old time steps then, and would train tau no more. ``fit`` and the next call of ``prune``
            refuse it, a hand-written loop does not notice.
        averaged: Averaged weights of the model, pruned alike.

    Returns:
        What was done.

    Raises:
        TypeError: If the model has no time steps, ``keep`` is no list of integers, ``optimizer`` no optimiser, or
            ``averaged`` no AveragedModel.
        ValueError: If the threshold lies outside (0, 1) or stands beside ``keep`` or ``budget``, the model cannot be
            pruned, ``keep`` or ``budget`` leave out a layer that must stay, no deletion meets the latency, or the
            optimiser does not hold the model's parameters.

    References:
        Herberg, Herzog, Koehne (2023), section 3, adaptive pruning.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(784, 100, 10, 6, init=[0.5, 0.2, 0.001, 0.1, 0.0, 0.2])
        >>> report = prune(network, 0.01)
        >>> [d.layer for d in report.deleted], report.parameters_before - report.parameters_after
        ([4, 2], 20202)
    """
    if threshold is not None:
        check_threshold(threshold)
    check_one_decides(threshold, keep=keep, budget=budget)
    prunable = check_prunable(model)
    model = getattr(model, "_orig_mod", model)
    steps, power = prunable.time_steps, prunable.scheme.step_power
    fixed = prunable.fixed_layers()
    if optimizer is not None:
        check_holds(optimizer, model)
    if averaged is not None:
        check_averaged(averaged, model)
    scores, exponent = scores_of(criterion, prunable, model)
    note = ""
    if budget is not None:
        if keep is not None:
            raise ValueError("budget must be None where keep is given: keep names the layers already")
        chosen, note = within_budget(budget, model, steps, exponent, scores, fixed)
    elif keep is None:
        chosen = plan(steps, THRESHOLD if threshold is None else threshold, power=exponent, fixed=fixed, scores=scores)
    else:
        kept_positions = _positions(keep)
        if not kept_positions or kept_positions[0] < 0 or kept_positions[-1] >= steps.num_steps:
            raise ValueError(f"keep must name layers in 0 .. {steps.num_steps - 1}, got {kept_positions}")
        all_shares = shares(steps, exponent).tolist() if scores is None else normalised(scores)
        chosen = [(i, all_shares[i]) for i in range(steps.num_steps) if i not in kept_positions]
    gone = {i for i, _ in chosen}
    kept = tuple(i for i in range(steps.num_steps) if i not in gone)
    for layer in sorted(gone & fixed.keys()):
        raise ValueError(f"keep must contain layer {layer}, got {list(kept)}: {fixed[layer]}")

    tau = steps.tau.detach().double().abs().tolist()
    gain = math.gamma(2.0 - power)
    layers = cast(Any, prunable).layers
    own = int(isinstance(steps.values, nn.Parameter))
    deleted = tuple(
        DeletedLayer(steps.origin[i], share, gain * tau[i] ** power, own + _count(layers[i])) for i, share in chosen
    )
    before, parameters_before = steps.num_steps, _count(model)
    state = "none" if optimizer is None else "unchanged"
    if deleted:
        models = [model] if averaged is None else [model, averaged.module]
        with all_or_nothing(models, optimizer):
            state = delete(models, kept, optimizer)
        expire_wrappers(model)
        if WRAPPING in vars(model):
            _forget_compiled()
    if deleted and power != 1.0:
        size = sum(d.factor for d in deleted)
        error = f"error of the order tau^gamma, here {size:.2g} times the size of the deleted layers' values"
        note = f"{note}; {error}" if note else error
    if deleted and optimizer is None and steps.values.grad is not None:
        warning = "an optimiser made before this no longer trains tau: hand it over (optimizer=...) or make a new one"
        note = f"{note}; {warning}" if note else warning
    return PruneReport(deleted, kept, before, len(kept), parameters_before, _count(model), state, note)


def _positions(keep: Iterable[int]) -> list[int]:
    """The positions to keep in order, each once."""
    try:
        if isinstance(keep, str | bytes):
            raise TypeError
        return sorted({operator.index(i) for i in keep})
    except TypeError:
        raise TypeError(f"keep must be a list of layer numbers, such as [0, 2], got {keep!r}") from None


def _forget_compiled() -> None:
    """torch.compile gives up on a function after eight versions of it: a deletion starts the count anew.

    Whatever is compiled is compiled again on its next call.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
