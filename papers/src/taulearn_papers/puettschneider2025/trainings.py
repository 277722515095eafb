"""The trainings of the suite: residual networks with and without stage cost, and shallow ones for the bound.

Setting of the paper: ResNet-54, read as 54 residual blocks in stages of 16, 32 and 64 channels, a constant weight of
the stage cost, weight decay; time steps are not a part of it (tau = 1). The weight, the optimiser and the number of
epochs are not in the text that was at hand: ours are below. The quick suite has networks that two cores manage: fully
connected ones of 16 layers, and on MNIST ResNet-v2 of 9 blocks at half the resolution.
"""

from functools import partial
from typing import Any, NamedTuple

from ...config import TrainConfig
from ...suite import Member
from . import measures

WEIGHT = 0.1
"""Weight of the stage cost."""

TREATMENTS: dict[str, dict[str, Any]] = {"stage": {"stage_cost": WEIGHT}, "plain": {}}
"""With and without stage cost, by the name that settings carry."""

FULL_SEEDS = QUICK_SEEDS = 3

_STEPS: dict[str, Any] = {"constraint": "fixed", "init": 1.0, "threads": 1, "trace": "thinned", "checkpoint_every": 100}


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        name: In settings.
        depth: Number of layers.
        shallow: Depths of the networks that the bound is compared with.
        options: Settings.
    """

    name: str
    depth: int
    shallow: tuple[int, ...]
    options: dict[str, Any]


DENSE = Kind(
    "dense",
    16,
    (2, 4, 8),
    {"network": "resnet", "width": 50, "epochs": 12, "lr": 0.01, "momentum": 0.9, "weight_decay": 2e-3},
)
SMALL = Kind(
    "resnet-v2",
    9,
    (),
    {
        "network": "resnet-v2",
        "blocks_per_stage": (3, 3, 3),
        "channels": (8, 16, 32),
        "stem_stride": 2,
        "epochs": 2,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "scheduler": "onecycle",
    },
)
DEEP = Kind(
    "resnet-v2",
    54,
    (),
    {
        "network": "resnet-v2",
        "blocks_per_stage": (18, 18, 18),
        "channels": (16, 32, 64),
        "epochs": 100,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "scheduler": "cosine",
        "batch_size": 128,
        "precision": "bf16",
    },
)
QUICK: dict[str, tuple[Kind, ...]] = {"mnist": (DENSE, SMALL), "fashion-mnist": (DENSE,)}
FULL: dict[str, tuple[Kind, ...]] = {"mnist": (DEEP,), "cifar10": (DEEP,)}
"""Which networks are trained on which data."""


def setting(data: str, kind: str, depth: int, treatment: str) -> str:
    """The name of a setting.

    Example:
        >>> setting("mnist", "dense", 16, "stage")
        'mnist/dense-16/stage'
    """
    return f"{data}/{kind}-{depth}/{treatment}"


def kept(depth: int) -> tuple[int, ...]:
    """The numbers M of first blocks that are looked at: a ninth, two ninths (12 of 54, the paper's), a third, a half.

    Example:
        >>> kept(54), kept(16)
        ((6, 12, 18, 27), (2, 4, 5, 8))
    """
    return tuple(round(depth * share) for share in (1 / 9, 2 / 9, 1 / 3, 1 / 2))


def members(quick: bool = False, seeds: int | None = None) -> list[Member]:
    """All trainings, seed by seed, deep networks before shallow ones.

    Args:
        quick: The networks that two cores manage, instead of those of the paper.
        seeds: Number of seeds of each setting; None: 3.

    Example:
        >>> len(members(quick=True)), len(members())
        (36, 12)
        >>> members()[0].name
        'mnist/resnet-v2-54/stage/seed-0'
    """
    number = seeds if seeds is not None else QUICK_SEEDS if quick else FULL_SEEDS
    found = []
    for seed in range(number):
        for data, kinds in (QUICK if quick else FULL).items():
            for kind in kinds:
                for treatment, options in TREATMENTS.items():
                    found.append(_member(data, kind, kind.depth, treatment, options, seed))
                found += [_member(data, kind, M, "stage", TREATMENTS["stage"], seed) for M in kind.shallow]
    return found


def _member(data: str, kind: Kind, depth: int, treatment: str, options: dict[str, Any], seed: int) -> Member:
    shape: dict[str, Any] = {"hidden_layers": depth} if "blocks_per_stage" not in kind.options else {}
    config = TrainConfig(data=data, seed=seed, **_STEPS, **kind.options, **shape, **options)
    measure = partial(measures.at_each_depth, timed=depth == kind.depth)
    return Member(setting(data, kind.name, depth, treatment), seed, config, measure)
