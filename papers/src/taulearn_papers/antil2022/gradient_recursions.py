"""The recursions of section 6 against automatic differentiation, on trained networks in float64 (claim A7).

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, theorems 6.1,
        6.4 and 6.6.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ...._undisturbed import evaluation
from ....depth.layers import differentiable
from ....diagnostics import (
    dense_gradients,
    feedforward_gradients,
    fractional_gradients,
    memory_terms,
    residual_gradients,
)
from ....diagnostics.jacobian_products import Graph
from ....nn import TimeVariableNetwork
from ....nn.builders import FullyConnected
from ....nn.schemes import Fractional

_RECURSIONS: dict[str, Callable[..., dict[int, Tensor]]] = {
    "feedforward": feedforward_gradients,
    "residual": residual_gradients,
    "dense": dense_gradients,
    "fractional": fractional_gradients,
}


def errors(network: TimeVariableNetwork, x: Tensor) -> dict[str, float | None]:
    """Relative errors of the recursions for d y_N, the larger of those for layers 0 and N/2, by part.

    Args:
        network: Fully connected layers with tanh, in float64.
        x: One sample, (1, ...).

    Returns:
        Frobenius norms of the differences to automatic differentiation over those of the derivatives; in the fractional
        scheme "tau, as printed" besides, which leaves out what a step does through the weights of the memory.
    """
    N = len(network.layers)
    exact = by_autograd(network, x)
    found: dict[str, Tensor] = {}
    for j in (0, N // 2):
        for part, value in by_recursion(network, x, j).items():
            expected = exact[part.removesuffix(", as printed")][j]
            difference = (value - expected).norm()
            error = difference / expected.norm() if difference > 0 else difference  # 0 / 0 where tanh is saturated
            found[part] = torch.maximum(error, found.get(part, error))
    return {part: finite(error) for part, error in found.items()}


def finite(value: Any) -> float | None:
    """A number as JSON holds it: None for what is not finite.

    Example:
        >>> finite(2), finite(math.nan)
        (2.0, None)
    """
    return float(value) if math.isfinite(value) else None


def by_autograd(network: TimeVariableNetwork, x: Tensor) -> dict[str, list[Tensor]]:
    """d y_N / d y_{j+1}, d y_N / d W_j, d y_N / d b_j, d y_N / d tau_j for all j, each (width, entries)."""
    layers = [cast(FullyConnected, layer).linear for layer in network.layers]
    with evaluation(network), differentiable(network) as tau:
        graph = Graph(network.states(x), [[one.weight] for one in layers], [[one.bias] for one in layers], tau)
        states, others = graph.transposed(torch.eye(layers[-1].out_features))
    return {
        "propagator": states,
        "W": [others[one.weight].flatten(1) for one in layers],
        "b": [others[one.bias] for one in layers],
        "tau": list(others[tau].unsqueeze(-1).unbind(1)),
    }


@torch.no_grad()
def by_recursion(network: TimeVariableNetwork, x: Tensor, j: int) -> dict[str, Tensor]:
    """The same for one j by the recursions, started from the closed form of tanh layers; no graph is differentiated."""
    scheme, tau = network.scheme, network.time_steps.tau
    layers = [cast(FullyConnected, layer) for layer in network.layers]
    states = network.states(x, initial=True)
    f = [layer(y) for layer, y in zip(layers, states[:-1], strict=True)]
    D = [(1 - each**2).T * layer.linear.weight for each, layer in zip(f, layers, strict=True)]
    p = scheme.step_power
    size = tau[j] ** p * math.gamma(2 - p)
    slopes = torch.diag(1 - f[j][0] ** 2)
    starts = {
        "propagator": torch.eye(len(slopes)).to(tau),
        "W": size * torch.kron(slopes, states[j]),
        "b": size * slopes,
    }
    of_tau = p * tau[j] ** (p - 1) * math.gamma(2 - p) * f[j].T
    options: dict[str, Any] = {}
    if isinstance(scheme, Fractional):
        options = {"gamma": scheme.gamma, "memory_from": scheme.memory_from}
    recursion = partial(_RECURSIONS[scheme.name], jacobians=D, tau=tau, layer=j, **options)
    N = len(layers)
    together = recursion(torch.cat(list(starts.values()), dim=1))[N]
    found = dict(zip(starts, together.split([each.shape[1] for each in starts.values()], dim=1), strict=True))
    if not options:
        return found | {"tau": recursion(of_tau)[N]}
    carried = [torch.zeros_like(states[1][0]), *(y[0] for y in states[1:])]
    memory = memory_terms(carried, tau, j, **options)
    return found | {"tau": recursion(of_tau, memory=memory)[N], "tau, as printed": recursion(of_tau)[N]}
