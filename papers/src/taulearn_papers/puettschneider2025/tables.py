"""The first M blocks against the whole, beside the published figures; early exit; both sides of the bound."""

import numpy as np

from ...results import Results
from .members import kept
from .quantities import Pair, at_depth, bounds, pairs

PUBLISHED: dict[str, tuple[float, float, float]] = {
    "MNIST": (99.62, 99.54, 99.64),
    "CIFAR-10": (91.59, 91.02, 93.05),
    "CIFAR-100": (69.97, 66.55, 71.94),
}
"""Test accuracy of ResNet-54 with stage cost, of its first 12 blocks, and without stage cost (second-hand figures)."""

_SHARES = ("N/9", "2N/9", "N/3", "N/2")


def first_blocks(results: Results) -> str:
    """Test accuracy in percent of the whole network and of its first M blocks, mean ± standard deviation over seeds.

    Args:
        results: The records.

    Raises:
        NotMeasured: If no network is finished with and without stage cost.
    """
    head = ["network", "N", "stage cost", "seeds", "whole", *(f"M = {share}" for share in _SHARES)]
    rows = []
    for pair in pairs(results):
        for treatment, word in (("stage", "with"), ("plain", "without")):
            name = pair.name(treatment)
            seeds = results.seeds(name)
            found = [at_depth(results, name, seed, "test.accuracy") for seed in seeds]
            cells = [_percent([each[pair.depth] for each in found])]
            cells += [f"{_percent([each[M] for each in found])} ({M})" for M in kept(pair.depth)]
            rows.append([_title(pair), str(pair.depth), word, str(len(seeds)), *cells])
    for data, (whole, first, plain) in PUBLISHED.items():
        rows.append(
            [f"published: {data}, ResNet-54", "54", "with", "", f"{whole:.2f}", "", f"{first:.2f} (12)", "", ""]
        )
        rows.append([f"published: {data}, ResNet-54", "54", "without", "", f"{plain:.2f}", "", "", "", ""])
    return _table(head, rows)


def early_exits(results: Results) -> str:
    """Test accuracy in percent and mean depth when samples stop at the first confident output; means over the seeds.

    Args:
        results: The records.

    Raises:
        NotMeasured: If no network is finished with and without stage cost.
    """
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
            rows.append([_title(pair), word, *cells])
    return _table(["network", "stage cost", *(f"{threshold:g}" for threshold in thresholds)], rows)


def both_sides(results: Results) -> str:
    """Both sides of the bound, means over the seeds.

    Args:
        results: The records.

    Raises:
        NotMeasured: If no network is finished with and without stage cost.
    """
    rows = []
    for title, M, trained, found in bounds(results):
        left, right = np.mean(np.asarray(found), axis=0)
        kept_by = sum(each.left <= each.right for each in found)
        of = "trained by itself" if trained else "the first blocks of the deep one"
        rows.append([title, str(M), of, f"{left:.4f}", f"{right:.4f}", f"{kept_by} of {len(found)}"])
    return _table(["network", "M", "network of M blocks", "left side", "right side", "seeds that keep it"], rows)


def _title(pair: Pair) -> str:
    return f"{pair.data}, {pair.kind}"


def _percent(values: list[float]) -> str:
    mean = 100 * np.mean(values)
    return f"{mean:.2f}" if len(values) < 2 else f"{mean:.2f} ± {100 * np.std(values, ddof=1):.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
