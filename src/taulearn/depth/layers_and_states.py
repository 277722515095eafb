"""Layers, states and scheme of any model with time steps, and the conditions under which the diagnostics look at it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..nn.constraints import Free
from ..nn.pruned_models import prunable_of, wrapping_of
from ..nn.time_steps import TimeSteps, time_steps_of
from .wrapped_states import record_states


def states_of(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """A function from inputs to the states y_1 .. y_N of a network built by this package or wrapped by it."""
    time_steps_of(model)
    if callable(states := getattr(model, "states", None)):
        return cast(Callable[[Tensor], list[Tensor]], states)
    if wrapping_of(model) is None:
        raise TypeError(
            f"network must have a method states(x) -> [y_1, .., y_N], got {type(model).__name__} without: build it "
            "with taulearn.nn, or wrap it"
        )
    return lambda x: record_states(model, x)[1][1:]


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    """The layer functions, one per time step."""
    steps = time_steps_of(model)
    layers = getattr(prunable_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList | tuple) or len(layers) != steps.num_steps:
        raise TypeError(
            f"model must have layers, one per time step, got {type(model).__name__} with {steps.num_steps} steps: "
            "build it with taulearn.nn"
        )
    return list(layers)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[Tensor]:
    """All parameters require gradients, and the effective steps are a leaf of their own; put back afterwards."""
    steps = time_steps_of(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    own = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(steps).items()}
    tau = nn.Parameter(steps.tau.detach().clone())
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        steps.rule = Free()
        steps.values = tau
        # The other attention kernels can be differentiated once only. In forward mode fractional networks take their
        # plain path: the blocked one can be differentiated once only, and not with respect to single states.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            yield tau
    finally:
        vars(steps).clear()
        vars(steps).update(own)
        for parameter, required in flags:
            parameter.requires_grad_(required)


def check_batch(inputs: Tensor) -> None:
    """Refuse what is no batch."""
    if inputs.ndim < 2 or len(inputs) == 0:
        raise ValueError(
            f"inputs must be a batch (samples, ...) of at least one sample, got shape {tuple(inputs.shape)}: for one "
            "sample take inputs.unsqueeze(0)"
        )


def scheme_of(model: nn.Module) -> tuple[str, float | tuple[float, ...]]:
    """Name of the scheme, and the power with which its step multiplies the layer function."""
    scheme = getattr(prunable_of(model), "scheme", None)
    steps: TimeSteps | None = getattr(model, "time_steps", None)
    assert steps is not None
    return getattr(scheme, "name", type(model).__name__), getattr(scheme, "step_power", 1.0)
