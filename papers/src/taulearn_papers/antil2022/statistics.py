"""Figures of finished members, and how settings are compared by them.

Errors are compared by their logarithms, pair by pair over the seeds: "smaller" means that the mean of the paired
differences is negative and, with three pairs or more, that their 95 % interval does not reach zero.
"""

import math
from collections.abc import Callable

import numpy as np

from taulearn.app.results import NotMeasured, Results

from ..intervals import Interval, paired_interval
from .trainings import MESHES, QUICK_MESHES, mesh

ABOUT = 2.0
"""A printed error is met "about" within this factor: the article prints one digit and no seed."""


PRINTED: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("6-50", "resnet", "plain"): (0.92, 0.95, 0.99, 0.95, 0.92, 0.88),
    ("6-50", "resnet", "ordered"): (0.70, 0.94, 1.00, 0.96, 0.86, 0.70),
    ("6-50", "fractional", "plain"): (0.59, 0.70, 0.53, 0.34, 0.28, 0.30),
    ("6-50", "fractional", "ordered"): (0.67, 0.80, 0.78, 0.68, 0.44, 0.04),
    ("2-50", "resnet", "plain"): (0.84, 0.87),
    ("2-50", "resnet", "ordered"): (0.28, 0.51),
    ("2-50", "fractional", "plain"): (0.94, 0.93),
    ("2-50", "fractional", "ordered"): (0.85, 0.95),
}
"""The article's table 1: learned steps by size, scheme and bias ordering."""

NAMES = {"resnet": "ResNet", "fractional": "Frac-DNN"}

Figure = Callable[[Results, str, int], float]


def log_ratio(results: Results, a: str, b: str, figure: Figure) -> Interval:
    """The paired difference log(a) - log(b) of a positive figure over the seeds that two settings share."""
    seeds = results.seeds(a, b)
    return paired_interval(*([math.log(figure(results, name, seed)) for seed in seeds] for name in (a, b)))


def mean(results: Results, name: str, figure: Figure) -> float:
    """The mean of a figure over all seeds of a setting."""
    return float(np.mean([figure(results, name, seed) for seed in results.seeds(name)]))


def mse(step: str) -> Figure:
    """The mean squared error after a number of steps, or at the "end"."""
    return lambda results, name, seed: float(results.measurements(name, seed)["mse"][step])


def measured(*path: str) -> Figure:
    """A number in a member's measurements."""

    def figure(results: Results, name: str, seed: int) -> float:
        value = results.measurements(name, seed)
        for key in path:
            value = value[key]
        return float(value)  # type: ignore[arg-type]

    return figure


def meshes_of(results: Results) -> list[int]:
    """The meshes on which networks and finite elements are measured, coarse ones first."""
    found = [n for n in sorted({*MESHES, *QUICK_MESHES}) if mesh(n) in results.settings]
    if len(found) < 2:
        raise NotMeasured("the finite elements are measured on less than two meshes")
    return found
