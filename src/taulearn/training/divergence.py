"""A loss that is no number: since when, what the last values were, whose fault it may be, and what may help."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._counting import Counting
from .batches import LoaderBatches, TensorBatches
from .check_data import bad_sample, ignored_batch
from .events import Diverged
from .history import History

_REMEDY = (
    "Lower the learning rate (lr, tau_lr), clip gradients (clip_norm), "
    "or bound the steps (constraint, lower_bound, penalties.TimeHorizon)"
)


def cause_in(batches: TensorBatches | LoaderBatches, iteration: int, counting: Counting) -> str | None:
    """The fault in the data that made the loss of an iteration no number, or None if nothing is found."""
    fault = bad_sample(batches) or ignored_batch(batches, iteration, counting)
    return None if fault is None else f"the training data are the cause: {fault}"


def diverged(
    what: str, at: int, history: History, columns: Sequence[str], checkpoints: Path | None, cause: str | None = None
) -> Diverged:
    """The error that says what happened after ``at`` good iterations, and what may help."""
    last = "there was no finite value before"
    if at > 0:
        values = ", ".join(f"{name} = {history.iterations[name][at - 1]:.6g}" for name in columns)
        tau = np.round(history.iterations["tau"][at - 1], 4).tolist()
        last = f"last finite values, at iteration {at}: {values}, tau = {tau}"
    kept = f"; the last good checkpoint in {checkpoints} is kept" if checkpoints is not None else ""
    if cause is not None:
        return Diverged(f"{what}; {cause}; {last}{kept}")
    return Diverged(f"{what}; {last}{kept}. {_REMEDY}")
