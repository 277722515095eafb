"""The judges of claims H6 and H8, about pruning while training, on Fashion-MNIST with the residual network."""

import numpy as np

from ....training import History
from ...results import Results
from ...suite import Verdict
from . import quantities as q
from .judges import FASHION, SIMILAR, Figures, Parts, describe, difference, final_accuracy, mean, values
from .members import DEPTHS, PRUNED, THRESHOLD, setting

VARIABLES_OF_A_LAYER = 10_101
"""Weights 100 x 100, biases 100, one time step."""

NOTICEABLE = 0.05
"""A cost is noticeable from a twentieth of the time of an epoch on: that much times of one program vary anyway."""

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
            worst = gap.mean if gap.n < 3 else gap.low
            parts[f"accuracy is kept within a point ({treatment})"] = worst > -SIMILAR
    l1 = setting(FASHION, "resnet", "l1-pruned")
    kept = [q.layers_left(results.history(l1, seed)) for seed in results.seeds(l1)]
    parts["only layers 0 and 5 remain with l1, in most seeds"] = sum(each == [0, 5] for each in kept) > len(kept) / 2
    figures["layers that remain with l1, by seed"] = "; ".join(", ".join(map(str, each)) for each in kept)
    sizes = {gone.parameters for seed in results.seeds(l1) for gone in results.history(l1, seed).deletions}
    if sizes:
        parts["each deletion removes 10,101 variables"] = sizes == {VARIABLES_OF_A_LAYER}
    times = _times(results, "resnet-6")
    rule, saved = times["each epoch"] / times["never"] - 1.0, 1.0 - times["2 layers"] / times["never"]
    parts["looking for layers to delete after each epoch costs nothing noticeable"] = rule < NOTICEABLE
    parts["the smaller network is faster"] = saved > NOTICEABLE
    figures["cost of looking after each epoch, share of its time"] = rule
    figures["cost of looking after each iteration, share of its time"] = times["each iteration"] / times["never"] - 1.0
    figures["time saved by a network with 2 of 6 layers"] = saved
    return Verdict.of(parts, figures)


def depth_is_found(results: Results) -> Verdict:
    """H8: the same number of layers and the same accuracy from any start, and more time saved from a deeper one."""
    parts: Parts = {}
    figures: Figures = {}
    left, accuracy, saved = {}, {}, {}
    for depth in (6, *DEPTHS):
        network = "resnet" if depth == 6 else f"resnet-{depth}"
        pruned, whole = setting(FASHION, network, "l1-pruned"), setting(FASHION, network, "l1")
        left[depth] = mean(results, pruned, number_left)
        accuracy[depth] = mean(results, pruned, final_accuracy)
        gap = difference(results, pruned, whole, final_accuracy)
        figures[f"layers left of {depth}"] = describe(values(results, pruned, results.seeds(pruned), number_left))
        figures[f"final accuracy from {depth} layers, pruned"] = accuracy[depth]
        figures[f"final accuracy from {depth} layers, pruned - unpruned"] = str(gap)
        parts[f"from {depth} layers accuracy is kept within a point"] = gap.mean > -SIMILAR
        times = _times(results, f"resnet-{depth}")
        survivors = sorted((int(name.split()[0]), t) for name, t in times.items() if name.endswith("layers"))
        counts, seconds = zip(*survivors, (depth, times["never"]), strict=True)
        saved[depth] = 1.0 - float(np.interp(left[depth], counts, seconds)) / times["never"]
        figures[f"time per epoch saved at the end, from {depth} layers"] = saved[depth]
    parts["the number of layers left does not depend on the start"] = (
        max(left.values()) - min(left.values()) <= SAME_DEPTH
    )
    parts["neither does the accuracy"] = max(accuracy.values()) - min(accuracy.values()) < SIMILAR
    parts["the time saved grows with the size"] = list(saved.values()) == sorted(saved.values())
    figures["threshold of the share"] = THRESHOLD
    return Verdict.of(parts, figures)


def _times(results: Results, network: str) -> dict[str, float]:
    """Seconds of an epoch by what is timed, measured in turn in one process."""
    name = f"time/{network}"
    return {key: float(value) for key, value in results.measurements(name, results.seeds(name)[0]).items()}
