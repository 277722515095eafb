"""What the explicit adjoint systems need beside their equations: checks, sigma', P^T, derivatives of the weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import caputo
from .nn.builders import FlattenInput, FullyConnected
from .nn.network import TimeVariableNetwork
from .nn.schemes import Fractional, Residual
from .nn.skips import ComposedSkips, IdentitySkips, PadSkips, Skips

# Below it phi' is a power series whose omitted terms are < 1e-18; above it the closed form keeps 13 digits.
_SMALL_RATIO = 2.0**-5
_SERIES_TERMS = 13


def check_network(network: nn.Module) -> None:
    """Refuse networks whose adjoint the papers do not write down.

    Raises:
        TypeError: If it is no TimeVariableNetwork.
        ValueError: If scheme, layers, skips, head or stem are of another kind.
    """
    if not isinstance(network, TimeVariableNetwork):
        raise TypeError(
            f"network must be a TimeVariableNetwork, got {type(network).__name__}: build it with taulearn.nn, or let "
            "autograd differentiate it"
        )
    if not isinstance(network.scheme, Residual | Fractional):
        raise ValueError(
            f"network must have the residual or the fractional scheme, got {network.scheme.name!r}: no adjoint system "
            "is written down for it; autograd differentiates every scheme"
        )
    for l, layer in enumerate(network.layers):
        if not isinstance(layer, FullyConnected):
            raise ValueError(
                f"layers of network must be FullyConnected, sigma(W y + b), got {type(layer).__name__} as layer {l}: "
                "autograd differentiates all others"
            )
        if any(True for _ in layer.activation.parameters()):
            raise ValueError(
                f"activations of network must have no parameters, got {type(layer.activation).__name__} in layer {l}: "
                "the adjoint systems know W, b and tau only"
            )
    if any(True for _ in network.stem.parameters()) or not isinstance(network.stem, FlattenInput | nn.Identity):
        raise ValueError(f"stem of network must be an nn.Identity or FlattenInput, got {type(network.stem).__name__}")
    if not isinstance(network.head, nn.Linear | nn.Identity):
        raise ValueError(f"head of network must be an nn.Linear or nn.Identity, got {type(network.head).__name__}")
    _check_skips(network.skips)


def _check_skips(skips: Skips) -> None:
    if not isinstance(skips, IdentitySkips | PadSkips | ComposedSkips):
        raise ValueError(
            f"skips of network must be identities, padding or linear maps, got {type(skips).__name__}: "
            "P^T is not known for it"
        )
    if isinstance(skips, ComposedSkips):
        for l, module in enumerate(skips.maps):
            linear = isinstance(module, nn.Linear) and module.bias is None
            if not linear and not isinstance(module, nn.Identity):
                raise ValueError(
                    f"skips of network must be linear maps without bias, got {module} past layer {l}: "
                    "P^T is not known for it"
                )


def carry_back(skips: Skips, phi: Tensor, source: int, target: int) -> Tensor:
    """(P_source^target)^T phi, for rows phi of the width of state ``target``."""
    if isinstance(skips, PadSkips):
        # the transpose of padding is truncation, and the other way round
        change = skips.widths[source] - phi.shape[-1]
        return nn.functional.pad(phi, (0, change)) if change > 0 else phi[..., : skips.widths[source]]
    if isinstance(skips, ComposedSkips):
        for layer in reversed(range(source, target)):
            module = skips.maps[layer]
            phi = phi @ module.weight if isinstance(module, nn.Linear) else phi
    return phi


def slope(activation: nn.Module, z: Tensor, layer: int) -> Tensor:
    """sigma'(z) by one forward-mode product.

    Raises:
        ValueError: If a second product, in a direction of random signs, shows that sigma does not act entrywise.
    """

    def sigma(z: Tensor) -> Tensor:
        value: Tensor = activation(z.clone())
        return value

    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, z.shape, generator=generator) * 2 - 1).to(z)
    derivative: Tensor = torch.func.jvp(sigma, (z,), (torch.ones_like(z),))[1]
    probe: Tensor = torch.func.jvp(sigma, (z,), (signs,))[1]
    if probe.shape != z.shape or not torch.allclose(probe, derivative * signs, equal_nan=True):
        raise ValueError(
            f"activations of network must act entrywise and without randomness, got {type(activation).__name__} in "
            f"layer {layer}: sigma' is no vector; autograd differentiates it"
        )
    return derivative


def loss_gradient(loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, targets: Tensor) -> Tensor:
    """phi_out, the gradient of the loss with respect to the network's output."""
    with torch.enable_grad():
        output = output.detach().requires_grad_()
        value = loss(output, targets)
        if value.numel() != 1:
            raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}: take its mean over the batch")
        (gradient,) = torch.autograd.grad(value.sum(), output)
    return gradient


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
        self._by_own_step = gamma * caputo.l1_weights(tau, gamma) / tau[:, None]
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
