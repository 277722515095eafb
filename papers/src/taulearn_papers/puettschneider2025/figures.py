"""Figures of a network at each depth, with and without stage cost; and tables beside the published figures.

Lines are means, bands reach from the least to the largest. Tables: the first M blocks against the whole, early exit,
both sides of the bound.
"""

from typing import TYPE_CHECKING

import numpy as np

from taulearn.app.results import NotMeasured, Results
from taulearn.report.figures import PALETTE
from taulearn.report.seed_bands import band

from ..axes_and_tables import markdown_table, new_axes
from .statistics import Pair, at_depth, bounds, pairs, per_layer
from .trainings import kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_WORDS = {"stage": "with stage cost", "plain": "without"}
_COLOURS = {"stage": PALETTE[0], "plain": PALETTE[3]}
_TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "dense": "fully connected"}


def depths(results: Results) -> "Figure":
    """Accuracy of the first k blocks; what each block adds to the state; the norm of its weights."""
    from matplotlib.ticker import MaxNLocator

    found = pairs(results)
    figure, axes = new_axes(len(found), 3, 2.7, width=40 / 27)
    for row, pair in zip(axes, found, strict=True):
        M = kept(pair.depth)[1]
        for treatment in _WORDS:
            name = pair.name(treatment)
            seeds = results.seeds(name)
            accuracy = [at_depth(results, name, seed, "test.accuracy") for seed in seeds]
            panels = [(np.array(list(accuracy[0])), np.array([list(each.values()) for each in accuracy]))]
            for key in ("relative", "weights"):
                values = np.array([per_layer(results, name, seed, key) for seed in seeds])
                panels.append((np.arange(1, pair.depth + 1), values))
            for ax, (x, values) in zip(row, panels, strict=True):
                lines = values.mean(0), values.min(0), values.max(0)
                band(ax, x, lines, _COLOURS[treatment], _WORDS[treatment], "-")
        row[0].set(ylabel=f"{_title(pair)}\ntest accuracy", xlabel=f"first k blocks (dotted: {M})")
        row[1].set(ylabel=r"$\|\tau_k F_k(y_k)\| \, / \, \|y_{k+1}\|$", yscale="log", xlabel="block k")
        row[2].set(ylabel=r"$\|w_{F,k}\|$", yscale="log", xlabel="block k")
        for ax in row:
            ax.axvline(M, color="#999999", linewidth=0.8, linestyle=":")
            ax.set_xlim(0, pair.depth + 0.5)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].legend(fontsize="small", loc="lower right")
    return figure


def bound(results: Results) -> "Figure":
    """Both sides of the bound, for each network and M."""
    rows = list(bounds(results))
    if not rows:
        raise NotMeasured("no network is finished for the bound")
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    height = 0.6 + 0.32 * len(rows)
    figure, ((ax,),) = new_axes(1, 1, height, width=7.5 / height)
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
    ax.legend(fontsize="small")
    return figure


def _title(pair: Pair) -> str:
    kind = _TITLES.get(pair.kind, "ResNet-v2")
    return f"{_TITLES.get(pair.data, pair.data)}, {kind}, {pair.depth}"


PUBLISHED: dict[str, tuple[float, float, float]] = {
    "MNIST": (99.62, 99.54, 99.64),
    "CIFAR-10": (91.59, 91.02, 93.05),
    "CIFAR-100": (69.97, 66.55, 71.94),
}
"""Test accuracy of ResNet-54 with stage cost, of its first 12 blocks, and without stage cost (second-hand figures)."""

_SHARES = ("N/9", "2N/9", "N/3", "N/2")


def first_blocks(results: Results) -> str:
    """Test accuracy in percent of the whole network and of its first M blocks, mean ± standard deviation over seeds."""
    head = ["network", "N", "stage cost", "seeds", "whole", *(f"M = {share}" for share in _SHARES)]
    rows = []
    for pair in pairs(results):
        for treatment, word in (("stage", "with"), ("plain", "without")):
            name = pair.name(treatment)
            seeds = results.seeds(name)
            found = [at_depth(results, name, seed, "test.accuracy") for seed in seeds]
            cells = [_percent([each[pair.depth] for each in found])]
            cells += [f"{_percent([each[M] for each in found])} ({M})" for M in kept(pair.depth)]
            rows.append([_words(pair), str(pair.depth), word, str(len(seeds)), *cells])
    for data, (whole, first, plain) in PUBLISHED.items():
        rows.append(
            [f"published: {data}, ResNet-54", "54", "with", "", f"{whole:.2f}", "", f"{first:.2f} (12)", "", ""]
        )
        rows.append([f"published: {data}, ResNet-54", "54", "without", "", f"{plain:.2f}", "", "", "", ""])
    return markdown_table(head, rows)


def early_exits(results: Results) -> str:
    """Test accuracy in percent and mean depth when samples stop at the first confident output; means over the seeds."""
    found = pairs(results)
    first = found[0].name("stage")
    thresholds = results.measurements(first, results.seeds(first)[0])["exits"]["thresholds"]
    rows = []
    for pair in found:
        for treatment, word in (("stage", "with"), ("plain", "without")):
            name = pair.name(treatment)
            exits = [results.measurements(name, seed)["exits"] for seed in results.seeds(name)]
            accuracy, depth = (np.mean([each[key] for each in exits], axis=0) for key in ("accuracy", "depth"))
            cells = [f"{100 * a:.2f} at {d:.1f}" for a, d in zip(accuracy, depth, strict=True)]
            rows.append([_words(pair), word, *cells])
    return markdown_table(["network", "stage cost", *(f"{threshold:g}" for threshold in thresholds)], rows)


def both_sides(results: Results) -> str:
    """Both sides of the bound, means over the seeds."""
    rows = []
    for title, M, trained, found in bounds(results):
        left, right = np.mean(np.asarray(found), axis=0)
        kept_by = sum(each.left <= each.right for each in found)
        of = "trained by itself" if trained else "the first blocks of the deep one"
        rows.append([title, str(M), of, f"{left:.4f}", f"{right:.4f}", f"{kept_by} of {len(found)}"])
    return markdown_table(
        ["network", "M", "network of M blocks", "left side", "right side", "seeds that keep it"], rows
    )


def _words(pair: Pair) -> str:
    return f"{pair.data}, {pair.kind}"


def _percent(values: list[float]) -> str:
    mean = 100 * np.mean(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {100 * np.std(values, ddof=1):.2f}"
