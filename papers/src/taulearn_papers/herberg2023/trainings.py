"""The trainings of the suite: two data sets, two networks, six ways to treat the time steps, and pruned ones.

Setting of the paper (section 4 and its published code): 6 hidden layers of width 100, ReLU, T = 1, tau_l = 1/6 at the
start, plain SGD with batches of 100 and learning rate 0.01, 200 epochs; alpha = 0.01, weight of the horizon penalty 1,
pruning threshold 0.01; for the fractional network gamma = 1/2 and tau >= 1e-4.

Seconds of an epoch are measured besides, with and without pruning and of smaller networks, in turn in one process.
Times taken while a suite trains would tell how busy the machine was. Here the variants take turns, and the fastest
epoch of each turn counts. Where other members train beside it, intervals over the turns are wide: the command with
``--workers 1`` measures alone.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from taulearn.app.config import TrainConfig
from taulearn.app.members import Member

from ..suite import generalisation
from .published_program import AS_PUBLISHED

DATA = ("fashion-mnist", "mnist")
NETWORKS = ("resnet", "fractional")

TREATMENTS: dict[str, dict[str, Any]] = {
    "free": {},
    "fixed": {"constraint": "fixed"},
    "l1": {"l1": 0.01},
    "horizon": {"time_horizon": 1.0},
    "dependent": {"constraint": "dependent"},
    "l1-horizon": {"l1": 0.01, "time_horizon": 1.0},
}
"""Treatments of the time steps, by the name that settings carry."""

LEARNED = ("free", "l1", "horizon", "dependent")
"""The four treatments that figures 4.2 and 4.3 compare."""

PRUNED = ("l1", "l1-horizon", "free", "horizon", "dependent")
DEPTHS = (12, 24)
"""Depths of claim H8, besides the paper's 6."""

FULL_EPOCHS, QUICK_EPOCHS = 200, 5
FULL_SEEDS = {"resnet": 5, "fractional": 3}
DEEP_SEEDS = 3
QUICK_SEEDS = 2
PUBLISHED_SEEDS = 3
PUBLISHED = (
    ("fashion-mnist", "resnet", "fixed"),
    ("fashion-mnist", "resnet", "dependent"),
    ("fashion-mnist", "resnet", "l1-pruned"),
    ("fashion-mnist", "fractional", "free"),
    ("fashion-mnist", "fractional", "horizon"),
    ("fashion-mnist", "fractional", "dependent"),
    ("mnist", "resnet", "fixed"),
)
"""Trainings that are done once more with the faults of the published program: data, network, treatment."""

THRESHOLD = 0.01


def setting(data: str, network: str, treatment: str) -> str:
    """The name of a setting.

    Example:
        >>> setting("mnist", "resnet", "free")
        'mnist/resnet/free'
    """
    return f"{data}/{network}/{treatment}"


def members(quick: bool = False, seeds: int | None = None) -> list[Member]:
    """All trainings, seed by seed, so that every claim has its first seed early.

    Example:
        >>> len(members())
        157
        >>> members()[0].name
        'fashion-mnist/resnet/free/seed-0'
    """
    fashion, mnist = DATA
    rule: dict[str, Any] = {"prune": THRESHOLD, "prune_every": 1}
    table = [
        *_treatments(fashion, "resnet"),
        *(
            _Row(setting(fashion, "resnet", f"{name}-pruned"), 5, _options(fashion, "resnet", name) | rule)
            for name in PRUNED
        ),
        *_treatments(mnist, "resnet"),
        *_treatments(fashion, "fractional"),
        *_treatments(mnist, "fractional"),
    ]
    for depth in DEPTHS:
        options = _options(fashion, "resnet", "l1") | {"hidden_layers": depth}
        table.append(_Row(setting(fashion, f"resnet-{depth}", "l1-pruned"), DEEP_SEEDS, options | rule))
        table.append(_Row(setting(fashion, f"resnet-{depth}", "l1"), DEEP_SEEDS, options))
    own = seeds if seeds is not None else QUICK_SEEDS if quick else None
    common: dict[str, Any] = {
        "epochs": QUICK_EPOCHS if quick else FULL_EPOCHS,
        "trace": "thinned",
        "checkpoint_every": 10,
        "threads": 1,
    }
    trained = [
        Member(row.setting, seed, TrainConfig(**common, **row.options, seed=seed), generalisation)
        for seed in range(own or max(row.seeds for row in table))
        for row in table
        if seed < (own or row.seeds)
    ]
    return [*trained, *timings(quick), *_published(common, own or PUBLISHED_SEEDS)]


def _published(common: Mapping[str, Any], seeds: int) -> list[Member]:
    """Trainings with the published program's faults, for the table that sets them beside the formulas."""
    found = []
    for seed in range(seeds):
        for data, network, treatment in PUBLISHED:
            options = _options(data, network, treatment.removesuffix("-pruned"))
            options |= {"seed": seed, **common}
            if network == "fractional":
                options["memory_from"] = 0
            if treatment.endswith("-pruned"):
                options["prune"] = THRESHOLD
            name = setting(data, f"{network}-as-published", treatment)
            found.append(Member(name, seed, TrainConfig(**options), generalisation, AS_PUBLISHED))
    return found


class _Row(NamedTuple):
    """A setting with its number of seeds in the full suite."""

    setting: str
    seeds: int
    options: dict[str, Any]


def _options(data: str, network: str, treatment: str) -> dict[str, Any]:
    return {"data": data, "network": network, **TREATMENTS[treatment]}


def _treatments(data: str, network: str) -> list[_Row]:
    return [
        _Row(setting(data, network, name), FULL_SEEDS[network], _options(data, network, name)) for name in TREATMENTS
    ]


TIMED_DEPTHS = (6, 12, 24)
ROUNDS = 5
TIMED_EPOCHS = 4
SAMPLES = 20_000
NOTHING = 1e-12
"""A threshold below which no share ever lies: all of the rule but the deletion."""


def timings(quick: bool) -> list[Member]:
    """One member for each depth."""
    return [
        Member(f"time/resnet-{depth}", 0, None, partial(epoch_times, layers=depth, rounds=1 if quick else ROUNDS))
        for depth in TIMED_DEPTHS
    ]


def epoch_times(_: Path, *, layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of an epoch of the residual network, by what differs.

    Args:
        _: The member's folder; nothing is left there.
        layers: Depth of the network.
        rounds: How often each variant has its turn.

    Returns:
        "never", "each epoch", "each iteration": when layers to delete are looked for, none of which is found;
        "2 layers" and so on: networks of that size, without looking. A figure for each turn.
    """
    from taulearn.adaptivity.policies import Pruning

    rules: dict[str, Any] = {"never": None, "each epoch": Pruning(NOTHING), "each iteration": Pruning(NOTHING, 1)}
    variants = {name: (layers, rule) for name, rule in rules.items()}
    variants |= {f"{n} layers": (n, None) for n in (2, 4, 6) if n < layers}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _round in range(rounds):
        for name, (depth, rule) in variants.items():
            times[name].append(_fastest_epoch(depth, rule))
    return times


def _fastest_epoch(layers: int, rule: Any) -> float:
    import torch

    from taulearn import data
    from taulearn.nn import resnet
    from taulearn.optim import parameter_groups
    from taulearn.penalties import L1
    from taulearn.training import fit

    inputs, targets = data.load(DATA[0], "train", as_uint8=True)
    torch.manual_seed(0)
    model = resnet(784, 100, 10, layers)
    history = fit(
        model,
        (inputs[:SAMPLES], targets[:SAMPLES]),
        loss=torch.nn.functional.cross_entropy,
        optimizer=torch.optim.SGD(parameter_groups(model, 0.01), lr=0.01),
        penalties=[L1(0.01)],
        pruning=rule,
        epochs=TIMED_EPOCHS,
        compile="always",
        progress=False,
    )
    return float(history.epochs["seconds"][2:].min())
