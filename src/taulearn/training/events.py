"""Events of a training: the end of an epoch, an interruption, a divergence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .history import Deletion

if TYPE_CHECKING:
    from .run_folder import Run


class Diverged(ArithmeticError):
    """The loss is no longer finite; the message says since when, what the last values were, and what may help."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says when it came, what is lost, and how to go on.

    Args:
        run: The run to resume, or None if nothing is written.
        detail: When it came and what is lost, to follow "training was interrupted".

    Attributes:
        run: The run to resume, or None.
    """

    def __init__(self, run: "Run | None", detail: str = "") -> None:
        remedy = (
            f"go on with `taulearn resume {run.path}` (or fit(..., run=..., resume=True))"
            if run
            else "nothing was written: pass run= to keep checkpoints"
        )
        super().__init__(f"training was interrupted{detail}: {remedy}")
        self.run = run


class StopTraining(Exception):
    """To be raised by a callback that wants training to end after this epoch."""


@dataclass(frozen=True)
class EpochEnd:
    """The argument of callbacks, which are called after each epoch.

    Attributes:
        epoch: Number of finished epochs.
        iteration: Number of iterations taken.
        metrics: The epoch's row of the record: "train.loss", "validation.accuracy", "layers", ...
        model: The model as it is now.
        optimizer: Its optimiser.
        deletions: What was deleted so far.
    """

    epoch: int
    iteration: int
    metrics: Mapping[str, float]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    deletions: Sequence[Deletion]
