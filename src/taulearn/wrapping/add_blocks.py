"""New blocks in a wrapped model: copies with steps of their own, each in the list of the block behind which it comes.

With steps of 0 they change nothing. Whether that is so is tried on the example inputs, as hosts may do more with a list
than run through it; and what ``save_pretrained`` could write before, it must be able to write afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .._errors import in_short
from .._undisturbed import undisturbed
from ..nn.grid import copied
from ..nn.pruned_models import follower_of, set_follower
from ..nn.time_steps import TimeSteps
from . import remove_blocks as structure
from .branches import step_of
from .comparison import as_taken
from .folding import changed_modules, take_off
from .observation import Observation, difference, observe
from .try_deletion import memories_of
from .wrapped_model import Layer, Wrapping, has_save_pretrained, install, is_configured


def why_not_copied(wrapping: Wrapping, l: int) -> str:
    """Why no copy of a block can come behind it, or nothing."""
    block = wrapping.present[l].block
    if wrapping.per == "branch":
        return "its step is that of one branch, which is no step of a differential equation: wrap with per='block'"
    if wrapping.units is not None:
        return "its step has a unit of displacement, which no new block has: wrap with units='steps'"
    if structure.list_of(wrapping.host, block) not in wrapping.shorten:
        return "it is in no list that the host is known to run through in order (give example_inputs to wrap)"
    inside, own = {id(part) for part in block.modules()}, {id(each) for each in block.parameters()}
    held = [part for _, holder, _, part in structure.holders(wrapping.host) if id(holder) not in inside]
    others = (p for part in wrapping.host.modules() if id(part) not in inside for p in part._parameters.values())
    if sum(id(part) in inside for part in held) > 1 or any(id(p) in own for p in others):
        return "it shares modules or parameters with others, of which a copy would no longer be one"
    return ""


def copy_of(wrapping: Wrapping, l: int) -> nn.Module:
    """A block once more, without its step; what it shares with others, such as a configuration, it shares still."""
    block = wrapping.present[l].block
    inside = {id(part) for part in block.modules()}
    memo: dict[int, object] = {}
    for part in wrapping.host.modules():
        if id(part) not in inside:
            others = (each for each in vars(part).values() if hasattr(each, "__dict__") and id(each) not in inside)
            memo |= {id(part): part} | {id(each): each for each in others}
    made = copied(block, memo)
    for part in made.modules():
        if isinstance(getattr(step_of(part), "steps", None), TimeSteps):
            take_off(part)
    return made


def grow(wrapping: Wrapping, sources: Sequence[int], made: Mapping[int, nn.Module], values: Tensor) -> None:
    """See :meth:`Wrapping.grow_layers_`.

    Raises:
        ValueError: If the host computes anything else with steps of 0, or could be saved by ``save_pretrained`` and
            could no longer.
    """
    host, steps, follower = wrapping.host, wrapping.time_steps, follower_of(wrapping.host)
    unsaved, tau = _unsaved(host), steps.tau.detach()
    try:
        before = _outputs(wrapping)
    except Exception:  # noqa: BLE001  the inputs are not what the host takes any more: nothing can be compared
        before = None
    for module in changed_modules(wrapping):
        take_off(module)
    behind = {wrapping.present[sources[i]].block: block for i, block in made.items()}
    lists = structure.change_lists(host, wrapping.shorten, {block: (block, new) for block, new in behind.items()})
    if is_configured(host):
        from .configurations import follow_lists

        follow_lists(host, lists)
    present = [wrapping.present[l] for l in sources]
    for i, block in made.items():
        present[i] = _copied(present[i], block)
    trained = dict(wrapping.trained)
    for i, block in made.items():
        theirs = dict(wrapping.present[sources[i]].block.named_parameters())
        trained |= {q: trained[theirs[n]] for n, q in block.named_parameters() if theirs.get(n) in trained}
    after = replace(wrapping, present=tuple(present), trained=trained)
    idle = [tau[l] * (i not in made) for i, l in enumerate(sources)]
    steps.grow_(sources, made, steps.rule.values(torch.stack(idle)))
    install(after)
    set_follower(host, follower)
    try:
        found = None if before is None else _outputs(after)
        unlike = None if before is None or found is None else difference(before, found)
    except Exception as error:  # noqa: BLE001  hosts may raise anything
        unlike = f"fails with them: {in_short(error)}"
    if unlike is not None:
        raise ValueError(f"layers must be such that new blocks with step 0 change nothing, but the host {unlike}")
    if unsaved is None and (reason := _unsaved(host)):
        raise ValueError(f"layers must be such that the host's configuration describes it, got others: {reason}")
    steps.take_(values, steps.origin)


def _copied(parent: Layer, block: nn.Module) -> Layer:
    """The record of a new block, which is like its parent."""
    branches = parent.at_start.branches
    try:
        sites = {place: block.get_submodule(branches[place].site) for place in parent.sites}
    except AttributeError as error:
        raise ValueError(
            f"layer must make a block with the branches of {parent.name!r}, got one without ({error}): wrap with "
            "form='whole', or give the parts these names"
        ) from error
    return Layer(block, block, parent.at_start, sites)


def _outputs(wrapping: Wrapping) -> Observation | None:
    """The output of the host on the example inputs, or None where there are none."""
    host, device = wrapping.host, wrapping.time_steps.values.device
    if wrapping.inputs.value is None:
        return None
    inputs = as_taken(wrapping.inputs.value, host, device)
    with undisturbed(host, inputs):
        return observe(host, inputs, (), memories_of(host, wrapping.layers))


def _unsaved(host: nn.Module) -> str | None:
    """Why ``save_pretrained`` would refuse the host, or None."""
    if not has_save_pretrained(host):
        return None
    from .save_pretrained import refused

    return refused(host, {})
