"""Backward passes that compute the states again from the last one, where a scheme can be inverted.

Nothing is stored of the layers on the way, so that memory does not grow with the depth beyond the parameters. A step
back amplifies rounding, by ``growth_back`` of the scheme: where the product over some layers in a row between two
stored states, times the machine epsilon, exceeds 1e-5, the pass is refused. The layers can amplify it as well: the
backward pass compares the state that it comes back to with the one it began from, and is refused where they differ by
more than 1e-5 of it (under autocast, than its rounding). Layers must compute the same when they are called again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .integrators import InvertibleScheme, shape_kept

TOLERANCE = 1e-5
_REMEDY = "store a state every k layers, store_every=k, or take smaller steps, a larger epsilon or float64"


def last_state(scheme: InvertibleScheme, y: Tensor, v: Tensor, layers: Sequence[nn.Module], tau: Tensor) -> Tensor:
    """y_N from y_0, v_0 by steps with identity skips, of which every ``scheme.store_every``-th state is stored.

    Raises:
        ValueError: If a layer in training mode has batch normalisation or draws random numbers, or rounding would be
            amplified too much; in the backward pass, if it was.
    """
    every = scheme.store_every or max(1, len(layers))
    segment = cast(Callable[..., tuple[Tensor, Tensor]], _Segment.apply)
    for first in range(0, len(layers), every):
        part = list(layers[first : first + every])
        steps = tau[first : first + every]
        _check(scheme, part, steps, y)
        parameters = [p for layer in part for p in layer.parameters() if p.requires_grad]
        y, v = segment(scheme, part, y, v, steps, *parameters)
    return y


def _check(scheme: InvertibleScheme, layers: Sequence[nn.Module], tau: Tensor, y: Tensor) -> None:
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                raise ValueError(
                    "memory must be 'stored' with a normalisation in training mode whose running statistics would "
                    "see each batch twice: take memory='stored', or group normalisation"
                )
    growth = scheme.growth_back(tau.detach().double()).abs().log()
    total = torch.cat([growth.new_zeros(1), growth.cumsum(0)])
    largest = float((total - total.cummin(0).values).max().exp())  # of all products over layers in a row
    error = largest * torch.finfo(y.dtype).eps
    if error > TOLERANCE:  # steps that are no numbers are for the loss to show
        raise ValueError(
            f"memory must be 'stored' for these steps, got 'reversible' with {len(layers)} layers between stored "
            f"states, through which rounding errors grow by {largest:.1e} backwards, to about {error:.0e}: {_REMEDY}"
        )


def _check_return(found: Tensor, start: Tensor, end: Tensor, layers_in: torch.dtype) -> None:
    """Refuse a state that is not the one the forward pass began from; a pass that ended in no numbers is let go.

    The error is compared with the larger of the first and the last state: rounding is that of the larger one.
    """
    tolerance = max(TOLERANCE, torch.finfo(layers_in).eps)
    scale, error = max(float(start.norm()), float(end.norm())), float((found - start).norm())
    if math.isfinite(float(end.norm())) and not error <= tolerance * scale:
        raise ValueError(
            f"memory must be 'stored' for these layers, got 'reversible', with which rounding errors grew to "
            f"{error / scale:.0e} of a state that was computed again: {_REMEDY}"
        )


class _Once:
    """A layer of which one value is asked for, at one point up to rounding; its gradients by autograd."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.point, self.value = layer, torch.empty(0), torch.empty(0)
        self.parameters = [p for p in layer.parameters() if p.requires_grad]
        self.gradients: list[Tensor] = []
        self.asked = False

    def __call__(self, y: Tensor) -> Tensor:
        if not self.asked:
            self.asked, self.point = True, y.detach().requires_grad_()
            with torch.enable_grad():
                self.value = self.layer(self.point)
        return self.value.detach()

    def back(self, y: Tensor, bar: Tensor) -> Tensor:
        wanted = [self.point, *self.parameters]
        bar = bar.to(self.value.dtype)
        found, *self.gradients = torch.autograd.grad(self.value, wanted, bar, materialize_grads=True)
        return found


class _Segment(torch.autograd.Function):
    """The steps between two stored states."""

    @staticmethod
    def forward(
        ctx: Any,
        scheme: InvertibleScheme,
        layers: list[nn.Module],
        y: Tensor,
        v: Tensor,
        tau: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.scheme, ctx.layers = scheme, layers
        kind = y.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        start = y
        with _no_random_numbers(y.device):
            for f, step in zip(layers, tau.unbind(), strict=True):
                y, v = scheme.advance(shape_kept(f, scheme), y, v, step)
        ctx.save_for_backward(start, y, v, tau, *parameters)  # parameters, so that a change of theirs is noticed
        return y, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, phi: Tensor, psi: Tensor) -> tuple[Any, ...]:
        start, end, v, tau, *_ = ctx.saved_tensors
        dtau = torch.zeros_like(tau)
        gradients: list[Tensor] = []
        kind, dtype, enabled = ctx.autocast
        y = end
        with torch.autocast(kind, dtype, enabled=enabled):
            for l in reversed(range(len(ctx.layers))):
                f = _Once(ctx.layers[l])
                y, v = ctx.scheme.invert(f, y, v, tau[l])
                phi, psi, dtau[l] = ctx.scheme.step_back(f, y, v, tau[l], phi, psi)
                gradients = [*f.gradients, *gradients]
        _check_return(y, start, end, dtype if enabled else y.dtype)
        return None, None, phi, psi, dtau, *gradients


@contextmanager
def _no_random_numbers(device: torch.device) -> Iterator[None]:
    """Refuse layers that draw random numbers, which would be others when they are called again."""
    states = [torch.get_rng_state] + ([torch.cuda.get_rng_state] if device.type == "cuda" else [])
    before = [state() for state in states]
    yield
    if not all(torch.equal(state(), was) for state, was in zip(states, before, strict=True)):
        raise ValueError(
            "memory must be 'stored' with layers that draw random numbers (dropout in training mode), which would be "
            "others in the backward pass: take memory='stored', or dropout with p = 0"
        )
