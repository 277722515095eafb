"""Refinement of the time grid, the mirror of pruning: layers become two, or new ones come in with a step of 0.

    split     layer l becomes two with the same parameters and steps theta tau_l and (1 - theta) tau_l: the same
              differential equation on a finer grid; a residual y changes by theta (1 - theta) tau_l^2 f_l' f_l + ..
    insert    a new layer with step 0 behind layer l: nothing changes; dJ/dtau_new = <psi, f_new(y)>, psi the adjoint

Indicators say where (indicators.py), a rule marks (mark.py), the transaction carries it out (transaction.py).

References:
    Kreis, Herberg, Koehne, Schiela, Herzog (2023), SensLI, arXiv 2311.15995, insertion. Hintermüller, Hinze, Korolev
    (2026), arXiv 2601.07397, dual weighted residuals. Kim et al. (2023), SOLAR, arXiv 2312.15166, and Wu et al. (2024),
    LLaMA Pro, arXiv 2401.02415, the same with pretrained models.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._distributed import together
from .._errors import unknown_name
from ..nn import finer_steps
from ..nn.grid import Grid, copied, regrow, twice
from ..nn.pruned_models import WRAPPING, prunable_of
from .coarsen import changed_together, forget_compiled, number_of_variables, positions_in, prune, with_steps
from .indicators import Indicator, NewLayer as LayerMaker, indicators, made_by
from .mark_to_refine import bulk as smallest_set, largest
from .optimizer_state import optimizers_in, parameters_held
from .transaction import Prunable, all_or_nothing, change


class Refinable(Prunable, Protocol):
    """The attributes and methods of a model that can be refined, too."""

    def not_split(self) -> dict[int, str]:
        """Positions of layers that cannot be split whatever their steps, each with the reason."""

    def not_inserted(self, *, copied: bool) -> dict[int, str]:
        """Positions behind which no layer can be inserted, or none that is a copy, each with the reason."""

    def copied_behind(self, layer: int) -> int | None:
        """Position of the layer a copy of which fits behind one; None: no copy fits."""

    def copy_of(self, layer: int) -> nn.Module:
        """A layer once more."""

    def grow_layers_(
        self, sources: Sequence[int], made: Mapping[int, nn.Module], values: Tensor
    ) -> dict[Any, Any] | None:
        """Take layers in between; new parameters of a scheme are answered, with their parents."""


@dataclass(frozen=True)
class NewLayer:
    """One new layer.

    Attributes:
        layer: Its number.
        parent: Number of the layer that it is the second half of, a copy of, or was made behind.
        indicator: What the indicator said of the place, with its sign, NaN where none was asked.
        parameters: Number of variables that came with it.
    """

    layer: int
    parent: int
    indicator: float
    parameters: int


@dataclass(frozen=True)
class RefineReport:
    """The result of :func:`refine`; prints as a few lines.

    Attributes:
        by: "split" or "insert".
        new: The new layers, in their order.
        layers_before: Number of layers before.
        layers_after: Number of layers after.
        parameters_before: Number of variables before.
        parameters_after: Number of variables after.
        optimizer: "none" (not given), "exact" (all state is what it was; both halves of a split have it) or "reset"
            (some of it could not follow and is made anew; the note says what).
        note: What the reader should know of the accuracy, or of the optimiser.

    Example:
        >>> from taulearn.nn import resnet
        >>> print(refine(resnet(2, 3, 1, 4), [1, 3]))
        split layers 1, 3 (new: 4, 5): 4 -> 6 layers, 52 -> 78 parameters
    """

    by: str
    new: tuple[NewLayer, ...]
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    optimizer: str
    note: str = ""

    def __str__(self) -> str:
        plural, act = "s" if len(self.new) > 1 else "", "split" if self.by == "split" else "inserted a copy of"
        parents, numbers = (", ".join(str(getattr(each, name)) for each in self.new) for name in ("parent", "layer"))
        text = (
            f"{act} layer{plural} {parents} (new: {numbers}): {self.layers_before} -> {self.layers_after} layers, "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        )
        return text + (f"; {self.note}" if self.note else "")


def refine(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    *,
    by: str = "split",
    indicator: Indicator | None = None,
    number: int | None = None,
    bulk: float | None = None,
    theta: float = 0.5,
    layer: LayerMaker | None = None,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: AveragedModel | None = None,
    train: str | None = None,
) -> RefineReport:
    """Make the time grid finer, in model, optimisers and averaged model, or in none of them.

    New layers get numbers that were never used (``model.time_steps.origin``, ``.parent``); batch normalisation's
    buffers are copied. An optimiser goes on with the exact state of what was there; parameters of new layers join the
    groups of those that they are copies of. If anything fails, all is as before.

    Args:
        model: A residual or fractional network with time steps, or a wrapped model.
        layers: Positions (now, from 0) of the layers to split, or behind which to insert. One of ``layers``,
            ``number`` and ``bulk`` decides.
        by: "split": each becomes two with the same parameters and a share of its step. "insert": behind each comes a
            new layer with step 0, or with the lower bound of the steps where there is one.
        indicator: Where the grid is too coarse, where its absolute value is large: "dual-weighted", what a split would
            change the loss by; "sensitivity", the derivative with respect to the step of a layer not there yet; or a
            function, see :mod:`taulearn.adaptivity.indicators`. None: the first for splits, the second for insertions.
        number: How many layers to refine, those with the largest indicators.
        bulk: The smallest set whose indicators sum to at least this share of the total, in (0, 1].
        theta: Share of the first half of a split, in (0, 1).
        layer: What an inserted layer is, a function of a copy of the layer behind which it comes, or of the next one
            where that one changes the width and the next does not. None: this copy. It must keep the shape of its
            input: looked at where a named indicator sees data, or a wrapped model has example inputs, and not before
            the next forward pass where ``layers`` name the places in a network.
        data: What a named indicator looks at, see :func:`taulearn.prune`.
        loss: Maps (output, target) to a scalar. None: the one that the model returns.
        optimizer: The optimiser of the model's parameters, or a list of all of them, see :func:`taulearn.prune`.
        averaged: Averaged weights of the model, refined alike.
        train: "new": from now on only the new layers and their steps train (a proximal step or weight decay moves all
            steps); a run that is resumed goes on so, while a model of ``load_model`` trains as a whole. None: what
            trains trains on.

    Returns:
        What was done.

    Raises:
        TypeError: If the model has no time steps, or an argument is of another kind.
        ValueError: If an argument lies outside its range, not one of ``layers``, ``number`` and ``bulk`` is given, the
            scheme, a layer or the constraint does not allow it, fewer layers can be refined than asked for, ``data`` is
            lacking, or an optimiser cannot follow.

    References:
        See the module's text.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 3, init=[0.5, 0.25, 0.25])
        >>> report = refine(network, [1], by="insert")
        >>> network.time_steps.tau.tolist(), network.time_steps.origin
        ([0.5, 0.25, 0.0, 0.25], (0, 1, 3, 2))
    """
    check_way(by, theta, layer)
    if train not in (None, "new"):
        raise ValueError(f"train must be None or 'new', got {train!r}: 'new' trains the new layers alone")
    refinable = check_refinable(model)
    models, optimizers = changed_together(model, optimizer, averaged)
    with all_or_nothing(models, optimizer):
        chosen = _choose(refinable, models[0], layers, by, indicator, number, bulk, theta, layer, data, loss)
        return carry_out(models, optimizers, chosen, by=by, theta=theta, layer=layer, train=train)


def take_grid(model: nn.Module, grid: Grid, *, optimizer: Any = None, averaged: AveragedModel | None = None) -> None:
    """Let a model built anew have the layers of another one, whose content is to be loaded; optimisers follow.

    Raises:
        ValueError: If it lacks layers, or they cannot be deleted or copied.
    """
    kept, _, copies = grid.made_from(prunable_of(model).time_steps.origin)
    if len(kept) < prunable_of(model).time_steps.num_steps:
        prune(model, keep=kept, optimizer=optimizer, averaged=averaged)
    if copies:
        check_refinable(model)
    models = [model] if averaged is None else [model, averaged.module]
    with all_or_nothing(models, optimizer):
        steps, kin = prunable_of(model).time_steps, dict[Any, Any]()
        _, sources, copies = grid.made_from(steps.origin)
        entries = steps.rule.entries([-1 if i in copies else l for i, l in enumerate(sources)])
        change(models, lambda _, each: kin.update(regrow(each, grid)), entries, optimizers_in(optimizer), kin)


def check_way(by: str, theta: float, layer: Any) -> None:
    """Refuse ways of refining that are unknown or contradict themselves."""
    finer_steps.check_theta(theta)
    if by not in ("split", "insert"):
        raise unknown_name("by", by, ("split", "insert"))
    if by == "insert" and theta != 0.5:
        raise ValueError(f"theta must be left out with by='insert', got {theta!r}: a new layer has the step 0")
    if layer is not None and by == "split":
        raise ValueError("layer must be None with by='split', whose halves are copies: take by='insert'")
    if layer is not None and (not callable(layer) or isinstance(layer, nn.Module)):
        raise TypeError(
            f"layer must be a function that makes a new layer from its neighbour, got {type(layer).__name__}: write "
            "layer=lambda neighbour: ..."
        )


def check_refinable(model: nn.Module) -> Refinable:
    """The model as something that can be refined, or an error that says why it cannot."""
    refinable: Refinable = with_steps(model, "refine", "refined", "grow_layers_")
    if not refinable.scheme.deletes_exactly:
        raise ValueError(
            f"model has the {refinable.scheme.name} scheme, whose layers are no steps of a differential equation: two "
            "halves would be another model, and a step of 0 is not the identity; use a residual or fractional network"
        )
    return refinable


def closed_layers(refinable: Refinable, by: str, theta: float, layer: Any) -> dict[int, str]:
    """Positions that cannot be refined, with the reason."""
    steps = refinable.time_steps
    if by == "split":
        return finer_steps.not_split(steps, theta) | refinable.not_split()
    return refinable.not_inserted(copied=layer is None) | steps.rule.not_inserted(steps.num_steps)


def _choose(
    refinable: Refinable,
    model: nn.Module,
    layers: Iterable[int] | None,
    by: str,
    indicator: Indicator | None,
    number: int | None,
    bulk: float | None,
    theta: float,
    layer: Any,
    data: Any,
    loss: Any,
) -> dict[int, float]:
    """Positions of the layers that are refined, in order, with their indicators."""
    given = [name for name, value in {"layers": layers, "number": number, "bulk": bulk}.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"one of layers, number and bulk must be given, got {' and '.join(given) or 'none of them'}")
    closed = closed_layers(refinable, by, theta, layer)
    if layers is not None:
        for name, value in {"indicator": indicator, "data": data, "loss": loss}.items():
            if value is not None:
                raise ValueError(f"{name} must be None where layers is given, which names them already")
        positions = positions_in("layers", layers, refinable.time_steps.num_steps)
        if len(set(positions)) < len(positions):
            raise ValueError(f"layers must name each layer once, got {positions}: refine again for more")
        for l in positions:
            if l in closed:
                raise ValueError(f"layers must not contain {l} with by={by!r}, got {positions}: {closed[l]}")
        return dict.fromkeys(positions, float("nan"))
    if indicator is None:
        indicator = "dual-weighted" if by == "split" else "sensitivity"
    eta = indicators(model, indicator, data, loss, theta=theta, layer=layer).detach().double().cpu()
    eta[list(closed)] = float("nan")
    marked = largest(eta, number, closed) if number is not None else smallest_set(eta, cast(float, bulk), closed)
    return {l: float(eta[l]) for l in marked}


def carry_out(
    models: Sequence[nn.Module],
    optimizers: Sequence[Any],
    chosen: Mapping[int, float],
    *,
    by: str,
    theta: float,
    layer: LayerMaker | None,
    train: str | None = None,
) -> RefineReport:
    """Make new layers, and let a model, its averages and its optimisers take them in.

    Args:
        models: The model, and its averages.
        optimizers: All of them.
        chosen: Positions that can be refined, in order, with their indicators.
        by: As for :func:`refine`.
        theta: As for :func:`refine`.
        layer: As for :func:`refine`; asked once a place.
        train: As for :func:`refine`.
    """
    model, refinable = models[0], cast(Refinable, prunable_of(models[0]))
    steps, parameters, layers_before = refinable.time_steps, number_of_variables(model), refinable.time_steps.num_steps
    sources, new_ones = twice(layers_before, chosen)
    like = dict(zip(new_ones, chosen, strict=True))  # the positions then of new layers, and those now of their parents
    if by == "insert":
        like = {i: l if (fitting := refinable.copied_behind(l)) is None else fitting for i, l in like.items()}
        sources = [like.get(i, l) for i, l in enumerate(sources)]
    if layer is None:
        made = [{i: prunable_of(each).copy_of(l) for i, l in like.items()} for each in models]
    else:
        made = [{}] * len(models)
        made[0] = {i: _made(layer, refinable.copy_of(l), model) for i, l in like.items()}
        made[1:] = [{i: copied(new) for i, new in made[0].items()} for _ in models[1:]]
    pairs = [(f"layer {steps.origin[l]}", refinable.layers[l], made[0][i]) for i, l in like.items()]
    kin = {q: p for pair in pairs for q, p in _kin(*pair, needed=bool(optimizers))}
    grids = [prunable_of(each).time_steps for each in models]
    values = [
        finer_steps.split(each, [*chosen], theta) if by == "split" else finer_steps.insert(each, [*chosen])
        for each in grids
    ]
    shared, before = together(model), steps.values
    if WRAPPING in vars(model):
        forget_compiled()
    grown = dict(zip(models, zip(made, values, strict=True), strict=True))
    # a half takes the state of the steps, too; where new layers train alone, nothing is left that moves other steps
    old = [-1 if train == "new" or (i in like and by == "insert") else l for i, l in enumerate(sources)]

    def grow(each: nn.Module, grows: Any) -> None:
        scheme = grows.grow_layers_(sources, *grown[each])
        if scheme and each is model:
            kin.update(scheme)

    alike = nullcontext()
    if shared is not None:
        alike = shared.changing("the layers to refine", dict.fromkeys(chosen), steps.tau)
    with alike:
        state, reset = change(
            models,
            grow,
            steps.rule.entries(old),
            optimizers,
            kin,
            inherit=by == "split",
        )
    own = int(isinstance(steps.values, nn.Parameter)) + refinable.scheme.per_layer
    new = tuple(
        NewLayer(steps.origin[i], steps.parent[steps.origin[i]], eta, own + number_of_variables(made[0][i]))
        for i, eta in zip(like, chosen.values(), strict=True)
    )
    notes = [*_cautions(refinable, by, len(new)), *reset]
    held = {id(p) for p in parameters_held(optimizers)}
    if optimizers and any(id(q) not in held and (q.requires_grad or train == "new") for q in kin):
        notes.append("no optimiser holds all of the new parameters: add them, or make a new one")
    report = RefineReport(
        by, new, layers_before, steps.num_steps, parameters, number_of_variables(model), state, "; ".join(notes)
    )
    if train == "new":  # last, as flags are not put back
        for p in model.parameters():
            p.requires_grad_(p in kin or p is steps.values)
            p.grad = p.grad if p.requires_grad else None  # optimisers move what has a gradient
        steps.held = frozenset(steps.origin) - {each.layer for each in new}
    if shared is not None:  # knowing what trains
        shared.follow((), steps.values, before)
    return report


def _made(layer: LayerMaker, neighbour: nn.Module, model: nn.Module) -> nn.Module:
    """What the user's function makes of a layer, in the model's mode."""
    made = made_by(layer, neighbour)
    theirs = {id(each) for each in (*model.modules(), *model.parameters())}
    if any(id(each) in theirs for each in (*made.modules(), *made.parameters())):
        raise ValueError("layer must return a module that shares nothing with the model: copy.deepcopy(neighbour)")
    return made if model.training else made.eval()


def _kin(
    name: str, neighbour: nn.Module, made: nn.Module, *, needed: bool
) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
    """The parameters of a new layer, each with one of its neighbour's in whose groups it belongs: the one of its name.

    Optimisers that go by the number of dimensions (Muon) must get none of another one.
    """
    theirs = dict(neighbour.named_parameters())
    for key, q in made.named_parameters():
        alike = [p for p in theirs.values() if p.ndim == q.ndim]
        found = theirs[key] if key in theirs and theirs[key].ndim == q.ndim else alike[0] if alike else None
        if found is None and needed:
            raise ValueError(
                f"layer must have parameters like those of {name}, got {key!r} with {q.ndim} dimensions, for which "
                "there is no group: refine with optimizer=None and make a new one"
            )
        yield q, found


def _cautions(refinable: Refinable, by: str, number: int) -> Iterator[str]:
    """Notes for the report on the accuracy."""
    steps, power = refinable.time_steps, refinable.scheme.step_power
    if by == "insert" and steps.lower_bound:
        size = float(refinable.scheme.factor(torch.full_like(steps.tau, steps.lower_bound).double()).max())
        also = ", and the other steps gave way" if steps.rule.adds_up else ""
        yield f"steps at the lower bound: {number} x {size:.2g} times a layer's values came to the state{also}"
    elif by == "split" and power != 1.0:
        yield "the memory has the weights of the finer grid: error of the order of the L1 scheme's"
