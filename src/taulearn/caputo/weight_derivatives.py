"""Derivatives of the L1 weights with respect to the steps, in closed form."""

import torch
from torch import Tensor

from .weights import l1_weights

# Below it phi' is a power series whose omitted terms are < 1e-18; above it the closed form keeps 13 digits.
_SMALL_RATIO = 2.0**-5
_SERIES_TERMS = 13


class WeightDerivatives:
    """Derivatives of the L1 scheme's weights a_{k,j} with respect to the steps, in float64.

    With S = tau_{j+1} + .. + tau_k, r = tau_j / S and a_{k,j} = (tau_k/S)^gamma phi(r), phi(r) = ((1+r)^(1-gamma)-1)/r,

        d a_{k,j}/d tau_l = (1-gamma) (tau_k/S)^gamma / tau_j [(1+r)^(-gamma) - 1]          j < l < k
        d a_{l,j}/d tau_l = the same + gamma a_{l,j} / tau_l                                j < l
        d a_{k,l}/d tau_l = (tau_k/S)^gamma phi'(r) / S                                     l < k

    which are the paper's formulas without their cancellation.

    Args:
        tau: Steps > 0, (N,).
        gamma: Order of the derivative, in (0, 1).
        memory_from: 1 leaves out the column j = 0 (see :class:`~taulearn.nn.Fractional`).

    References:
        Antil, Diaz, Herberg (2022), appendix A.2.

    Example:
        >>> WeightDerivatives(torch.tensor([1.0, 1.0, 1.0]), 0.5).of(1)
        tensor([[ 0.0000,  0.0000,  0.0000],
                [ 0.0607,  0.0000,  0.0000],
                [-0.0649, -0.0607,  0.0000]], dtype=torch.float64)
    """

    def __init__(self, tau: Tensor, gamma: float, *, memory_from: int = 0) -> None:
        tau = tau.detach().double()
        index = torch.arange(len(tau), device=tau.device)
        self._memory = index[:, None] > index[None, :]
        span = torch.cumsum(torch.where(self._memory, tau[:, None], 0.0), dim=0)
        span = torch.where(self._memory, span, 1.0)
        r, scale = tau / span, (tau[:, None] / span) ** gamma
        self._by_span = (1.0 - gamma) * scale / tau * torch.expm1(-gamma * torch.log1p(r))
        self._by_own_step = gamma * l1_weights(tau, gamma) / tau[:, None]
        self._by_remembered_step = scale / span * _power_quotient_slope(r, 1.0 - gamma)
        if memory_from == 1:
            self._memory[:, 0] = False

    def of(self, layer: int) -> Tensor:
        """The matrix with entries d a_{k,j} / d tau_layer at [k, j]; zero outside layer <= k, j <= min(k-1, layer)."""
        found = torch.zeros_like(self._by_span)
        found[layer:, :layer] = self._by_span[layer:, :layer]
        found[layer, :layer] += self._by_own_step[layer, :layer]
        found[layer:, layer] = self._by_remembered_step[layer:, layer]
        return torch.where(self._memory, found, 0.0)


def _power_quotient_slope(r: Tensor, c: float) -> Tensor:
    """phi'(r) for phi(r) = ((1 + r)^c - 1) / r = sum_k binomial(c, k) r^(k-1)."""
    small = r < _SMALL_RATIO
    near, away = torch.where(small, r, 0.0), torch.where(small, 1.0, r)
    binomials = [c]
    for k in range(2, _SERIES_TERMS + 2):
        binomials.append(binomials[-1] * (c - k + 1) / k)
    series = torch.zeros_like(r)
    for k in range(_SERIES_TERMS + 1, 1, -1):
        series = series * near + (k - 1) * binomials[k - 1]
    quotient = torch.expm1(c * torch.log1p(away)) / away
    return torch.where(small, series, (c * (1.0 + away) ** (c - 1.0) - quotient) / away)
