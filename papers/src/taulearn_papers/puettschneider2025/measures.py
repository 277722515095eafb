"""What is measured on a trained network: its figures at each depth, what its blocks add and weigh, early exit."""

from pathlib import Path
from typing import Any

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

    from ....calibration import norms_in
    from ....diagnostics import depth_profile, early_exit
    from ....saving import load_model
    from ....training import Run
    from ....training.objective import as_float
    from ... import parts
    from ...training import settings_of

    config = settings_of(Run.open(folder))
    splits = parts.load_splits(config)
    loss = parts.make_loss(config, classes=splits.classes is not None)[1]
    device = parts.make_device(config)
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
        "weights.start": _weights(parts.make_network(config, splits)),
        "decay": [0.5 * config.weight_decay * (total - sum(of_layers[k:])) for k in found["depths"]],
    }


def _squared(module: Any, *, matrices: bool = False) -> float:
    """The squared norm of all parameters, or of the matrices and convolutions alone."""
    return sum(float(p.detach().double().square().sum()) for p in module.parameters() if p.ndim > 1 or not matrices)


def _weights(network: Any) -> list[float]:
    return [_squared(layer, matrices=True) ** 0.5 for layer in network.layers]
