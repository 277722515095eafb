"""Questions that the papers leave open: which horizon, which penalty, pruning other networks, generalisation.

Setting of Herberg, Herzog, Koehne (2023): 6 hidden layers of width 100, batches of 100, SGD with rate 0.01; on
Fashion-MNIST for their 200 epochs, and on CIFAR-10 with its images flattened, 3,072 inputs, for 40. And that of
Puettschneider et al. (2025), made small for CPUs: on CIFAR-10 half of their 54 blocks, a stem of stride 2, 3 epochs.
The questions are ours, and so are the thresholds, which were written down before the trainings.
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
from .puettschneider2025.claims import first_blocks_suffice
from .puettschneider2025.trainings import DEEP, SMALL, Kind, pair
from .suite import Claim, Figures, Parts, Suite, Verdict, generalisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS = {"fashion-mnist": 200, "cifar10": 40}
HORIZONS = {"fashion-mnist": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), "cifar10": (0.25, 1.0, 8.0)}
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
    "elastic-net": {"elastic_net": 0.01},
    "group-lasso": {"group_lasso": 0.001},
    "simplex": {"constraint": "simplex"},
}
"""The l1 weight is the paper's; l2 and the elastic net have the same. The group lasso, whose norms are about a hundred
times as large as the steps, has a tenth of it. The simplex is a constraint, and has none."""

HALVED = {"blocks_per_stage": (9, 9, 9), "stem_stride": 2, "epochs": 3, "scheduler": "onecycle", "precision": "float32"}
CONVOLUTIONAL = Kind("resnet-v2", 27, (), {**DEEP.options, **HALVED})
LEARNED: dict[str, dict[str, Any]] = {
    "free": {},
    "l1-proximal/whole": {"l1": 0.1, "proximal": True},
    "l1-proximal/pruned": {"l1": 0.1, "proximal": True, "prune": 0.01},
}
"""The convolutional network with steps that are learned, from 1 on. It has a hundredth of the iterations, and ten times
the weight, with which layers go at all (tried with a seed of its own, 99)."""

LAYERS, THRESHOLD = 6, 0.01
QUICK_EPOCHS, FULL_SEEDS, FEW_SEEDS, QUICK_SEEDS = 5, 5, 3, 1
"""The fractional network and the convolutional ones have few seeds."""


def members(quick: bool = False, seeds: int | None = None) -> list[Member]:
    """All trainings, seed by seed.

    Example:
        >>> len(members())
        276
    """
    seeds = seeds or (QUICK_SEEDS if quick else FULL_SEEDS)
    dense = [
        Member(f"{data}/{name}", seed, _config(data, quick, seed, options), generalisation)
        for seed in range(seeds)
        for data in EPOCHS
        for name, options in _settings(data, fractional=seed < FEW_SEEDS).items()
    ]
    return dense + [each for seed in range(min(seeds, FEW_SEEDS)) for each in _convolutional(quick, seed)]


def _convolutional(quick: bool, seed: int) -> list[Member]:
    """The convolutional network with and without stage cost, its steps 1, and with learned steps."""
    with_and_without = pair("cifar10", SMALL if quick else CONVOLUTIONAL, seed)
    steps: dict[str, Any] = {"data": "cifar10", "seed": seed, "init": 1.0, "threads": 1, "trace": "thinned"}
    kind = (SMALL if quick else CONVOLUTIONAL).options
    return with_and_without + [
        Member(f"cifar10/convolutional/{name}", seed, TrainConfig(**steps, **kind, **options), generalisation)
        for name, options in LEARNED.items()
    ]


def _settings(data: str, *, fractional: bool) -> dict[str, dict[str, Any]]:
    """What is trained on a data set: name and options; the fractional network on the first alone."""
    table = {
        f"horizon/T={horizon:g}/{name}": {"horizon": horizon, **options}
        for horizon in HORIZONS[data]
        for name, options in TREATMENTS.items()
    }
    pruned = {f"penalty/{name}": options for name, options in PENALTIES.items()}
    if fractional and data == "fashion-mnist":
        pruned["fractional"] = {"network": "fractional", "l1": 0.01, "proximal": True}
    for name, options in pruned.items():
        if _whole(name) not in table:
            table[_whole(name)] = options
        table[f"{name}/pruned"] = {"prune": THRESHOLD, **options}
    return table


def _whole(name: str) -> str:
    """The setting without pruning; where nothing is penalised that of the horizon 1."""
    same = {"penalty/none": "horizon/T=1/free", "penalty/simplex": "horizon/T=1/simplex"}
    return same.get(name, f"{name}/whole")


def _config(data: str, quick: bool, seed: int, options: dict[str, Any]) -> TrainConfig:
    epochs = QUICK_EPOCHS if quick else EPOCHS[data]
    rest: dict[str, Any] = {"trace": "thinned", "checkpoint_every": 10, "threads": 1}
    return TrainConfig(data=data, epochs=epochs, seed=seed, **rest, **options)


def which_horizon(results: Results) -> Verdict:
    """B1: whether learned steps make the choice of T matter less than fixed ones do."""
    parts, figures = Parts(), Figures()
    for data, horizons in HORIZONS.items():
        settings = {(T, name): f"{data}/horizon/T={T:g}/{name}" for T in horizons for name in TREATMENTS}
        seeds = results.seeds(*settings.values())
        spread = {}
        for name in TREATMENTS:
            finals = {T: values(results, settings[T, name], seeds, final_accuracy) for T in horizons}
            spread[name] = np.ptp(list(finals.values()), axis=0)
            figures |= {f"final accuracy, T = {T:g}, {name}, {data}": describe(each) for T, each in finals.items()}
        over = {name: interval_of(each - SIMILAR) for name, each in spread.items()}
        less = interval_of(spread["free"] - spread["fixed"])
        figures |= {f"spread over T less one point, {name}, {data}": str(found) for name, found in over.items()}
        figures[f"spread over T, free - fixed, {data}"] = str(less)
        parts |= {
            f"free steps make T matter less than a point on {data}": over["free"].negative,
            f"free steps make T matter less than fixed ones on {data}": less.negative,
            f"T matters by more than a point where the sum is held at it on {data}": over["simplex"].positive,
        }
    return Verdict.of(parts, figures)


def which_penalty(results: Results) -> Verdict:
    """B2: which penalties delete layers, and at what cost in accuracy."""
    parts, figures = Parts(), Figures()
    for data in EPOCHS:
        left = {}
        for name in PENALTIES:
            pruned, whole = f"{data}/penalty/{name}/pruned", f"{data}/{_whole(f'penalty/{name}')}"
            left[name] = remaining = _layers(results, pruned)
            gap = difference(results, pruned, whole, final_accuracy)
            figures[f"layers left, {name}, {data}"] = describe(remaining)
            figures[f"final accuracy, {name}, {data}"] = describe(_finals(results, pruned))
            figures[f"final accuracy, {name}, pruned - whole, {data}"] = str(gap)
            if name != "none":
                cost = difference(results, pruned, f"{data}/{_whole('penalty/none')}", final_accuracy)
                figures[f"final accuracy, {name} pruned - no penalty whole, {data}"] = str(cost)
            if min(remaining) < LAYERS:
                parts[f"pruning with {name} keeps the accuracy within a point on {data}"] = gap.worst > -SIMILAR
        for name in ("l1", "elastic-net", "group-lasso", "simplex"):
            parts[f"{name} deletes layers on {data}"] = max(left[name]) < LAYERS
        for name in ("none", "l2"):
            parts[f"{name} deletes none on {data}"] = min(left[name]) == LAYERS
        most = min(map(np.mean, left.values()))
        parts[f"the proximal step deletes most on {data}"] = bool(np.mean(left["l1-proximal"]) <= most)
    return Verdict.of(parts, figures)


def fractional_pruning(results: Results) -> Verdict:
    """B3: whether the fractional network, which the papers do not prune, can be pruned."""
    return _pruning(results, "fashion-mnist/fractional")


def convolutional_pruning(results: Results) -> Verdict:
    """B5: whether the l1 penalty prunes a convolutional network, too; the accuracy is that without a penalty."""
    return _pruning(results, "cifar10/convolutional/l1-proximal", "cifar10/convolutional/free")


def _pruning(results: Results, name: str, *others: str) -> Verdict:
    """Whether layers are deleted with every seed, without loss against the same whole, and against other networks."""
    seeds = results.seeds(f"{name}/pruned")
    deleted = values(results, f"{name}/pruned", seeds, lambda history: float(len(history.deletions)))
    parts, figures = Parts({"layers are deleted": min(deleted) > 0}), Figures({"layers deleted": describe(deleted)})
    for whole in (f"{name}/whole", *others):
        gap = difference(results, f"{name}/pruned", whole, final_accuracy)
        parts[f"accuracy is kept within a point of {whole}"] = gap.worst > -SIMILAR
        figures[f"final accuracy, pruned - {whole}"] = str(gap)
    return Verdict.of(parts, figures)


def gap_after_pruning(results: Results) -> Verdict:
    """B4: whether the pruned network generalises better: accuracy on training minus accuracy on test data."""
    parts, figures = Parts(), Figures()
    dense = [f"{data}/penalty/{name}" for data in EPOCHS for name in ("l1", "l1-proximal")]
    for name in (*dense, "fashion-mnist/fractional", "cifar10/convolutional/l1-proximal"):
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


def _layers(results: Results, name: str) -> list[float]:
    return values(results, name, results.seeds(name), lambda history: float(len(q.layers_left(history))))


def _finals(results: Results, name: str) -> list[float]:
    return values(results, name, results.seeds(name), final_accuracy)


def figure_horizons(results: Results) -> "Figure":
    """Accuracy for several horizons, with fixed steps, free ones, and ones that add up to T."""
    figure, axes = new_axes(len(HORIZONS), 3, 3.4)
    for row, (data, horizons) in zip(axes, HORIZONS.items(), strict=True):
        for ax, name in zip(row, TREATMENTS, strict=True):
            groups = {f"T = {T:g}": records(results, f"{data}/horizon/T={T:g}/{name}") for T in horizons}
            epoch_bands(groups, "validation.accuracy", ax)
            ax.set_title(f"{name}, {data}", fontsize="medium")
            ax.set_ylabel("Accuracy, test")
        row[-1].legend(fontsize="small", loc="lower right")
    return figure


def figure_penalties(results: Results) -> "Figure":
    """Accuracy and layers left with several penalties, pruning on the way."""
    figure, axes = new_axes(len(EPOCHS), 2, 3.8)
    for row, data in zip(axes, EPOCHS, strict=True):
        groups = {name: records(results, f"{data}/penalty/{name}/pruned") for name in PENALTIES}
        if data == "fashion-mnist":
            groups["fractional, l1-proximal"] = records(results, f"{data}/fractional/pruned")
        for ax, (column, label) in zip(
            row, {"validation.accuracy": "Accuracy, test", "layers": "Layers"}.items(), strict=True
        ):
            epoch_bands(groups, column, ax)
            ax.set_title(data, fontsize="medium")
            ax.set_ylabel(label)
        row[0].legend(fontsize="small", loc="lower right")
    return figure


SUITE = Suite(
    name="beyond",
    title="Beyond the papers: horizon, penalties, pruning other networks, generalisation, stage cost",
    members=members,
    claims=(
        Claim(
            "B1",
            "It hardly matters from which T learned steps start, but if they must add up to it.",
            which_horizon,
        ),
        Claim(
            "B2",
            "l1, elastic net, group lasso and simplex prune, l2 and none do not; the proximal step prunes most.",
            which_penalty,
        ),
        Claim("B3", "Fractional networks can be pruned while training without loss.", fractional_pruning),
        Claim("B4", "Pruned networks have a smaller gap between training and test accuracy.", gap_after_pruning),
        Claim("B5", "A convolutional ResNet can be pruned while training without loss.", convolutional_pruning),
        Claim("B6", "P1 on CIFAR-10: with the stage cost the first blocks nearly suffice.", first_blocks_suffice),
    ),
    figures={"horizons": figure_horizons, "penalties": figure_penalties},
    needs={"horizons": ("*/horizon/*",), "penalties": ("*/penalty/*/pruned", "*/fractional/pruned")},
)
