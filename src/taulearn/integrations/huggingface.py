"""The callback for Trainer of Hugging Face transformers."""

import json
import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_tensors, write_tensors
from ..penalties import Penalty
from ..pruning import Pruning
from ..training.history import History
from ..training.plain import from_plain, to_plain
from ..wrapping.transformers import SavePretrained
from .checkpoints import follow_states, marked
from .companion import Companion, model_with_time_steps

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "transformers must be installed for this callback: pip install 'taulearn[huggingface]'"
    ) from error

FILE = "time_steps.safetensors"
"""The record, in the folder of each checkpoint."""


class TimeStepsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Trains and prunes time steps in Trainer: add it to the list of callbacks.

    Penalties enter the gradient before each step of the optimiser, after clipping; the proximal step and the projection
    onto the constraint follow it. Layers are deleted at the end of an epoch, or every so many steps, in the model and
    in the optimiser, whose other state stays as it is.

    Trainer's checkpoints hold the time steps and the numbers of the layers that are left: training resumes from them
    with a model that was built and wrapped as at the start. They are for that alone; ``taulearn.save_model`` writes the
    model itself.

    Args:
        penalties: Added to the loss; those that need the states of the forward pass are not possible here.
        pruning: When and which layers are deleted. None: none.

    Attributes:
        history: The record: steps and penalties of each iteration, losses where Trainer logged them (the mean since the
            last log), layers of each epoch, deletions.

    Raises:
        ValueError: If a penalty needs data; when training starts, if the model cannot be pruned, several processes are
            to prune it, or it is trained in float16 without clipping.

    Example:
        >>> from taulearn import Pruning
        >>> from taulearn.penalties import L1
        >>> callback = TimeStepsCallback(penalties=[L1(0.01, proximal=True)], pruning=Pruning(0.02))
        >>> callback.history.num_iterations
        0
    """

    def __init__(self, penalties: Penalty | Sequence[Penalty] = (), pruning: Pruning | None = None) -> None:
        self._companion = Companion(penalties, pruning)
        self._cleanup = ExitStack()

    @property
    def history(self) -> History:
        """The record so far."""
        return self._companion.history()
