"""Numbers and arrays that the judges look at: of one record, a :class:`~taulearn.training.History`, and of all seeds.

Records are thinned, so each row stands for the iterations up to the next one: shares of iterations are weighted so.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float

from taulearn.app.results import Results
from taulearn.training import History
from taulearn.training.thinned_records import numbers

from ..intervals import Interval, paired_interval

LAST_EPOCHS = 10
"""Epochs that a final figure is the mean of: a single epoch's test accuracy jumps by some tenths of a point."""


def accuracy(history: History) -> Float[np.ndarray, " epochs"]:
    """Accuracy on the test data, before training and after each epoch."""
    return np.asarray(history.epochs["validation.accuracy"], dtype=np.float64)


def final(column: Float[np.ndarray, " epochs"]) -> float:
    """The mean of a column over the last epochs; of a short training over its last tenth.

    Example:
        >>> final(np.array([0.0, 1.0, 3.0]))
        3.0
    """
    return float(np.mean(column[-max(1, min(LAST_EPOCHS, (len(column) - 1) // 10)) :]))


def mean_after_start(column: Float[np.ndarray, " epochs"]) -> float:
    """The mean over all epochs but the state before training: the area under a curve, over the number of epochs."""
    return float(np.nanmean(column[1:]))


def taus(history: History, *, raw: bool = False) -> Float[np.ndarray, "rows layers"]:
    """The steps in each row, NaN once deleted; those before the lower bound was applied where they differ."""
    name = "raw_tau" if raw and "raw_tau" in history.iterations else "tau"
    return np.asarray(history.iterations[name], dtype=np.float64)


def last_taus(history: History, *, raw: bool = False) -> Float[np.ndarray, " layers"]:
    """The steps of the last iteration."""
    return taus(history, raw=raw)[-1]


def weights(history: History) -> Float[np.ndarray, " rows"]:
    """The share of all iterations that each row stands for; they add up to 1."""
    there = numbers(history)
    return np.diff(np.append(there, there[-1] + 1)) / there[-1]


def share_of_iterations(history: History, where: Bool[np.ndarray, " rows"]) -> float:
    """The share of the iterations for which something holds.

    Example:
        >>> record = History({"iteration": np.array([1, 2, 8]), "loss": np.zeros(3)})
        >>> share_of_iterations(record, np.array([False, True, True]))
        0.875
    """
    return float(weights(history)[where].sum())


def first_iteration(history: History, where: Bool[np.ndarray, " rows"]) -> float:
    """The first recorded iteration for which something holds, NaN where there is none."""
    rows = np.flatnonzero(where)
    return float(numbers(history)[rows[0]]) if len(rows) else float("nan")


def sums(history: History) -> Float[np.ndarray, " rows"]:
    """The sum of the steps that are there in each row."""
    return np.asarray(np.nansum(taus(history), axis=1))


def shares(history: History) -> Float[np.ndarray, "rows layers"]:
    """Each step's share of the sum of the magnitudes."""
    magnitude = np.abs(taus(history))
    return np.asarray(magnitude / np.nansum(magnitude, axis=1, keepdims=True))


def small_for(history: History, bound: float) -> Float[np.ndarray, " layers"]:
    """For how large a share of all iterations, counted from the end, each layer's share has stayed below a bound.

    Example:
        >>> tau = np.array([[1.0, 1.0], [1.0, 0.001], [1.0, 0.0]])
        >>> small_for(History({"tau": tau, "loss": np.zeros(3)}), 0.01).round(2).tolist()
        [0.0, 0.67]
    """
    weight, small = weights(history), shares(history) < bound
    stayed = np.cumprod(small[::-1], axis=0)[::-1].astype(np.float64)
    return np.asarray(np.where(np.isfinite(taus(history)[-1]), weight @ stayed, np.nan))


def layers_left(history: History) -> list[int]:
    """The numbers at the start of the layers that are there at the end."""
    gone = {deletion.layer for deletion in history.deletions}
    return [layer for layer in range(taus(history).shape[1]) if layer not in gone]


def reversals(values: Float[np.ndarray, " rows"], amplitude: float) -> int:
    """How often a series turns by at least an amplitude: the teeth of a zigzag, noise left out.

    Example:
        >>> reversals(np.array([0.0, 1.0, 0.99, 1.2, 0.5, 0.8]), 0.1)
        2
    """
    turns, direction, extreme = 0, 0, float(values[0])
    for value in map(float, values):
        if direction * (value - extreme) > 0 or (direction == 0 and abs(value - extreme) >= amplitude):
            direction = direction or (1 if value > extreme else -1)
            extreme = value
        elif direction and abs(value - extreme) >= amplitude:
            turns, direction, extreme = turns + 1, -direction, value
    return turns


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
    return final(accuracy(history))


def accuracy_after(epoch: int) -> Callable[[History], float]:
    """Accuracy after an epoch, as a figure of a record."""
    return lambda history: float(accuracy(history)[epoch])


def mean_of(column: str) -> Callable[[History], float]:
    """The mean of a column over all epochs, as a figure of a record."""
    return lambda history: mean_after_start(history.epochs[column])


def describe(all_: Iterable[float]) -> str:
    """Values over seeds as mean and range.

    Example:
        >>> describe([1.0, 2.0]), describe([])
        ('1.5 (1 .. 2)', 'never')
    """
    known = [value for value in all_ if not math.isnan(value)]
    return f"{np.mean(known):.4g} ({min(known):.4g} .. {max(known):.4g})" if known else "never"
