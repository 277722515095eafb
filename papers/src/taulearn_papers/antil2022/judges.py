"""The judges of claims A1, A2, A3 and A8, with their thresholds, which were written down before the full runs."""

import math
from itertools import product

import numpy as np

from ...results import Results
from ...suite import Verdict
from . import tables
from .members import ORDERS, SCHEMES, STARTS, STEPS, reduction, setting
from .quantities import ABOUT, Figures, Parts, log_ratio, mean, measured, mse, smaller

ROUNDING = 1e-6
"""The objective "decreases monotonically" up to this share of itself: what float32 resolves, gradient and value being
computed by two different compiled functions."""

SAME_ERROR = 1.15
"""Errors that both print as 0.07 may differ by this factor."""

NEAR_THE_TABLE = 0.1
"""An entry of table 1 is met within this distance: learned steps lie between 0.04 and 1.00 there."""

SAME_ORDER = 0.7
"""Rank correlation from which six steps are in the order of the table; chance reaches it in one of fifteen cases."""

PRINTED_ERROR = 0.07


def learned_trains_faster(results: Results) -> Verdict:
    """A1: learned against fixed steps, 6-50, and how much more than for 2-50; the objective never rises."""
    parts: Parts = {}
    figures: Figures = {}
    for scheme, order in product(SCHEMES, ORDERS):
        a, b = (setting("6-50", scheme, kind, order) for kind in STEPS)
        first = results.measurements(a, results.seeds(a, b)[0])["mse"]
        found = {step: log_ratio(results, a, b, mse(step)) for step in first}
        parts[f"faster with learned steps ({scheme} 6-50 {order})"] = all(map(smaller, found.values()))
        for step, each in found.items():
            after = "at the end" if step == "end" else f"after {step} steps"
            figures[f"log MSE, learned - fixed, 6-50, {scheme}, {order}, {after}"] = str(each)
    gains = {size: _gain(results, size) for size in ("6-50", "2-50")}
    parts["the gain is larger for 6-50 than for 2-50"] = gains["6-50"] > gains["2-50"]
    figures |= {f"mean log gain of learned steps at the end, {size}": gain for size, gain in gains.items()}
    names = [setting("6-50", scheme, kind, order) for scheme, kind, order in product(SCHEMES, STEPS, ORDERS)]
    rise = max(measured("largest_rise")(results, name, seed) for name in names for seed in results.seeds(name))
    parts["the objective decreases monotonically"] = rise <= ROUNDING
    figures["largest relative rise of the objective in a step, 6-50"] = rise
    rises = [mean(results, name, measured("mse_rises")) for name in names if name.endswith("ordered")]
    figures["steps in which the mean squared error rises, 6-50 with bias ordering, mean"] = float(np.mean(rises))
    return Verdict.of(parts, figures)


def _gain(results: Results, size: str) -> float:
    pairs = [[setting(size, scheme, kind, order) for kind in STEPS] for scheme, order in product(SCHEMES, ORDERS)]
    return -float(np.mean([log_ratio(results, a, b, mse("end")).mean for a, b in pairs]))


def network_reduces(results: Results) -> Verdict:
    """A2: layers of the network 5-10 whose steps are near zero, and the error without them; means over the seeds."""
    parts: Parts = {}
    figures: Figures = {}
    for start in STARTS:
        name, words = reduction(start), f"tau {'= 1' if start == 'ones' else 'random'} at the start"
        seeds = results.seeds(name)
        rows = [results.measurements(name, seed) for seed in seeds]
        before = float(np.mean([row["before"] for row in rows]))
        papers = [set(row["near_zero"]) >= {1, 3, 4} for row in rows]
        parts[f"relative error about {PRINTED_ERROR} ({words})"] = 1 / ABOUT <= before / PRINTED_ERROR <= ABOUT
        parts[f"tau_1 and tau_3 and tau_4 near 0 ({words})"] = all(papers)
        parts[f"some layers near 0 ({words})"] = all(row["near_zero"] for row in rows)
        growth = {way: [row["after"][way] / row["before"] for row in rows] for way in rows[0]["after"]}
        parts[f"deleting the article's three layers keeps the error ({words})"] = max(growth["paper"]) <= SAME_ERROR
        deleted = [growth["near_zero"][i] for i, row in enumerate(rows) if row["near_zero"]]
        if deleted:
            parts[f"deleting the layers near 0 keeps the error ({words})"] = max(deleted) <= SAME_ERROR
        figures[f"relative test error before, {words}"] = before
        figures[f"layers near 0 by seed, {words}"] = "; ".join(str(row["near_zero"]) for row in rows)
        figures[f"tau of the first seed, {words}"] = ", ".join(f"{tau:.2f}" for tau in rows[0]["tau"])
        for way, ratios in growth.items():
            figures[f"error after over before, deleting {way}, by seed, {words}"] = ", ".join(
                f"{r:.3g}" for r in ratios
            )
        for way in rows[0]["further"]:
            error = float(np.mean([row["further"][way] for row in rows]))
            figures[f"relative test error after further steps, {way}, {words}"] = error
    return Verdict.of(parts, figures)


def steps_are_those_of_the_table(results: Results) -> Verdict:
    """A3: the learned steps against table 1, entry by entry and by their order; means over the seeds."""
    parts: Parts = {}
    figures: Figures = {}
    lowest = math.inf
    for (size, scheme, order), printed in tables.PRINTED.items():
        name = setting(size, scheme, "learned", order)
        taus = np.array([results.measurements(name, seed)["tau"] for seed in results.seeds(name)])
        if size == "6-50":
            lowest = min(lowest, float(taus.min()))
        tau = taus.mean(0)
        distance = float(np.abs(tau - printed).mean())
        parts[f"values ({scheme} {size} {order})"] = distance <= NEAR_THE_TABLE
        figures[f"tau, {size}, {scheme}, {order}"] = ", ".join(f"{value:.2f}" for value in tau)
        figures[f"mean distance to the table, {size}, {scheme}, {order}"] = distance
        if len(printed) > 2:
            agreement = rank_agreement(tau, np.array(printed))
            parts[f"their order ({scheme} {size} {order})"] = agreement >= SAME_ORDER
            figures[f"rank agreement, {size}, {scheme}, {order}"] = agreement
    parts["all steps of 6-50 are positive"] = lowest > 0
    figures["smallest step of 6-50"] = lowest
    return Verdict.of(parts, figures)


def rank_agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation.

    Args:
        a: (n,).
        b: (n,).

    Example:
        >>> rank_agreement(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.9]))
        1.0
    """
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def stable_in_the_initial_value(results: Results) -> Verdict:
    """A8: measured L1 distances against C = T E_{gamma,2}(L T^gamma), and against the printed exponential."""
    rows = results.measurements("stability", 0)["rows"]
    bounded = all(row["ratio"] <= row["bound"] for row in rows)
    exceeded = [row for row in rows if row["ratio"] > row["printed"]]
    figures: Figures = {}
    for row in rows:
        case = f"{row['problem']}, gamma = {row['gamma']}, L = {row['lipschitz']}"
        values = f"{row['ratio']:.4g}; C = {row['bound']:.4g}; printed growth {row['printed']:.4g}"
        figures[f"distance over initial distance, {case}"] = values
    parts = {
        "distances in L1 are bounded by C times the initial distance": bounded,
        "the printed exponential growth bounds them": not exceeded,
    }
    return Verdict.of(parts, figures)
