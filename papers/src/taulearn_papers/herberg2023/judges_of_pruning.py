"""The judges of claims H6 and H8, about pruning while training, on Fashion-MNIST with the residual network."""

from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Float

from ....training import History
from ...intervals import interval_of
from ...results import Results
from ...suite import Verdict
from . import quantities as q
from .judges import FASHION, SIMILAR, Figures, Parts, describe, difference, final_accuracy, mean, values
from .members import DEPTHS, PRUNED, THRESHOLD, setting

VARIABLES_OF_A_LAYER = 10_101
"""Weights 100 x 100, biases 100, one time step."""

NOTICEABLE = 0.05
"""A cost is noticeable from a twentieth of the time of an epoch on: that much times of one program vary anyway. It is
not if the whole interval over the turns lies below."""

SAME_DEPTH = 1.0
"""Starts lead to "the same" depth if the mean numbers of layers left differ by at most one."""


def number_left(history: History) -> float:
    """The number of layers at the end."""
    return float(len(q.layers_left(history)))


def pruning_succeeds(results: Results) -> Verdict:
    """H6: what is deleted, what it costs, what it saves."""
    parts: Parts = {}
    figures: Figures = {}
    for treatment in PRUNED:
        name = setting(FASHION, "resnet", f"{treatment}-pruned")
        if "l1" not in treatment and name not in results.settings:
            continue
        left = values(results, name, results.seeds(name), number_left)
        figures[f"layers left, {treatment}"] = describe(left)
        figures[f"variables left, {treatment}"] = describe(
            values(results, name, results.seeds(name), lambda history: float(history.epochs["parameters"][-1]))
        )
        gap = difference(results, name, setting(FASHION, "resnet", treatment), final_accuracy)
        figures[f"final accuracy, pruned - unpruned, {treatment}"] = str(gap)
        if "l1" in treatment:
            parts[f"layers are deleted ({treatment})"] = max(left) < 6
            parts[f"accuracy is kept within a point ({treatment})"] = gap.worst > -SIMILAR
    l1 = setting(FASHION, "resnet", "l1-pruned")
    kept = [q.layers_left(results.history(l1, seed)) for seed in results.seeds(l1)]
    parts["only layers 0 and 5 remain with l1, in most seeds"] = sum(each == [0, 5] for each in kept) > len(kept) / 2
    figures["layers that remain with l1, by seed"] = "; ".join(", ".join(map(str, each)) for each in kept)
    sizes = {gone.parameters for seed in results.seeds(l1) for gone in results.history(l1, seed).deletions}
    parts["each deletion removes 10,101 variables"] = sizes == {VARIABLES_OF_A_LAYER}
    times = _times(results, 6)
    for when in ("each iteration", "each epoch"):
        cost = interval_of(times[when] / times["never"] - 1.0)
        parts[f"looking for layers to delete after {when} costs nothing noticeable"] = (-cost).worst > -NOTICEABLE
        figures[f"cost of looking after {when}, share of the time of an epoch, over turns"] = str(cost)
    saved = time_saved(results, 6, mean(results, l1, number_left))
    parts["the network that pruning leaves with l1 is faster"] = saved > NOTICEABLE
    figures["time per epoch saved by the network that pruning leaves with l1"] = saved
    return Verdict.of(parts, figures)


def depth_is_found(results: Results) -> Verdict:
    """H8: the same number of layers and the same accuracy from any start, and more time saved from a deeper one."""
    parts: Parts = {}
    figures: Figures = {}
    left, pruned, saved = {}, {}, {}
    for depth in (6, *DEPTHS):
        network = "resnet" if depth == 6 else f"resnet-{depth}"
        name = pruned[depth] = setting(FASHION, network, "l1-pruned")
        left[depth] = mean(results, name, number_left)
        gap = difference(results, name, setting(FASHION, network, "l1"), final_accuracy)
        figures[f"layers left of {depth}"] = describe(values(results, name, results.seeds(name), number_left))
        figures[f"final accuracy from {depth} layers, pruned"] = mean(results, name, final_accuracy)
        figures[f"final accuracy from {depth} layers, pruned - unpruned"] = str(gap)
        parts[f"from {depth} layers accuracy is kept within a point"] = gap.worst > -SIMILAR
        saved[depth] = time_saved(results, depth, left[depth])
        figures[f"time per epoch saved at the end, from {depth} layers"] = saved[depth]
    parts["the number of layers left does not depend on the start"] = (
        max(left.values()) - min(left.values()) <= SAME_DEPTH
    )
    gaps = {(a, b): difference(results, pruned[a], pruned[b], final_accuracy) for a, b in combinations(pruned, 2)}
    parts["neither does the accuracy"] = all(gap.within(SIMILAR) for gap in gaps.values())
    figures |= {f"final accuracy, pruned, from {a} - from {b} layers": str(gap) for (a, b), gap in gaps.items()}
    parts["time is saved from every size"] = min(saved.values()) > NOTICEABLE
    parts["the time saved grows with the size"] = all(a < b for a, b in pairwise(saved.values()))
    figures["threshold of the share"] = THRESHOLD
    return Verdict.of(parts, figures)


def time_saved(results: Results, depth: int, left: float) -> float:
    """The share of an epoch's time that a network saves in which so many layers are left.

    Args:
        results: The records.
        depth: Layers at the start.
        left: Layers left, a mean over seeds; times are interpolated between the sizes that were measured.
    """
    times = _times(results, depth)
    whole = float(np.median(times["never"]))
    measured = sorted((int(name.split()[0]), float(np.median(t))) for name, t in times.items() if "layers" in name)
    counts, seconds = zip(*measured, (depth, whole), strict=True)
    return 1.0 - float(np.interp(left, counts, seconds)) / whole


def _times(results: Results, depth: int) -> dict[str, Float[np.ndarray, " turns"]]:
    """Seconds of an epoch by what is timed, measured in turn in one process."""
    name = f"time/resnet-{depth}"
    return {key: np.array(value) for key, value in results.measurements(name, results.seeds(name)[0]).items()}
