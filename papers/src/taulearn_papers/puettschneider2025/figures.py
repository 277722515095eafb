"""What a network does at each depth, with and without stage cost: means, and bands from the least to the largest."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ....report.figures import PALETTE
from ...results import NotMeasured, Results
from .members import kept
from .quantities import Pair, at_depth, bounds, pairs, per_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WORDS = {"stage": "with stage cost", "plain": "without"}
_COLOURS = {"stage": PALETTE[0], "plain": PALETTE[3]}
_BAND = 0.2
_TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "dense": "fully connected"}


def depths(results: Results) -> "Figure":
    """Accuracy of the first k blocks; what each block adds to the state; the norm of its weights."""
    from matplotlib.ticker import MaxNLocator

    found = pairs(results)
    figure, axes = _grid(len(found), 3)
    for row, pair in zip(axes, found, strict=True):
        M = kept(pair.depth)[1]
        for treatment in _WORDS:
            name = pair.name(treatment)
            seeds = results.seeds(name)
            accuracy = [at_depth(results, name, seed, "test.accuracy") for seed in seeds]
            _band(row[0], treatment, np.array(list(accuracy[0])), np.array([list(a.values()) for a in accuracy]))
            blocks = np.arange(1, pair.depth + 1)
            for ax, key in ((row[1], "relative"), (row[2], "weights")):
                _band(ax, treatment, blocks, np.array([per_layer(results, name, seed, key) for seed in seeds]))
        for ax in row:
            ax.axvline(M, color="#999999", linewidth=0.8, linestyle=":")
            ax.set_xlim(0, pair.depth + 0.5)
        row[0].set_ylabel(f"{_title(pair)}\ntest accuracy")
        row[0].set_xlabel(f"first k blocks (dotted: {M})")
        row[1].set_ylabel(r"$\|\tau_k F_k(y_k)\| \, / \, \|y_{k+1}\|$")
        row[1].set_yscale("log")
        row[2].set_ylabel(r"$\|w_{F,k}\|$")
        row[2].set_yscale("log")
        for ax in row:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in row[1:]:
            ax.set_xlabel("block k")
    axes[0][0].legend(fontsize="small", loc="lower right")
    return figure


def bound(results: Results) -> "Figure":
    """Both sides of the bound, for each network and M."""
    rows = list(bounds(results))
    if not rows:
        raise NotMeasured("no network is finished for the bound")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.5, 0.6 + 0.32 * len(rows)), dpi=120, layout="constrained")
    ax = figure.subplots()
    for y, (_, _, _, found) in enumerate(rows):
        values = np.asarray(found)
        for column, (side, colour) in enumerate((("left", PALETTE[0]), ("right", PALETTE[3]))):
            ax.plot(values[:, column], np.full(len(values), y), "o", color=colour, markersize=5, alpha=0.6)
            if y == 0:
                ax.plot([], [], "o", color=colour, label=f"{side} side")
    ax.set_yticks(range(len(rows)), [f"{title}, M = {M}" for title, M, _, _ in rows], fontsize="small")
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("weighted mean of the training losses")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize="small")
    return figure


def _title(pair: Pair) -> str:
    kind = _TITLES.get(pair.kind, "ResNet-v2")
    return f"{_TITLES.get(pair.data, pair.data)}, {kind}, {pair.depth}"


def _band(
    ax: "Axes", treatment: str, x: Float[np.ndarray, " points"], values: Float[np.ndarray, "seeds points"]
) -> None:
    colour = _COLOURS[treatment]
    ax.plot(x, values.mean(0), color=colour, label=_WORDS[treatment], marker=".", markersize=4, linewidth=1.4)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=_BAND, linewidth=0)


def _grid(rows: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * columns, 2.7 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in axes]
