"""A loss that is no number: since when, what the last values were, whose fault it may be, and what may help."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .._batches import inputs_and_targets
from .._counting import Counting
from .batches import LoaderBatches, TensorBatches, make_batches
from .check_data import bad_tensor_sample, fault_of, nothing_counts
from .events import Diverged
from .history import History

_SEARCH_SECONDS = 30.0
_LARGER = "drop such samples, or take larger batches"
_REMEDY = (
    "Lower the learning rate (lr, tau_lr), clip gradients (clip_norm), "
    "or bound the steps (constraint, lower_bound, penalties.TimeHorizon)"
)


def cause_in(batches: TensorBatches | LoaderBatches, iteration: int, counting: Counting) -> str | None:
    """The fault in the data that made the loss of an iteration no number, or None if nothing is found."""
    if (fault := bad_sample(batches) or ignored_batch(batches, iteration, counting)) is not None:
        return f"the training data are the cause: {fault}"
    fault = ignored_sample(batches, counting)
    return None if fault is None else f"the training data may be the cause: {fault}"


def diverged(
    what: str, at: int, history: History, columns: Sequence[str], checkpoints: Path | None, cause: str | None = None
) -> Diverged:
    """The error that says what happened after ``at`` good iterations, and what may help."""
    last = "there was no finite value before"
    if at > 0:
        values = ", ".join(f"{name} = {history.iterations[name][at - 1]:.6g}" for name in columns)
        tau = history.iterations["tau"][at - 1].astype(np.float64).round(4).tolist()
        last = f"last finite values, at iteration {at}: {values}, tau = {tau}"
    kept = f"; the last good checkpoint in {checkpoints} is kept" if checkpoints is not None else ""
    if cause is not None:
        return Diverged(f"{what}; {cause}; {last}{kept}")
    return Diverged(f"{what}; {last}{kept}. {_REMEDY}")


def check_validation(data: Any) -> None:
    """Say which sample of validation data is not finite, where their loss is no number before training."""
    fault = bad_sample(make_batches(data, 1, 0, torch.device("cpu"), shuffle=False, argument="validation"))
    if fault is not None:
        raise ValueError(f"validation must hold finite numbers, but {fault}")


def bad_sample(batches: TensorBatches | LoaderBatches) -> str | None:
    """The first sample that is not finite, in words, or None; of a loader's data set, half a minute is searched."""
    if isinstance(batches, TensorBatches):
        return bad_tensor_sample(batches)
    dataset, began = cast(Any, batches.loader.dataset), time.monotonic()
    for at in range(len(dataset)):
        if time.monotonic() - began > _SEARCH_SECONDS:
            return None
        item = dataset[at]
        for name, value in (
            item.items() if isinstance(item, Mapping) else zip(("inputs", "targets"), item, strict=False)
        ):
            try:
                tensor = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                continue
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return fault_of(name, tensor, at)
    return None


def ignored_batch(batches: TensorBatches | LoaderBatches, iteration: int, counting: Counting) -> str | None:
    """That no label of a batch counts, so that the mean of its losses is 0/0; or None."""
    if not isinstance(batches, TensorBatches):
        return None
    index = batches.split(batches.order(iteration // len(batches)))[iteration % len(batches)]
    reason = nothing_counts(batches.targets.index_select(0, index), counting)
    return reason and f"all labels of its batch, sample {int(index[0])} among them, are {reason}: {_LARGER}"


def ignored_sample(batches: TensorBatches | LoaderBatches, counting: Counting) -> str | None:
    """The first sample of a loader of which no label counts, in words, or None; which batch it was in is not known."""
    if not isinstance(batches, LoaderBatches):
        return None
    loader, began = batches.loader, time.monotonic()
    dataset, whole = cast(Any, loader.dataset), loader.batch_sampler is None  # the data set's items are batches
    with torch.random.fork_rng([]):  # of which collate_fn may draw
        for at in range(len(dataset)):
            if time.monotonic() - began > _SEARCH_SECONDS:
                return None
            targets = inputs_and_targets(loader.collate_fn(dataset[at] if whole else [dataset[at]]))[1]
            reason = nothing_counts(targets, counting) if isinstance(targets, Tensor) else None
            if reason is not None:
                return f"all labels of {'batch' if whole else 'sample'} {at} are {reason}: {_LARGER}"
    return None
