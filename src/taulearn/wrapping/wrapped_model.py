"""The time steps of an existing model, as pruning sees them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..nn.pruned_models import WRAPPING, Follower, set_follower
from ..nn.time_steps import TimeSteps
from . import remove_blocks as structure
from .block import Step
from .state_argument import Form

if TYPE_CHECKING:
    from ..nn.schemes import Scheme
    from .displacement import DisplacementUnits


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """The example inputs of a wrapped model, and no part of it: copies of the model share them, pickles lack them."""

    value: Any = None  # the inputs, on the CPU and without gradients; None: there are none

    @classmethod
    def of(cls, value: Any) -> "ExampleInputs":
        """The inputs, out of the graph and off the accelerator."""
        return cls(tree_map(lambda each: each.detach().cpu() if isinstance(each, Tensor) else each, value))

    def __deepcopy__(self, _memo: dict[int, Any]) -> "ExampleInputs":
        return self

    def __reduce__(self) -> tuple[type["ExampleInputs"], tuple[()]]:
        return type(self), ()


@dataclass(frozen=True, eq=False)
class Wrapping:
    """The wrapping of a model: its steps and blocks. It is never changed: a deletion puts another in place.

    Attributes:
        host: The model.
        time_steps: Its steps.
        layers: The blocks that exist now, in the order of their calls.
        names: Names of all blocks when the model was wrapped.
        forms: Where each block's state is.
        shorten: Names of the lists that get shorter when a block of theirs is deleted.
        keep: Numbers (at the start) of blocks that cannot be deleted, with the reason.
        trained: The parameters whose ``requires_grad`` was changed, with what it was.
        units: Units of displacement of the steps, or None.
        inputs: Example inputs, on which save_pretrained compares a pruned model with what is loaded.
        not_saved: Numbers (at the start) of blocks without which save_pretrained is refused, with the reason.
    """

    host: nn.Module
    time_steps: TimeSteps
    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    forms: tuple[Form, ...]
    shorten: frozenset[str]
    keep: dict[int, str]
    trained: dict[nn.Parameter, bool]
    units: "DisplacementUnits | None" = None
    inputs: ExampleInputs = field(default_factory=ExampleInputs)
    not_saved: dict[int, str] = field(default_factory=dict)

    @property
    def scheme(self) -> "Scheme":
        """Blocks are steps of the residual scheme."""
        from ..nn.schemes import Residual

        return Residual()

    def states(self) -> tuple[tuple[str | int | None, str | int | None], ...]:
        """Where the states of all blocks at the start are: argument and entry of the output; None of deleted ones."""
        known = dict(zip(self.time_steps.origin, self.forms, strict=True))
        forms = [known.get(l, Form()) for l in range(len(self.names))]
        return tuple((form.argument, form.key) for form in forms)

    def fixed_layers(self) -> dict[int, str]:
        """Positions that must stay, with the reason."""
        origin = self.time_steps.origin
        reasons = {l: self.keep[origin[l]] for l in range(len(origin)) if origin[l] in self.keep}
        for layer, reason in self.time_steps.rule.fixed(len(origin)).items():
            reasons.setdefault(layer, reason)
        return reasons

    @torch.no_grad()
    def plain_steps(self) -> Tensor:
        """The steps without units, (number of blocks,): what multiplies B(x) - x now."""
        tau = self.time_steps.tau
        return tau if self.units is None else tau * self.units.gains()

    @torch.no_grad()
    def keep_layers_(self, indices: Sequence[int]) -> None:
        """Delete all blocks but those at ``indices``.

        Args:
            indices: Current positions, in increasing order.

        Raises:
            ValueError: If a block that must stay is left out.
        """
        kept, origin = list(indices), self.time_steps.origin
        for layer, reason in self.fixed_layers().items():
            if layer not in kept:
                raise ValueError(
                    f"indices must contain block {self.names[origin[layer]]!r}, got positions {kept}: {reason}"
                )
        gone = {self.layers[i]: self.forms[i] for i in range(len(self.layers)) if i not in set(kept)}
        self.time_steps.keep_(kept)
        if self.units is not None:
            self.units.keep_(kept)
        shortened = structure.remove(self.host, gone, self.shorten)
        if is_configured(self.host):
            from .configurations import follow_deletion

            follow_deletion(self.host, shortened)
        after = replace(self, layers=tuple(self.layers[i] for i in kept), forms=tuple(self.forms[i] for i in kept))
        for position, block in enumerate(after.layers):
            vars(block)["forward"] = replace(vars(block)["forward"], index=position)
        vars(self.host)[WRAPPING] = after


def is_configured(host: nn.Module) -> bool:
    """Whether a module has a configuration, as those of transformers do; :mod:`.configurations` is loaded for them."""
    return any("config" in vars(module) for module in host.modules())


def install(wrapping: Wrapping) -> None:
    """Put steps and blocks' forwards in place."""
    host = wrapping.host
    host.add_module("time_steps", wrapping.time_steps)
    if wrapping.units is not None:
        wrapping.time_steps.add_module("units", wrapping.units)
    for l, block in enumerate(wrapping.layers):
        own = "forward" in vars(block)
        vars(block)["forward"] = Step(
            block.forward, wrapping.time_steps, l, wrapping.names[l], wrapping.forms[l], own, wrapping.units
        )
    vars(host)[WRAPPING] = wrapping
    set_follower(host, Follower())


def take_states(wrapping: Wrapping, states: Sequence[tuple[str | int | None, str | int | None]]) -> None:
    """Let states be where a saved model had them, see :meth:`Wrapping.states`."""
    forms = list(wrapping.forms)
    for l, (number, block) in enumerate(zip(wrapping.time_steps.origin, wrapping.layers, strict=True)):
        if number < len(states) and states[number] != (None, None):
            step, (argument, key) = vars(block)["forward"], states[number]
            taken = Form.taking(argument, step.inner)
            forms[l] = replace(forms[l], argument=taken.argument, position=taken.position, key=key)
            vars(block)["forward"] = replace(step, form=forms[l])
    vars(wrapping.host)[WRAPPING] = replace(wrapping, forms=tuple(forms))


@torch.no_grad()
def drop_units(wrapping: Wrapping) -> None:
    """Let the steps be plain ones from now on; their values stay."""
    for block in wrapping.layers:
        vars(block)["forward"] = replace(vars(block)["forward"], units=None)
    del wrapping.time_steps.units
    vars(wrapping.host)[WRAPPING] = replace(wrapping, units=None)


def uninstall(wrapping: Wrapping) -> None:
    """Undo :func:`install`; deleted blocks stay deleted."""
    host = wrapping.host
    set_follower(host, None)
    for block in wrapping.layers:
        step = vars(block).pop("forward")
        if step.own:
            vars(block)["forward"] = step.inner
    for parameter, flag in wrapping.trained.items():
        parameter.requires_grad_(flag)
    del host.time_steps
    del vars(host)[WRAPPING]
