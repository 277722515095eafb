"""TensorBoard events at the end of each epoch."""

from ..penalties import time_steps_of
from .events import EpochEnd
from .run import Run


class TensorBoard:
    """A callback that writes the epoch's figures and the time steps.

    Args:
        run: The run whose folder the events go into.

    Raises:
        ValueError: If there is no run.
        ImportError: If tensorboard is not installed.
    """

    def __init__(self, run: Run | None) -> None:
        if run is None:
            raise ValueError("run must be given with tensorboard=True, got None: the events go into its folder")
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=True needs TensorBoard: pip install 'taulearn[tensorboard]'") from error
        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def __call__(self, end: EpochEnd) -> None:
        """Write one epoch."""
        for name, value in end.metrics.items():
            if value == value:
                self._writer.add_scalar(name.replace(".", "/"), value, end.iteration)
        steps = time_steps_of(end.model)
        for layer, tau in zip(steps.origin, steps.tau.tolist(), strict=True):
            self._writer.add_scalar(f"tau/{layer}", tau, end.iteration)
        self._writer.flush()
