"""The judges of claims H1 to H8, with their thresholds, which were written down before the full runs.

Some rules were mended after records of the full runs had been seen, because they did not measure the claim: steps are
compared as they are, not by magnitude (H4, H5); an oscillation turns by more than the noise of the batches (H5); the
cost of looking for layers is judged after each iteration, too, and by its interval over turns, and the time saved is
that of the layers left (H6, H8); "similar" and "within a point" ask for whole intervals instead of means (H2, H3, H5,
H8). The page on claims says which verdicts that changed.

Accuracy is that on the test data after each epoch. Where a claim compares, "higher" means that the mean of the paired
differences is positive and, with three pairs or more, that their 95 % interval does not reach zero.
"""

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np
from jaxtyping import Float

from ....training import History
from ...intervals import Interval, interval_of, paired_interval
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
    return all(each.positive for each in found.values()), figures


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
    parts: Parts = {}
    figures: Figures = {}
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


def describe(all_: Iterable[float]) -> str:
    """Values over seeds as mean and range.

    Example:
        >>> describe([1.0, 2.0]), describe([])
        ('1.5 (1 .. 2)', 'never')
    """
    known = [value for value in all_ if not math.isnan(value)]
    return f"{np.mean(known):.4g} ({min(known):.4g} .. {max(known):.4g})" if known else "never"
