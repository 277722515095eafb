"""Adaptive pruning: a layer whose time step is near zero is the identity and is deleted with all its variables.

Rule (Herberg, Herzog, Koehne 2023, section 3): layer l goes when abs(tau_l)^p < threshold * sum_j abs(tau_j)^p, with
p = 1 for the residual and p = gamma for the fractional scheme (whose increment is proportional to tau^gamma); smallest
share first, shares recomputed after each deletion.

Three stages: scores (estimate.py, criteria.py), the plan (mark.py), the transaction (transaction.py); :func:`prune`
joins them.
"""

import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._distributed import refuse_distributed, together
from ..nn.pruned_models import WRAPPING, prunable_of, refuse_inference_mode
from .estimate import Criterion, as_criterion, normalised, scores_of, shares
from .mark import Budget, plan
from .optimizer_state import check_holds, check_holds_steps, has_session, optimizers_in
from .policies import THRESHOLD, check_one_decides, check_threshold
from .transaction import Prunable, all_or_nothing, check_averaged, delete, taken_out


@dataclass(frozen=True)
class DeletedLayer:
    """One deleted layer.

    Attributes:
        layer: Its number at the start of training, from 0.
        share: Its score, abs(tau)^p or the criterion's, over the sum of all layers that existed when it was chosen.
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
    """The result of :func:`prune`; prints as a few lines.

    Attributes:
        deleted: The deleted layers, in the order of deletion.
        kept: Positions, before the call, of the layers that stayed.
        layers_before: Number of layers before.
        layers_after: Number of layers after.
        parameters_before: Number of variables before.
        parameters_after: Number of variables after.
        optimizer: "none" (not given), "unchanged", "exact" (all state is what it was, bit by bit, without the entries
            of what was deleted) or "reset" (some of it could not follow and is made anew; the note says what).
        note: What the reader should know of the accuracy of the deletion, of state of an optimiser that was reset, or
            of an optimiser that was not given.
        scores: What the criterion measured of each layer that can go, by its number at the start of training: of "loss"
            how much larger the loss is without it than at the least of them. Empty where the time steps decided.

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
    scores: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __bool__(self) -> bool:
        """Whether anything was deleted."""
        return bool(self.deleted)

    def __str__(self) -> str:
        plural, sizes = "s" if len(self.deleted) > 1 else "", f"{self.parameters_after:,} parameters"
        layers = ", ".join(str(d.layer) for d in self.deleted)
        shares = ", ".join(f"{d.share:.2g}" for d in self.deleted)
        text = f"no layer deleted: {self.layers_after} layers, {sizes}"
        if self.deleted:
            text = (
                f"deleted layer{plural} {layers} (share{plural} {shares}): {self.layers_before} -> {self.layers_after} "
                f"layers, {self.parameters_before:,} -> {sizes}"
            )
        scores = ", ".join(f"{layer}: {score:.3g}" for layer, score in self.scores.items())
        measured = f"\nscores of the layers before: {scores}" if scores else ""
        return text + (f"; {self.note}" if self.note else "") + measured


def with_steps(model: nn.Module, act: str, done: str, method: str) -> Any:
    """The object that a change of the layers works on, which has this method; refused where there is none."""
    refuse_distributed("model", model, act)
    refuse_inference_mode(done)
    found = prunable_of(model)
    if not all(hasattr(found, name) for name in ("time_steps", "scheme", "fixed_layers", method)):
        raise TypeError(
            f"model must be a network with time steps, got {type(model).__name__}: build it with taulearn.nn or wrap "
            "it with taulearn.wrap, and hand over the network itself, not a wrapper around it"
        )
    return found


def check_prunable(model: nn.Module) -> Prunable:
    """The model as something that can be pruned, or an error that says why it cannot."""
    prunable: Prunable = with_steps(model, "prune", "pruned", "keep_layers_")
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


def changed_together(
    model: nn.Module, optimizer: Any, averaged: AveragedModel | None
) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    """The model, with its average, and the optimisers; refused, if one of them could not follow a change of layers."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile compiled
    optimizers = optimizers_in(optimizer)
    for each in optimizers:
        check_holds(each, model)
    if optimizers:
        check_holds_steps(
            optimizers,
            model,
            "hand over all that train this model, optimizer=[muon, adamw], the one that holds the time steps among "
            "them; or freeze the steps, model.time_steps.values.requires_grad_(False)",
        )
    if averaged is not None:
        check_averaged(averaged, model)
    if has_session(model):
        raise ValueError(
            "model must have no session of taulearn.attach, got one that has, whose record and policy would not "
            "follow: hand attach a Pruning or a Refinement, or call session.detach() before, and attach again"
        )
    return [model] if averaged is None else [model, averaged.module], optimizers


def prune(
    model: nn.Module,
    threshold: float | None = None,
    *,
    keep: Iterable[int] | None = None,
    budget: Budget | None = None,
    criterion: str | Criterion | Callable[[Tensor, nn.Module], Tensor] | None = None,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: AveragedModel | None = None,
) -> PruneReport:
    """Delete layers whose time step is near zero, in model, optimisers and averaged model, or in none of them.

    An optimiser goes on with the surviving parameters and their exact state: nothing is rebuilt. If anything fails,
    all is as before.

    Args:
        model: A residual or fractional network with time steps, or a wrapped model.
        threshold: Layers with a smaller share of sum abs(tau)^p are deleted, see the module's text; in (0, 1). None:
            0.01, where neither ``keep`` nor ``budget`` is given; one of the three decides.
        keep: Positions (now, from 0) of the layers to keep instead of the rule.
        budget: A number of layers to keep, or {"latency_ms": x, "example_inputs": inputs} for
            as many as a forward pass allows that takes at most x milliseconds, measured here and now in evaluation
            mode. The layers with the largest shares stay.
        criterion: What shares are taken of. By name: "share", abs(tau); "power", abs(tau)^gamma with the scheme's gamma
            (1 for the residual scheme); and on ``data``, in evaluation mode: "contribution", the mean norm of what a
            layer adds to the state; "influence", the mean of 1 - cos of the states before and after it, over tokens
            that count in the attention mask; "sensitivity", the mean over batches of abs(tau_l dJ/dtau_l), J the loss
            of a batch; "loss", how much larger the loss is without it, taken again after each deletion, for budgets
            alone. Or a function (tau, model) -> one score >= 0 per layer; or a :class:`taulearn.Criterion`. None:
            "loss" for a budget with ``data``; else "power" for the fractional scheme, "share" for all others.
        data: What the last four look at: batches, from a DataLoader or a list, or one batch; each a pair (inputs,
            targets) or a dictionary of keywords, with "labels". Some hundred samples do. The loss weighs batches by
            what they count; the others take plain means over batches, and the sensitivity depends on their size.
        loss: Maps (output, target) to a scalar, for "sensitivity" and "loss". None: the one that the model returns.
        optimizer: The optimiser of the model's parameters, or a list of all of them where there are several (Muon for
            the matrices, AdamW for the rest). State that is kept by parameter, and has its shape, follows; what cannot
            is reset, which the report says. None: there is none; one that was made before holds the old time steps
            then, and would train tau no more. ``fit`` and the next call of ``prune`` refuse it, and so does the
            projection of ``register_projection``; a hand-written loop without it does not notice.
        averaged: Averaged weights of the model, pruned alike.

    Returns:
        What was done.

    Raises:
        TypeError: If the model has no time steps, ``keep`` is no list of integers, ``data`` no batches that the model
            takes, ``optimizer`` no optimiser, or ``averaged`` no AveragedModel.
        ValueError: If the threshold lies outside (0, 1) or stands beside ``keep`` or ``budget``, the model cannot be
            pruned, ``keep`` or ``budget`` leave out a layer that must stay, ``data`` or ``loss`` are lacking, a
            threshold is to decide with the criterion "loss", all steps are equal and no criterion decides, no deletion
            meets the latency, no optimiser holds the time steps that train, or one does not hold the model's
            parameters or keeps its state where it cannot follow.

    References:
        Herberg, Herzog, Koehne (2023), section 3, adaptive pruning. Men et al. (2024), ShortGPT, arXiv 2403.03853,
        block influence.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(784, 100, 10, 6, init=[0.5, 0.2, 0.001, 0.1, 0.0, 0.2])
        >>> report = prune(network, 0.01)
        >>> [d.layer for d in report.deleted], report.parameters_before - report.parameters_after
        ([4, 2], 20202)
        >>> batches = [(torch.rand(8, 784), torch.randint(10, (8,))) for _ in range(3)]
        >>> report = prune(network, budget=2, criterion="loss", data=batches, loss=nn.functional.cross_entropy)
        >>> network.time_steps.num_steps
        2
    """
    if threshold is not None:
        check_threshold(threshold)
    check_one_decides(threshold, keep=keep, budget=budget)
    shared, prunable = together(model), check_prunable(model)
    models, optimizers = changed_together(model, optimizer, averaged)
    model = models[0]
    if criterion is None and data is not None and budget is not None:
        criterion = "loss"
    asked = as_criterion(criterion, model, data=data, loss=loss)
    if shared is not None:
        asked.mean = shared.mean
    if asked.greedy and keep is None and budget is None:
        raise ValueError(
            "budget must be given with a criterion that is taken again after each deletion, such as 'loss', got "
            f"threshold={threshold}: say how many layers stay"
        )
    measured = asked.power is None or isinstance(budget, Mapping)
    with all_or_nothing(models, optimizer) if measured else nullcontext():  # a criterion or a clock calls the model
        chosen, note, scores = _choose(prunable, model, threshold, keep, asked, budget)
    before = prunable.time_steps.values
    lost = {i: prunable.layers[i] for i, _ in chosen}
    alike = nullcontext() if shared is None else shared.changing("the layers to delete", lost, prunable.time_steps.tau)
    with all_or_nothing(models, optimizer) if chosen else nullcontext(), alike:
        number, parameters = prunable.time_steps.num_steps, number_of_variables(model)
        deleted, gone = deleted_layers(prunable, chosen), {i for i, _ in chosen}
        kept = tuple(i for i in range(number) if i not in gone)
        state, notes = "unchanged" if optimizers else "none", [note]
        if chosen:
            if WRAPPING in vars(model):
                forget_compiled()
            state, reset = delete(models, kept, optimizers)
            notes += [*_cautions(prunable, deleted, given=bool(optimizers)), *reset]
        said = "; ".join(each for each in notes if each)
        sizes = parameters, number_of_variables(model)
        report = PruneReport(deleted, kept, number, len(kept), *sizes, state, said, scores)
        if shared is None or not chosen:
            return report  # here, as after this block what breaks it off would come with all done
    shared.follow(lost.values(), prunable.time_steps.values, before)
    return report


def _choose(
    prunable: Prunable,
    model: nn.Module,
    threshold: float | None,
    keep: Iterable[int] | None,
    criterion: Criterion,
    budget: Budget | None,
) -> tuple[list[tuple[int, float]], str, dict[int, float]]:
    """Positions of what goes, with shares, what the report says of the choice, and the scores that were measured."""
    steps, fixed, note = prunable.time_steps, layers_that_stay(prunable), ""
    scores, exponent = scores_of(criterion, model)
    again = partial(scores_without, criterion, model) if criterion.greedy else None
    if budget is not None:
        if keep is not None:
            raise ValueError("budget must be None where keep is given: keep names the layers already")
        from .mark_by_budget import within_budget

        chosen, note = within_budget(budget, model, steps, exponent, scores, fixed, again)
    elif keep is None:
        chosen = plan(steps, THRESHOLD if threshold is None else threshold, power=exponent, fixed=fixed, scores=scores)
    else:
        positions = set(positions_in("keep", keep, steps.num_steps))
        all_shares = shares(steps, exponent).tolist() if scores is None else normalised(scores)
        chosen = [(i, all_shares[i]) for i in range(steps.num_steps) if i not in positions]
    gone = {i for i, _ in chosen}
    for layer in sorted(gone & fixed.keys()):
        kept = [i for i in range(steps.num_steps) if i not in gone]
        raise ValueError(f"keep must contain layer {layer}, got {kept}: {fixed[layer]}")
    if scores is None and keep is None:
        _check_decided(shares(steps, exponent).tolist(), gone, fixed)
    measured = {
        l: score for i, (l, score) in enumerate(zip(steps.origin, scores or (), strict=False)) if i not in fixed
    }
    return chosen, note, measured


def _check_decided(sizes: Sequence[float], gone: Collection[int], fixed: Collection[int]) -> None:
    """Refuse to take some of the layers where all steps are equal, and not zero, so that they say nothing."""
    free = [size for i, size in enumerate(sizes) if i not in fixed]
    if 0 < len(gone) < len(free) and 0 < max(free) <= min(free) * (1.0 + 1e-6):
        raise ValueError(
            "criterion must be given where all time steps are equal, as after taulearn.wrap, and say nothing of the "
            f'layers, got shares that are all {free[0]:.2g}: criterion="loss", "contribution" or another one with '
            "data= tells them apart, keep= names those that stay"
        )


def layers_that_stay(prunable: Prunable) -> dict[int, str]:
    """Positions of the layers that cannot be deleted now, with the reason."""
    steps = prunable.time_steps
    resting = {
        i: "it is new and rests, see Refinement(rest=..)" for i, l in enumerate(steps.origin) if l in steps.resting
    }
    return resting | prunable.fixed_layers()


def scores_without(criterion: Criterion, model: nn.Module, gone: Sequence[int]) -> list[float]:
    """The scores of the layers that are left when others, by their positions, are taken out."""
    with taken_out(model, gone):
        found = scores_of(criterion, model)[0]
    assert found is not None
    return found


def deleted_layers(prunable: Prunable, chosen: Iterable[tuple[int, float]]) -> tuple[DeletedLayer, ...]:
    """The layers at these positions, with their shares, as the report names them."""
    steps, layers = prunable.time_steps, prunable.layers
    factors = prunable.scheme.factor(steps.tau.detach().double()).tolist()
    own = int(isinstance(steps.values, nn.Parameter)) + prunable.scheme.per_layer
    return tuple(
        DeletedLayer(steps.origin[i], share, factors[i], own + number_of_variables(layers[i])) for i, share in chosen
    )


def _cautions(prunable: Prunable, deleted: Iterable[DeletedLayer], *, given: bool) -> Iterator[str]:
    """Notes for the report: accuracy, and an optimiser that was not given."""
    if (power := prunable.scheme.step_power) != 1.0:
        size = sum(d.factor for d in deleted)
        power = min(power) if isinstance(power, tuple) else power
        yield f"error of the order tau^{power:g}, here {size:.2g} times the size of the deleted layers' values"
    if not given and prunable.time_steps.values.grad is not None:
        yield "an optimiser made before this no longer trains tau: hand it over (optimizer=...) or make a new one"


def positions_in(argument: str, given: Iterable[int], number: int) -> list[int]:
    """Positions among so many layers, in order."""
    try:
        if isinstance(given, str | bytes):
            raise TypeError
        given = list(given)
        if any(isinstance(each, bool) or getattr(each, "dtype", None) is torch.bool for each in given):
            raise TypeError  # a mask
        found = sorted(map(operator.index, given))
    except TypeError:
        raise TypeError(f"{argument} must be a list of layer numbers, such as [0, 2], got {given!r:.200}") from None
    if not found or found[0] < 0 or found[-1] >= number:
        some = "" if found else "at least one of the "
        raise ValueError(f"{argument} must name {some}layers in 0 .. {number - 1}, got {found}")
    return found


def forget_compiled() -> None:
    """Compile all anew on its next call, as torch.compile gives up on a function after eight versions of it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def number_of_variables(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(p.numel() for p in module.parameters())
