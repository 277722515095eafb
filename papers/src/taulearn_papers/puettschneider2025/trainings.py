"""The trainings of the suite: residual networks with and without stage cost, and shallow ones for the bound.

Setting of the paper: ResNet-54, read as 54 residual blocks in stages of 16, 32 and 64 channels, a constant weight of
the stage cost, weight decay; time steps are not a part of it (tau = 1). The weight, the optimiser and the number of
epochs are not in the text that was at hand: ours are below. The quick suite has networks that two cores manage: fully
connected ones of 16 layers, and on MNIST ResNet-v2 of 9 blocks at half the resolution.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from taulearn.app.config import TrainConfig
from taulearn.app.members import Member

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
                found += pair(data, kind, seed)
                found += [_member(data, kind, M, "stage", TREATMENTS["stage"], seed) for M in kind.shallow]
    return found


def pair(data: str, kind: Kind, seed: int) -> list[Member]:
    """A network with and without stage cost."""
    return [_member(data, kind, kind.depth, treatment, options, seed) for treatment, options in TREATMENTS.items()]


def _member(data: str, kind: Kind, depth: int, treatment: str, options: dict[str, Any], seed: int) -> Member:
    shape: dict[str, Any] = {"hidden_layers": depth} if "blocks_per_stage" not in kind.options else {}
    config = TrainConfig(data=data, seed=seed, **_STEPS, **kind.options, **shape, **options)
    measure = partial(at_each_depth, timed=depth == kind.depth)
    return Member(setting(data, kind.name, depth, treatment), seed, config, measure)


TIMED = 20
"""Samples in a timed forward pass."""

CALIBRATION = 500
"""Training samples on which batch normalisation gets statistics for each depth: in training each state is normalised by
its own, while the running ones are those of the last state."""


def at_each_depth(folder: Path, *, timed: bool = True) -> dict[str, Any]:
    """Figures of the network cut after each layer, on test data and training data.

    Args:
        folder: The run's folder.
        timed: Whether the cut networks are timed, too.

    Returns:
        "depths", for each of which there are "test.accuracy", "test.loss", "train.accuracy", "train.loss",
        "parameters", "milliseconds" (where timed) and "decay", half the weight decay times the squared norm of the cut
        network's weights. For each layer "contribution" and "relative" (see
        :class:`taulearn.diagnostics.DepthProfile`), "weights", the norm of its weights, and "weights.start", the same
        before training. "stage_cost" and "weight_decay"; "exits" with "thresholds", "accuracy", "depth". With batch
        normalisation the heads of the cut networks have statistics of their own, early exit included, and there is
        "test.accuracy.running" for the running ones.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig, train
        >>> config = TrainConfig(width=8, epochs=1, stage_cost=0.1, run=tempfile.mkdtemp())
        >>> figures = at_each_depth(train(config, progress=False).run.path)
        >>> figures["depths"], len(figures["test.accuracy"]), len(figures["weights"])
        ([1, 2, 3, 4, 5, 6], 6, 6)
    """
    import torch

    from taulearn.app import build
    from taulearn.app.train import settings_of
    from taulearn.calibration import norms_in
    from taulearn.diagnostics import depth_profile, early_exit
    from taulearn.saving import load_model
    from taulearn.training import Run
    from taulearn.training.objective import as_float

    config = settings_of(Run.open(folder))
    splits = build.load_splits(config)
    loss = build.make_loss(config, classes=splits.classes is not None)[1]
    device = build.make_device(config)
    model = load_model(folder).to(device)
    seen = None
    if norms_in([model]):
        seen = as_float(splits.train.inputs[:CALIBRATION], model.time_steps.values.dtype).to(device)
    found: dict[str, Any] = {"stage_cost": config.stage_cost, "weight_decay": config.weight_decay}
    for name, split in (("test", splits.test), ("train", splits.train)):
        x = as_float(split.inputs, model.time_steps.values.dtype).to(device)
        z = split.targets.to(device)
        example = x[:TIMED] if name == "test" and timed else None
        profile = depth_profile(model, x, z, loss, calibration=seen, example_inputs=example)
        found |= {f"{name}.loss": profile.loss.tolist()}
        if profile.accuracy is not None:
            found |= {f"{name}.accuracy": profile.accuracy.tolist()}
        if name == "test":
            if seen is not None:
                running = depth_profile(model, x, z, loss)
                assert running.accuracy is not None
                found |= {"test.accuracy.running": running.accuracy.tolist()}
            exits = early_exit(model, x, z, calibration=seen)
            found |= {
                "depths": list(profile.depths),
                "parameters": list(profile.parameters),
                "milliseconds": None if profile.milliseconds is None else list(profile.milliseconds),
                "contribution": profile.contribution.tolist(),
                "relative": profile.relative.tolist(),
                "exits": {
                    "thresholds": list(exits.thresholds),
                    "accuracy": exits.accuracy.tolist(),
                    "depth": exits.depth.tolist(),
                },
            }
    of_layers = [_squared(layer) for layer in model.layers]
    total = _squared(model) - _squared(model.time_steps)
    torch.manual_seed(config.seed)
    return found | {
        "weights": _weights(model),
        "weights.start": _weights(build.make_network(config, splits)),
        "decay": [0.5 * config.weight_decay * (total - sum(of_layers[k:])) for k in found["depths"]],
    }


def _squared(module: Any, *, matrices: bool = False) -> float:
    """The squared norm of all parameters, or of the matrices and convolutions alone."""
    return sum(float(p.detach().double().square().sum()) for p in module.parameters() if p.ndim > 1 or not matrices)


def _weights(network: Any) -> list[float]:
    return [_squared(layer, matrices=True) ** 0.5 for layer in network.layers]
