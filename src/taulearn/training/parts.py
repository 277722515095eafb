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
    """Where a run stands."""

    epoch: int = 0  # number of finished epochs
    batch: int = 0  # number of batches taken of the epoch under way
    iteration: int = 0  # number of iterations taken
    compiled: bool = False  # whether the steps are compiled now
    seconds: float = 0.0  # time spent in the epoch under way
    stopped: bool = False  # whether a callback ended the training


@dataclass
class Parts:
    """The objects that a checkpoint saves and restores."""

    model: nn.Module  # the model with time steps
    optimizer: torch.optim.Optimizer  # its optimiser
    scheduler: LRScheduler | None = None  # learning rate scheduler, or None
    averaged: AveragedModel | None = None  # averaged weights, or None
    generator: torch.Generator | None = None  # the generator of a DataLoader's order, or None
    policies: Adaptation | None = None  # those at work, of pruning and of refinement, or None


@dataclass(frozen=True)
class Start:
    """The terms and the configuration with which a run was started."""

    terms: Mapping[str, Any]  # what must be the same when it is resumed (``check_arguments.terms``)
    config: Mapping[str, Any]  # the configuration in its run.toml
