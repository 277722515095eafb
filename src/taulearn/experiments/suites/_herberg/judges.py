"""The judges of claims H1 to H8, with their thresholds, which were written down before the full runs.

Accuracy is that on the test data after each epoch. Where a claim compares, "higher" means that the mean of the paired
differences is positive and, with three pairs or more, that their 95 % interval does not reach zero.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

from ....training import History
from ...intervals import Interval, paired_interval
from ...results import Results
from ...suite import Verdict
from . import quantities as q
from .members import DATA, LEARNED, NETWORKS, setting

EARLY_EPOCHS = (1, 5, 10, 20)
"""When "sooner" is judged: the first 20 of 200 epochs are where the curves of figure 4.1 lie apart."""

SIMILAR = 0.01
"""Accuracies are "similar" within one point: what cannot be told apart on the figures' axis from 0 to 1."""

MOST_EPOCHS = 0.95
""" "Throughout" and "during the first 100 epochs" ask for so many of the epochs: what one in twenty does cannot be seen
in figure 4.3."""

FASHION = DATA[0]

Parts = dict[str, bool]
Figures = dict[str, float | str]


def values(results: Results, name: str, seeds: Iterable[int], figure: Callable[[History], float]) -> list[float]:
    """A figure of the records of a setting, one for each seed."""
    return [figure(results.history(name, seed)) for seed in seeds]


def difference(results: Results, a: str, b: str, figure: Callable[[History], float]) -> Interval:
    """The paired difference a - b of a figure over the seeds that two settings share."""
    seeds = results.seeds(a, b)
    return paired_interval(*(values(results, name, seeds, figure) for name in (a, b)))


def mean(results: Results, name: str, figure: Callable[[History], float]) -> float:
    """The mean of a figure over all seeds of a setting."""
    return float(np.mean(values(results, name, results.seeds(name), figure)))


def higher(interval: Interval) -> bool:
    """Whether a difference counts as positive."""
    return interval.mean > 0 and (interval.n < 3 or interval.low > 0)


def final_accuracy(history: History) -> float:
    """Accuracy over the last epochs."""
    return q.final(q.accuracy(history))


def accuracy_after(epoch: int) -> Callable[[History], float]:
    """Accuracy after an epoch, as a figure of a record."""
    return lambda history: float(q.accuracy(history)[epoch])


def mean_of(column: str) -> Callable[[History], float]:
    """The mean of a column over all epochs, as a figure of a record."""
    return lambda history: q.mean_after_start(history.epochs[column])


def learned_beats_fixed(results: Results) -> Verdict:
    """H1: free against fixed."""
    parts: Parts = {}
    figures: Figures = {}
    for data in DATA:
        for network in NETWORKS:
            won, found = _beats_fixed(results, data, network, "free")
            parts[f"{network} on {data}"] = won
            figures |= found
    return Verdict.of(parts, figures)


def regularised_beats_fixed(results: Results) -> Verdict:
    """H7: each of the regularised treatments against fixed."""
    parts: Parts = {}
    figures: Figures = {}
    for data in DATA:
        for network in NETWORKS:
            for treatment in ("l1", "horizon", "dependent", "l1-horizon"):
                won, found = _beats_fixed(results, data, network, treatment)
                parts[f"{network} with {treatment} on {data}"] = won
                figures |= found
    return Verdict.of(parts, figures)


def _beats_fixed(results: Results, data: str, network: str, treatment: str) -> tuple[bool, Figures]:
    """Whether a treatment has the higher accuracy after each of the early epochs, and the larger area in all."""
    a, b = setting(data, network, treatment), setting(data, network, "fixed")
    shortest = min(len(q.accuracy(results.history(name, seed))) for name in (a, b) for seed in results.seeds(a, b))
    found = {f"after epoch {n}": difference(results, a, b, accuracy_after(n)) for n in EARLY_EPOCHS if n < shortest}
    found["mean over all epochs"] = difference(results, a, b, lambda h: q.mean_after_start(q.accuracy(h)))
    figures: Figures = {f"{treatment} - fixed, {network}, {data}, {name}": str(each) for name, each in found.items()}
    return all(map(higher, found.values())), figures


LOSSES = {
    "training loss with penalties": "train.total",
    "training loss on the data alone": "train.loss",
    "test loss": "validation.loss",
}


def similar_accuracy_larger_loss(results: Results) -> Verdict:
    """H2: residual network, the treatments against each other; each loss for itself, since totals hold the penalty."""
    parts: Parts = {}
    figures: Figures = {}
    for data in DATA:
        finals = {name: mean(results, setting(data, "resnet", name), final_accuracy) for name in LEARNED}
        spread = max(finals.values()) - min(finals.values())
        parts[f"similar accuracy on {data}"] = spread < SIMILAR
        figures |= {f"final accuracy, {name}, {data}": value for name, value in finals.items()}
        figures[f"spread of the final accuracies, {data}"] = spread
        for words, column in LOSSES.items():
            larger = True
            for a in ("l1", "horizon"):
                for b in ("free", "dependent"):
                    names = setting(data, "resnet", a), setting(data, "resnet", b)
                    found = difference(results, *names, mean_of(column))
                    larger = larger and higher(found)
                    figures[f"{words}, {a} - {b}, {data}, mean over all epochs"] = str(found)
            parts[f"larger {words} with l1 and horizon on {data}"] = larger
    return Verdict.of(parts, figures)


def horizon_restricts_fractional(results: Results) -> Verdict:
    """H3: fractional network, horizon penalty against free, l1, dependent, epoch by epoch in the means over seeds."""
    parts: Parts = {}
    figures: Figures = {}
    others = ("free", "l1", "dependent")
    for data in DATA:
        horizon = setting(data, "fractional", "horizon")
        names = [setting(data, "fractional", name) for name in others]
        lower, larger = {}, {}
        for name in names:
            seeds = results.seeds(horizon, name)
            gaps = np.mean(
                [q.accuracy(results.history(horizon, s)) - q.accuracy(results.history(name, s)) for s in seeds], axis=0
            )
            half = 1 + max(1, (len(gaps) - 1) // 2)
            lower[name] = float(np.mean(gaps[1:half] < 0))
            for words, column in LOSSES.items():
                loss = np.mean(
                    [
                        results.history(horizon, s).epochs[column] - results.history(name, s).epochs[column]
                        for s in seeds
                    ],
                    axis=0,
                )
                larger[words, name] = float(np.mean(loss[1:] > 0))
            figures[f"accuracy, horizon - {name}, mean over the first half of the epochs"] = float(gaps[1:half].mean())
            figures[f"share of the first half of the epochs with lower accuracy, against {name}"] = lower[name]
        figures |= {f"share of epochs with larger {words}, against {n}": v for (words, n), v in larger.items()}
        parts[f"lower accuracy in the first half of the epochs on {data}"] = min(lower.values()) >= MOST_EPOCHS
        for words in LOSSES:
            share = min(value for (each, _), value in larger.items() if each == words)
            parts[f"larger {words} throughout on {data}"] = share >= MOST_EPOCHS
        largest = {n: mean(results, n, lambda h: float(np.nanmax(q.last_taus(h)))) for n in (horizon, *names)}
        figures |= {f"largest step at the end, {name}": value for name, value in largest.items()}
        parts[f"smallest largest step on {data}"] = min(largest, key=lambda n: largest[n]) == horizon
    return Verdict.of(parts, figures)


def describe(all_: Iterable[float]) -> str:
    """Values over seeds as mean and range.

    Example:
        >>> describe([1.0, 2.0]), describe([])
        ('1.5 (1 .. 2)', 'never')
    """
    known = [value for value in all_ if not math.isnan(value)]
    return f"{np.mean(known):.4g} ({min(known):.4g} .. {max(known):.4g})" if known else "never"
