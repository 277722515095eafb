"""Figures of a model on data: the loss and any mean of a function of output and target."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._counting import IGNORED, Counting, Mean, accuracy as accuracy, counted, watched
from .._undisturbed import evaluation
from ..nn.time_steps import time_steps_of
from .batches import Batch, LoaderBatches, make_batches
from .check_data import check_loss
from .objective import Loss, as_float, input_dtype

Metric = Callable[[Any, Tensor], Tensor]


def choose_metrics(metrics: str | Mapping[str, Metric], target: Tensor, output: object = None) -> dict[str, Metric]:
    """The metrics meant by "auto": accuracy for class numbers, none for anything else."""
    if isinstance(metrics, str):
        if metrics != "auto":
            raise ValueError(f"metrics must be 'auto' or a mapping of names to functions, got {metrics!r}")
        scores = output is None or (isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1)
        integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        return {"accuracy": accuracy} if scores and integers and target.ndim == 1 else {}
    return dict(metrics)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    loss: Loss | None = None,
    metrics: str | Mapping[str, Metric] = "auto",
    batch_size: int = 1000,
) -> dict[str, float]:
    """Loss and metrics of a model on a data set, in evaluation mode.

    The modes of all modules and torch's global generator are put back, so that training goes on as before.

    Args:
        model: A model with time steps.
        data: A pair of tensors (uint8 images are scaled), a Dataset or a DataLoader.
        loss: Maps (output, target) to a scalar. None: left out.
        metrics: "auto" (accuracy for class numbers, given two outputs or more; labels that the loss ignores do not
            count) or names with functions like ``loss``.
        batch_size: Samples at a time, which bounds memory.

    Returns:
        By name what the whole data in one batch would give: torch's own losses are weighted by what they count (labels
        that are not ignored, class weights, elements), sums are added up, any other function is a mean over samples.

    Example:
        >>> from taulearn.nn import resnet
        >>> data = torch.zeros(5, 2), torch.zeros(5, 1)
        >>> evaluate(resnet(2, 3, 1, 2, init=0.5), data, loss=lambda output, target: (target - target).mean())
        {'loss': 0.0}
    """
    values, dtype = time_steps_of(model).values, input_dtype(model)
    if loss is not None:
        check_loss(loss)
    batches = make_batches(data, batch_size, 0, values.device, shuffle=False, argument="data")
    means: dict[str, Mean] = {}
    strange = torch.zeros((), dtype=torch.bool, device=values.device)
    with evaluation(model), torch.random.fork_rng([]):  # a loader draws from the generator
        for inputs, targets in _in_order(batches):
            output = model(as_float(inputs, dtype))
            functions: dict[str, Metric] = {}
            if loss is not None:
                value, counting = watched(loss, output, targets, argument=batches.argument, where="of a batch")
                means.setdefault("loss", Mean()).add(value, counting, targets)
            if metrics == "auto" and loss is not None:
                functions = _auto(counting, output, targets)
                if functions and counting.classes is None:  # integers that may be no classes, but ranks or counts
                    strange = strange | (counted(targets) & ((targets < 0) | (targets >= output.shape[1]))).any()
            else:
                functions = choose_metrics(metrics, targets, output)
            for name, function in functions.items():
                value, counting = watched(function, output, targets)
                means.setdefault(name, Mean()).add(value, counting, targets)
    if bool(strange):
        del means["accuracy"]
    return {name: float(mean.value()) for name, mean in means.items()}


def _auto(counting: Counting, output: Any, targets: Tensor) -> dict[str, Metric]:
    """Accuracy of what the loss compares with class numbers; where the loss is not known, of the outputs."""
    if not counting.known and counting.classes is None:
        return choose_metrics("auto", targets, output)
    scores, ignored = counting.scores, counting.ignored
    if scores is None or scores.ndim != 2 or scores.shape[1] < 2 or not targets.numel() == len(targets) == len(scores):
        return {}
    known = IGNORED if ignored is None else ignored
    return {"accuracy": lambda _, target: accuracy(scores, target.flatten(), known)}


def _in_order(batches: Any) -> Any:
    if isinstance(batches, LoaderBatches):
        yield from batches.epoch(0)
        return
    size = batches.batch_size
    for start in range(0, len(batches.inputs), size):
        batch: Batch = (batches.inputs[start : start + size], batches.targets[start : start + size])
        yield batch
