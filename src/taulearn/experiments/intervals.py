"""Intervals for paired comparisons over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """The mean of a difference with its 95 % interval.

    Attributes:
        mean: Mean of the differences.
        low: Lower end; NaN where a single pair tells nothing about the spread.
        high: Upper end.
        n: Number of pairs.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        bounds = "no interval" if math.isnan(self.low) else f"{self.low:+.4g} .. {self.high:+.4g}"
        return f"{self.mean:+.4g} ({bounds}, n = {self.n})"


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The mean of a - b over pairs with its 95 % interval, after Student.

    Args:
        a: One value per seed.
        b: The values of the same seeds, in the same order.

    Returns:
        Mean and interval; with one pair the interval is NaN.

    Raises:
        ValueError: If the numbers differ, or there is none.

    Example:
        >>> print(paired_interval([0.90, 0.92, 0.91], [0.80, 0.83, 0.80]))
        +0.1 (+0.07516 .. +0.1248, n = 3)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"a and b must hold one value for each of the same seeds, got shapes {x.shape} and {y.shape}")
    difference, n = x - y, len(x)
    mean = float(difference.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
