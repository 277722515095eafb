"""The judge of claim A7, with its thresholds, which were written down before results of the full runs were looked at.

That dense networks are judged with their structural growth, and not only beyond it, was added afterwards.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...intervals import Interval, paired_interval
from ...results import Results
from ...suite import Verdict
from .gradient_examples import SLOPE
from .gradients import EXAMPLES, KINDS, PARTS, STARTS
from .quantities import Figures, Parts

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
    parts: Parts = {}
    figures: Figures = {}
    rows = {scheme: _rows(results, scheme) for scheme in STARTS}
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

    Args:
        change: Of the absolute orders of magnitude, learned - fixed, paired over the seeds.
        orders: Those of the fixed steps, their mean.

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
