"""The recursions for G_i = d y_i / d theta_j, which show how gradients vanish or explode over the layers.

Widths are equal and P is the identity. With D_i = d f_i / d y_i, G_{j+1} = d(tau_j f_j)/d theta_j and, for i >= j + 2,

    feedforward   G_i = tau_{i-1} D_{i-1} G_{i-1}
    residual      G_i = (I + tau_{i-1} D_{i-1}) G_{i-1}
    dense         G_i = sum_{k=j+1..i-2} G_k + (I + tau_{i-1} D_{i-1}) G_{i-1}
    fractional    G_i = sum_{k=j+1..i-2} (a_{i-1,k} - a_{i-1,k-1}) G_k
                        + ((1 - a_{i-1,i-2}) I + tau_{i-1}^gamma Gamma(2-gamma) D_{i-1}) G_{i-1} + q_i

with G_{j+1} = d(tau_j^gamma Gamma(2-gamma) f_j)/d theta_j + q_{j+1}. For weights and biases q = 0; for theta_j = tau_j

    q_i = - sum_k (d a_{i-1,k} / d tau_j) (y_{k+1} - y_k),

because the weights of the memory depend on the steps. With theta_j = y_{j+1}, start from the identity.

References:
    Antil, Diaz, Herberg (2022), theorems 6.1, 6.4 and 6.6; the last is printed with a_{i,k} for a_{i-1,k} and
    without q.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from taulearn import caputo

Jacobians = Sequence[Float[Tensor, "*batch width width"]]


def feedforward_gradients(
    start: Float[Tensor, "*batch width p"], jacobians: Jacobians, tau: Float[Tensor, " layers"], layer: int
) -> dict[int, Tensor]:
    """G_i of the feedforward scheme, prod tau_i D_i times the start.

    Args:
        start: d(tau_j f_j)/d theta_j, (..., n, p) for p parameters.
        jacobians: D_0 .. D_{N-1}, each (..., n, n); those up to D_j are not used.
        tau: Steps, (N,).
        layer: j, the layer of the parameters, in 0 .. N-1.

    Returns:
        {i: G_i} for i = j+1 .. N.

    Raises:
        ValueError: If the numbers of jacobians and steps differ, a shape does not fit, or there is no such layer.

    References:
        Antil, Diaz, Herberg (2022), theorem 6.1.

    Example:
        >>> D = [2.0 * torch.eye(1)] * 3
        >>> feedforward_gradients(torch.ones(1, 1), D, torch.tensor([1.0, 0.5, 0.25]), 0)[3]
        tensor([[0.5000]])
    """
    _check(start, jacobians, tau, layer)
    G = {layer + 1: start}
    for i in range(layer + 2, len(tau) + 1):
        G[i] = tau[i - 1] * jacobians[i - 1] @ G[i - 1]
    return G


def residual_gradients(
    start: Float[Tensor, "*batch width p"], jacobians: Jacobians, tau: Float[Tensor, " layers"], layer: int
) -> dict[int, Tensor]:
    """G_i of the residual scheme, prod (I + tau_i D_i) times the start.

    Arguments, result and errors are those of :func:`feedforward_gradients`.

    References:
        Antil, Diaz, Herberg (2022), theorem 6.1.

    Example:
        >>> D = [2.0 * torch.eye(1)] * 3
        >>> residual_gradients(torch.ones(1, 1), D, torch.tensor([1.0, 0.5, 0.25]), 0)[3]
        tensor([[3.]])
    """
    _check(start, jacobians, tau, layer)
    G = {layer + 1: start}
    for i in range(layer + 2, len(tau) + 1):
        G[i] = G[i - 1] + tau[i - 1] * jacobians[i - 1] @ G[i - 1]
    return G


def dense_gradients(
    start: Float[Tensor, "*batch width p"], jacobians: Jacobians, tau: Float[Tensor, " layers"], layer: int
) -> dict[int, Tensor]:
    """G_i of the dense scheme; with tau = 0 it doubles with every layer, G_N = 2^(N-j-2) G_{j+1}.

    Arguments, result and errors are those of :func:`feedforward_gradients`.

    References:
        Antil, Diaz, Herberg (2022), theorem 6.4.

    Example:
        >>> D = [2.0 * torch.eye(1)] * 3
        >>> dense_gradients(torch.ones(1, 1), D, torch.tensor([1.0, 0.5, 0.25]), 0)[3]
        tensor([[4.]])
    """
    _check(start, jacobians, tau, layer)
    G, total = {layer + 1: start}, start
    for i in range(layer + 2, len(tau) + 1):
        G[i] = total + tau[i - 1] * jacobians[i - 1] @ G[i - 1]
        total = total + G[i]
    return G


def fractional_gradients(
    start: Float[Tensor, "*batch width p"],
    jacobians: Jacobians,
    tau: Float[Tensor, " layers"],
    layer: int,
    *,
    gamma: float = 0.5,
    memory_from: int = 1,
    memory: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """G_i of the fractional scheme.

    Args:
        start: d(tau_j^gamma Gamma(2-gamma) f_j)/d theta_j, (..., n, p).
        jacobians: D_0 .. D_{N-1}, each (..., n, n); those up to D_j are not used.
        tau: Steps > 0, (N,).
        layer: j, in 0 .. N-1.
        gamma: Order of the derivative, in (0, 1).
        memory_from: First difference that is remembered, 1 or 0.
        memory: For theta_j = tau_j the terms {i: q_i} of :func:`memory_terms`. None: zero, as for weights and biases.

    Returns:
        {i: G_i} for i = j+1 .. N.

    Raises:
        ValueError: As :func:`feedforward_gradients`, and if gamma or tau is outside its range.

    References:
        Antil, Diaz, Herberg (2022), theorem 6.6.

    Example:
        >>> D = [torch.zeros(1, 1)] * 3
        >>> fractional_gradients(torch.ones(1, 1), D, torch.ones(3), 0, memory_from=0)[3]
        tensor([[0.4395]])
    """
    _check(start, jacobians, tau, layer)
    a = _weights(tau.detach(), gamma, memory_from).to(start.dtype)
    s = tau**gamma * math.gamma(2.0 - gamma)
    q = {} if memory is None else memory
    G = {layer + 1: start + q[layer + 1] if layer + 1 in q else start}
    for i in range(layer + 2, len(tau) + 1):
        G[i] = (1 - a[i - 1, i - 2]) * G[i - 1] + s[i - 1] * jacobians[i - 1] @ G[i - 1]
        for k in range(layer + 1, i - 1):
            G[i] = G[i] + (a[i - 1, k] - a[i - 1, k - 1]) * G[k]
        if i in q:
            G[i] = G[i] + q[i]
    return G


def memory_terms(
    states: Sequence[Float[Tensor, "*batch width"]],
    tau: Float[Tensor, " layers"],
    layer: int,
    *,
    gamma: float = 0.5,
    memory_from: int = 1,
) -> dict[int, Tensor]:
    """q_i = - sum_k (d a_{i-1,k} / d tau_j) (y_{k+1} - y_k), what a step does through the memory's weights.

    Args:
        states: P y_0 (zeros where the first skip is zero), y_1 .. y_N, each (..., n).
        tau: Steps > 0, (N,).
        layer: j, in 0 .. N-1.
        gamma: Order of the derivative, in (0, 1).
        memory_from: First difference that is remembered, 1 or 0.

    Returns:
        {i: q_i} for i = j+1 .. N, each (..., n, 1), of the states' type.

    Raises:
        ValueError: If there is not one state more than steps, or an argument is outside its range.

    References:
        Antil, Diaz, Herberg (2022), appendix A.2, for the derivatives of the weights.

    Example:
        >>> y = [torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([3.0])]
        >>> memory_terms(y, torch.ones(2), 0, memory_from=0)[2]
        tensor([[0.0607]])
    """
    _check_layer(layer, tau)
    if len(states) != len(tau) + 1:
        raise ValueError(f"states must be y_0 .. y_{len(tau)}, one more than tau has entries, got {len(states)}")
    direction = torch.zeros_like(tau, dtype=torch.float64)
    direction[layer] = 1.0
    a = partial(_weights, gamma=gamma, memory_from=memory_from)
    derivatives = torch.func.jvp(a, (tau.detach().double(),), (direction,))[1]
    differences = torch.stack([b - a for a, b in pairwise(states)]).double()
    q = -torch.tensordot(derivatives, differences, dims=1).unsqueeze(-1).to(states[-1].dtype)
    return {i: q[i - 1] for i in range(layer + 1, len(tau) + 1)}


def _weights(tau: Tensor, gamma: float, memory_from: int) -> Tensor:
    if memory_from not in (0, 1):
        raise ValueError(f"memory_from must be 0 or 1, got {memory_from!r}: it is the first difference in the memory")
    a = caputo.l1_weights(tau, gamma)
    return torch.cat([a[:, :1].triu(), a[:, 1:]], 1) if memory_from == 1 else a


def _check_layer(layer: int, tau: Tensor) -> None:
    if tau.ndim != 1 or len(tau) == 0:
        raise ValueError(f"tau must be a vector of at least one step, got shape {tuple(tau.shape)}")
    if not 0 <= layer < len(tau):
        raise ValueError(f"layer must be a number in 0 .. {len(tau) - 1}, got {layer!r}: there are {len(tau)} steps")


def _check(start: Tensor, jacobians: Jacobians, tau: Tensor, layer: int) -> None:
    _check_layer(layer, tau)
    if len(jacobians) != len(tau):
        raise ValueError(f"jacobians must be D_0 .. D_{len(tau) - 1}, one per step, got {len(jacobians)}")
    if start.ndim < 2:
        raise ValueError(
            f"start must be (..., width, parameters), got shape {tuple(start.shape)}: for one parameter "
            "take start.unsqueeze(-1)"
        )
    n = start.shape[-2]
    for i in range(layer + 1, len(tau)):
        if jacobians[i].shape[-2:] != (n, n):
            raise ValueError(
                f"jacobians must be {n} by {n} from layer {layer + 1} on, as wide as start, got shape "
                f"{tuple(jacobians[i].shape)} for layer {i}: the recursions are written for equal widths"
            )
