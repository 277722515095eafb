"""The judges of claims A4, A5 and A6, with their thresholds, which were written down before the full runs."""

from itertools import product

import numpy as np

from ...results import Results
from ...suite import Verdict
from .members import COARSER, ORDERS, SCHEMES, STEPS, mesh, setting
from .quantities import ABOUT, Figure, Figures, Parts, log_ratio, mean, measured, meshes_of, mse, smaller

ORDER_TOLERANCE = 0.1
STABLE = 1.25
""" "Remains stable": the error on the finest mesh over that on the coarsest stays below this factor."""

COINCIDE = 0.05
"""Quiver plots "seem to coincide": arrows that differ by a twentieth of their length look the same in print."""

PRINTED_U3 = (-0.0051, 0.0077)


def networks_against_elements(results: Results) -> Verdict:
    """A4: L2 errors over the meshes; seeds are paired."""
    parts: Parts = {}
    figures: Figures = {}
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
        parts[words] = all(map(smaller, found))
        figures |= {f"log error, {a} - {b}": str(each) for (a, b, _), each in zip(pairs, found, strict=True)}
    return Verdict.of(parts, figures)


def fractional_extrapolates(results: Results) -> Verdict:
    """A5: the error on the square outside the disc of the training data, 2-50 without bias ordering."""
    parts: Parts = {}
    figures: Figures = {}
    outside = measured("square", "rms_outside")
    for kind in STEPS:
        a, b = (setting("2-50", scheme, kind, "plain") for scheme in ("fractional", "resnet"))
        each = log_ratio(results, a, b, outside)
        parts[f"fractional extrapolates better than ResNet with {kind} steps"] = smaller(each)
        figures[f"log error outside, fractional - resnet, {kind}"] = str(each)
        for name in (a, b):
            figures[f"root mean square error outside, {name}"] = mean(results, name, outside)
    a, b = (setting("2-50", "resnet", kind, "plain") for kind in STEPS)
    each = log_ratio(results, a, b, outside)
    parts["ResNet extrapolates slightly better with learned steps"] = smaller(each)
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
        "ResNet with learned steps does better": smaller(better),
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
