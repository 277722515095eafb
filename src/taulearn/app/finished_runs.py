"""Networks of finished runs pruned, cut, or exported as files, with figures before and after."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..adaptivity.coarsen import PruneReport, prune
from ..adaptivity.estimate import shares
from ..adaptivity.policies import check_one_decides
from ..calibration import norms_in, recalibrate_
from ..data.catalog import entry_of
from ..depth.choose_layers import DepthDecision, choose_layers
from ..depth.truncate import truncate
from ..export import Exported, export_model
from ..nn.network import TimeVariableNetwork
from ..saving import load_model, save_model
from ..training import Run, evaluate
from ..training.checkpoint import read_start
from ..training.objective import as_float
from . import build
from .config import TrainConfig
from .train import settings_of

_TIMED = 50
"""Samples in a timed forward pass."""

_CALIBRATION = 500
"""Training samples on which batch normalisation gets new statistics."""


def finished_run(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool
) -> tuple[Run, TrainConfig, TimeVariableNetwork]:
    """A finished run with its settings and its network, once it is clear that ``out`` can be written."""
    opened = Run.open(run)
    if not {"data", "network"} <= opened.config.keys():
        raise ValueError(
            f"run must have been made by `taulearn train`, got {str(opened.path)!r}, which names no data and no "
            f"network: in Python, taulearn.load_model({str(opened.path)!r}) is its network (for a wrapped model with "
            "host=, a fresh model of its kind), for taulearn.export_model(network, out, example_inputs) or "
            "taulearn.prune"
        )
    config = settings_of(opened)
    folder = Path(out)
    if (folder / "run.toml").exists():
        raise FileExistsError(f"out must not be the folder of a run, got {str(folder)!r}: choose another one")
    if folder.exists() and not overwrite and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"out must be a new folder, got {str(folder)!r}: choose another one, or pass overwrite (--overwrite)"
        )
    if not (opened.path / "model.json").exists():
        raise FileNotFoundError(
            f"run must be finished, got {str(opened.path)!r} without a network: `taulearn resume {opened.path}` goes on"
        )
    found = read_start(opened.checkpoints)
    if found is not None and found[1].epoch < config.epochs and not found[1].stopped:
        raise FileNotFoundError(
            f"run must be finished, got {str(opened.path)!r}, which was resumed and is at epoch {found[1].epoch} of "
            f"{config.epochs}: `taulearn resume {opened.path}` goes on"
        )
    return opened, config, load_model(opened.path)


@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune_run`."""

    report: PruneReport  # what was deleted
    model: nn.Module  # the network as it is now
    before: dict[str, float]  # loss and, for classes, accuracy on the test data before
    after: dict[str, float]  # the same after
    # number at the start and share of the layer that would go first now; None where none can go
    least: tuple[int, float] | None


def prune_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    keep: Collection[int] | None = None,
    overwrite: bool = False,
) -> Pruned:
    """Prune the network that a run left, and save it elsewhere if anything was deleted; the run stays as it is.

    Example:
        >>> import tempfile, taulearn
        >>> from pathlib import Path
        >>> from taulearn.experiments import TrainConfig, train
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = train(TrainConfig(epochs=1, width=8, run=str(folder / "run")), progress=False)
        >>> pruned = prune_run(folder / "run", folder / "small", keep=[0, 5])
        >>> taulearn.load_model(folder / "small").time_steps.origin
        (0, 5)
    """
    check_one_decides(threshold, keep=keep)
    opened, config, model = finished_run(run, out, overwrite=overwrite)
    splits = build.load_splits(config, opened)
    loss = build.make_loss(config, classes=splits.classes is not None)[1]
    positions = None if keep is None else _positions(keep, model.time_steps.origin)
    before = evaluate(model, tuple(splits.test), loss=loss)
    report = prune(model, threshold, keep=positions)
    after = evaluate(model, tuple(splits.test), loss=loss)
    if report:
        save_model(model, out)
    return Pruned(report, model, before, after, _least(model))


@dataclass(frozen=True)
class Cut:
    """The result of :func:`cut_run`."""

    report: PruneReport  # what was deleted
    decision: DepthDecision | None  # why, where that was to be found out
    chosen_on: str  # the data on which the depth was chosen: "validation" or "test"
    model: nn.Module  # the network as it is now
    before: dict[str, float]  # loss and, for classes, accuracy on the test data before
    after: dict[str, float]  # the same after


def cut_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    depth: int | Literal["auto"] = "auto",
    tolerance: float = 0.002,
    by_stage: bool = False,
    overwrite: bool = False,
) -> Cut:
    """Cut the network that a run left after its first layers, and save it elsewhere if anything went.

    Batch normalisation gets new statistics on training data, those behind the cut for a cut of the whole.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from taulearn.experiments import TrainConfig, train
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = train(TrainConfig(epochs=1, width=8, stage_cost=0.1, run=str(folder / "run")), progress=False)
        >>> cut_run(folder / "run", folder / "small", depth=2).report.layers_after
        2
    """
    opened, config, model = finished_run(run, out, overwrite=overwrite)
    splits = build.load_splits(config, opened)
    loss = build.make_loss(config, classes=splits.classes is not None)[1]
    before = evaluate(model, tuple(splits.test), loss=loss)
    decision = None
    dtype = model.time_steps.values.dtype
    seen = as_float(splits.train.inputs[:_CALIBRATION], dtype) if norms_in([model]) else None
    if depth == "auto":
        values = as_float(splits.validation.inputs, dtype)
        decision = choose_layers(
            model,
            values,
            splits.validation.targets,
            loss,
            tolerance=tolerance,
            by_stage=by_stage,
            calibration=seen,
            example_inputs=values[:_TIMED],
        )
        report = decision.apply_(model, seen)
    else:
        report = truncate(model, depth)
        if report and seen is not None:
            recalibrate_(model, seen, within=model.head)
    after = evaluate(model, tuple(splits.test), loss=loss)
    if report:
        save_model(model, out)
    chosen_on = "test" if splits.validation is splits.test else "validation"
    return Cut(report, decision, chosen_on, model, before, after)


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",  # noqa: A002  it is called so everywhere
    overwrite: bool = False,
) -> Exported:
    """Export the network that a run left; see :func:`taulearn.export_model`. A named data set need not be there.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig, train
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = train(TrainConfig(epochs=1, width=8, run=str(folder / "run")), progress=False)
        >>> exported = export_run(folder / "run", folder / "out", format="torch")
        >>> print(exported.inputs[0])
        x, float32 (batch, 1, 8, 8)
    """
    _, config, model = finished_run(run, out, overwrite=overwrite)
    folder = Path(out)
    entry = entry_of(config.data, config.target)
    images = entry.kind == "images"
    draw = torch.rand if images else torch.randn
    example = draw(2, *entry.shape, dtype=model.time_steps.values.dtype)
    values = "pixels in [0, 1]" if images else "as in the data set"
    about: dict[str, Any] = {"data": Path(config.data).name, "values": values}
    if entry.classes is not None:
        about["classes"] = entry.classes
    return export_model(model, folder, example, format=format, about=about)


def _positions(keep: Collection[int], origin: tuple[int, ...]) -> list[int]:
    """Where the layers with these starting numbers are now."""
    strangers = sorted(set(keep) - set(origin))
    if strangers or not keep:
        raise ValueError(
            f"keep must name layers out of {', '.join(map(str, origin))}, which are there, got {list(keep)}"
        )
    return [origin.index(layer) for layer in sorted(set(keep))]


def _least(model: TimeVariableNetwork) -> tuple[int, float] | None:
    """Number and share of the layer that a higher threshold would delete first."""
    fixed = model.fixed_layers()
    all_shares = shares(model.time_steps, model.scheme.step_power).tolist()
    candidates = [(share, i) for i, share in enumerate(all_shares) if i not in fixed]
    if len(all_shares) == 1 or not candidates:
        return None
    share, i = min(candidates)
    return model.time_steps.origin[i], share
