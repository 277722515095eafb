"""The schemes in NumPy, float64, with double loops: from the formulas alone, to be compared with the package."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from taulearn.nn import ComposedSkips, Fractional, PadSkips, TimeSteps, TimeVariableNetwork

Array = NDArray[np.float64]
Carry = Callable[[Array, int, int], Array]


def smooth_relu(y: Array, eta: float = 1e-4) -> Array:
    """max(0, y) outside [-eta, eta], y^2/(4 eta) + y/2 + eta/4 inside."""
    return np.where(np.abs(y) > eta, np.maximum(y, 0.0), y * y / (4 * eta) + y / 2 + eta / 4)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Tanh": np.tanh,
    "ReLU": lambda y: np.maximum(y, 0.0),
    "SmoothReLU": smooth_relu,
    "Sigmoid": lambda y: 1.0 / (1.0 + np.exp(-y)),
    "Softplus": lambda y: np.log1p(np.exp(y)),
}


@dataclass(frozen=True)
class Layer:
    """f(y) = sigma(W y + b)."""

    weight: Array
    bias: Array
    sigma: Callable[[Array], Array]

    def __call__(self, y: Array) -> Array:
        return self.sigma(y @ self.weight.T + self.bias)


def caputo_weight(tau: Array, gamma: float, l: int, j: int) -> float:
    """a_{l,j} = tau_l^gamma / tau_j [(t_{l+1} - t_j)^(1-gamma) - (t_{l+1} - t_{j+1})^(1-gamma)], as printed."""
    t = np.concatenate([[0.0], np.cumsum(tau)])
    powers = (t[l + 1] - t[j]) ** (1 - gamma) - max(t[l + 1] - t[j + 1], 0.0) ** (1 - gamma)
    return float(tau[l] ** gamma / tau[j] * powers)


def time_steps(values: Array, constraint: str, horizon: float, lower_bound: float | None) -> Array:
    """The steps that the network uses, from the parameter vector."""
    if constraint != "dependent":
        return values
    last = horizon - math.fsum(values)
    return np.append(values, last if lower_bound is None else max(last, lower_bound))


def states(
    scheme: str,
    layers: Sequence[Layer],
    tau: Array,
    carry: Carry,
    u: Array,
    *,
    gamma: float | tuple[float, ...] = 0.5,
    memory_from: int = 1,
    epsilon: float = 1.0,
) -> list[Array]:
    """The states y_0 .. y_N of the scheme."""
    y, v = [u], np.zeros_like(carry(u, 0, 1))
    for l, layer in enumerate(layers):
        f = layer(y[l])
        if scheme in LOCAL and layer.weight.shape[0] == layer.weight.shape[1]:
            new, v = LOCAL[scheme](layer, y[l], v, float(tau[l]), epsilon)
        elif scheme in LOCAL:
            new = carry(y[l], l, l + 1) + tau[l] * f
        elif scheme == "feedforward":
            new = tau[l] * f
        elif scheme == "residual":
            new = carry(y[l], l, l + 1) + tau[l] * f
        elif scheme == "dense":
            new = tau[l] * f
            for k in range(l + 1):
                new = new + carry(y[k], k, l + 1)
        elif scheme in ("fractional", "fractional-learned"):
            order = gamma[l] if isinstance(gamma, tuple) else gamma
            new = carry(y[l], l, l + 1) + tau[l] ** order * math.gamma(2 - order) * f
            for j in range(memory_from, l):
                difference = carry(y[j + 1], j + 1, l + 1) - carry(y[j], j, l + 1)
                new = new - caputo_weight(tau, order, l, j) * difference
        else:
            raise AssertionError(scheme)
        y.append(new)
    return y


def midpoint(f: Layer, y: Array, v: Array, tau: float, epsilon: float) -> tuple[Array, Array]:
    return y + tau * f(y + tau / 2 * f(y)), v


def heun(f: Layer, y: Array, v: Array, tau: float, epsilon: float) -> tuple[Array, Array]:
    return y + tau / 2 * (f(y) + f(y + tau * f(y))), v


def rk4(f: Layer, y: Array, v: Array, tau: float, epsilon: float) -> tuple[Array, Array]:
    first = f(y)
    second = f(y + tau / 2 * first)
    third = f(y + tau / 2 * second)
    return y + tau / 6 * (first + 2 * second + 2 * third + f(y + tau * third)), v


def momentum(f: Layer, y: Array, v: Array, tau: float, epsilon: float) -> tuple[Array, Array]:
    mu = 1 - tau / epsilon
    v = mu * v + (1 - mu) * f(y)
    return y + tau * v, v


def verlet(f: Layer, y: Array, v: Array, tau: float, epsilon: float) -> tuple[Array, Array]:
    after = v + tau * f(y + tau / 2 * v)
    return y + tau / 2 * (v + after), after


LOCAL = {"midpoint": midpoint, "heun": heun, "rk4": rk4, "momentum": momentum, "verlet": verlet}


def padding(widths: Sequence[int], *, from_input: bool = False) -> Carry:
    """Zero padding or truncation, directly from one state to another."""

    def carry(y: Array, source: int, target: int) -> Array:
        carried = np.zeros((len(y), widths[target]))
        if source > 0 or from_input:
            common = min(widths[source], widths[target])
            carried[:, :common] = y[:, :common]
        return carried

    return carry


def composition(widths: Sequence[int], maps: Sequence[Array | None], *, from_input: bool = False) -> Carry:
    """Linear maps (None: the identity), one past each layer, applied one after the other."""

    def carry(y: Array, source: int, target: int) -> Array:
        if source == 0 and not from_input:
            return np.zeros((len(y), widths[target]))
        for layer in range(source, target):
            matrix = maps[layer]
            y = y if matrix is None else y @ matrix.T
        return y

    return carry


def array(x: Tensor) -> Array:
    return x.detach().cpu().numpy().astype(np.float64)


def linear_layers(network: TimeVariableNetwork) -> list[nn.Linear]:
    """The linear maps of the hidden layers."""
    found = [layer.linear for layer in network.layers if isinstance(layer.linear, nn.Linear)]
    assert len(found) == len(network.layers)
    return found


def network_states(network: TimeVariableNetwork, x: Tensor) -> list[Array]:
    """The states y_0 .. y_N of a network of fully connected layers, by the formulas of this file."""
    layers = []
    for module, linear in zip(network.layers, linear_layers(network), strict=True):
        layers.append(Layer(array(linear.weight), array(linear.bias), ACTIVATIONS[type(module.activation).__name__]))
    widths = [layers[0].weight.shape[1], *(layer.weight.shape[0] for layer in layers)]
    steps, skips = network.time_steps, network.skips
    assert isinstance(steps, TimeSteps)
    carry = padding(widths, from_input=skips.from_input)
    if isinstance(skips, ComposedSkips):
        maps = [array(module.weight) if isinstance(module, nn.Linear) else None for module in skips.maps]
        carry = composition(widths, maps, from_input=skips.from_input)
    elif len(set(widths[1:])) > 1:
        assert isinstance(skips, PadSkips)
    scheme = network.scheme
    gamma, memory_from = (scheme.gamma, scheme.memory_from) if isinstance(scheme, Fractional) else (0.5, 1)
    tau = time_steps(array(steps.values), steps.constraint, steps.horizon, steps.lower_bound)
    options = {"gamma": gamma, "memory_from": memory_from, "epsilon": getattr(scheme, "epsilon", 1.0)}
    return states(scheme.name, layers, tau, carry, array(x.flatten(1)), **options)


def network_output(network: TimeVariableNetwork, x: Tensor) -> Array:
    """W_N y_N."""
    head = network.head
    assert isinstance(head, nn.Linear)
    return network_states(network, x)[-1] @ array(head.weight).T
