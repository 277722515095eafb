"""Intervals for paired comparisons over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


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

    @property
    def worst(self) -> float:
        """The lower end from three pairs on; the mean of fewer, whose interval says little."""
        return self.mean if self.n < 3 else self.low

    @property
    def positive(self) -> bool:
        """Whether the difference counts as positive: its mean is, and from three pairs on its whole interval."""
        return self.worst > 0

    @property
    def negative(self) -> bool:
        """Whether the difference counts as negative."""
        return (-self).positive

    @property
    def less(self) -> bool | None:
        """Whether the difference counts as negative; None where it counts as neither."""
        return self.negative if self.negative or self.positive else None

    def within(self, bound: float) -> bool:
        """Whether the difference counts as smaller than a bound, in either direction.

        Example:
            >>> Interval(0.004, -0.002, 0.010, 3).within(0.01), Interval(0.004, -0.002, 0.009, 3).within(0.01)
            (False, True)
        """
        return self.worst > -bound and (-self).worst > -bound

    def __neg__(self) -> "Interval":
        return Interval(-self.mean, -self.high, -self.low, self.n)

    def __str__(self) -> str:
        bounds = "no interval" if math.isnan(self.low) else f"{self.low:+.4g} .. {self.high:+.4g}"
        return f"{self.mean:+.4g} ({bounds}, n = {self.n})"


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The mean of a - b over pairs with its 95 % interval, after Student.

    Example:
        >>> print(paired_interval([0.90, 0.92, 0.91], [0.80, 0.83, 0.80]))
        +0.1 (+0.07516 .. +0.1248, n = 3)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"a and b must hold one value for each of the same seeds, got shapes {x.shape} and {y.shape}")
    return interval_of(x - y)


def interval_of(differences: Sequence[float] | Float[np.ndarray, " pairs"]) -> Interval:
    """The mean of differences with its 95 % interval, after Student.

    Example:
        >>> print(interval_of([0.10, 0.09, 0.11]))
        +0.1 (+0.07516 .. +0.1248, n = 3)
    """
    difference = np.asarray(differences, dtype=np.float64)
    mean, n = float(difference.mean()), len(difference)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
