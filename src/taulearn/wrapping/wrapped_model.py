"""The time steps of an existing model, as pruning sees them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..nn.pruned_models import WRAPPING, Follower, set_follower
from ..nn.time_steps import TimeSteps
from . import remove_blocks as structure
from .block import Step
from .branches import Branch, BranchStep, Run, WatchedBlock
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
class BlockAtStart:
    """A block when the model was wrapped; it knows no modules, as it may have been deleted since."""

    name: str  # in the host
    form: Form  # where its state is
    branches: tuple[Branch, ...] = ()  # none with form "whole"
    stays: bool = False  # whether its place cannot be taken out, though all of its branches are


@dataclass(frozen=True, eq=False)
class Layer:
    """Something with a step that exists now: a block, or with ``per="branch"`` one branch of a block.

    With x and y what ``form`` takes from arguments and output of a call of ``module``, a block adds y - x to the state,
    and a branch y = tau g.
    """

    module: nn.Module  # the block, or the site of the branch
    block: nn.Module  # the same, or the block that holds it
    at_start: BlockAtStart
    sites: dict[int, nn.Module]  # whose outputs its step multiplies, by place among the block's branches
    keep: str = ""  # why it cannot be deleted, or nothing

    def branches(self) -> list[tuple[Branch, nn.Module]]:
        """The branches that its step multiplies, with their sites."""
        return [(self.at_start.branches[place], site) for place, site in self.sites.items()]

    @property
    def branch(self) -> Branch | None:
        """The branch that it is, or None where it is a block."""
        return None if self.module is self.block else self.branches()[0][0]

    @property
    def name(self) -> str:
        """The name of the module in the host when it was wrapped."""
        return self.at_start.name if self.branch is None else f"{self.at_start.name}.{self.branch.site}"

    @property
    def form(self) -> Form:
        """Where its state is; of a branch, its increment."""
        return (self.branch or self.at_start).form


@dataclass(frozen=True, eq=False)
class Wrapping:
    """The wrapping of a model: its steps and blocks. It is never changed: a change of the grid puts another in place.

    Attributes:
        host: The model.
        time_steps: Its steps.
        blocks: All blocks when the model was wrapped.
        present: The layers that exist now, one a step, in the order of the calls.
        per: What has a step of its own, "block" or "branch".
        shorten: Names of the lists that get shorter when a block of theirs is deleted.
        trained: The parameters whose ``requires_grad`` was changed, with what it was.
        units: Units of displacement of the steps, or None.
        inputs: Example inputs, on which save_pretrained compares a pruned model with what is loaded.
        not_saved: Numbers (at the start) of blocks without which save_pretrained is refused, with the reason.
        why: Why the form is what it is.
    """

    host: nn.Module
    time_steps: TimeSteps
    blocks: tuple[BlockAtStart, ...]
    present: tuple[Layer, ...]
    per: str = "block"
    shorten: frozenset[str] = frozenset()
    trained: dict[nn.Parameter, bool] = field(default_factory=dict)
    units: "DisplacementUnits | None" = None
    inputs: ExampleInputs = field(default_factory=ExampleInputs)
    not_saved: dict[int, str] = field(default_factory=dict)
    why: str = ""

    @property
    def form(self) -> str:
        """How a step enters a block, "branches" or "whole"."""
        return "branches" if any(block.branches for block in self.blocks) else "whole"

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The modules of the layers that exist now."""
        return tuple(layer.module for layer in self.present)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers when the model was wrapped."""
        if self.per == "block":
            return tuple(block.name for block in self.blocks)
        return tuple(f"{block.name}.{branch.site}" for block in self.blocks for branch in block.branches)

    @property
    def scheme(self) -> "Scheme":
        """Blocks are steps of the residual scheme."""
        from ..nn.schemes import Residual

        return Residual()

    def fixed_layers(self) -> dict[int, str]:
        """Positions that must stay, with the reason."""
        own = {l: layer.keep for l, layer in enumerate(self.present) if layer.keep}
        return self.time_steps.rule.fixed(len(self.present)) | own

    @torch.no_grad()
    def keep_layers_(self, indices: Sequence[int]) -> None:
        """Delete all blocks but those at ``indices``.

        Args:
            indices: Current positions, in increasing order.

        Raises:
            ValueError: If a block that must stay is left out.
        """
        kept = list(indices)
        for l, reason in self.fixed_layers().items():
            if l not in kept:
                name = self.present[l].name
                raise ValueError(f"indices must contain block {name!r}, got positions {kept}: {reason}")
        self.time_steps.keep_(kept)
        left = tuple(self.present[l] for l in kept)
        lost = [layer for l, layer in enumerate(self.present) if l not in set(kept)]
        needed = {layer.block for layer in left} | {layer.block for layer in lost if layer.at_start.stays}
        gone = {layer.block: layer.at_start.form for layer in lost if layer.block not in needed}
        if self.units is not None:
            self.units.keep_(kept)
        if self.per == "branch":
            from .single_branches import take_branches_out

            take_branches_out(self.host, [layer for layer in lost if layer.block not in gone])
        shortened = structure.remove(self.host, gone, self.shorten)
        if is_configured(self.host):
            from .configurations import follow_lists, number_caches

            follow_lists(self.host, shortened)
            if self.per == "branch":
                number_caches(self.host, {branch.site for block in self.blocks for branch in block.branches})
        if self.form == "whole":
            for position, layer in enumerate(left):
                vars(layer.module)["forward"] = replace(vars(layer.module)["forward"], index=position)
        else:
            for block, positions in _positions(left).items():
                vars(block)["forward"] = replace(vars(block)["forward"], indices=positions)
        vars(self.host)[WRAPPING] = replace(self, present=left)

    def not_split(self) -> dict[int, str]:
        """Positions of blocks that cannot be split, each with the reason."""
        return self.not_inserted(copied=True)

    def not_inserted(self, *, copied: bool) -> dict[int, str]:
        """Positions behind which no block can be inserted, each with the reason."""
        from .add_blocks import why_not_copied

        reasons = {l: why_not_copied(self, l) for l in range(len(self.present))}
        return {l: reason for l, reason in reasons.items() if reason}

    def copied_behind(self, layer: int) -> int:
        """Position of the block a copy of which fits behind one: the same."""
        return layer

    def copy_of(self, layer: int) -> nn.Module:
        """A block once more, without its step."""
        from .add_blocks import copy_of

        return copy_of(self, layer)

    @torch.no_grad()
    def grow_layers_(self, sources: Sequence[int], made: Mapping[int, nn.Module], values: Tensor) -> None:
        """Take blocks in between, as :meth:`taulearn.nn.TimeVariableNetwork.grow_layers_`."""
        from .add_blocks import grow

        grow(self, sources, made, values)

    def has_other_blocks(self) -> bool:
        """Whether blocks were deleted, or branches, or new ones came."""
        return self.time_steps.origin != tuple(range(len(self.names)))


def is_configured(host: nn.Module) -> bool:
    """Whether a module has a configuration, as those of transformers do; :mod:`.configurations` is loaded for them."""
    return any("config" in vars(module) for module in host.modules())


def has_save_pretrained(model: nn.Module) -> bool:
    """Whether a part of the model has the method, which is guarded while there are steps other than 1."""
    return any(hasattr(type(module), "save_pretrained") for module in model.modules())


def install(wrapping: Wrapping) -> None:
    """Put steps and blocks' forwards in place."""
    host = wrapping.host
    host.add_module("time_steps", wrapping.time_steps)
    if wrapping.units is not None:
        wrapping.time_steps.add_module("units", wrapping.units)
    if wrapping.form == "branches":
        _install_branches(wrapping)
    else:
        for l, layer in enumerate(wrapping.present):
            block = layer.module
            vars(block)["forward"] = Step(
                block.forward, wrapping.time_steps, l, layer.name, layer.form, "forward" in vars(block), wrapping.units
            )
    vars(host)[WRAPPING] = wrapping
    set_follower(host, Follower())


def _install_branches(wrapping: Wrapping) -> None:
    steps, watched = wrapping.time_steps, dict[nn.Module, WatchedBlock]()
    runs = {block: Run(positions) for block, positions in _positions(wrapping.present).items()}
    for layer in wrapping.present:
        block, start, run = layer.block, layer.at_start, runs[layer.block]
        before = watched[block].sites if block in watched else {}
        sites = before | {place: start.branches[place].site for place in layer.sites}
        own = "forward" in vars(block)
        watched[block] = WatchedBlock(
            block.forward, steps, start.form, start.name, sites, run.indices, wrapping.per == "block", run, own
        )
        for place, site in layer.sites.items():
            own = "forward" in vars(site)
            step = BranchStep(site.forward, steps, start.branches[place].form, own, place, run)
            vars(site)["forward"] = step.forward
    for block, watch in watched.items():
        vars(block)["forward"] = watch


def _positions(present: Iterable[Layer]) -> dict[nn.Module, tuple[int, ...]]:
    """For each block the positions of the steps of its branches; -1 of those that are gone."""
    result: dict[nn.Module, list[int]] = {}
    for position, layer in enumerate(present):
        of_block = result.setdefault(layer.block, [-1] * len(layer.at_start.branches))
        for place in layer.sites:
            of_block[place] = position
    return {block: tuple(positions) for block, positions in result.items()}
