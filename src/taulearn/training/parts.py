"""The parts of a run, where it stands, and how it was started: what its checkpoints hold (training/checkpoint.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..adaptivity.adaptation import Adaptation


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: Number of finished epochs.
        batch: Number of batches taken of the epoch under way.
        iteration: Number of iterations taken.
        compiled: Whether the steps are compiled now.
        seconds: Time spent in the epoch under way.
        stopped: Whether a callback ended the training.
    """

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    compiled: bool = False
    seconds: float = 0.0
    stopped: bool = False


@dataclass
class Parts:
    """The objects that a checkpoint saves and restores.

    Attributes:
        model: The model with time steps.
        optimizer: Its optimiser.
        scheduler: Learning rate scheduler, or None.
        averaged: Averaged weights, or None.
        generator: The generator of a DataLoader's order, or None.
        policies: Those at work, of pruning and of refinement, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    averaged: AveragedModel | None = None
    generator: torch.Generator | None = None
    policies: Adaptation | None = None


@dataclass(frozen=True)
class Start:
    """The terms and the configuration with which a run was started.

    Attributes:
        terms: What must be the same when it is resumed (``check_arguments.terms``).
        config: The configuration in its run.toml.
    """

    terms: Mapping[str, Any]
    config: Mapping[str, Any]
