"""Pruning a trained network after the fact, with its figures before and after."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..nn.network import TimeVariableNetwork
from ..pruning import PruneReport, prune, shares
from ..saving import load_model, save_model
from ..training import Run, evaluate
from . import parts
from .training import settings_of


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_run` did.

    Attributes:
        report: What was deleted.
        model: The network as it is now.
        before: Loss and, for classes, accuracy on the test data before.
        after: The same after.
        least: Number at the start and share of the layer that would go first now; None where none can go.
    """

    report: PruneReport
    model: nn.Module
    before: dict[str, float]
    after: dict[str, float]
    least: tuple[int, float] | None


def prune_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    threshold: float = 0.01,
    keep: Collection[int] | None = None,
    overwrite: bool = False,
) -> Pruned:
    """Prune the network that a run left, and save it elsewhere if anything was deleted; the run stays as it is.

    Args:
        run: The run's folder.
        out: Folder for the pruned network.
        threshold: Share of the sum of abs(tau) below which layers are deleted, in (0, 1).
        keep: Numbers at the start of the layers to keep, instead of the threshold.
        overwrite: Whether a network in ``out`` is replaced.

    Returns:
        What was done, and the figures on the test data.

    Raises:
        FileNotFoundError: If it is not the folder of a finished run.
        FileExistsError: If ``out`` holds a run, or something that is not to be replaced.
        ValueError: If ``keep`` names a layer that is not there, or the network cannot be pruned.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig, train
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = train(TrainConfig(epochs=1, width=8, run=str(folder / "run")), progress=False)
        >>> pruned = prune_run(folder / "run", folder / "small", keep=[0, 5])
        >>> load_model(folder / "small").time_steps.origin
        (0, 5)
    """
    opened = Run.open(run)
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
    model = load_model(opened.path)
    splits = parts.load_splits(config)
    loss = parts.make_loss(config, classes=splits.classes is not None)[1]
    positions = None if keep is None else _positions(keep, model.time_steps.origin)
    before = evaluate(model, tuple(splits.test), loss=loss)
    report = prune(model, threshold, keep=positions)
    after = evaluate(model, tuple(splits.test), loss=loss)
    if report:
        save_model(model, folder)
    return Pruned(report, model, before, after, _least(model))


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
