"""Questions that the papers leave open: which horizon, which penalty, pruning the fractional network, generalisation.

Setting of Herberg, Herzog, Koehne (2023) on Fashion-MNIST: 6 hidden layers of width 100, batches of 100, SGD with rate
0.01. The questions are ours, and so are the thresholds, which were written down before the trainings.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from taulearn.app.config import TrainConfig
from taulearn.app.members import Member
from taulearn.app.results import Results
from taulearn.report.seed_bands import epoch_bands

from .axes_and_tables import new_axes
from .herberg2023 import statistics as q
from .herberg2023.claims import SIMILAR
from .herberg2023.figures import records
from .herberg2023.statistics import describe, difference, final_accuracy, values
from .intervals import interval_of, paired_interval
from .suite import Claim, Figures, Parts, Suite, Verdict, generalisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = "fashion-mnist"
HORIZONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
TREATMENTS: dict[str, dict[str, Any]] = {
    "fixed": {"constraint": "fixed"},
    "free": {},
    "simplex": {"constraint": "simplex"},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "l1": {"l1": 0.01},
    "l1-proximal": {"l1": 0.01, "proximal": True},
    "l2": {"l2": 0.01},
    "group-lasso": {"group_lasso": 0.001},
}
"""The l1 weight is the paper's; l2 has the same. The group lasso, whose norms are about a hundred times as large as the
steps, has a tenth of it."""

THRESHOLD = 0.01
FULL_EPOCHS, QUICK_EPOCHS, FULL_SEEDS, QUICK_SEEDS = 200, 5, 3, 1


def members(quick: bool = False, seeds: int | None = None) -> list[Member]:
    """All trainings, seed by seed.

    Example:
        >>> len(members())
        90
    """
    table: list[tuple[str, dict[str, Any]]] = [
        (f"horizon/T={horizon:g}/{name}", {"horizon": horizon, **options})
        for horizon in HORIZONS
        for name, options in TREATMENTS.items()
    ]
    for name, options in PENALTIES.items():
        table.append((f"penalty/{name}/whole", options))
        table.append((f"penalty/{name}/pruned", {"prune": THRESHOLD, **options}))
    fractional = {"network": "fractional", "l1": 0.01, "proximal": True}
    table += [("fractional/whole", fractional), ("fractional/pruned", {"prune": THRESHOLD, **fractional})]
    common: dict[str, Any] = {"data": DATA, "epochs": QUICK_EPOCHS if quick else FULL_EPOCHS}
    common |= {"trace": "thinned", "checkpoint_every": 10, "threads": 1}
    return [
        Member(name, seed, TrainConfig(**common, **options, seed=seed), generalisation)
        for seed in range(seeds or (QUICK_SEEDS if quick else FULL_SEEDS))
        for name, options in table
    ]


def which_horizon(results: Results) -> Verdict:
    """B1: whether learned steps make the choice of T matter less than fixed ones do."""
    spread, figures = {}, Figures()
    seeds = results.seeds(*(f"horizon/T={T:g}/{name}" for T in HORIZONS for name in TREATMENTS))
    for name in TREATMENTS:
        finals = {T: values(results, f"horizon/T={T:g}/{name}", seeds, final_accuracy) for T in HORIZONS}
        spread[name] = np.ptp(list(finals.values()), axis=0)
        figures |= {f"final accuracy, T = {T:g}, {name}": describe(each) for T, each in finals.items()}
    over = {name: interval_of(each - SIMILAR) for name, each in spread.items()}
    less = interval_of(spread["free"] - spread["fixed"])
    figures |= {f"spread over T less one point, {name}": str(found) for name, found in over.items()}
    figures["spread over T, free - fixed"] = str(less)
    return Verdict.of(
        {
            "free steps make T matter less than a point": over["free"].negative,
            "free steps make T matter less than fixed ones": less.negative,
            "T matters by more than a point where the sum is held at it": over["simplex"].positive,
        },
        figures,
    )


def which_penalty(results: Results) -> Verdict:
    """B2: which penalties delete layers, and at what cost in accuracy."""
    left, figures, parts = {}, Figures(), Parts()
    for name in PENALTIES:
        pruned, whole = f"penalty/{name}/pruned", f"penalty/{name}/whole"
        remaining = values(results, pruned, results.seeds(pruned), lambda history: float(len(q.layers_left(history))))
        left[name] = float(np.mean(remaining))
        gap = difference(results, pruned, whole, final_accuracy)
        figures[f"layers left, {name}"] = describe(remaining)
        figures[f"final accuracy, {name}, pruned - whole"] = str(gap)
        if left[name] < 6:
            parts[f"pruning with {name} keeps the accuracy within a point"] = gap.worst > -SIMILAR
    parts["l1 deletes layers and l2 does not"] = left["l1"] < 6 and left["l2"] == 6
    parts["the proximal step deletes at least as many as the subgradient"] = left["l1-proximal"] <= left["l1"]
    parts["the group lasso deletes layers"] = left["group-lasso"] < 6
    return Verdict.of(parts, figures)


def fractional_pruning(results: Results) -> Verdict:
    """B3: whether the fractional network, which the papers do not prune, can be pruned."""
    pruned, whole = "fractional/pruned", "fractional/whole"
    left = values(results, pruned, results.seeds(pruned), lambda history: float(len(q.layers_left(history))))
    gap = difference(results, pruned, whole, final_accuracy)
    return Verdict.of(
        {"layers are deleted": max(left) < 6, "accuracy is kept within a point": gap.worst > -SIMILAR},
        {"layers left": describe(left), "final accuracy, pruned - whole": str(gap)},
    )


def gap_after_pruning(results: Results) -> Verdict:
    """B4: whether the pruned network generalises better: accuracy on training minus accuracy on test data."""
    parts, figures = Parts(), Figures()
    for name in ("penalty/l1", "penalty/l1-proximal", "fractional"):
        pruned, whole = f"{name}/pruned", f"{name}/whole"
        seeds = results.seeds(pruned, whole)
        gaps = {each: [_gap(results, each, seed) for seed in seeds] for each in (pruned, whole)}
        found = paired_interval(gaps[pruned], gaps[whole])
        parts[f"smaller gap, {name}"] = found.negative
        figures |= {f"train - test accuracy, {each}": describe(gap) for each, gap in gaps.items()}
        figures[f"difference of the gaps, pruned - whole, {name}"] = str(found)
    return Verdict.of(parts, figures)


def _gap(results: Results, name: str, seed: int) -> float:
    measured = results.measurements(name, seed)
    return float(measured["train.accuracy"] - measured["test.accuracy"])


def figure_horizons(results: Results) -> "Figure":
    """Accuracy for several horizons, with fixed steps, free ones, and ones that add up to T."""
    figure, axes = new_axes(1, 3, 3.4)
    for ax, name in zip(axes[0], TREATMENTS, strict=True):
        groups = {f"T = {T:g}": records(results, f"horizon/T={T:g}/{name}") for T in HORIZONS}
        epoch_bands(groups, "validation.accuracy", ax)
        ax.set_title(name, fontsize="medium")
        ax.set_ylabel("Accuracy, test")
    axes[0][-1].legend(fontsize="small", loc="lower right")
    return figure


def figure_penalties(results: Results) -> "Figure":
    """Accuracy and layers left with several penalties, pruning on the way."""
    figure, axes = new_axes(1, 2, 3.8)
    groups = {name: records(results, f"penalty/{name}/pruned") for name in PENALTIES}
    groups["fractional, l1-proximal"] = records(results, "fractional/pruned")
    for ax, (column, label) in zip(
        axes[0], {"validation.accuracy": "Accuracy, test", "layers": "Layers"}.items(), strict=True
    ):
        epoch_bands(groups, column, ax)
        ax.set_ylabel(label)
    axes[0][0].legend(fontsize="small", loc="lower right")
    return figure


SUITE = Suite(
    name="beyond",
    title="Beyond the papers: horizon, penalties, fractional pruning, generalisation",
    members=members,
    claims=(
        Claim("B1", "With learned steps it hardly matters which time horizon T one starts from.", which_horizon),
        Claim("B2", "l1 prunes, l2 does not, the proximal step prunes most, the group lasso prunes.", which_penalty),
        Claim("B3", "Fractional networks can be pruned while training without loss.", fractional_pruning),
        Claim("B4", "Pruned networks have a smaller gap between training and test accuracy.", gap_after_pruning),
    ),
    figures={"horizons": figure_horizons, "penalties": figure_penalties},
    needs={"horizons": ("horizon/*",), "penalties": ("penalty/*/pruned", "fractional/pruned")},
)
