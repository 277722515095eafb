"""The weights a_{l,j} of the L1 scheme by blocks of rows, and the product of a cotangent with their derivative.

Both walk down the rows with temporaries of one block, so that memory is that of the result, and go through the lower
triangle only. With S = tau_{j+1} + .. + tau_l, r = tau_j / S and phi(r) = ((1 + r)^(1-gamma) - 1) / r, for j < l

    a_{l,j} = (tau_l / S)^gamma phi(r)
    d a_{l,j} / d tau_l  =  gamma a_{l,j} / tau_l   (through the factor; all else goes through S and r)
    d a_{l,j} / d tau_j  =  (tau_l / S)^gamma phi'(r) / S
    d a_{l,j} / d S      = -(gamma a_{l,j} + tau_j d a_{l,j} / d tau_j) / S,   and S reaches tau_{j+1} .. tau_l
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Below it a Taylor series of phi', whose omitted terms are < 1e-18; above it the closed form keeps 13 digits.
_SMALL_RATIO = 1e-3
BLOCK = 64
"""Rows per block."""


def row_blocks(tau: Tensor, gamma: float) -> Iterator[tuple[int, Tensor]]:
    """Rows of the matrix a, a block at a time.

    Args:
        tau: float64 steps, (N,).
        gamma: Order.

    Yields:
        The first row l of the block, and its rows up to the diagonal of its last one, (rows, l + rows).
    """
    for start, span, memory in _spans(tau):
        stop = start + len(span)
        weights = (tau[start:stop, None] / span).pow_(gamma).mul_(_quotient(tau[:stop] / span, 1.0 - gamma))
        weights.mul_(memory)
        weights.diagonal(start).fill_(1.0)
        yield start, weights


def cotangent_of_steps(tau: Tensor, gamma: float, cotangents: Iterable[Tensor]) -> Tensor:
    """The gradient of sum_{l,j} G_{l,j} a_{l,j} with respect to tau.

    Args:
        tau: float64 steps, (N,).
        gamma: Order.
        cotangents: G in the blocks of rows of :func:`row_blocks`, float64, each at least as wide as the block; entries
            on and above the diagonal do not count.

    Returns:
        float64 (N,).
    """
    gradient = torch.zeros_like(tau)
    for (start, span, memory), cotangent in zip(_spans(tau), cotangents, strict=True):
        stop = start + len(span)
        own, earlier = tau[start:stop, None], tau[:stop]
        r = earlier / span
        quotient = _quotient(r, 1.0 - gamma)
        scaled = (own / span).pow_(gamma).mul_(cotangent[:, :stop]).mul_(memory)
        by_column = scaled * _quotient_slope(r, quotient, 1.0 - gamma) / span
        by_row = scaled.mul_(quotient).mul_(gamma)
        gradient[start:stop] += by_row.sum(1) / own[:, 0]
        gradient[:stop] += by_column.sum(0)
        by_span = by_column.mul_(earlier).add_(by_row).div_(span).neg_()
        # prefix sums: S_{l,j} holds tau_{i} for j < i <= l. No sums are subtracted, they differ in size.
        gradient[1:stop] += torch.cumsum(by_span, 1).mul_(memory).sum(0)[:-1]
    return gradient


def _spans(tau: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, S_{l,j} of a block of rows (1 where j >= l), and the mask j < l, as float64."""
    before = tau.new_zeros(0)
    for start in range(0, len(tau), BLOCK):
        steps = tau[start : start + BLOCK]
        inside = torch.ones(len(steps), len(steps), dtype=tau.dtype, device=tau.device).tril_(-1)
        # sums of positive terms only: t_{l+1} - t_{j+1} would cancel
        near = torch.cumsum(inside * steps[:, None], 0)
        span = torch.cat([before + torch.cumsum(steps, 0)[:, None], near], 1)
        before = span[-1].clone()
        span[:, start:] += 1.0 - inside
        yield start, span, torch.cat([torch.ones_like(span[:, :start]), inside], 1)


def _quotient(r: Tensor, c: float) -> Tensor:
    """phi(r) = ((1 + r)^c - 1) / r."""
    return torch.log1p(r).mul_(c).expm1_().div_(r)


def _quotient_slope(r: Tensor, quotient: Tensor, c: float) -> Tensor:
    """phi'(r) = (c (1 + r)^(c-1) - phi(r)) / r, by a series for small r, where it cancels."""
    coefficients, binomial = [], c
    for k in range(2, 8):
        binomial *= (c - k + 1) / k
        coefficients.append((k - 1) * binomial)
    series = torch.full_like(r, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        series.mul_(r).add_(coefficient)
    closed = torch.log1p(r).mul_(c - 1.0).exp_().mul_(c).sub_(quotient).div_(r)
    return torch.where(r < _SMALL_RATIO, series, closed)
