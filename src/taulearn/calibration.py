"""Statistics of batch normalisation, estimated anew.

In training with a stage cost each state is normalised by its own statistics, but the running ones are those of the last
state. A network that is cut after fewer layers therefore needs statistics of its own: one batch of training data gives
them, without any training.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._calls import call


class Statistics(NamedTuple):
    """The running statistics of one normalisation."""

    norm: _BatchNorm  # the normalisation
    mean: Tensor  # (channels,)
    var: Tensor  # (channels,)


@torch.no_grad()
def recalibrate_(model: nn.Module, inputs: Any, *, within: nn.Module | None = None) -> int:
    """Estimate the running statistics of batch normalisation anew, as those of one batch.

    All else is in evaluation mode meanwhile; a model without batch normalisation stays as it is.

    Args:
        model: Any model, changed in place.
        inputs: A batch of training data, some hundreds of samples: a tensor, a tuple of arguments, or a dictionary of
            keywords.
        within: The part of the model whose normalisations are meant. None: all.

    Returns:
        The number of normalisations.

    Raises:
        ValueError: If the batch is empty, gives statistics that are not finite, or ``within`` is no part of the model;
            nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> recalibrate_(model, torch.tensor([[1.0], [3.0]])), model[0].running_mean
        (1, tensor([2.]))
    """
    if within is not None and all(within is not module for module in model.modules()):
        what = f"another {type(within).__name__}" if isinstance(within, nn.Module) else repr(within)
        raise ValueError(f"within must be a module of the model, got {what}: take it from the model, as model.head")
    check_calibration("inputs", inputs)
    norms = norms_in([model if within is None else within])
    if norms:
        install(_measured(norms, lambda: call(model, inputs), [model]))
    return len(norms)


def check_calibration(argument: str, inputs: Any) -> None:
    """Refuse an empty batch, which has no statistics."""
    together = inputs.values() if isinstance(inputs, Mapping) else inputs
    for each in together if isinstance(inputs, Mapping | tuple | list) else [inputs]:
        if isinstance(each, Tensor) and each.ndim > 0 and len(each) == 0:
            raise ValueError(
                f"{argument} must be a batch of training data, got an empty one of shape {tuple(each.shape)}: give "
                "some hundreds of samples"
            )


def norms_in(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """The batch normalisations with running statistics in some modules."""
    found = (norm for module in modules for norm in module.modules())
    return [norm for norm in found if isinstance(norm, _BatchNorm) and norm.running_mean is not None]


@torch.no_grad()
def statistics_of(modules: Sequence[nn.Module], y: Tensor) -> list[Statistics]:
    """The statistics that normalisations would have if modules were always called in turn on such a state."""

    def run() -> None:
        x = y
        for module in modules:
            x = module(x)

    norms = norms_in(modules)
    return _measured(norms, run, modules) if norms else []


@contextmanager
def using(found: Sequence[Statistics]) -> Iterator[None]:
    """Other running statistics for a while."""
    own = [_now(each.norm) for each in found]
    try:
        install(found)
        yield
    finally:
        install(own)


@torch.no_grad()
def install(found: Sequence[Statistics]) -> None:
    """Put statistics in place."""
    for norm, mean, var in found:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def _now(norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return Statistics(norm, norm.running_mean.clone(), norm.running_var.clone())


def _measured(norms: Sequence[_BatchNorm], run: Any, modules: Sequence[nn.Module]) -> list[Statistics]:
    """The statistics after a run in which only the normalisations are in training mode; everything is put back."""
    everything = [part for module in modules for part in module.modules()]
    modes = [(part, part.training) for part in everything]
    own = [(_now(norm), norm.momentum, norm.num_batches_tracked) for norm in norms]
    for part in everything:
        part.training = False
    for norm in norms:
        norm.training, norm.momentum = True, 1.0  # what is seen replaces what was
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        run()
        found = [_now(norm) for norm in norms]
    finally:
        for before, momentum, count in own:
            install([before])
            before.norm.momentum = momentum
            before.norm.num_batches_tracked = count
        for part, training in modes:
            part.training = training
    if not all(bool(torch.isfinite(each.mean).all() and torch.isfinite(each.var).all()) for each in found):
        raise ValueError(
            "the statistics of batch normalisation must be finite, got nan or inf from the batch for calibration: look "
            "for such numbers in it, and in the parameters"
        )
    return found
