"""Time grids: which layers there are, by number, and how one grid comes from another.

A layer keeps its number through all changes; a new one gets a number that was never used, and knows its parent. So a
model that was built anew becomes the one that was refined and pruned: some layers go, others are copied.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from .._errors import first_line


class Grid(NamedTuple):
    """Which layers there are."""

    origin: tuple[int, ...]  # their numbers, in their order
    next_number: int  # the number that the next new layer gets
    # for each layer that was ever new its number, and that of the layer that it was made from
    parent: Mapping[int, int]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        parents = [[number, parent] for number, parent in self.parent.items()]
        return {"origin": list(self.origin), "next_number": self.next_number, "parents": parents}

    @classmethod
    def from_plain(cls, written: Mapping[str, Any]) -> Self:
        """What :meth:`plain` wrote; files from before there was refinement lack what only that needs."""
        origin, parent = tuple(written["origin"]), dict(written.get("parents", ()))
        return cls(origin, max(written.get("next_number", 0), *(1 + n for n in (*origin, *parent))), parent)

    def made_from(self, present: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """How to get it from a grid whose layers have the numbers ``present``.

        Returns:
            Positions there of the layers to keep; for each layer here the position among those, its own or an
            ancestor's; and the positions here of those that are copies.

        Raises:
            ValueError: If a layer has no ancestor there, or the order is another.

        Example:
            >>> Grid((0, 5, 4), 6, {4: 2, 5: 4}).made_from([0, 1, 2, 3])
            ([0, 2], [0, 1, 1], [2])
        """
        positions, places = {number: l for l, number in enumerate(present)}, list[int]()
        for number in self.origin:
            ancestor = number
            while ancestor not in positions and self.parent.get(ancestor, ancestor) < ancestor:
                ancestor = self.parent[ancestor]
            if ancestor not in positions:
                raise ValueError(f"origin must be numbers of {len(present)} layers, got {ancestor}")
            places.append(positions[ancestor])
        if places != sorted(places) or len(set(self.origin)) < len(self.origin):
            raise ValueError(f"origin must increase, but for layers that were new, got {str(list(self.origin))[:80]}")
        kept = sorted(set(places))
        # where the layer itself goes: to that of its number, or where it was deleted to its first descendant
        itself = {l: i for i, l in reversed([*enumerate(places)])}
        itself |= {l: i for i, l in enumerate(places) if self.origin[i] == present[l]}
        rank = {l: k for k, l in enumerate(kept)}
        return kept, [rank[l] for l in places], [i for i, l in enumerate(places) if itself[l] != i]


def twice(number: int, indices: Iterable[int]) -> tuple[list[int], list[int]]:
    """The positions 0 .. number - 1, those at ``indices`` twice; and where the second ones stand.

    Example:
        >>> twice(3, [0, 2])
        ([0, 0, 1, 2, 2], [1, 4])
    """
    again = set(indices)
    sources = [l for l in range(number) for _ in range(1 + (l in again))]
    return sources, [i for i in range(1, len(sources)) if sources[i] == sources[i - 1]]


def copied(layer: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A layer once more, with parameters and buffers of its own; ``memo`` as for ``copy.deepcopy``."""
    try:
        return copy.deepcopy(layer, memo)
    except RuntimeError as error:
        raise ValueError(
            f"model must have layers that can be copied, got a {type(layer).__name__} that cannot "
            f"({first_line(error)}): the old weight_norm and spectral_norm of torch.nn.utils keep computed tensors; "
            "take those of torch.nn.utils.parametrizations"
        ) from error


@torch.no_grad()
def regrow(prunable: Any, grid: Grid) -> dict[Any, Any]:
    """Let a model have the layers of a grid: some go, others are copies of those that they were made from.

    Steps and weights of the copies are to be loaded. Returns the copies' parameters, each with that of which it is one.

    Raises:
        ValueError: If it does not have the layers from which they were made, or some cannot go.
    """
    steps, kin = prunable.time_steps, dict[Any, Any]()
    kept, sources, copies = grid.made_from(steps.origin)
    if len(kept) < steps.num_steps:
        prunable.keep_layers_(kept)
    if copies:
        made = {i: prunable.copy_of(sources[i]) for i in copies}
        for i, layer in made.items():
            kin |= zip(layer.parameters(), prunable.layers[sources[i]].parameters(), strict=True)
        entries = torch.tensor(steps.rule.entries(sources), device=steps.values.device)
        values = torch.cat([steps.values, steps.values.new_zeros(1)])[entries.clamp(max=len(steps.values))]
        kin |= prunable.grow_layers_(sources, made, values) or {}  # a dependent step had none
    steps.take_grid_(grid)
    return kin
