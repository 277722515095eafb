"""Early exit over thresholds: how accurate a network is, and how deep it goes, when it stops at confident outputs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .._errors import positive_integer
from .._table import format_table
from .._undisturbed import evaluation
from ..calibration import check_calibration
from ..nn.early_exit import check_classes, check_confidence, confident
from ..nn.time_steps import time_steps_of
from .layers_and_states import check_batch
from .profile import depth_statistics, outputs_at
from .states import check_has_stages, forward_with_states

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class EarlyExit:
    """One row per threshold; prints as a table.

    Attributes:
        thresholds: Confidences at which samples stop.
        accuracy: Share of samples with the right class, (thresholds,).
        depth: Mean number of layers, (thresholds,).
        shares: Share of the samples that stop after k layers, (thresholds, N + 1).
    """

    thresholds: tuple[float, ...]
    accuracy: Tensor
    depth: Tensor
    shares: Tensor

    def __str__(self) -> str:
        return format_table(
            {
                "confidence": [*self.thresholds],
                "accuracy": [*self.accuracy.tolist()],
                "mean depth": [*self.depth.tolist()],
                "whole depth": [*self.shares[:, -1].tolist()],
            }
        )


def early_exit(
    network: nn.Module,
    inputs: Float[Tensor, "batch *features"],
    targets: Int[Tensor, " batch"],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    calibration: Tensor | None = None,
    batch_size: int = 250,
) -> EarlyExit:
    """Accuracy and mean depth of early exit for several thresholds, from one forward pass.

    What ``network.predict`` answers, without its savings, but for all thresholds at once.

    Args:
        network: A TimeVariableNetwork of any scheme, or a wrapped model.
        inputs: (batch, ...).
        targets: Class numbers.
        thresholds: The largest softmax probability that is enough, in (0, 1]; with 1 no sample stops early.
        calibration: Inputs of some hundreds of training samples, from which batch normalisation gets statistics for
            each depth before the last (:func:`~taulearn.diagnostics.depth_statistics`). None: the running ones. Not for
            wrapped models.
        batch_size: Samples at a time.

    Returns:
        One row per threshold.

    Raises:
        TypeError: If ``network`` is neither, targets are no class numbers, or thresholds no sequence.
        ValueError: If a threshold lies outside (0, 1], inputs and targets do not fit, or the outputs are not (batch,
            classes) with at least two classes.

    Example:
        >>> from taulearn.nn import resnet
        >>> found = early_exit(resnet(2, 3, 2, 4), torch.ones(5, 2), torch.zeros(5, dtype=torch.long), (0.5, 1.0))
        >>> found.depth
        tensor([1., 4.], dtype=torch.float64)
    """
    check_has_stages(network, "network")
    check_batch(inputs)
    if targets.ndim != 1 or targets.is_floating_point():
        raise TypeError(
            f"targets must be class numbers (batch,), got {targets.dtype} of shape {tuple(targets.shape)}: early exit "
            "goes by the probabilities of classes"
        )
    if len(targets) != len(inputs):
        raise ValueError(f"targets must have one entry per sample, got {len(targets)} for {len(inputs)} inputs")
    if not isinstance(thresholds, Iterable) or isinstance(thresholds, str):
        raise TypeError(f"thresholds must be a sequence of numbers, got {thresholds!r}: write for instance (0.9, 1.0)")
    thresholds = tuple(thresholds)
    for threshold in thresholds:
        check_confidence("thresholds", threshold)
    batch_size = positive_integer("batch_size", batch_size)
    if calibration is not None:
        check_calibration("calibration", calibration)
    number = time_steps_of(network).num_steps
    right = torch.zeros(len(thresholds), dtype=torch.float64)
    stopped = torch.zeros(len(thresholds), number + 1, dtype=torch.float64)
    own = {} if calibration is None else depth_statistics(network, calibration)
    with evaluation(network), torch.no_grad():
        for x, z in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            output, states = forward_with_states(network, x)
            check_classes(output)
            outputs = outputs_at(network, x, states, output, own)
            depths = torch.tensor(list(outputs), device=x.device)
            correct = torch.stack([y.argmax(1) == z for y in outputs.values()])
            for i, threshold in enumerate(thresholds):
                done = torch.stack([confident(y, threshold) for y in outputs.values()])
                done[-1] = True
                first = done.int().argmax(0)  # the first of the largest
                right[i] += correct.gather(0, first.unsqueeze(0)).sum().cpu()
                stopped[i] += torch.bincount(depths[first], minlength=number + 1).cpu()
    shares = stopped / len(inputs)
    depth = shares @ torch.arange(number + 1, dtype=torch.float64)
    return EarlyExit(tuple(float(each) for each in thresholds), right / len(inputs), depth, shares)
