"""The transaction: layers come to models and optimisers, or go from them, together, or everything stays as it was."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .._undisturbed import Contents
from ..nn.pruned_models import REPLACED, prunable_of, retire
from ..nn.schemes import Scheme
from ..nn.skips import Skips
from ..nn.time_steps import TimeSteps
from .optimizer_state import Change, follow, gathered, optimizers_in, with_inner


class Prunable(Protocol):
    """The attributes and methods of a model that can be pruned."""

    time_steps: TimeSteps
    scheme: Scheme

    @property
    def layers(self) -> nn.ModuleList | tuple[nn.Module, ...]:
        """Those that are left, in their order."""

    def fixed_layers(self) -> dict[int, str]:
        """Positions that must stay, with the reason."""

    def keep_layers_(self, indices: Sequence[int]) -> None:
        """Delete all other layers."""


def check_averaged(averaged: AveragedModel, model: nn.Module) -> None:
    """Refuse what is no average of this model."""
    if not isinstance(averaged, AveragedModel):
        given = f"the class {averaged.__name__}" if isinstance(averaged, type) else f"a {type(averaged).__name__}"
        raise TypeError(
            f"averaged must be torch's AveragedModel of the model, got {given}: "
            "write torch.optim.swa_utils.AveragedModel(model)"
        )
    shapes, theirs = ([tuple(p.shape) for p in each.parameters()] for each in (model, averaged.module))
    if shapes != theirs:
        raise ValueError(
            "averaged must average this model, got one whose parameters have other shapes: make it from this model, "
            "and hand it to every call of prune and refine"
        )


class Snapshot:
    """Modules and optimisers as they are now, to be put back; a deletion changes no tensor, so references suffice."""

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[Any] = ()) -> None:
        self._models, self._differentiating = models, torch.is_grad_enabled()
        parts = [module for model in models for module in model.modules()]
        # what steps, schemes and skips keep in plain objects, a constraint's own state among it
        ours = [each for each in parts if isinstance(each, TimeSteps | Scheme | Skips)]
        own = [vars(each) for part in ours for each in vars(part).values() if _is_plain(each)]
        kept = [[vars(each), each.param_groups, getattr(each, "state", {})] for each in with_inner(optimizers)]
        self._contents = Contents([*parts, *own, *kept])

    def restore(self) -> None:
        """Put everything back, into the objects that held it."""
        self._contents.put_back()
        for model in self._models:
            for parameter in model.parameters():
                vars(parameter).pop(REPLACED, None)
        torch.set_grad_enabled(self._differentiating)


def _is_plain(value: object) -> bool:
    """Whether this is an object of some class that holds attributes, and no tensor, module, class or function."""
    other = isinstance(value, torch.Tensor | nn.Module | type) or callable(value)
    return hasattr(value, "__dict__") and not other


@contextmanager
def all_or_nothing(models: Sequence[nn.Module], optimizer: Any = None) -> Iterator[None]:
    """Put modules and optimisers, none, one or several, back when the body fails; it changes no tensor."""
    before = Snapshot(models, optimizers_in(optimizer))
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def taken_out(model: nn.Module, layers: Collection[int]) -> Iterator[None]:
    """The model without some layers, by their positions, which come back afterwards."""
    prunable, before = prunable_of(model), Snapshot([model])
    try:
        if layers:
            prunable.keep_layers_([i for i in range(prunable.time_steps.num_steps) if i not in layers])
        yield
    finally:
        before.restore()


def delete(models: Sequence[nn.Module], kept: Sequence[int], optimizers: Sequence[Any]) -> tuple[str, list[str]]:
    """Delete the layers and let the optimisers follow; returns a word for their state, and what of it was reset."""
    entries = prunable_of(models[0]).time_steps.rule.entries(kept)
    return change(models, lambda _, prunable: prunable.keep_layers_(kept), entries, optimizers)


def change(
    models: Sequence[nn.Module],
    act: Callable[[nn.Module, Any], None],
    entries: Sequence[int],
    optimizers: Sequence[Any],
    kin: Mapping[Any, Any] | None = None,
    inherit: bool = False,
) -> tuple[str, list[str]]:
    """Change the grid of a model and its averages, and let the optimisers follow; returns as :func:`delete`.

    ``entries`` has for each value of the steps then the position now; ``kin`` the new parameters, each with the one
    whose groups it joins, and whose state if they ``inherit``.
    """
    model = models[0]
    steps = prunable_of(model).time_steps
    old, before = steps.values, {p: name for name, p in model.named_parameters()}
    for each in models:
        act(each, prunable_of(each))
    new = steps.values
    index = torch.tensor(entries, dtype=torch.long, device=old.device)
    if old.grad is not None:
        new.grad = gathered(old.grad, index)
    if new is not old:
        retire(old)
    after = {p: name for name, p in model.named_parameters()}
    joining = {q: p for q, p in (kin or {}).items() if q in after}
    reset = follow(optimizers, Change(old, new, index, before, after, joining, inherit))
    return ("reset" if reset else "exact") if optimizers else "none", reset
