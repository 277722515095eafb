"""The judges of claims H1 to H8, with their thresholds, which were written down before the full runs.

Accuracy is that on the test data after each epoch. "Higher" over seeds means that the 95 % interval of the paired
difference lies above zero where there are at least three pairs, and that the mean does where there are fewer.
"""

import math

import numpy as np

from ...intervals import Interval, paired_interval
from ...results import Results
from ...suite import Verdict
from .members import DATA, NETWORKS, setting

EARLY_EPOCHS = (1, 5, 10, 20)
"""When "sooner" is judged: the first 20 of 200 epochs are where the curves of figure 4.1 differ."""


def above_zero(interval: Interval) -> bool:
    """Whether a difference counts as positive."""
    return interval.mean > 0 if interval.n < 3 or math.isnan(interval.low) else interval.low > 0


def learned_beats_fixed(results: Results) -> Verdict:
    """H1: accuracy after some early epochs, and the area under the whole curve, learned minus fixed."""
    parts, figures = {}, {}
    for data in DATA:
        for network in NETWORKS:
            a, b = setting(data, network, "free"), setting(data, network, "fixed")
            seeds = results.seeds(a, b)
            curves = [[results.history(each, seed).epochs["validation.accuracy"] for seed in seeds] for each in (a, b)]
            epochs = [epoch for epoch in EARLY_EPOCHS if epoch < min(len(curve) for curve in curves[0] + curves[1])]
            differences = {
                f"epoch {n}": paired_interval([c[n] for c in curves[0]], [c[n] for c in curves[1]]) for n in epochs
            }
            differences["area"] = paired_interval(*([float(np.mean(c[1:])) for c in group] for group in curves))
            parts[f"{network} on {data}"] = all(map(above_zero, differences.values()))
            figures |= {f"{network} on {data}, {name}": str(value) for name, value in differences.items()}
    return Verdict.of(parts, figures)
