"""The papers' explicit adjoint systems: gradients written out, without automatic differentiation of the network.

States y_0 .. y_N, z_l = W_l y_l + b_l, f_l = sigma(z_l), output W_N y_N. With phi_out the gradient of the loss with
respect to the output (* is the entrywise product), phi_N = W_N^T phi_out and, for l = N-1 .. 1,

    residual     phi_l = P^T phi_{l+1} + tau_l W_l^T (phi_{l+1} * sigma'(z_l))                             after (5.2)
    fractional   phi_l = (1 - a_{l,l-1}) P^T phi_{l+1} + sum_{j=l+2..N} (a_{j-1,l} - a_{j-1,l-1}) P^T phi_j
                         + tau_l^gamma Gamma(2-gamma) W_l^T (phi_{l+1} * sigma'(z_l))                           (5.9)

is the discretised problem's adjoint ("discretize-then-optimize"): what follows from it is the gradient. Discretising
the adjoint equation instead, with the right-sided derivative, gives for the fractional scheme

    phi_l = P^T phi_{l+1} + sum_{j=l+1..N-1} b_{j,l} (P^T phi_{j+1} - P^T phi_j)
            + tau_l^gamma Gamma(2-gamma) W_l^T (phi_{l+1} * sigma'(z_l))                                        (5.8)

("optimize-then-discretize"), which is no gradient of the discrete loss; for the residual scheme the two agree. In both
cases, with s_l = tau_l (residual) or tau_l^gamma Gamma(2-gamma) (fractional),

    dW_N = phi_out y_N^T     dW_l = s_l (phi_{l+1} * sigma'(z_l)) y_l^T     db_l = s_l phi_{l+1} * sigma'(z_l)
    dtau_l = <f_l, phi_{l+1}>                                                                              (residual)
    dtau_l = - sum_{k>=l} sum_{j<=min(k-1,l)} (d a_{k,j}/d tau_l) <P y_{j+1} - P y_j, phi_{k+1}>
             + gamma tau_l^(gamma-1) Gamma(2-gamma) <f_l, phi_{l+1}>                                     (fractional)

Schemes that look at the last state alone (:mod:`taulearn.nn.integrators`) have a step back of their own, from
(phi_{l+1}, psi_{l+1}) to (phi_l, psi_l) and dtau_l, psi being the derivative with respect to the velocity.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5 and
    appendix A. Printed there with dW_l transposed and db_l as a scalar.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import caputo
from ._errors import unknown_name
from ._table import format_table
from .caputo._rows import BLOCK, cotangent_of_steps
from .nn.builders import FlattenInput, FullyConnected
from .nn.integrators import LocalScheme
from .nn.network import TimeVariableNetwork
from .nn.skips import ComposedSkips, IdentitySkips, PadSkips, Skips

Loss = Callable[[Tensor, Tensor], Tensor]

METHODS = ("discretize-then-optimize", "optimize-then-discretize")


def gradients(
    network: TimeVariableNetwork,
    inputs: Float[Tensor, "batch *features"],
    targets: Tensor,
    loss: Loss,
    method: str = "discretize-then-optimize",
) -> dict[str, Tensor]:
    """Gradients of loss(network(inputs), targets) by the explicit adjoint systems.

    Args:
        network: A residual or fractional network, or one with a scheme that has a step back, of fully connected layers
            f(y) = sigma(W y + b), as the builders make it, with skips that are identities, padding or learned linear
            maps. sigma must act entrywise and have no parameters. The memory of a fractional network is computed
            exactly, whatever its ``memory``.
        inputs: (batch, ...), of the network's floating point type.
        targets: What ``loss`` compares the outputs with.
        loss: Maps (output, target) to a scalar.
        method: "discretize-then-optimize" (the gradient) or "optimize-then-discretize" (an object of study: with the
            fractional scheme another direction; residual and fractional networks only).

    Returns:
        One tensor per name of ``network.named_parameters()``, in its order: with fixed steps none for them, with
        dependent steps N - 1 values.

    Raises:
        ValueError: If the method is unknown, the network has no explicit adjoint (the message says why), the steps of a
            fractional network are not positive, or the loss is not a scalar.
        TypeError: If ``network`` is no TimeVariableNetwork.

    References:
        Antil, Diaz, Herberg (2022), section 5, equations (5.8) and (5.9).

    Example:
        >>> from taulearn.nn import resnet
        >>> _ = torch.manual_seed(0)
        >>> network, x, y = resnet(2, 3, 1, 4), torch.ones(5, 2), torch.zeros(5, 1)
        >>> loss = nn.functional.mse_loss
        >>> explicit = gradients(network, x, y, loss)
        >>> loss(network(x), y).backward()
        >>> torch.allclose(explicit["time_steps.values"], network.time_steps.values.grad)
        True
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    check_network(network)
    if isinstance(network.scheme, LocalScheme):
        if method != METHODS[0]:
            raise ValueError(
                f"method must be {METHODS[0]!r} with the {network.scheme.name} scheme, got {method!r}: the other one "
                "is written down for the residual and the fractional scheme"
            )
        with torch.no_grad():
            return _local_gradients(network, network.scheme, inputs, targets, loss)
    with torch.no_grad():
        return _Adjoint(network, inputs, targets, loss, method).gradients()


class _LayerBack:
    """A layer sigma(W y + b) whose gradients are summed while it is gone through backwards."""

    def __init__(self, layer: FullyConnected, number: int, found: dict[Tensor, Tensor]) -> None:
        self.layer, self.number, self.found = layer, number, found

    def __call__(self, y: Tensor) -> Tensor:
        return cast(Tensor, self.layer(y))

    def back(self, y: Tensor, bar: Tensor) -> Tensor:
        linear = self.layer.linear
        delta = bar * slope(self.layer.activation, linear(y), self.number)
        self.found[linear.weight] += _outer(delta, y)
        self.found[linear.bias] += delta.flatten(0, -2).sum(0)
        return delta @ linear.weight


def _local_gradients(
    network: TimeVariableNetwork, scheme: LocalScheme, inputs: Tensor, targets: Tensor, loss: Loss
) -> dict[str, Tensor]:
    """The gradients by the scheme's steps back, from the states and velocities of a forward pass."""
    found: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in network.parameters()}
    tau, skips, y = network.time_steps.tau, network.skips, network.stem(inputs)
    v, before, coefficients = scheme.init(y), [], scheme.prepare(tau)
    for l, layer in enumerate(network.layers):
        before.append((y, v))
        y, v = scheme.step(l, layer, y, v, skips, coefficients)
    phi = _of_head(network.head, y, loss_gradient(loss, network.head(y), targets), found)
    psi, dtau = scheme.init(y), torch.zeros_like(tau)
    for l in reversed(range(len(network.layers))):
        f, (y, v) = _LayerBack(cast(FullyConnected, network.layers[l]), l, found), before[l]
        if skips.is_identity(l):
            phi, psi, dtau[l] = scheme.step_back(f, y, v, tau[l], phi, psi)
        else:  # layer 0, y_1 = P y_0 + tau_0 f_0(y_0)
            if skips.from_input and isinstance(past := skips.past(l), nn.Linear):
                found[past.weight] += _outer(phi, y)
            dtau[l] = (phi * f(y)).sum()
            f.back(y, tau[l] * phi)
    _of_steps(network, dtau, found)
    return {name: found[p] for name, p in network.named_parameters()}


def _of_head(head: nn.Module, y: Tensor, phi_out: Tensor, found: dict[Tensor, Tensor]) -> Tensor:
    """phi_N; the head's own gradients are added to those found."""
    if not isinstance(head, nn.Linear):
        return phi_out
    found[head.weight] += _outer(phi_out, y)
    if head.bias is not None:
        found[head.bias] += phi_out.flatten(0, -2).sum(0)
    return phi_out @ head.weight


def _of_steps(network: TimeVariableNetwork, dtau: Tensor, found: dict[Tensor, Tensor]) -> None:
    """From effective steps to the values that are stored, through their constraint."""
    steps = network.time_steps
    if steps.values in found:
        values = steps.values.detach().requires_grad_()
        with torch.enable_grad():
            tau = steps.rule.tau(values)
        held = [steps.origin[i] in steps.held for i in steps.rule.entries(range(steps.num_steps))]
        gradient = torch.autograd.grad(tau, values, dtau)[0]
        found[steps.values] += gradient.masked_fill(torch.tensor(held, dtype=torch.bool, device=gradient.device), 0.0)


class _Adjoint:
    """Forward pass, adjoint system and what follows from both, letter by letter as above."""

    def __init__(self, network: TimeVariableNetwork, inputs: Tensor, targets: Tensor, loss: Loss, method: str) -> None:
        self.network, self.skips = network, network.skips
        self.tau, self.N = network.time_steps.tau, network.time_steps.num_steps
        self.layers = [cast(FullyConnected, layer) for layer in network.layers]
        self.W = [layer.linear.weight for layer in self.layers]
        # in forward mode fractional networks take their plain path: memory is exact, however it is set
        with forward_ad.dual_level():
            self.y = [network.stem(inputs), *network.states(inputs)]
        z = [layer.linear(y) for layer, y in zip(self.layers, self.y[:-1], strict=True)]
        self.f = [layer.activation(z_l.clone()) for layer, z_l in zip(self.layers, z, strict=True)]
        self.slope = [slope(layer.activation, z[l], l) for l, layer in enumerate(self.layers)]
        self.phi_out = loss_gradient(loss, network.head(self.y[-1]), targets)
        self.gamma = gamma = cast(float, network.scheme.caputo_order)
        if gamma < 1.0:
            self.s = self.tau**gamma * math.gamma(2.0 - gamma)
            self.a = caputo.l1_weights(self.tau, gamma).to(self.tau.dtype)
            if network.scheme.memory_from == 1:
                self.a[1:, 0] = 0.0
            fractional = self._phi_left if method == METHODS[0] else self._phi_right
            self.phi = fractional(self._phi_N())
        else:
            self.s = self.tau
            self.a = torch.eye(self.N, dtype=self.tau.dtype, device=self.tau.device)
            self.phi = self._phi_residual(self._phi_N())

    def _phi_N(self) -> Tensor:
        head = self.network.head
        return self.phi_out @ head.weight if isinstance(head, nn.Linear) else self.phi_out

    def _PT(self, phi: Tensor, l: int, j: int) -> Tensor:
        """(P_l^j)^T phi."""
        return carry_back(self.skips, phi, l, j)

    def _layer(self, phi: dict[int, Tensor], l: int) -> Tensor:
        """s_l W_l^T (phi_{l+1} * sigma'(z_l)); states are rows, so W^T v is v W."""
        return self.s[l] * (phi[l + 1] * self.slope[l]) @ self.W[l]

    def _phi_residual(self, phi_N: Tensor) -> dict[int, Tensor]:
        phi = {self.N: phi_N}
        for l in range(self.N - 1, 0, -1):
            phi[l] = self._PT(phi[l + 1], l, l + 1) + self._layer(phi, l)
        return phi

    def _phi_left(self, phi_N: Tensor) -> dict[int, Tensor]:
        phi, a, N = {self.N: phi_N}, self.a, self.N
        for l in range(N - 1, 0, -1):
            phi[l] = (1 - a[l, l - 1]) * self._PT(phi[l + 1], l, l + 1) + self._layer(phi, l)
            for j in range(l + 2, N + 1):
                phi[l] += (a[j - 1, l] - a[j - 1, l - 1]) * self._PT(phi[j], l, j)
        return phi

    def _phi_right(self, phi_N: Tensor) -> dict[int, Tensor]:
        phi, N = {self.N: phi_N}, self.N
        b = caputo.l1_weights(self.tau, self.gamma, side="right").to(self.tau.dtype).T  # b[j, l]
        for l in range(N - 1, 0, -1):
            phi[l] = self._PT(phi[l + 1], l, l + 1) + self._layer(phi, l)
            for j in range(l + 1, N):
                phi[l] += b[j, l] * (self._PT(phi[j + 1], l, j + 1) - self._PT(phi[j], l, j))
        return phi

    def gradients(self) -> dict[str, Tensor]:
        """By the parameters' names; shared parameters collect the sum of their places."""
        found: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in self.network.parameters()}
        for l, layer in enumerate(self.layers):
            delta = self.s[l] * self.phi[l + 1] * self.slope[l]
            found[layer.linear.weight] += _outer(delta, self.y[l])
            found[layer.linear.bias] += delta.flatten(0, -2).sum(0)
        _of_head(self.network.head, self.y[-1], self.phi_out, found)
        if isinstance(self.skips, ComposedSkips):
            for k, module in enumerate(self.skips.maps):
                if isinstance(module, nn.Linear):
                    found[module.weight] += self._skip_gradient(k)
        _of_steps(self.network, self.dtau(), found)
        return {name: found[p] for name, p in self.network.named_parameters()}

    def dtau(self) -> Tensor:
        """The gradient with respect to the effective steps, before their constraint, (N,)."""
        along_f = torch.stack([(f * self.phi[l + 1]).sum() for l, f in enumerate(self.f)])
        if self.gamma == 1.0:
            return along_f
        gamma, tau = self.gamma, self.tau.double()
        differences = self._differences()
        if self.network.scheme.memory_from == 1:
            differences[:, 0] = 0.0
        memory = cotangent_of_steps(tau, gamma, differences.split(BLOCK))
        own = gamma * tau ** (gamma - 1.0) * math.gamma(2.0 - gamma) * along_f.double()
        return (own - memory).to(self.tau.dtype)

    def _differences(self) -> Tensor:
        """<P y_{j+1} - P y_j, phi_{k+1}> at [k, j], j < k, in float64."""
        inner = torch.zeros(self.N, self.N + 1, dtype=torch.float64, device=self.tau.device)
        for k in range(self.N):
            for j in range(k + 1):
                carried = self.skips(self.y[j], j, k + 1)
                if carried is not None:
                    inner[k, j] = (carried * self.phi[k + 1]).sum()
        return inner.diff(dim=1).tril(-1)

    def _skip_gradient(self, k: int) -> Tensor:
        """Of the learned map past layer k, which is part of every P_j^i with j <= k < i.

        y_i contains sum_j (a_{i-1,j} - a_{i-1,j-1}) P_j^i y_j; for the residual scheme a is the identity matrix.
        """
        module = self.skips.get_submodule(f"maps.{k}")
        assert isinstance(module, nn.Linear)
        total = torch.zeros_like(module.weight)
        first = 0 if self.skips.from_input else 1
        for i in range(k + 1, self.N + 1):
            coefficients = self.a[i - 1].diff(prepend=self.a.new_zeros(1))
            before = [
                coefficients[j] * (self.skips.carry(self.y[j], j, k) if j < k else self.y[j])
                for j in range(first, k + 1)
            ]
            if before:
                after = self._PT(self.phi[i], k + 1, i) if i > k + 1 else self.phi[i]
                total += _outer(after, torch.stack(before).sum(0))
        return total


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """sum over the batch of left right^T."""
    return left.flatten(0, -2).T @ right.flatten(0, -2)


@dataclass(frozen=True)
class Deviation:
    """How far the direction of optimize-then-discretize is from the gradient, layer by layer; prints as a table.

    Attributes:
        layers: Numbers of the layers at the start.
        ratio: norm of (dW_l, db_l) of optimize-then-discretize over that of the gradient, (N,).
        angle: Angle between the two in degrees, (N,).
        tau_ratio: dtau_l of optimize-then-discretize over that of the gradient, signed, (N,).
        tau_angle: Angle between the two vectors dtau, in degrees.
    """

    layers: tuple[int, ...]
    ratio: Tensor
    angle: Tensor
    tau_ratio: Tensor
    tau_angle: float

    def __str__(self) -> str:
        columns = {
            "layer": [*self.layers],
            "norm ratio": self.ratio.tolist(),
            "angle": self.angle.tolist(),
            "dtau ratio": self.tau_ratio.tolist(),
        }
        return f"{format_table(columns)}\nangle between the two dtau: {self.tau_angle:.2f} degrees"


def deviation(
    network: TimeVariableNetwork, inputs: Float[Tensor, "batch *features"], targets: Tensor, loss: Loss
) -> Deviation:
    """Compare the two methods of :func:`gradients`, layer by layer.

    Args:
        network: As in :func:`gradients`.
        inputs: (batch, ...).
        targets: What ``loss`` compares the outputs with.
        loss: Maps (output, target) to a scalar.

    Returns:
        Norm ratios and angles; NaN where a gradient is zero.

    Raises:
        ValueError, TypeError: As :func:`gradients`.

    Example:
        >>> from taulearn.nn import resnet
        >>> _ = torch.manual_seed(0)
        >>> found = deviation(resnet(2, 3, 1, 4, activation="tanh"), torch.ones(5, 2), torch.zeros(5, 1), nn.MSELoss())
        >>> found.ratio.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    check_network(network)
    if network.scheme.caputo_order is None:
        raise ValueError(
            f"network must have the residual or the fractional scheme, got {network.scheme.name!r}: the two methods "
            "are written down for these"
        )
    with torch.no_grad():
        exact, other = (_Adjoint(network, inputs, targets, loss, method) for method in METHODS)
        pairs = [(_theta(exact, l), _theta(other, l)) for l in range(exact.N)]
        tau, other_tau = exact.dtau().double(), other.dtau().double()
    return Deviation(
        layers=network.time_steps.origin,
        ratio=torch.stack([d.norm() / g.norm() for g, d in pairs]),
        angle=torch.stack([_angle(g, d) for g, d in pairs]),
        tau_ratio=other_tau / tau,
        tau_angle=float(_angle(tau, other_tau)),
    )


def _theta(adjoint: _Adjoint, l: int) -> Tensor:
    """(dW_l, db_l) as one float64 vector."""
    delta = (adjoint.s[l] * adjoint.phi[l + 1] * adjoint.slope[l]).double()
    return torch.cat([_outer(delta, adjoint.y[l].double()).flatten(), delta.flatten(0, -2).sum(0)])


def _angle(u: Tensor, v: Tensor) -> Tensor:
    """The angle in degrees, accurate also near 0 and 180 (Kahan)."""
    u, v = u / u.norm(), v / v.norm()
    return torch.rad2deg(2.0 * torch.atan2((u - v).norm(), (u + v).norm()))


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
    if network.scheme.caputo_order is None and not isinstance(network.scheme, LocalScheme):
        raise ValueError(
            f"network must have the residual or the fractional scheme, or one with a step back, got "
            f"{network.scheme.name!r}: no adjoint system is written down for it; autograd differentiates every scheme"
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
