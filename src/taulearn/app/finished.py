"""Finished runs, of which something else is made."""

import os
from pathlib import Path

from ..nn.network import TimeVariableNetwork
from ..saving import load_model
from ..training import Run
from ..training.checkpoint import read_start
from .config import TrainConfig
from .training import settings_of


def finished_run(
    run: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool
) -> tuple[Run, TrainConfig, TimeVariableNetwork]:
    """A finished run with its settings and its network, once it is clear that ``out`` can be written.

    Args:
        run: Its folder.
        out: Where something made of it is to go.
        overwrite: Whether that folder may hold something.

    Raises:
        FileNotFoundError: If the run is not finished.
        FileExistsError: If ``out`` is the folder of a run, or holds something and may not.
        ValueError: If ``taulearn train`` did not make the run.
    """
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
