"""Deletions tried on example inputs when a model is wrapped, so that none changes the model unnoticed later.

A list of blocks may get shorter only if the host runs through it in order. Whether it does cannot be read off the
list: hosts take blocks by number, or run through several lists at once. So one deletion is carried out, compared with
the same block at tau = 0, and undone.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._calls import call
from .._deletion import all_or_nothing
from ..nn.time_steps import TimeSteps
from . import structure
from .blocks import Skip
from .host import Wrapping, install
from .probe import undisturbed

_NOT_TRIED = (
    "whether the host can do without it was not tried: give example_inputs to wrap, so that a deletion can be compared "
    "with tau = 0"
)
_DIFFERS = "the host gives another output without it than with tau = 0: it uses the block's place or its other outputs"


class _Undone(Exception):
    """Ends a trial."""


def ways(wrapping: Wrapping, example_inputs: Any | None) -> tuple[frozenset[str], dict[int, str]]:
    """Which lists get shorter when a block is deleted, and which blocks must stay.

    Args:
        wrapping: The wrapping of a model that is not wrapped yet.
        example_inputs: Inputs of the host. None: nothing is tried, and only lists that are run through in order for
            certain get shorter; all other blocks must stay.

    Returns:
        Names of lists; and reasons by block number.
    """
    lists = {l: structure.list_of(wrapping.host, block) for l, block in enumerate(wrapping.layers)}
    shorten: set[str] = set()
    keep: dict[int, str] = {}
    for name in dict.fromkeys(lists.values()):
        members = [l for l in lists if lists[l] == name]
        if example_inputs is None:
            if name is not None and structure.sure_to_shorten(wrapping.host, name):
                shorten.add(name)
            else:
                keep |= dict.fromkeys(members, _NOT_TRIED)
            continue
        tried = set() if name is None else {name}
        working = [l for l in _ends(members) if _works(wrapping, l, tried, example_inputs)]
        if tried and not working:
            tried = set()
            working = [l for l in _ends(members) if _works(wrapping, l, tried, example_inputs)]
        shorten |= tried
        failing = []
        if len(working) < len(_ends(members)):
            failing = [l for l in members if not _works(wrapping, l, tried, example_inputs)]
        keep |= dict.fromkeys(failing, _DIFFERS)
    return frozenset(shorten), keep


def _ends(members: list[int]) -> list[int]:
    """The first and the last: without the first, all others change their numbers."""
    return sorted({members[0], members[-1]})


def _works(wrapping: Wrapping, gone: int, shorten: set[str], inputs: Any) -> bool:
    """Whether the host without a block gives what it gives with the block at tau = 0; the host stays as it is."""
    host, block, number = wrapping.host, wrapping.layers[gone], len(wrapping.layers)
    if number == 1:
        return True
    expected: dict[object, Tensor] = {}
    with suppress(_Undone), undisturbed(host), all_or_nothing([host], None):
        vars(block)["forward"] = Skip(block.forward, wrapping.forms[gone])
        expected = _tensors(call(host, inputs))
        raise _Undone
    same = False
    # whatever the host raises without the block, it cannot do without it
    with suppress(Exception), undisturbed(host), all_or_nothing([host], None):
        like = wrapping.time_steps.values
        ones = TimeSteps(number, init=1.0, horizon=number, dtype=like.dtype, device=like.device)
        trial = replace(wrapping, time_steps=ones, shorten=frozenset(shorten), keep={})
        install(trial)
        del host.time_steps  # a Sequential would call it
        trial.keep_layers_([l for l in range(number) if l != gone])
        found = _tensors(call(host, inputs))
        same = found.keys() == expected.keys() and all(_close(found[k], expected[k]) for k in expected)
        raise _Undone
    return same


def _tensors(output: Any) -> dict[object, Tensor]:
    items: Iterable[tuple[object, object]]
    if isinstance(output, Tensor):
        items = [(None, output)]
    elif isinstance(output, Mapping):
        items = output.items()
    else:
        items = enumerate(output) if isinstance(output, tuple | list) else []
    return {key: value for key, value in items if isinstance(value, Tensor)}


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.abs().nan_to_num().amax()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=1e3 * torch.finfo(a.dtype).eps * scale, equal_nan=True)
