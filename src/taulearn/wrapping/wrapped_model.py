"""The time steps of an existing model, as pruning sees them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..nn.pruned_models import WRAPPING, Follower, set_follower
from ..nn.time_steps import TimeSteps
from . import remove_blocks as structure
from .block import Step
from .branches import Branch, BranchStep, NoBranch, Run, WatchedBlock, step_of
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
class Branches:
    """Where branch steps are in a model, see :class:`Wrapping`.

    Attributes:
        per: What has a step of its own, "block" or "branch".
        names: Names of all blocks when the model was wrapped.
        forms: Where their states are.
        found: The branches of each of them.
        keep: Numbers of those blocks that cannot be taken out, with the reason.
        blocks: For each layer that exists now, the block that it is, or is a part of.
        sites: For each layer that exists now, the modules whose outputs its step multiplies.
    """

    per: str
    names: tuple[str, ...]
    forms: tuple[Form, ...]
    found: tuple[tuple[Branch, ...], ...]
    keep: dict[int, str]
    blocks: tuple[nn.Module, ...]
    sites: tuple[tuple[nn.Module, ...], ...]

    def layer(self, number: int) -> tuple[int, tuple[int, ...]]:
        """The block of the layer that had a number at the start, and the numbers of its branches in that block."""
        if self.per == "block":
            return number, tuple(range(len(self.found[number])))
        places = [(b, (i,)) for b, branches in enumerate(self.found) for i in range(len(branches))]
        return places[number]

    def kept(self, indices: Sequence[int]) -> "Branches":
        """The same without all layers but those at these positions."""
        blocks, sites = tuple(self.blocks[i] for i in indices), tuple(self.sites[i] for i in indices)
        return replace(self, blocks=blocks, sites=sites)

    def of(self, number: int) -> tuple[Branch, ...]:
        """The branches of that layer."""
        block, branches = self.layer(number)
        return tuple(self.found[block][i] for i in branches)

    def places(self, origin: Sequence[int]) -> list[tuple[int, nn.Module, Form]]:
        """The sites of all layers that exist now, with the layer's position and where the increment tau g is."""
        return [
            (l, site, branch.form)
            for l, (number, sites) in enumerate(zip(origin, self.sites, strict=True))
            for site, branch in zip(sites, self.of(number), strict=True)
        ]

    def layer_names(self) -> tuple[str, ...]:
        """Names of all layers when the model was wrapped."""
        if self.per == "block":
            return self.names
        pairs = zip(self.names, self.found, strict=True)
        return tuple(f"{name}.{branch.site}" for name, branches in pairs for branch in branches)


@dataclass(frozen=True, eq=False)
class Wrapping:
    """The wrapping of a model: its steps and blocks. It is never changed: a deletion puts another in place.

    Attributes:
        host: The model.
        time_steps: Its steps.
        layers: What has a step and exists now, in the order of the calls: blocks, or with ``per="branch"`` the sites
            of branches. With x and y what ``forms[l]`` takes from arguments and output of a call,
            layer l adds y - x to the state with ``per="block"``, y = tau g with ``per="branch"``.
        names: Names of all of them when the model was wrapped.
        forms: Where each one's state is; of a branch, its increment.
        shorten: Names of the lists that get shorter when a block of theirs is deleted.
        keep: Numbers (at the start) of blocks that cannot be deleted, with the reason.
        trained: The parameters whose ``requires_grad`` was changed, with what it was.
        units: Units of displacement of the steps, or None.
        inputs: Example inputs, on which save_pretrained compares a pruned model with what is loaded.
        not_saved: Numbers (at the start) of blocks without which save_pretrained is refused, with the reason.
        branches: Where branch steps are; None: the form is "whole".
        why: Why the form is what it is.
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
    branches: Branches | None = None
    why: str = ""

    @property
    def form(self) -> str:
        """How a step enters a block, "branches" or "whole"."""
        return "whole" if self.branches is None else "branches"

    @property
    def per(self) -> str:
        """What has a step of its own, "block" or "branch"."""
        return "block" if self.branches is None else self.branches.per

    @property
    def scheme(self) -> "Scheme":
        """Blocks are steps of the residual scheme."""
        from ..nn.schemes import Residual

        return Residual()

    def states(self) -> tuple[tuple[str | int | None, str | int | None], ...]:
        """Where the states of all blocks at the start are: argument and entry of the output; None of deleted ones."""
        if self.branches is None:
            known = dict(zip(self.time_steps.origin, self.forms, strict=True))
            forms = [known.get(l, Form()) for l in range(len(self.names))]
        else:
            forms = list(self.branches.forms)
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
        gone = _blocks_that_go(self, kept)
        self.time_steps.keep_(kept)
        if self.units is not None:
            self.units.keep_(kept)
        if self.branches is not None and self.per == "branch":
            lost = {i: origin[i] for i in range(len(origin)) if i not in set(kept)}
            _take_branches_out(self.host, self.branches, lost, gone)
        shortened = structure.remove(self.host, gone, self.shorten)
        if is_configured(self.host):
            from .configurations import follow_deletion, number_caches

            follow_deletion(self.host, shortened)
            if self.branches is not None and self.per == "branch":
                number_caches(self.host, {branch.site for each in self.branches.found for branch in each})
        after = replace(self, layers=tuple(self.layers[i] for i in kept), forms=tuple(self.forms[i] for i in kept))
        if self.branches is not None:
            after = replace(after, branches=self.branches.kept(kept))
        if after.branches is None:
            for position, block in enumerate(after.layers):
                vars(block)["forward"] = replace(vars(block)["forward"], index=position)
        else:
            for block, indices in _indices(after.branches, after.time_steps.origin).items():
                vars(block)["forward"] = replace(vars(block)["forward"], indices=indices)
        vars(self.host)[WRAPPING] = after

    def has_lost_blocks(self) -> bool:
        """Whether blocks were deleted, or branches."""
        return len(self.layers) < len(self.names)

    def changed(self) -> list[nn.Module]:
        """All modules whose forward is another than before."""
        if self.branches is None:
            return list(self.layers)
        return [*(site for each in self.branches.sites for site in each), *dict.fromkeys(self.branches.blocks)]


def _blocks_that_go(wrapping: Wrapping, kept: Sequence[int]) -> dict[nn.Module, Form]:
    """The blocks that go with all layers but those kept, with where their states are."""
    gone = [i for i in range(len(wrapping.layers)) if i not in set(kept)]
    branches = wrapping.branches
    if branches is None:
        return {wrapping.layers[i]: wrapping.forms[i] for i in gone}
    left, result = {branches.blocks[i] for i in kept}, {}
    for i in gone:
        block, (number, _) = branches.blocks[i], branches.layer(wrapping.time_steps.origin[i])
        if block not in left and (wrapping.per == "block" or number not in branches.keep):
            result[block] = branches.forms[number]
    return result


def _take_branches_out(
    host: nn.Module, branches: Branches, lost: Mapping[int, int], without: Collection[nn.Module]
) -> None:
    """Put modules that return zeros in the places of branches, whose blocks are not among those without.

    ``lost`` has their positions, and their numbers at the start.
    """
    stand_ins: dict[nn.Module, nn.Module] = {}
    for position, number in lost.items():
        block, (site,) = branches.blocks[position], branches.sites[position]
        if block not in without:
            take_off(site)
            (branch,), (place,) = branches.of(number), branches.layer(number)[1]
            stand_ins[site] = NoBranch(site, branch)
            watch = vars(block)["forward"]
            if sites := {k: v for k, v in watch.sites.items() if k != place}:
                vars(block)["forward"] = replace(watch, sites=sites)
            else:
                take_off(block)
    structure.put_in_place(host, stand_ins)


def is_configured(host: nn.Module) -> bool:
    """Whether a module has a configuration, as those of transformers do; :mod:`.configurations` is loaded for them."""
    return any("config" in vars(module) for module in host.modules())


def install(wrapping: Wrapping) -> None:
    """Put steps and blocks' forwards in place."""
    host = wrapping.host
    host.add_module("time_steps", wrapping.time_steps)
    if wrapping.units is not None:
        wrapping.time_steps.add_module("units", wrapping.units)
    if wrapping.branches is not None:
        _install_branches(wrapping, wrapping.branches)
    for l, block in enumerate(wrapping.layers if wrapping.branches is None else ()):
        own = "forward" in vars(block)
        vars(block)["forward"] = Step(
            block.forward, wrapping.time_steps, l, wrapping.names[l], wrapping.forms[l], own, wrapping.units
        )
    vars(host)[WRAPPING] = wrapping
    set_follower(host, Follower())


def _install_branches(wrapping: Wrapping, branches: Branches) -> None:
    origin = wrapping.time_steps.origin
    runs = {block: Run(indices) for block, indices in _indices(branches, origin).items()}
    watched: dict[nn.Module, WatchedBlock] = {}
    for number, block, sites in zip(origin, branches.blocks, branches.sites, strict=True):
        at, places = branches.layer(number)
        names = {place: branch.site for place, branch in zip(places, branches.of(number), strict=True)}
        before = watched[block].sites if block in watched else {}
        watched[block] = WatchedBlock(
            block.forward,
            wrapping.time_steps,
            branches.forms[at],
            branches.names[at],
            before | names,
            runs[block].indices,
            branches.per == "block",
            runs[block],
            "forward" in vars(block),
        )
        for place, branch, site in zip(places, branches.of(number), sites, strict=True):
            own = "forward" in vars(site)
            vars(site)["forward"] = BranchStep(
                site.forward, wrapping.time_steps, branch.form, own, place, runs[block]
            ).forward
    for block, watch in watched.items():
        vars(block)["forward"] = watch


def _indices(branches: Branches, origin: Sequence[int]) -> dict[nn.Module, tuple[int, ...]]:
    """For each block the positions of the steps of its branches; -1 of those that are gone."""
    result: dict[nn.Module, list[int]] = {}
    for position, (number, block) in enumerate(zip(origin, branches.blocks, strict=True)):
        at, places = branches.layer(number)
        of_block = result.setdefault(block, [-1] * len(branches.found[at]))
        for place in places:
            of_block[place] = position
    return {block: tuple(positions) for block, positions in result.items()}


def reinstall(wrapping: Wrapping, after: Wrapping) -> None:
    """Put the steps in place in another form."""
    for module in wrapping.changed():
        take_off(module)
    install(after)


def take_states(wrapping: Wrapping, states: Sequence[tuple[str | int | None, str | int | None]]) -> None:
    """Let states be where a saved model had them, see :meth:`Wrapping.states`."""
    if wrapping.branches is not None:  # which come with their forms
        return
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


def take_off(module: nn.Module) -> None:
    """Let a module have the forward that it had before it was wrapped."""
    step = step_of(module)
    del vars(module)["forward"]
    if step.own:
        vars(module)["forward"] = step.inner


def uninstall(wrapping: Wrapping) -> None:
    """Undo :func:`install`; deleted blocks stay deleted."""
    host = wrapping.host
    set_follower(host, None)
    for module in wrapping.changed():
        take_off(module)
    for parameter, flag in wrapping.trained.items():
        parameter.requires_grad_(flag)
    del host.time_steps
    del vars(host)[WRAPPING]
