"""The L1 scheme: weights and discrete derivative, left and right sided.

Grid t_0 = 0, t_{l+1} = t_l + tau_l, l = 0..N-1; y is taken as linear between the grid points:

    a_{l,j} = tau_l^gamma / tau_j [(t_{l+1} - t_j)^(1-gamma) - (t_{l+1} - t_{j+1})^(1-gamma)],  j <= l,  a_{l,l} = 1
    left derivative at t_{l+1} =  tau_l^(-gamma) / Gamma(2-gamma) sum_{j<=l} a_{l,j} (y_{j+1} - y_j)
    b_{j,l} = tau_l^gamma / tau_j [(t_{j+1} - t_l)^(1-gamma) - (t_j - t_l)^(1-gamma)],          j >= l,  b_{l,l} = 1
    right derivative at t_l    = -tau_l^(-gamma) / Gamma(2-gamma) sum_{j>=l} b_{j,l} (y_{j+1} - y_j)

The differences of powers cancel. With S = tau_{j+1} + .. + tau_l summed directly and r = tau_j / S the same weights are

    a_{l,j} = (tau_l / S)^gamma phi(r),   phi(r) = ((1 + r)^(1-gamma) - 1) / r

without cancellation, for any ratio of the steps.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, (5.4) and (5.5).
    Jin, Lazarov, Zhou (2016), An analysis of the L1 scheme for the subdiffusion equation with nonsmooth data.
    Stynes, O'Riordan, Gracia (2017), Error analysis of a finite difference method on graded meshes for a
        time-fractional diffusion equation.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from taulearn._errors import unknown_name

from .._calls import transforming
from ._arguments import apply, check_order, check_steps, to_double
from ._rows import BLOCK, cotangent_of_steps, row_blocks

# Below it a Taylor series, whose omitted terms are < 1e-18; above it the closed form keeps 13 digits of the derivative.
_SMALL_RATIO = 1e-3


def l1_weights(
    tau: Float[Tensor, " layers"], gamma: float, side: str = "left", *, validate: bool = True
) -> Float64[Tensor, "layers layers"]:
    """Weights of the L1 scheme for the Caputo derivative on a non-uniform grid.

    Args:
        tau: Step sizes tau_0 .. tau_{N-1} > 0, shape (N,).
        gamma: Order of the derivative, 0 < gamma < 1.
        side: "left" for a_{l,j} (memory of the past), "right" for b_{j,l} (memory of the future).
        validate: Whether the values of tau are checked, at the cost of one synchronisation on an accelerator. Never
            done while compiling.

    Returns:
        float64 matrix (N, N) with unit diagonal; row l belongs to the step tau_l: entry [l, j] is a_{l,j} (lower
        triangular) or b_{j,l} (upper triangular). Off the diagonal the entries lie in (0, 1-gamma] and grow towards it.
        Differentiable in tau.

    Raises:
        ValueError: If gamma lies outside (0, 1), side is unknown, tau is not a vector of N >= 1 entries, or an entry of
            tau is not positive and finite, or the steps span 150 orders of magnitude.
        TypeError: If tau is not a floating point tensor, or gamma is no number.
        RuntimeError: If the values of tau are to be checked under ``torch.func.vmap``.

    References:
        Antil, Diaz, Herberg (2022), equations (5.4) and (5.5).

    Example:
        >>> l1_weights(torch.tensor([1.0, 1.0, 1.0]), 0.5)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.4142, 1.0000, 0.0000],
                [0.3178, 0.4142, 1.0000]], dtype=torch.float64)
    """
    gamma = check_order(gamma)
    check_steps(tau, validate=validate)
    if side == "left":
        return _left_weights(tau.double(), gamma)
    if side == "right":
        # time reversed: b_{j,l} of the grid is a_{N-1-l,N-1-j} of the grid run backwards
        return _left_weights(tau.double().flip(0), gamma).flip(0, 1)
    raise unknown_name("side", side, ("left", "right"))


def derivative(
    y: Float[Tensor, " points *shape"],
    tau: Float[Tensor, " layers"],
    gamma: float,
    side: str = "left",
    *,
    validate: bool = True,
) -> Float64[Tensor, " layers *shape"]:
    """L1 approximation of the Caputo derivative of order gamma.

    For smooth functions on uniform grids its error is of order 2-gamma in the step.

    Args:
        y: Values y_0 .. y_N at the grid points, shape (N+1, ...).
        tau: Step sizes, > 0, shape (N,).
        gamma: Order of the derivative, 0 < gamma < 1.
        side: "left" (from time 0) or "right" (from the final time).
        validate: As in :func:`l1_weights`.

    Returns:
        float64 (N, ...): row l is the left derivative at t_{l+1}, or the right derivative at t_l. Differentiable in y
        and tau.

    Raises:
        ValueError: As :func:`l1_weights`, and if y does not have N+1 rows.

    References:
        Antil, Diaz, Herberg (2022), equations (5.4) and (5.5).

    Example:
        The derivative of order 1/2 of y = t at t = 1 is 2 / sqrt(pi); the scheme is exact for linear functions:

        >>> derivative(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.5, 0.5]), 0.5)[-1].item()
        1.1283791670955126
    """
    weights = l1_weights(tau, gamma, side, validate=validate)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}: write torch.as_tensor(y)")
    if y.ndim == 0 or y.shape[0] != tau.shape[0] + 1:
        raise ValueError(
            f"y must have one row more than tau has entries, {tau.shape[0] + 1}, got shape {tuple(y.shape)}: "
            "give the values at all grid points"
        )
    differences = torch.diff(to_double(y), dim=0)
    gamma = check_order(gamma)
    scale = tau.double() ** -gamma / math.gamma(2.0 - gamma)
    scale = scale if side == "left" else -scale
    return torch.tensordot((scale[:, None] * weights).to(differences.dtype), differences, dims=1)


def _left_weights(tau: Tensor, gamma: float) -> Tensor:
    """a_{l,j} of float64 steps (..., N): plain operations under transforms, else with a backward of its own."""
    if transforming() or tau.ndim > 1:
        return plain_left_weights(tau, gamma)
    weights: Tensor = apply(_LeftWeights, tau, gamma)
    return weights


class _LeftWeights(torch.autograd.Function):
    """a_{l,j} that keeps nothing but tau; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.gamma = gamma
        weights = tau.new_zeros(len(tau), len(tau))
        for start, rows in row_blocks(tau, gamma):
            weights[start : start + len(rows), : rows.shape[1]] = rows
        return weights

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (tau,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph: the derivative itself is to be differentiated
            return torch.autograd.grad(plain_left_weights(tau, ctx.gamma), tau, cotangents, create_graph=True)[0], None
        return cotangent_of_steps(tau, ctx.gamma, cotangents[0].split(BLOCK)), None


def plain_left_weights(tau: Tensor, gamma: float | Tensor) -> Tensor:
    """a_{l,j} of steps (..., N), with every masked entry replaced before a power is taken; gamma may be a tensor.

    So autograd never meets 0^(1-gamma); it keeps about ten matrices.
    """
    index = torch.arange(tau.shape[-1], device=tau.device)
    memory = index[:, None] > index[None, :]
    zero, one = tau.new_zeros(()), tau.new_ones(())
    row, column = tau[..., :, None], tau[..., None, :]
    # S_{l,j} = tau_{j+1} + .. + tau_l as one sum of positive terms per column: t_{l+1} - t_{j+1} would cancel
    span = torch.cumsum(torch.where(memory, row, zero), dim=-2)
    span = torch.where(memory, span, one)
    scale = (torch.where(memory, row, one) / span) ** gamma
    weights = scale * _power_quotient(column / span, 1.0 - gamma)
    return torch.where(memory, weights, torch.eye(tau.shape[-1], dtype=tau.dtype, device=tau.device))


def _power_quotient(r: Tensor, c: float | Tensor) -> Tensor:
    """phi(r) = ((1 + r)^c - 1) / r, by a series for small r: there the derivative of the closed form cancels."""
    small = r < _SMALL_RATIO
    near, away = torch.where(small, r, r.new_zeros(())), torch.where(small, r.new_ones(()), r)
    coefficients = [c]
    for k in range(2, 7):
        coefficients.append(coefficients[-1] * (c - k + 1) / k)  # binomial(c, k)
    series = coefficients[-1] + torch.zeros_like(r)
    for coefficient in reversed(coefficients[:-1]):
        series = series * near + coefficient
    # expm1(x) = 2 exp(x/2) sinh(x/2): torch.compile turns torch.expm1 into exp(x) - 1 on the CPU
    half = 0.5 * c * torch.log1p(away)
    return torch.where(small, series, 2.0 * torch.exp(half) * torch.sinh(half) / away)
