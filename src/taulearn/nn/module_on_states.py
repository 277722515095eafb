"""One module on several states at once, as if each came alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def apply_to_each(module: nn.Module, states: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a module for several states of one shape, from one call where that is the same.

    The states go through the module as one batch. Batch normalisation by the statistics of the batch, as in training
    mode, would mix them: a module with a method ``each(states)`` says itself how to keep them apart
    (:class:`~taulearn.nn.PooledHead` does, in one call), a Sequential is gone through member by member, any other
    module is called once per state. Each state is normalised by its own statistics, and none of them enters the running
    ones, which belong to the forward pass.

    Args:
        module: A module that treats the samples of a batch alike, and one by one but for batch normalisation.
        states: Tensors (batch, ...).

    Returns:
        One output per state.

    Example:
        >>> [y.tolist() for y in apply_to_each(nn.ReLU(), [torch.tensor([[-1.0]]), torch.tensor([[2.0]])])]
        [[[0.0]], [[2.0]]]
    """
    if len(states) == 0 or isinstance(module, nn.Identity):
        return list(states)
    each = getattr(module, "each", None)
    if callable(each):
        return cast(Callable[[Sequence[Tensor]], list[Tensor]], each)(states)
    if not mixing(module):
        return [module(states[0])] if len(states) == 1 else _split(module(torch.cat(list(states))), states)
    if type(module) is nn.Sequential:
        result = list(states)
        for member in module:
            result = apply_to_each(member, result)
        return result
    with running_statistics_held(module):
        return [module(y) for y in states]


def _split(outputs: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    return list(outputs.split([len(y) for y in states]))


def mixing(module: nn.Module) -> list[_NormBase]:
    """The normalisations in a module by which a sample's output depends on the others now, or which keep statistics.

    Batch normalisation without running statistics is one of them also in evaluation mode.

    Args:
        module: Any module.

    Example:
        >>> len(mixing(nn.BatchNorm1d(1))), len(mixing(nn.BatchNorm1d(1).eval())), len(mixing(nn.LayerNorm(1)))
        (1, 0, 0)
    """
    norms = [each for each in module.modules() if isinstance(each, _NormBase)]
    return [each for each in norms if each.training or (isinstance(each, _BatchNorm) and each.running_mean is None)]


@contextmanager
def running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Normalisations in training mode go by the statistics of the batch as ever, but keep no record of it."""
    norms = [(norm, norm.momentum) for norm in mixing(module) if norm.track_running_stats]
    for norm, _ in norms:
        norm.track_running_stats = False
        norm.momentum = 0.0  # instance normalisation keeps its record all the same
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.track_running_stats = True
            norm.momentum = momentum
