"""Figures of a model on data: the loss and any mean of a function of output and target."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..penalties import time_steps_of
from .batches import Batch, LoaderBatches, are_labels, check_labels, make_batches
from .inspection import check_loss
from .objective import Loss, as_float

Metric = Callable[[Tensor, Tensor], Tensor]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of samples whose largest output is the target class.

    Args:
        output: (batch, classes).
        target: Class numbers, (batch,).

    Returns:
        A scalar in [0, 1].

    Example:
        >>> accuracy(torch.eye(2), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    return (output.argmax(1) == target).float().mean()


def choose_metrics(metrics: str | Mapping[str, Metric], target: Tensor, output: object = None) -> dict[str, Metric]:
    """The metrics meant by "auto": accuracy for class numbers, none for anything else.

    Args:
        metrics: "auto" or names with functions (output, target) -> mean over the batch.
        target: A sample of the targets.
        output: The outputs for it, of which a single column is no classes. None: not looked at.

    Returns:
        Names with functions.

    Raises:
        ValueError: If it is another string.
    """
    if isinstance(metrics, str):
        if metrics != "auto":
            raise ValueError(f"metrics must be 'auto' or a mapping of names to functions, got {metrics!r}")
        single = isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] < 2
        classes = target.ndim == 1 and not target.is_floating_point() and not single
        return {"accuracy": accuracy} if classes else {}
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

    The model's mode and torch's global generator are put back, so that training goes on as if nothing had happened.

    Args:
        model: A model with time steps.
        data: A pair of tensors (uint8 images are scaled), a Dataset or a DataLoader.
        loss: Mean over a batch of (output, target). None: left out.
        metrics: "auto" (accuracy for class numbers, given two outputs or more) or names with functions like ``loss``.
        batch_size: Samples at a time, which bounds memory.

    Returns:
        Means over the samples, by name.

    Example:
        >>> from taulearn.nn import resnet
        >>> data = torch.zeros(5, 2), torch.zeros(5, 1)
        >>> evaluate(resnet(2, 3, 1, 2, init=0.5), data, loss=lambda output, target: (target - target).mean())
        {'loss': 0.0}
    """
    values = time_steps_of(model).values
    if loss is not None:
        check_loss(loss)
    batches = make_batches(data, batch_size, 0, values.device, shuffle=False, argument="data")
    training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    generator = torch.get_rng_state()
    try:
        for inputs, targets in _in_order(batches):
            output = model(as_float(inputs, values.dtype))
            functions = choose_metrics(metrics, targets, output)
            if loss is not None:
                functions = {"loss": loss, **functions}
            if loss is not None and are_labels(targets, output) and targets.device.type == "cpu":
                check_labels(batches.argument, targets, output.shape[1], "of a batch")
            count += len(inputs)
            for name, function in functions.items():
                sums[name] = sums.get(name, 0.0) + function(output, targets).double() * len(inputs)
    finally:
        model.train(training)
        torch.set_rng_state(generator)  # a loader draws from it, and training must not notice
    return {name: float(total) / count for name, total in sums.items()}


def _in_order(batches: Any) -> Any:
    if isinstance(batches, LoaderBatches):
        yield from batches.epoch(0)
        return
    size = batches.batch_size
    for start in range(0, len(batches.inputs), size):
        batch: Batch = (batches.inputs[start : start + size], batches.targets[start : start + size])
        yield batch
