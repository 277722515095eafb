"""Claims A1 to A8: their judges, with their thresholds, which were written down before the full runs.

That dense networks are judged with their structural growth, and not only beyond it, was added afterwards (A7).
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from taulearn.app.results import Results

from ..intervals import Interval, paired_interval
from ..suite import Figures, Parts, Verdict
from .gradients import EXAMPLES, GRADIENT_STARTS, KINDS, PARTS, SLOPE
from .statistics import ABOUT, PRINTED, Figure, log_ratio, mean, measured, meshes_of, mse
from .trainings import COARSER, ORDERS, SCHEMES, STARTS, STEPS, mesh, reduction, setting

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
    parts, figures = Parts(), Figures()
    for scheme, order in product(SCHEMES, ORDERS):
        a, b = (setting("6-50", scheme, kind, order) for kind in STEPS)
        first = results.measurements(a, results.seeds(a, b)[0])["mse"]
        found = {step: log_ratio(results, a, b, mse(step)) for step in first}
        parts[f"faster with learned steps ({scheme} 6-50 {order})"] = all(each.negative for each in found.values())
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
    parts, figures = Parts(), Figures()
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
    parts, figures = Parts(), Figures()
    lowest = math.inf
    for (size, scheme, order), printed in PRINTED.items():
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


ORDER_TOLERANCE = 0.1
STABLE = 1.25
""" "Remains stable": the error on the finest mesh over that on the coarsest stays below this factor."""

COINCIDE = 0.05
"""Quiver plots "seem to coincide": arrows that differ by a twentieth of their length look the same in print."""

PRINTED_U3 = (-0.0051, 0.0077)


def networks_against_elements(results: Results) -> Verdict:
    """A4: L2 errors over the meshes; seeds are paired."""
    parts, figures = Parts(), Figures()
    ns = meshes_of(results)
    h, fem = (np.array([measured(key)(results, mesh(n), 0) for n in ns]) for key in ("h", "l2"))
    slope = float(np.polyfit(np.log(h), np.log(fem), 1)[0])
    parts["the finite elements are of order 1"] = abs(slope - 1) <= ORDER_TOLERANCE
    figures["order of the finite elements in L2"] = slope
    coarse, fine = (measured("cube", str(n)) for n in (ns[0], ns[-1]))
    coarsest = {n: measured("l2")(results, mesh(n), 0) for n in (*COARSER, ns[0])}
    firsts, ratios = [], []
    for size, scheme, kind, order in product(("2-50", "6-50"), SCHEMES, STEPS, ORDERS):
        name = setting(size, scheme, kind, order)
        first, last = mean(results, name, coarse), mean(results, name, fine)
        ratios.append(last / first)
        figures[f"L2 error on the cube, {size}, {scheme}, {kind}, {order}"] = last
        if size == "2-50":
            firsts.append(first)
            crossing = float(h[0] * (first / fem[0]) ** (1 / slope))
            figures[f"h from which the finite elements are better than {scheme}, {kind}, {order}, by their order"] = (
                crossing
            )
    for n, error in coarsest.items():
        parts[f"every network 2-50 beats the finite elements for n = {n}"] = max(firsts) < error
        parts[f"some network 2-50 beats the finite elements for n = {n}"] = min(firsts) < error
        figures[f"L2 error of the finite elements, n = {n}"] = error
    parts["the networks' errors stay stable"] = max(ratios) <= STABLE and min(ratios) >= 1 / STABLE
    figures["largest ratio of a network's errors, finest over coarsest mesh"] = max(ratios)
    comparisons: dict[str, list[tuple[str, str, Figure]]] = {
        "fractional better than ResNet on unseen data (2-50)": [
            (setting("2-50", "fractional", kind, order), setting("2-50", "resnet", kind, order), fine)
            for kind, order in product(STEPS, ORDERS)
        ],
        "ResNet better than fractional in training (2-50)": [
            (setting("2-50", "resnet", kind, order), setting("2-50", "fractional", kind, order), mse("end"))
            for kind, order in product(STEPS, ORDERS)
        ],
        "2-50 better than 6-50 on the cube": [
            (setting("2-50", scheme, kind, order), setting("6-50", scheme, kind, order), fine)
            for scheme, kind, order in product(SCHEMES, STEPS, ORDERS)
        ],
    }
    for words, pairs in comparisons.items():
        found = [log_ratio(results, a, b, figure) for a, b, figure in pairs]
        parts[words] = all(each.negative for each in found)
        figures |= {f"log error, {a} - {b}": str(each) for (a, b, _), each in zip(pairs, found, strict=True)}
    return Verdict.of(parts, figures)


def fractional_extrapolates(results: Results) -> Verdict:
    """A5: the error on the square outside the disc of the training data, 2-50 without bias ordering."""
    parts, figures = Parts(), Figures()
    outside = measured("square", "rms_outside")
    for kind in STEPS:
        a, b = (setting("2-50", scheme, kind, "plain") for scheme in ("fractional", "resnet"))
        each = log_ratio(results, a, b, outside)
        parts[f"fractional extrapolates better than ResNet with {kind} steps"] = each.negative
        figures[f"log error outside, fractional - resnet, {kind}"] = str(each)
        for name in (a, b):
            figures[f"root mean square error outside, {name}"] = mean(results, name, outside)
    a, b = (setting("2-50", "resnet", kind, "plain") for kind in STEPS)
    each = log_ratio(results, a, b, outside)
    parts["ResNet extrapolates slightly better with learned steps"] = each.negative
    figures["log error outside, resnet, learned - fixed"] = str(each)
    return Verdict.of(parts, figures)


def third_component_is_small(results: Results) -> Verdict:
    """A6: fractional 2-50 with learned steps in the cylinder, and the residual network beside it."""
    name, rival = (setting("2-50", scheme, "learned", "plain") for scheme in ("fractional", "resnet"))
    low, high = (mean(results, name, measured("inside", key)) for key in ("u3_min", "u3_max"))
    relative = mean(results, name, measured("inside", "relative_error"))
    better = log_ratio(results, rival, name, measured("inside", "mean_error"))
    parts = {
        "u3 within about the printed range": low >= ABOUT * PRINTED_U3[0] and high <= ABOUT * PRINTED_U3[1],
        "the quiver plots coincide": relative <= COINCIDE,
        "ResNet with learned steps does better": better.negative,
    }
    figures: Figures = {
        "smallest u3": low,
        "largest u3": high,
        "printed range of u3": f"{PRINTED_U3[0]} .. {PRINTED_U3[1]}",
        "relative error of (u1, u2)": relative,
        "mean error of (u1, u2), fractional": mean(results, name, measured("inside", "mean_error")),
        "mean error of (u1, u2), resnet": mean(results, rival, measured("inside", "mean_error")),
        "log mean error, resnet - fractional": str(better),
    }
    return Verdict.of(parts, figures)


EXACT = 1e-10
"""Relative error up to which two ways to compute a derivative in float64 agree: 128 layers of rounding stay below."""

NOTABLE = 1.0
"""Gradients vanish or explode if, with fixed steps, they change by this many orders of magnitude over the depth:
within a factor of ten, what there is to damp is not told from the differences between layers."""

DAMPED = 0.9
"""Damping takes away a tenth of these orders of magnitude at least: less is no cure, even where it is significant."""

Row = dict[str, Any]
Pairs = dict[tuple[str, int], np.ndarray]
"""(seeds, 2), fixed and learned, by start and depth."""


def gradients_are_damped(results: Results) -> Verdict:
    """A7: the recursions against automatic differentiation, and growth with learned against fixed steps, by pairs."""
    parts, figures = Parts(), Figures()
    rows = {scheme: _rows(results, scheme) for scheme in GRADIENT_STARTS}
    for scheme, cases in rows.items():
        _recursions(scheme, cases, parts, figures)
    for scheme, cases in rows.items():
        for part in PARTS:
            _damping(scheme, part, _pairs(cases, part, structural=scheme == "dense"), parts, figures)
            if scheme == "dense":
                _damping("dense beyond 2^(N-j-2)", part, _pairs(cases, part, structural=False), parts, figures)
    _examples(results, parts, figures)
    return Verdict.of(parts, figures)


def _rows(results: Results, scheme: str) -> dict[tuple[str, int], list[Row]]:
    """One row per seed, by start and depth."""
    name = f"gradients/{scheme}"
    found: dict[tuple[str, int], list[Row]] = {}
    for seed in results.seeds(name):
        for row in results.measurements(name, seed)["rows"]:
            found.setdefault((row["start"], row["depth"]), []).append(row)
    return found


def _recursions(scheme: str, cases: dict[tuple[str, int], list[Row]], parts: Parts, figures: Figures) -> None:
    every = [each for rows in cases.values() for row in rows for each in _errors(row)]
    diverged = sum(row[kind]["loss"] is None for rows in cases.values() for row in rows for kind in KINDS)
    figures[f"trainings that diverged, {scheme}"] = float(diverged)
    worst = {part: _worst(each[part] for each in every) for part in every[0]}
    parts[f"the recursions are exact to {EXACT:g} ({scheme})"] = max(worst[part] for part in PARTS) <= EXACT
    for part, error in worst.items():
        figures[f"largest relative error of the recursion, {scheme}, {part}"] = f"{error:.2g}"
    for part in [part for part in worst if part not in PARTS]:
        parts[f"the recursion is exact for {part} ({scheme})"] = worst[part] <= EXACT


def _errors(row: Row) -> list[dict[str, float | None]]:
    return [row["errors before"], *(row[kind]["errors"] for kind in KINDS if row[kind]["loss"] is not None)]


def _worst(errors: Iterator[float | None]) -> float:
    """The largest; what is not finite is no agreement."""
    return max(float("inf") if error is None else error for error in errors)


def _pairs(cases: dict[tuple[str, int], list[Row]], part: str, *, structural: bool) -> Pairs:
    """Orders of magnitude of fixed and of learned steps, of the seeds in which those of fixed steps are finite.

    Learned steps whose orders are not finite where those of fixed steps are count as infinitely many.
    """
    found: Pairs = {}
    for (start, depth), rows in cases.items():
        more = (depth - (2 if part == "propagator" else 3)) * math.log10(2) if structural else 0.0
        both = ([row[kind]["growth"][part] for kind in KINDS] for row in rows)
        finite = [(a, math.inf if b is None else b) for a, b in both if a is not None]
        found[start, depth] = np.array(finite, dtype=float).reshape(-1, 2) + more
    return found


def _damping(scheme: str, part: str, pairs: Pairs, parts: Parts, figures: Figures) -> None:
    """Whether every start and depth at which the gradients of fixed steps vanish (explode) is damped."""
    damped: dict[str, list[bool]] = {"vanishing": [], "exploding": []}
    lines: dict[str, list[str]] = {}
    lacking = [str(depth) for (_, depth), each in pairs.items() if not len(each)]
    but = [f"not finite for N = {' and '.join(lacking)}"] if lacking else []
    for (start, depth), (fixed, learned) in ((case, each.T) for case, each in pairs.items()):
        if not len(fixed):
            lines.setdefault(start, []).append(f"N = {depth}: not finite")
            continue
        finite = bool(np.isfinite(learned).all())
        change = paired_interval(np.abs(learned).tolist(), np.abs(fixed).tolist()) if finite else None
        if abs(fixed.mean()) >= NOTABLE:
            less = change is not None and is_damped(change, np.abs(fixed).mean())
            damped["exploding" if fixed.mean() > 0 else "vanishing"].append(less)
        words = f"N = {depth}: {fixed.mean():+.3g}, {learned.mean():+.3g}, of absolute values {change or 'not finite'}"
        lines.setdefault(start, []).append(words)
    for kind, found in damped.items():
        if found:
            parts[f"learned steps damp {kind} gradients ({', '.join([scheme, part, *but])})"] = all(found)
    for start, words_of in lines.items():
        name = f"log10 growth over the depth, fixed, learned, difference, {scheme} from {start}, {part}"
        figures[name] = "; ".join(words_of)


def is_damped(change: Interval, orders: float) -> bool:
    """Whether gradients of learned steps change by fewer orders of magnitude.

    Example:
        >>> is_damped(paired_interval([1.0, 1.1, 1.2], [2.0, 2.2, 2.3]), 2.2)
        True
        >>> is_damped(paired_interval([1.9, 2.1, 2.2], [2.0, 2.2, 2.3]), 2.2)  # a twentieth is not enough
        False
    """
    return change.negative and orders + change.mean <= DAMPED * orders


def _examples(results: Results, parts: Parts, figures: Figures) -> None:
    found = results.measurements(EXAMPLES, 0)
    agree = []
    for tau, each in found["6.3"].items():
        step = float(tau)
        agree += [
            np.allclose(each["far"], (1 + SLOPE * step) * np.array([1.0, 1.0, 2.0]), rtol=EXACT, atol=0.0),
            np.allclose(each["near"], [step, step, 2.0], rtol=EXACT, atol=0.0),
        ]
        for layer, name in ((0, "far"), (1, "near")):
            values = ", ".join(f"{value:.4g}" for value in each[name])
            figures[f"example 6.3, tau_1 = {tau}, d y_2 by W, b and tau of layer {layer}"] = values
    parts["example 6.3: a small step damps, and of its own layer shrinks the W- and b-parts alone"] = all(agree)
    parts["example 6.8: the closed forms, with a_{l-1,k}"] = max(found["6.8"].values()) <= EXACT
    for scheme, error in found["6.8"].items():
        figures[f"example 6.8, relative error, {scheme}"] = f"{error:.2g}"
