"""Wrapped models in files: what is written of blocks and branches, and a model wrapped as the saved one was.

No deletion is tried then, and no branch is searched for again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..nn.constraints import Constraint
from ..nn.pruned_models import WRAPPING
from ..wrapping import remove_blocks
from ..wrapping.branches import Branch, End
from ..wrapping.find_blocks import nearest_names
from ..wrapping.folding import changed_modules, take_off
from ..wrapping.state_argument import Form
from ..wrapping.wrap_model import check_blocks, check_host, of_blocks, steps_for, with_branches
from ..wrapping.wrapped_model import ExampleInputs, Wrapping, has_save_pretrained, install

_PLACEHOLDER = (
    "its place stays when it is deleted, and what stands there is known from example inputs: wrap the host with "
    "example_inputs before loading"
)
_AS_SAVED = "as it was when it was saved"


def rewrap(
    model: nn.Module,
    blocks: Sequence[str],
    shortened: Iterable[str],
    found: Sequence[tuple[Branch, ...]] = (),
    *,
    stays: Mapping[int, str],
    not_saved: Mapping[int, str],
    per: str = "block",
    constraint: str | Constraint,
    horizon: float,
    lower_bound: float | None,
) -> None:
    """Wrap a model as another of its kind was, without trying deletions or searching for branches again.

    By number of the block, ``stays`` is why it cannot be deleted, and ``not_saved`` is why ``save_pretrained`` would be
    refused without it.
    """
    check_host(model)
    known = dict(model.named_modules())
    for name in (*blocks, *shortened):
        if name not in known or (name in blocks and known[name] is model):
            raise ValueError(f"it has no {name!r}{nearest_names(name, known)}")
    layers = [known[name] for name in blocks]
    check_blocks(model, blocks, layers)
    for name in shortened:
        if not isinstance(known[name], remove_blocks.LISTS):
            raise ValueError(f"{name!r} must be a ModuleList or a Sequential, got a {type(known[name]).__name__}")
    number = len(layers) if per == "block" else sum(map(len, found))
    start = max(horizon / number, lower_bound or 0.0)
    steps = steps_for(layers, number, start, horizon, constraint, lower_bound)
    lists = [remove_blocks.list_of(model, layer) for layer in layers]
    keep = {l: _PLACEHOLDER for l, name in enumerate(lists) if name not in set(shortened)} | dict(stays)
    forms = tuple(Form.taking(None, layer.forward) for layer in layers)
    wrapping = of_blocks(model, steps, blocks, layers, forms, keep)
    wrapping = replace(wrapping, shorten=frozenset(shortened), not_saved=dict(not_saved))
    if found:
        _check_names(blocks, layers, found)
        wrapping = replace(with_branches(wrapping, found, per), why=_AS_SAVED)
    install(wrapping)
    if has_save_pretrained(model):
        from ..wrapping.save_pretrained import guard_saving

        guard_saving(model, layers, ExampleInputs())


def take_form(wrapping: Wrapping, found: Sequence[tuple[Branch, ...]]) -> None:
    """Let a model that is wrapped per block, and has all of its blocks, have the form of one that was saved."""
    if wrapping.per == "branch" or wrapping.has_other_blocks() or bool(found) == (wrapping.form == "branches"):
        return
    if found and len(found) != len(wrapping.present):
        return
    forms, keep = [block.form for block in wrapping.blocks], {l: each.keep for l, each in enumerate(wrapping.present)}
    plain = of_blocks(wrapping.host, wrapping.time_steps, wrapping.names, wrapping.layers, forms, keep)
    after = replace(wrapping, blocks=plain.blocks, present=plain.present, why=_AS_SAVED)
    if found:
        _check_names(wrapping.names, wrapping.layers, found)
        after = with_branches(after, found, "block")
    for module in changed_modules(wrapping):
        take_off(module)
    install(after)


def _check_names(names: Sequence[str], layers: Sequence[nn.Module], found: Sequence[tuple[Branch, ...]]) -> None:
    """Refuse branches whose modules or parameters the blocks do not have."""
    for name, layer, branches in zip(names, layers, found, strict=True):
        inside, parameters = dict(layer.named_modules()), dict(layer.named_parameters())
        for branch in branches:
            if branch.site not in inside or not branch.site:
                raise ValueError(f"it has no {f'{name}.{branch.site}'!r}{nearest_names(branch.site, inside)}")
            for end in branch.ends:
                if end.parameter not in parameters:
                    raise ValueError(
                        f"it has no {f'{name}.{end.parameter}'!r}{nearest_names(end.parameter, parameters)}"
                    )


def states_of(wrapping: Wrapping) -> tuple[tuple[str | int | None, str | int | None], ...]:
    """Where the states of all blocks are, by number: argument and entry of the output; None of deleted ones."""
    forms = [block.form for block in wrapping.blocks]
    if wrapping.form == "whole":
        known = dict(zip(wrapping.time_steps.origin, wrapping.present, strict=True))
        forms = [known[l].form if l in known else Form() for l in range(wrapping.time_steps.next_number)]
    return tuple((form.argument, form.key) for form in forms)


def take_states(wrapping: Wrapping, states: Sequence[Sequence[str | int | None]]) -> None:
    """Let states be where a saved model had them, see :func:`states_of`."""
    numbers: Sequence[int] = wrapping.time_steps.origin
    if wrapping.form == "branches":  # where several layers are of one block
        known = {block.name: number for number, block in enumerate(wrapping.blocks)}
        numbers = [known[layer.at_start.name] for layer in wrapping.present]
    present, blocks = list(wrapping.present), list(wrapping.blocks)
    for l, (number, layer) in enumerate(zip(numbers, wrapping.present, strict=True)):
        if number < len(states) and list(states[number]) != [None, None]:
            step, (argument, key) = vars(layer.block)["forward"], states[number]
            taken = Form.taking(argument, step.inner)
            form = replace(layer.at_start.form, argument=taken.argument, position=taken.position, key=key)
            present[l] = replace(layer, at_start=replace(layer.at_start, form=form))
            vars(layer.block)["forward"] = replace(step, form=form)
            if number < len(blocks):
                blocks[number] = replace(blocks[number], form=form)
    vars(wrapping.host)[WRAPPING] = replace(wrapping, blocks=tuple(blocks), present=tuple(present))


def stays_of(wrapping: Wrapping) -> dict[int, str]:
    """Which blocks cannot be deleted, by number, with the reason."""
    if wrapping.per == "branch":  # where the reasons are those of the branches
        return {number: _AS_SAVED for number, block in enumerate(wrapping.blocks) if block.stays}
    known = zip(wrapping.time_steps.origin, wrapping.present, strict=True)
    return {number: layer.keep for number, layer in known if layer.keep}


def written_branch(branch: Branch) -> dict[str, Any]:
    """A branch as JSON has it; :func:`read_branch` reads it."""
    known: dict[Any, str | None] = {None: None, tuple: "tuple", list: "list"}
    return {
        "site": branch.site,
        "key": branch.form.key,
        "argument": branch.form.argument,
        "output": known.get(branch.form.kind, "other"),
        "size": branch.form.size,
        "sizes": [list(each) for each in branch.sizes],
        "ends": [end._asdict() for end in branch.ends],
        "not_folded": branch.not_folded,
        "not_deleted": branch.not_deleted,
    }


def read_branch(entry: Mapping[str, Any]) -> Branch:
    """The branch that :func:`written_branch` wrote; the place of its argument is known from its module."""
    kind = {None: None, "tuple": tuple, "list": list, "other": dict}[entry["output"]]
    form = Form(kind, entry["key"], entry["size"], entry["argument"])
    sizes = tuple((dim, size) for dim, size in entry["sizes"])
    ends = tuple(End(**end) for end in entry["ends"])
    return Branch(entry["site"], form, sizes, ends, entry["not_folded"], entry["not_deleted"])
