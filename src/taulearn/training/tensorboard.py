"""TensorBoard events at the end of each epoch."""

import functools
import os
from pathlib import Path

from .._errors import needs
from ..nn.time_steps import time_steps_of
from .events import EpochEnd
from .run_folder import Run


class TensorBoard:
    """A callback that writes the epoch's figures and the time steps."""

    def __init__(self, run: Run | str | os.PathLike[str] | None) -> None:
        if run is None:
            raise ValueError("run must be given with tensorboard=True, got None: the events go into its folder")
        with needs("tensorboard", "tensorboard=True"):
            from torch.utils.tensorboard.writer import SummaryWriter
        folder = run.path if isinstance(run, Run) else Path(run)
        self._make = functools.cache(lambda: SummaryWriter(str(folder / "tensorboard")))

    def __call__(self, end: EpochEnd) -> None:
        """Write one epoch."""
        writer = self._make()
        for name, value in end.metrics.items():
            if value == value:
                writer.add_scalar(name.replace(".", "/"), value, end.iteration)
        steps = time_steps_of(end.model)
        for layer, tau in zip(steps.origin, steps.tau.tolist(), strict=True):
            writer.add_scalar(f"tau/{layer}", tau, end.iteration)
        writer.flush()
