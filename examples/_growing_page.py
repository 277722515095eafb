"""The page of ``grow_and_prune.py``: tables, what holds, and the figure, from the cells alone.

A figure is the median of the evaluations in the last twentieth of the arithmetic, or of the seconds, that the grown
network of the same seed took; where the other one ended before, both are read there. Ways are compared by paired
ratios: t-intervals of differences of logarithms.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from _cells import Cell, read_cells, write_cells
from _shortening import interval, shown

WINDOW = 0.05
CURVES = ("work", "seconds", "loss", "accuracy")
HEAD = (
    "| way | layers | seeds | rate | 10^9 multiply-adds | seconds | loss, equal arithmetic | over grown's "
    "| loss, equal seconds | over grown's | accuracy, %, and less grown's |\n" + 11 * "|---" + "|"
)


def at(cell: Cell, column: str, limit: float, figure: str = "loss") -> float:
    """A figure where so much arithmetic ("work"), or so many "seconds", were spent, up to a hundredth."""
    before = [(x, y) for x, y in zip(cell[column], cell[figure], strict=True) if x <= 1.01 * limit]
    return statistics.median([y for x, y in before if x > (1 - WINDOW) * limit] or [before[-1][1]])


def held_out(cell: Cell) -> float:
    """The loss at the end of a training; that of tuning is on samples held out. Infinite where it diverged."""
    return at(cell, "work", cell["work"][-1]) if "work" in cell else math.inf


def ratio(values: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of paired ratios with its 95 % t-interval (NaN for a single pair)."""
    mean, half = interval([math.log(a / b) for a, b in zip(values, to, strict=True)])
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def judged(found: tuple[float, float, float]) -> tuple[str, str]:
    """A ratio of losses to the grown network's, as it is shown, and what it says of the grown network."""
    mean, low, high = found
    if math.isnan(low):
        return f"{mean:.2f}", "one seed"
    verdict = "better" if low > 1 else "worse" if high < 1 else "undecided"
    lowest, largest = f"{low:.2f}" if low >= 0.1 else f"{low:.1g}", f"{high:.2f}" if high < 100 else f"{high:,.0f}"
    return f"{mean:.2f} ({lowest} .. {largest})", verdict


def row_of(cells: Sequence[Cell], grown: Mapping[int, Cell]) -> tuple[list[str], dict[str, str]]:
    """The row of a way, and what is said of the grown network beside it, by the measure that is equal."""
    pairs = [(cell, grown[cell["seed"]]) for cell in cells]
    limits = {column: [min(c[column][-1], g[column][-1]) for c, g in pairs] for column in ("work", "seconds")}
    seconds = [np.interp(limit, c["work"], c["seconds"]) for limit, (c, _) in zip(limits["work"], pairs, strict=True)]
    first = cells[0]
    layers = dict.fromkeys((first["most"], first["layers"]))
    row = [first["way"], ", then ".join(map(str, layers)), str(len(cells)), f"{first['lr']:g}"]
    row += [f"{statistics.fmean(limits['work']) / 1e9:.3g}", f"{statistics.fmean(seconds):.1f}"]
    said = {}
    for column, measure in (("work", "arithmetic"), ("seconds", "seconds")):
        losses = [at(c, column, limit) for limit, (c, _) in zip(limits[column], pairs, strict=True)]
        own = [at(g, column, limit) for limit, (_, g) in zip(limits[column], pairs, strict=True)]
        found, verdict = judged(ratio(losses, own))
        row += [f"{statistics.geometric_mean(losses):.3g}", "" if first["way"] == "grown" else found]
        said[measure] = f"{verdict}, {found}"
    if not first["accuracy"]:
        return [*row, ""], said
    ends = list(zip(limits["work"], pairs, strict=True))
    right, own = ([100 * at(pair[i], "work", limit, "accuracy") for limit, pair in ends] for i in (0, 1))
    text = f"{statistics.fmean(right):.2f}"
    if first["way"] != "grown":
        text += f" ({shown([a - b for a, b in zip(right, own, strict=True)], 2, signed=True)})"
    return [*row, text], said


def draw(tables: Mapping[str, Sequence[Sequence[Cell]]], path: Path) -> None:
    """The loss over multiply-adds: medians over the seeds, and from the smallest to the largest."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(tables) / 2)
    figure = Figure(figsize=(12, 4.4 * rows), layout="tight")
    for place, (name, ways) in enumerate(tables.items(), 1):
        axis = figure.add_subplot(rows, 2, place)
        for cells in ways:
            work = np.geomspace(max(c["work"][0] for c in cells), min(c["work"][-1] for c in cells), 200)
            losses = np.exp([np.interp(work, cell["work"], np.log(cell["loss"])) for cell in cells])
            (line,) = axis.plot(work, np.median(losses, 0), label=f"{cells[0]['way']} ({len(cells)})")
            axis.fill_between(work, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15)
        axis.set(title=name, xscale="log", yscale="log", xlabel="multiply-adds", ylabel="test loss")
        axis.grid(alpha=0.3)
        axis.legend(title="way (seeds)")
    figure.savefig(path, dpi=110)


def shortened_cells(places: Sequence[Path], tuning_seed: int) -> list[Cell]:
    """Cells from folders of runs, and from pages made of them; of tuning only the end."""
    found = read_cells(places, "data", "way", "lr", "seed")
    for cell in found:
        if cell["seed"] == tuning_seed and "work" in cell:
            end = sum(work > (1 - WINDOW) * cell["work"][-1] for work in cell["work"])
            cell |= {name: cell[name][-end:] for name in CURVES}
    return found


def report(
    places: Sequence[Path],
    out: Path,
    remarks: str,
    plan: Mapping[str, tuple[str, int]],
    ways: Sequence[str],
    tuning_seed: int,
) -> str:
    """Write README.md, figure.png and the cells, of which alone they are made.

    Args:
        places: Folders of runs or of pages.
        out: Folder of the page.
        remarks: Said first.
        plan: By data set, what is said of it, and how many seeds there should be.
        ways: All of them; the grown one is first.
        tuning_seed: The one that is not measured.
    """
    cells = shortened_cells(places, tuning_seed)
    write_cells(cells, out)
    tables, holds, lack, lines = dict[str, list[list[Cell]]](), list[str](), list[str](), list[str]()
    for name, (about, seeds) in plan.items():
        mine = {way: [c for c in cells if (c["data"], c["way"]) == (name, way)] for way in ways}
        measured = {way: [cell for cell in mine[way] if cell["seed"] != tuning_seed] for way in ways}
        there = {way: {cell["seed"] for cell in measured[way]} for way in ways}
        gaps = {way: [str(seed) for seed in range(seeds) if seed not in there[way]] for way in ways}
        lack += [f"- {name}, {way}: seeds {', '.join(gap)}" for way, gap in gaps.items() if gap]
        tables[name] = [found for found in measured.values() if found]
        if not tables[name]:
            del tables[name]
            continue
        grown = {cell["seed"]: cell for cell in measured["grown"]}
        rows = [row_of(found, grown) for found in tables[name]]
        lines += ["", f"## {name}", "", about, "", HEAD, *("| " + " | ".join(row) + " |" for row, _ in rows)]
        tried = []
        for way in ways:
            tuned = [f"{c['lr']:g}: {held_out(c):.3g}" for c in mine[way] if c["seed"] == tuning_seed]
            tried += [f"{way} {', '.join(tuned)}"] if tuned else []
        lines += ["", f"Held out, by rate: {'; '.join(tried)}."]
        for row, said in rows[1:]:
            holds += [f"- {name}, equal {measure}, grown against {row[0]}: {words}" for measure, words in said.items()]
    draw(tables, out / "figure.png")
    versions = ", ".join(sorted({cell["torch"] for cell in cells}))
    first = ["# Grown and pruned", "", remarks, "", "![figure](figure.png)", "", "## What holds", "", *holds, *lines]
    last = ["", "## Not run", "", *(lack or ["Nothing: all cells of the plan are there."]), "", f"torch {versions}."]
    text = "\n".join(first + last) + "\n"
    (out / "README.md").write_text(text)
    return text
