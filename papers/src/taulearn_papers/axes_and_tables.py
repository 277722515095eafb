"""Axes and tables that the figures of all suites share."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_axes(rows: int, columns: int, size: float, *, width: float = 1.25, grid: bool = False) -> "tuple[Figure, Any]":
    """A figure with panels of a height in inches, ``width`` times as wide, with or without lines behind the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * size * columns, size * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        if grid:
            ax.grid(True, color="0.93", linewidth=0.6)
            ax.set_axisbelow(True)
    return figure, axes


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
        >>> print(markdown_table(["data", "loss"], [["peaks", "0.1"]]), end="")
        | data | loss |
        | --- | --- |
        | peaks | 0.1 |
    """
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
