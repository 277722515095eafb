"""The Caputo equation D^gamma y = f(t, y), y(0) = y_0, by the explicit L1 scheme, as a fractional network steps it.

    y_{l+1} = y_l - sum_{j<l} a_{l,j} (y_{j+1} - y_j) + tau_l^gamma Gamma(2-gamma) f(t_l, y_l)

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, equation (5.7).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from taulearn.functional import fractional_step

from ._arguments import check_order, to_double
from .weights import l1_weights


def solve(
    f: Callable[[Tensor, Tensor], Tensor],
    y0: Float[Tensor, "*shape"],
    tau: Float[Tensor, " layers"],
    gamma: float,
    *,
    validate: bool = True,
) -> Float64[Tensor, " points *shape"]:
    """Solve D^gamma y = f(t, y), y(0) = y0, by the explicit L1 scheme, the one a fractional network is made of.

    y_{l+1} = y_l - sum_{j<l} a_{l,j} (y_{j+1} - y_j) + tau_l^gamma Gamma(2-gamma) f(t_l, y_l)

    Args:
        f: Right-hand side; called as f(t, y) with a scalar float64 tensor and a tensor shaped like ``y0``, in float64.
        y0: Initial value, any shape.
        tau: Step sizes, > 0, shape (N,).
        gamma: Order of the derivative, 0 < gamma < 1.
        validate: As in :func:`l1_weights`.

    Returns:
        float64 (N+1, ...): y_0 .. y_N. Differentiable in y0, tau and whatever f depends on.

    Raises:
        ValueError: As :func:`l1_weights`, and if f returns another shape than that of y0.
        TypeError: As :func:`l1_weights`, and if y0 is no tensor or f returns none.

    References:
        Antil, Diaz, Herberg (2022), equation (5.7).

    Example:
        >>> y = solve(lambda t, y: torch.ones_like(y), torch.tensor(0.0), torch.full((4,), 0.25), 0.5)
        >>> y[-1].item()  # 2 sqrt(t / pi) at t = 1 is 1.1284
        1.0586...
    """
    gamma = check_order(gamma)
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a tensor, got {type(y0).__name__}: write torch.as_tensor(y0)")
    weights = l1_weights(tau, gamma, validate=validate)
    steps = tau.double()
    times = torch.cat([steps.new_zeros(1), torch.cumsum(steps, 0)])
    y = to_double(y0)
    columns = weights.to(y.dtype).reshape(weights.shape + (1,) * y.ndim)
    states = [y]
    # Row i: memory of the i-th step to come. Each difference is added to all of them at once.
    memory = torch.zeros((tau.shape[0], *y.shape), dtype=y.dtype, device=y.device)
    for n in range(tau.shape[0]):
        value = f(times[n], y)
        if not isinstance(value, Tensor):
            raise TypeError(f"f must return a tensor of the shape of y0, {tuple(y.shape)}, got {type(value).__name__}")
        if value.shape != y.shape:
            raise ValueError(
                f"f must return the shape of y0, {tuple(y.shape)}, got {tuple(value.shape)}: one value per component"
            )
        y = fractional_step(y, memory[0], value, steps[n], gamma)
        memory = memory[1:] + columns[n + 1 :, n] * (y - states[-1])
        states.append(y)
    return torch.stack(states)
