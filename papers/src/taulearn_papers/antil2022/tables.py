"""Table 1 beside the printed one; and what the article mentions without figures: toy problems, other optimisers."""

from itertools import product
from typing import Any

import numpy as np

from ...results import NotMeasured, Results
from .members import OPTIMIZERS, SCHEMES, STEPS, TOYS, other, setting, toy

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
ORDERS = {"plain": "", "ordered": ", B.O."}


def table_1(results: Results) -> str:
    """The learned steps, mean and standard deviation over the seeds, beside the printed ones.

    Args:
        results: The records.

    Raises:
        NotMeasured: If no network with learned steps is finished.
    """
    lines = ["| network | step | printed | here | seeds |", "|---|---|---|---|---|"]
    for (size, scheme, order), printed in PRINTED.items():
        name = setting(size, scheme, "learned", order)
        if name not in results.settings:
            continue
        taus = np.array([results.measurements(name, seed)["tau"] for seed in results.seeds(name)])
        for l, value in enumerate(printed):
            spread = f" ± {taus[:, l].std(ddof=1):.2f}" if len(taus) > 1 else ""
            first = f"{size} {NAMES[scheme]}{ORDERS[order]}" if l == 0 else ""
            lines.append(f"| {first} | tau_{l} | {value:.2f} | {taus[:, l].mean():.2f}{spread} | {len(taus)} |")
    if len(lines) == 2:
        raise NotMeasured("no network with learned steps is finished")
    return "\n".join(lines) + "\n"


def toys(results: Results) -> str:
    """Test loss on the toy problems, learned and fixed steps: geometric means over the seeds.

    Args:
        results: The records.

    Raises:
        NotMeasured: If no toy problem is finished.
    """
    lines = ["| problem | network | learned steps | fixed steps | seeds |", "|---|---|---|---|---|"]
    for data, scheme in product(TOYS, SCHEMES):
        names = [toy(data, scheme, kind) for kind in STEPS]
        if not set(names) <= set(results.settings):
            continue
        seeds = results.seeds(*names)
        cells = [_geometric([results.measurements(name, seed)["test.loss"] for seed in seeds]) for name in names]
        lines.append(f"| {data} | {NAMES[scheme]} | {' | '.join(cells)} | {len(seeds)} |")
    if len(lines) == 2:
        raise NotMeasured("no toy problem is finished")
    return "\n".join(lines) + "\n"


def optimizers(results: Results) -> str:
    """Final errors of the residual network 6-50 with three optimisers; on the cube at the points of the finest mesh.

    Args:
        results: The records.

    Raises:
        NotMeasured: If none of them is finished.
    """
    lines = [
        "| optimiser | steps | MSE | relative test error | L2 error on the cube | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for words, kind in product(("steepest descent", *OPTIMIZERS), STEPS):
        name = other(words, kind) if words in OPTIMIZERS else setting("6-50", "resnet", kind, "plain")
        if name not in results.settings:
            continue
        rows = [results.measurements(name, seed) for seed in results.seeds(name)]
        columns = (
            [row["mse"]["end"] for row in rows],
            [row["test_error"] for row in rows],
            [_finest(row) for row in rows],
        )
        cells = [_geometric(column) for column in columns]
        lines.append(f"| {words} | {kind} | {' | '.join(cells)} | {len(rows)} |")
    if len(lines) == 2:
        raise NotMeasured("no optimiser is finished")
    return "\n".join(lines) + "\n"


def _finest(row: dict[str, Any]) -> float:
    cube: dict[str, float] = row["cube"]
    return cube[max(cube, key=int)]


def _geometric(values: list[float]) -> str:
    return f"{np.exp(np.mean(np.log(values))):.3g}" if min(values) > 0.0 else f"{np.mean(values):.3g}"
