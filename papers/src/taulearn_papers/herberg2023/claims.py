"""Claims H1 to H8: their judges, with their thresholds, which were written down before the full runs.

Some rules were mended after records of the full runs had been seen, because they did not measure the claim: steps are
compared as they are, not by magnitude (H4, H5); an oscillation turns by more than the noise of the batches (H5); the
cost of looking for layers is judged after each iteration, too, and by its interval over turns, and the time saved is
that of the layers left (H6, H8); "similar" and "within a point" ask for whole intervals instead of means (H2, H3, H5,
H8). The page on claims says which verdicts that changed.

Accuracy is that on the test data after each epoch. Where a claim compares, "higher" means that the mean of the paired
differences is positive and, with three pairs or more, that their 95 % interval does not reach zero.
"""

import math
from itertools import combinations, pairwise, product

import numpy as np
from jaxtyping import Float

from taulearn.app.results import Results
from taulearn.training import History
from taulearn.training.thinned_records import numbers

from ..intervals import interval_of
from ..suite import Figures, Parts, Verdict
from . import statistics as q
from .statistics import accuracy_after, describe, difference, final_accuracy, mean, mean_of, values
from .trainings import DATA, DEPTHS, LEARNED, NETWORKS, PRUNED, THRESHOLD, TREATMENTS, setting

EARLY_EPOCHS = (1, 5, 10, 20)
"""When "sooner" is judged: the first 20 of 200 epochs are where the curves of figure 4.1 lie apart."""

SIMILAR = 0.01
"""Accuracies are "similar" within one point: what cannot be told apart on the figures' axis from 0 to 1."""

MOST_EPOCHS = 0.95
""" "Throughout" and "during the first 100 epochs" ask for so many of the epochs: what one in twenty does cannot be seen
in figure 4.3."""

FASHION = DATA[0]


def learned_beats_fixed(results: Results) -> Verdict:
    """H1: free against fixed."""
    return _beat_fixed(results, {"free": ""})


def regularised_beats_fixed(results: Results) -> Verdict:
    """H7: each of the regularised treatments against fixed."""
    return _beat_fixed(results, {name: f" with {name}" for name in ("l1", "horizon", "dependent", "l1-horizon")})


def _beat_fixed(results: Results, treatments: dict[str, str]) -> Verdict:
    """Whether treatments, with the words for them, do better than fixed steps in both networks on both data sets."""
    parts, figures = Parts(), Figures()
    for data, network, (treatment, words) in product(DATA, NETWORKS, treatments.items()):
        parts[f"{network}{words} on {data}"], found = _beats_fixed(results, data, network, treatment)
        figures |= found
    return Verdict.of(parts, figures)


def _beats_fixed(results: Results, data: str, network: str, treatment: str) -> tuple[bool, Figures]:
    """Whether a treatment has the higher accuracy after each of the early epochs, and the larger area in all."""
    a, b = setting(data, network, treatment), setting(data, network, "fixed")
    shortest = min(len(q.accuracy(results.history(name, seed))) for name in (a, b) for seed in results.seeds(a, b))
    found = {f"after epoch {n}": difference(results, a, b, accuracy_after(n)) for n in EARLY_EPOCHS if n < shortest}
    found["mean over all epochs"] = difference(results, a, b, lambda h: q.mean_after_start(q.accuracy(h)))
    figures: Figures = {f"{treatment} - fixed, {network}, {data}, {name}": str(each) for name, each in found.items()}
    return all(each.positive for each in found.values()), figures


LOSSES = {
    "training loss with penalties": "train.total",
    "training loss on the data alone": "train.loss",
    "test loss": "validation.loss",
}


def similar_accuracy_larger_loss(results: Results) -> Verdict:
    """H2: residual network, the treatments against each other; each loss for itself, since totals hold the penalty."""
    parts, figures = Parts(), Figures()
    for data in DATA:
        gaps = {
            (a, b): difference(results, setting(data, "resnet", a), setting(data, "resnet", b), final_accuracy)
            for a, b in combinations(LEARNED, 2)
        }
        parts[f"similar accuracy on {data}"] = all(gap.within(SIMILAR) for gap in gaps.values())
        for name in LEARNED:
            figures[f"final accuracy, {name}, {data}"] = mean(results, setting(data, "resnet", name), final_accuracy)
        figures |= {f"final accuracy, {a} - {b}, {data}": str(gap) for (a, b), gap in gaps.items()}
        for words, column in LOSSES.items():
            larger = True
            for a in ("l1", "horizon"):
                for b in ("free", "dependent"):
                    names = setting(data, "resnet", a), setting(data, "resnet", b)
                    found = difference(results, *names, mean_of(column))
                    larger = larger and found.positive
                    figures[f"{words}, {a} - {b}, {data}, mean over all epochs"] = str(found)
            parts[f"larger {words} with l1 and horizon on {data}"] = larger
    return Verdict.of(parts, figures)


def horizon_restricts_fractional(results: Results) -> Verdict:
    """H3: fractional network, horizon penalty against free, l1, dependent.

    Judged epoch by epoch in the means over seeds, and by the paired means over epochs.
    """
    parts, figures = Parts(), Figures()
    for data in DATA:
        lower, larger, smallest = True, dict.fromkeys(LOSSES, True), True
        for other in ("free", "l1", "dependent"):
            a, b = setting(data, "fractional", "horizon"), setting(data, "fractional", other)
            against = f"horizon - {other}, {data}"
            gaps = _gaps(results, a, b, "validation.accuracy")
            half = gaps[:, : max(1, gaps.shape[1] // 2)]
            found, share = interval_of(half.mean(1)), float(np.mean(half.mean(0) < 0))
            lower = lower and found.negative and share >= MOST_EPOCHS
            figures[f"accuracy, {against}, mean over the first half of the epochs"] = str(found)
            figures[f"share of the first half of the epochs with lower accuracy, {against}"] = share
            for words, column in LOSSES.items():
                gaps = _gaps(results, a, b, column)
                found, share = interval_of(gaps.mean(1)), float(np.mean(gaps.mean(0) > 0))
                larger[words] = larger[words] and found.positive and share >= MOST_EPOCHS
                figures[f"{words}, {against}, mean over all epochs"] = str(found)
                figures[f"share of epochs with larger {words}, {against}"] = share
            found = difference(results, a, b, lambda history: float(np.nanmax(q.last_taus(history))))
            smallest = smallest and found.negative
            figures[f"largest step at the end, {against}"] = str(found)
        parts[f"lower accuracy in the first half of the epochs on {data}"] = lower
        parts |= {f"larger {words} throughout on {data}": each for words, each in larger.items()}
        parts[f"smallest largest step on {data}"] = smallest
    return Verdict.of(parts, figures)


def _gaps(results: Results, a: str, b: str, column: str) -> Float[np.ndarray, "seeds epochs"]:
    """The difference a - b of a column after each epoch, one row for each common seed."""
    seeds = results.seeds(a, b)
    first, second = (
        np.array([results.history(name, seed).epochs[column][1:] for seed in seeds], dtype=np.float64)
        for name in (a, b)
    )
    return np.asarray(first - second)


FAR_LARGER = 2.0
"""A step is "far larger" than the next from twice its size on: its line then stands clear of the others."""

SMALLEST = 1e-3
"""Ratios are formed to no smaller step: records hold three digits."""

NEAR_HORIZON = 0.05
"""The sum "is" the horizon within a twentieth of it, what can be read off figures 4.4 and 4.5; beyond, it exceeds."""

MOST_ITERATIONS = 0.5
""" "Most" iterations are more than half of them."""

SHORTLY_AFTER_100 = (100, 200)
""" "A bit more than 100 iterations": up to twice as many, a third of a decade on the figure's axis."""

NEAR_1000 = (500, 2000)
""" "Approximately 1000": within a factor of two, a third of a decade to either side on the figure's axis."""

STAYS = 0.1
"""A step has been driven to zero, "where it remains", if it stays below the pruning threshold for the last tenth."""

CLOSE_TO_ZERO = 0.05
"""In the fractional figures, whose axes span about one: a line that cannot be told from the axis."""

TOOTH = NEAR_HORIZON
"""An oscillation turns by at least so much, which can be read off figure 4.5. The noise of the batches stays below: it
still moves the sum by 0.03 in the last half of the iterations, and would count as some thirty turns of one percent."""


def next_largest_ratio(history: History) -> float:
    """tau_0 over the largest of the others at the end; a negative step is small, whatever its magnitude."""
    tau = q.last_taus(history)
    return float(tau[0] / max(np.nanmax(tau[1:]), SMALLEST))


def largest_magnitude_ratio(history: History) -> float:
    """|tau_0| over the largest magnitude of the others, at the end."""
    magnitude = np.abs(q.last_taus(history))
    return float(magnitude[0] / max(np.nanmax(magnitude[1:]), SMALLEST))


def share_at_horizon(history: History) -> float:
    """The share of iterations in which the sum of the steps lies near T = 1."""
    return q.share_of_iterations(history, np.abs(q.sums(history) - 1.0) < NEAR_HORIZON)


def first_negative(history: History) -> float:
    """The first iteration in which a step with l >= 1 is negative."""
    return q.first_iteration(history, np.any(q.taus(history)[:, 1:] < 0, axis=1))


def driven_to_zero(history: History) -> float:
    """The number of steps that have been small for long at the end."""
    return float((q.small_for(history, THRESHOLD) >= STAYS).sum())


def residual_steps(results: Results) -> Verdict:
    """H4: the steps of the residual network."""
    parts, figures = Parts(), Figures()
    for treatment in (name for name in TREATMENTS if name != "fixed"):
        name = setting(FASHION, "resnet", treatment)
        seeds = results.seeds(name)
        ratios = values(results, name, seeds, next_largest_ratio)
        parts[f"tau_0 far larger ({treatment})"] = min(ratios) >= FAR_LARGER
        figures[f"tau_0 over the next largest step, {treatment}"] = describe(ratios)
        magnitudes = values(results, name, seeds, largest_magnitude_ratio)
        figures[f"|tau_0| over the next largest magnitude, {treatment}"] = describe(magnitudes)
        if "horizon" in treatment:
            near = values(results, name, seeds, share_at_horizon)
            parts[f"sum = 1 in most iterations ({treatment})"] = min(near) > MOST_ITERATIONS
            figures[f"share of iterations with sum near 1, {treatment}"] = describe(near)
            first = values(results, name, seeds, first_negative)
            parts[f"negative steps after a bit more than 100 iterations ({treatment})"] = all(
                map(_shortly_after, first)
            )
            figures[f"first iteration with a negative step, {treatment}"] = describe(first)
            figures[f"seeds without a negative step, {treatment}"] = float(np.isnan(first).sum())
        if "l1" in treatment:
            count = values(results, name, seeds, driven_to_zero)
            longest = values(results, name, seeds, lambda history: float(np.nanmax(q.small_for(history, THRESHOLD))))
            parts[f"some steps go to zero and stay ({treatment})"] = min(count) >= 1
            figures[f"steps driven to zero, {treatment}"] = describe(count)
            figures[f"longest stay below the threshold, share of all iterations, {treatment}"] = describe(longest)
    return Verdict.of(parts, figures)


def _shortly_after(iteration: float) -> bool:
    return not math.isnan(iteration) and SHORTLY_AFTER_100[0] <= iteration <= SHORTLY_AFTER_100[1]


def fractional_steps(results: Results) -> Verdict:
    """H5: the steps of the fractional network, raw and effective, and what regularisation costs it."""
    parts, figures = Parts(), Figures()
    free, l1, horizon, dependent, both = (
        setting(FASHION, "fractional", name) for name in ("free", "l1", "horizon", "dependent", "l1-horizon")
    )
    for part, found in (
        _free_steps(results, free),
        _damped_steps(results, free, l1, horizon),
        _sum_with_horizon(results, horizon),
        _dependent_step(results, free, dependent),
        _both(results, both),
        _worse_with_penalty(results, free, {"l1": l1, "horizon": horizon, "l1-horizon": both}),
    ):
        parts |= part
        figures |= found
    return Verdict.of(parts, figures)


def _free_steps(results: Results, free: str) -> tuple[Parts, Figures]:
    growth = [q.last_taus(results.history(free, s)) / q.taus(results.history(free, s))[0] for s in results.seeds(free)]
    ratio = values(results, free, results.seeds(free), next_largest_ratio)
    return {
        "all steps grow without regularisation": min(map(np.min, growth)) > 1,
        "tau_0 is the largest without regularisation": min(ratio) > 1,
    }, {
        "smallest growth of a step without regularisation, factor": describe(float(g.min()) for g in growth),
        "tau_0 over the next largest step, free": describe(ratio),
    }


def _damped_steps(results: Results, free: str, l1: str, horizon: str) -> tuple[Parts, Figures]:
    def total(history: History) -> float:
        return float(q.sums(history)[-1])

    parts, figures = Parts(), Figures()
    for word, name in (("l1", l1), ("horizon", horizon)):
        found = difference(results, free, name, total)
        parts[f"{word} damps the growth"] = found.positive
        figures[f"sum at the end, free - {word}"] = str(found)
    count = values(results, l1, results.seeds(l1), driven_to_zero)
    parts["l1 brings no step to zero"] = max(count) == 0
    figures["steps that l1 drives to zero"] = describe(count)
    return parts, figures


def _sum_with_horizon(results: Results, horizon: str) -> tuple[Parts, Figures]:
    records = [results.history(horizon, seed) for seed in results.seeds(horizon)]
    first = [q.first_iteration(record, q.sums(record) > 1.0 + NEAR_HORIZON) for record in records]
    peaks = [float(q.sums(record).max()) for record in records]
    ends = [float(q.sums(record)[-1]) for record in records]
    highest = [float(numbers(record)[np.argmax(q.sums(record))]) for record in records]
    turns = [_turns(record) for record in records]
    noise = [float(np.ptp(q.sums(record)[numbers(record) > numbers(record)[-1] // 2])) for record in records]
    return {
        "the sum exceeds 1 near iteration 1000 (horizon)": all(
            not math.isnan(n) and NEAR_1000[0] <= n <= NEAR_1000[1] for n in first
        ),
        "the sum comes back to 1 (horizon)": all(
            abs(end - 1.0) < NEAR_HORIZON and not math.isnan(n) for end, n in zip(ends, first, strict=True)
        ),
        "the sum oscillates on its way (horizon)": min(turns) >= 2,
    }, {
        "first iteration with a sum clearly above 1, horizon": describe(first),
        "iteration with the largest sum, horizon": describe(highest),
        "largest sum, horizon": describe(peaks),
        "sum at the end, horizon": describe(ends),
        f"turns by more than {TOOTH:g} once the sum is clearly above 1, horizon": describe(map(float, turns)),
        "range of the sum over the last half of the iterations, horizon": describe(noise),
    }


def _turns(record: History) -> int:
    """How often the sum turns from where it first is clearly above 1; 0 if it never is."""
    above = np.flatnonzero(q.sums(record) > 1.0 + NEAR_HORIZON)
    return q.reversals(q.sums(record)[above[0] :], TOOTH) if len(above) else 0


def _dependent_step(results: Results, free: str, dependent: str) -> tuple[Parts, Figures]:
    seeds = results.seeds(dependent)
    lowest = values(results, dependent, seeds, lambda history: float(np.nanmin(q.taus(history, raw=True)[:, -1])))
    last = values(results, dependent, seeds, lambda history: float(q.taus(history, raw=True)[-1, -1]))
    gap = difference(results, dependent, free, final_accuracy)
    return {
        "the raw dependent step passes through zero": max(lowest) < 0,
        "it does not blow up": gap.worst > -SIMILAR,
    }, {
        "smallest raw dependent step": describe(lowest),
        "raw dependent step at the end": describe(last),
        "final accuracy, dependent - free": str(gap),
    }


def _both(results: Results, both: str) -> tuple[Parts, Figures]:
    middle = [q.last_taus(results.history(both, seed))[1:5] for seed in results.seeds(both)]
    parts: Parts = {"tau_1 to tau_4 get close to zero (l1-horizon)": max(map(np.max, middle)) < CLOSE_TO_ZERO}
    return parts, {"largest of tau_1 to tau_4 at the end, l1-horizon": describe(float(each.max()) for each in middle)}


def _worse_with_penalty(results: Results, free: str, regularised: dict[str, str]) -> tuple[Parts, Figures]:
    parts, figures = Parts(), Figures()
    for word, name in regularised.items():
        found = difference(results, free, name, final_accuracy)
        parts[f"better without {word}"] = found.positive
        figures[f"final accuracy, free - {word}"] = str(found)
    return parts, figures


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
    parts, figures = Parts(), Figures()
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
    parts, figures = Parts(), Figures()
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
    """The share of an epoch's time that a network saves in which so many layers are left."""
    times = _times(results, depth)
    whole = float(np.median(times["never"]))
    measured = sorted((int(name.split()[0]), float(np.median(t))) for name, t in times.items() if "layers" in name)
    counts, seconds = zip(*measured, (depth, whole), strict=True)
    return 1.0 - float(np.interp(left, counts, seconds)) / whole


def _times(results: Results, depth: int) -> dict[str, Float[np.ndarray, " turns"]]:
    """Seconds of an epoch by what is timed, measured in turn in one process."""
    name = f"time/resnet-{depth}"
    return {key: np.array(value) for key, value in results.measurements(name, results.seeds(name)[0]).items()}
