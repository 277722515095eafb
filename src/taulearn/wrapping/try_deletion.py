"""Deletions tried on example inputs when a model is wrapped, so that none changes the model unnoticed later.

A list of blocks may get shorter only if the host runs through it in order. Whether it does cannot be read off the
list: hosts take blocks by number, count them, keep what some of them return, or run through several lists at once. So
deletions are carried out, compared with the same blocks at tau = 0, and undone: some choices of blocks at first; where
one of those fails, each block alone, then one after the other until none is left, then all but the first. A list in
which that fails keeps its length, with placeholders, if more blocks can go in that way (at least two more where a
configuration counts the blocks, which knows no placeholders); a block without which the host is another one stays.

Compared are the output and the arguments of all blocks and modules around them. Parameters that are constant, as gates
and heads at the start are zero, have noise in their place meanwhile: they would hide what the host does with a block.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .._errors import in_short
from .._undisturbed import Before
from . import remove_blocks
from .block import PassingTimeSteps, Skip
from .observation import Observation, answers, difference, finite, noise_for, observe, put_noise
from .wrapped_model import Wrapping, install, is_configured

_NOT_TRIED = (
    "whether the host can do without it was not tried: give example_inputs to wrap, so that a deletion can be compared "
    "with tau = 0"
)
_UNTOLD = (
    "whether the host can do without it cannot be told from example_inputs: nothing in the host's output answers to "
    "any block; give inputs with which it does"
)
_PLACE = (
    "it uses the block's place or its other outputs, or returns records of its layers (then give example_inputs that "
    "ask for none)"
)
_TOGETHER = "where others are deleted the host gives another output without it than with tau = 0"


def try_deletions(wrapping: Wrapping, example_inputs: Any | None) -> tuple[frozenset[str], dict[int, str]]:
    """Which lists get shorter when a block is deleted, and which blocks must stay."""
    lists: dict[str | None, list[int]] = {}
    for l, block in enumerate(wrapping.layers):
        lists.setdefault(remove_blocks.list_of(wrapping.host, block), []).append(l)
    if example_inputs is None:
        certain = {name for name in lists if name is not None and remove_blocks.sure_to_shorten(wrapping.host, name)}
        return frozenset(certain), {l: _NOT_TRIED for name in lists if name not in certain for l in lists[name]}
    trial = _Trial(wrapping, example_inputs)
    if trial.number == 1:
        return frozenset(name for name in lists if name is not None), {}
    shorten: set[str] = set()
    keep: dict[int, str] = {}
    for name, members in lists.items():
        short, reasons = _way(trial, name, members)
        shorten |= short
        keep |= reasons
    if not trial.answered:
        return frozenset(shorten), dict.fromkeys(range(trial.number), _UNTOLD)
    if len(lists) > 1:
        keep |= trial.together([l for l in range(trial.number) if l not in keep], shorten)
    return frozenset(shorten), keep


def _way(trial: "_Trial", name: str | None, members: Sequence[int]) -> tuple[set[str], dict[int, str]]:
    """Whether a list gets shorter or keeps its length, and which members must stay then."""

    def staying(shorten: Collection[str]) -> dict[int, str]:
        alone = {l: trial.why_not(l, shorten) for l in members}
        keep = {l: reason for l, reason in alone.items() if reason is not None}
        return keep | trial.one_after_the_other([l for l in members if l not in keep], shorten)

    if name is None:
        return set(), staying(())
    if trial.any_of_them(members, {name}):
        return {name}, {}
    shorter = staying({name})
    if any(trial.why_not(l, ()) is None for l in shorter):
        places = staying(())
        # a list that a configuration counts can be saved only where it gets shorter: then one member may well stay
        if len(places) + _counted(trial.wrapping.host, name) < len(shorter):
            return set(), places
    return {name}, shorter


def _counted(host: nn.Module, name: str) -> bool:
    """Whether a configuration counts the members of a list."""
    if not is_configured(host):
        return False
    from .configurations import counts

    return counts(host, name)


class _Trial:
    """Passes of a host with blocks at tau = 0, and without them."""

    def __init__(self, wrapping: Wrapping, inputs: Any) -> None:
        host, blocks = wrapping.host, wrapping.layers
        inside = {module for block in blocks for module in block.modules()}
        self.wrapping, self.inputs, self.number = wrapping, inputs, len(blocks)
        self.blocks, self.before = blocks, Before(host, inputs)
        self.answered = False  # whether the output was another with some block at tau = 0
        around = [each for each in host.modules() if each is not host and each not in inside]
        self.watched = [each for each in (*blocks, *around) if not isinstance(each, torch.jit.ScriptModule)]
        self.memories = memories_of(host, blocks)
        self.noise = noise_for(host)
        self.bare = self._bare()
        self._check_ones()

    def _check_ones(self) -> None:
        """Refuse a host that is another one as soon as there are steps, such as one that runs through its children."""
        try:
            with self._without((), ()):
                found = self._observe()
            differs = difference(self.bare, found)
        except ValueError:  # of a block that cannot have a step
            raise
        # hosts may raise anything
        except Exception as error:  # noqa: BLE001
            differs = f"fails ({in_short(error)})"
        if differs is not None:
            raise ValueError(
                f"model must compute with time steps of 1 what it computes without, but it {differs}: "
                "where it runs through its own modules, time_steps among them, wrap torch.nn.Sequential(model) instead"
            )

    def _bare(self) -> Observation:
        """The host as it is, with noise unless it fails or overflows with it."""
        with self.before.kept():
            put_noise(self.wrapping.host, self.noise)
            try:
                seen = self._observe()
                if finite(seen) or not self.noise:
                    return seen
            except Exception:
                if not self.noise:
                    raise
        self.noise = {}
        return self._bare()

    def why_not(self, block: int, shorten: Collection[str], gone: Collection[int] = ()) -> str | None:
        """Why a block cannot be deleted where others are gone already, or None if it can."""
        try:
            with self._without(gone, shorten, zero=(block,)):
                expected = self._observe(gone)
        # hosts may raise anything
        except Exception as error:  # noqa: BLE001
            return f"the host fails where its step is 0: {in_short(error)}"
        self.answered |= not gone and answers(self.bare, expected, self.blocks)
        return self._differs(expected, {block, *gone}, shorten)

    def _differs(self, expected: Observation, gone: Collection[int], shorten: Collection[str]) -> str | None:
        """The host without blocks is here and nowhere else."""
        try:
            with self._without(gone, shorten):
                found = self._observe(gone)
        # whatever the host raises without a block, it cannot do without it
        except Exception as error:  # noqa: BLE001
            return f"the host fails without it: {in_short(error)}"
        differs = difference(expected, found, [self.blocks[l] for l in gone])
        return None if differs is None else f"the host {differs} without it than with tau = 0: {_PLACE}"

    def any_of_them(self, blocks: Sequence[int], shorten: Collection[str]) -> bool:
        """Whether some choices of blocks can all be deleted, so that any choice may be expected to.

        They are those with a binary digit of their position 0, or 1, and all but the first or last: of any two blocks,
        one is deleted where the other stays.
        """
        number = len(blocks)
        bits = max(1, (number - 1).bit_length())
        halves = [[l for i, l in enumerate(blocks) if i >> bit & 1 == digit] for bit in range(bits) for digit in (1, 0)]
        choices = [*halves, list(blocks[1:]), list(blocks[:-1])]
        if number < self.number:
            choices.append(list(blocks))
        wanted = dict.fromkeys(tuple(each) for each in choices if 0 < len(each) < self.number)
        return bool(wanted) and all(self._at_once(each, shorten) for each in wanted)

    def one_after_the_other(self, blocks: Sequence[int], shorten: Collection[str]) -> dict[int, str]:
        """Which blocks must stay, of those that can be deleted alone, so that all others can be deleted together."""
        keep: dict[int, str] = {}
        while True:
            rest = [l for l in blocks if l not in keep]
            more = self._in_turn(rest, shorten)
            if not more:
                if len(rest) < self.number or self._at_once(rest[1:], shorten):
                    return keep
                more = self._in_turn(rest[::-1], shorten) or dict.fromkeys(rest[1:], _TOGETHER)
            keep |= more

    def together(self, blocks: Sequence[int], shorten: Collection[str]) -> dict[int, str]:
        """The same for blocks of several lists, where the deepest deletions are tried first."""
        keep: dict[int, str] = {}
        while True:
            rest = [l for l in blocks if l not in keep]
            deepest = [rest] if len(rest) < self.number else [rest[1:], rest[:-1]]
            if all(self._at_once(each, shorten) for each in deepest):
                return keep
            keep |= self.one_after_the_other(rest, shorten) or dict.fromkeys(rest[1:], _TOGETHER)

    def _in_turn(self, blocks: Sequence[int], shorten: Collection[str]) -> dict[int, str]:
        """Delete one after the other, each compared with itself at tau = 0 where those before are gone."""
        keep: dict[int, str] = {}
        gone = list(blocks[:1])
        for l in blocks[1:]:
            if len(gone) + 1 == self.number:
                break
            reason = self.why_not(l, shorten, gone)
            if reason is None:
                gone.append(l)
            else:
                keep[l] = f"where others are deleted, {reason}"
        return keep

    def _at_once(self, blocks: Sequence[int], shorten: Collection[str]) -> bool:
        if not blocks:
            return True
        try:
            with self._without((), (), zero=blocks):
                expected = self._observe()
        # hosts may raise anything
        except Exception:  # noqa: BLE001
            return False
        self.answered |= answers(self.bare, expected, self.blocks)
        return self._differs(expected, blocks, shorten) is None

    def _observe(self, gone: Collection[int] = ()) -> Observation:
        without = {self.blocks[l] for l in gone}
        watched = [module for module in self.watched if module not in without]
        return observe(self.wrapping.host, self.inputs, watched, self.memories)

    @contextmanager
    def _without(self, gone: Collection[int], shorten: Collection[str], zero: Iterable[int] = ()) -> Iterator[None]:
        """The host with all steps 1, without some blocks and with others at tau = 0; afterwards it is as it was."""
        like = self.wrapping.time_steps.values
        with self.before.kept():
            put_noise(self.wrapping.host, self.noise)
            ones = PassingTimeSteps(self.number, horizon=self.number, dtype=like.dtype, device=like.device)
            wrapping = replace(self.wrapping, time_steps=ones.eval(), shorten=frozenset(shorten))
            install(wrapping)
            if gone:
                wrapping.keep_layers_([l for l in range(self.number) if l not in gone])
            for l in zero:
                block = self.blocks[l]
                vars(block)["forward"] = Skip(block.forward, self.wrapping.present[l].form)
            yield


def memories_of(host: nn.Module, blocks: Sequence[nn.Module]) -> frozenset[str]:
    """Names of what modules around blocks take where it is given, and return for the next call, such as a cache."""
    names: set[str] = set()
    for module in host.modules():
        if any(part in blocks for part in module.modules()):
            try:
                parameters = inspect.signature(module.forward).parameters.values()
            except (TypeError, ValueError):
                continue
            names |= {each.name for each in parameters if each.default is None}
    return frozenset(names)
