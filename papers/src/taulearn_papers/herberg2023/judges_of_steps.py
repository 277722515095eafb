"""The judges of claims H4 and H5, about the course of the time steps on Fashion-MNIST."""

import math

import numpy as np

from ....training import History
from ....training.thinning import numbers
from ...results import Results
from ...suite import Verdict
from . import quantities as q
from .judges import FASHION, SIMILAR, Figures, Parts, describe, difference, final_accuracy, values
from .members import THRESHOLD, TREATMENTS, setting

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
    parts: Parts = {}
    figures: Figures = {}
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
    parts: Parts = {}
    figures: Figures = {}
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

    parts: Parts = {}
    figures: Figures = {}
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
    parts: Parts = {}
    figures: Figures = {}
    for word, name in regularised.items():
        found = difference(results, free, name, final_accuracy)
        parts[f"better without {word}"] = found.positive
        figures[f"final accuracy, free - {word}"] = str(found)
    return parts, figures
