"""The formulas of the package: one step of each scheme, the activation, the projections, the loss.

Pure functions on tensors, without state. With f = f_l(y_l) the value of layer l, tau its time step and P y the state
carried over by the skip:

    feedforward   y_{l+1} = tau f
    residual      y_{l+1} = P y_l + tau f
    dense         y_{l+1} = sum_{k<=l} P y_k + tau f
    fractional    y_{l+1} = P y_l - memory_l + tau^gamma Gamma(2-gamma) f
                  memory_l = sum_{j<l} a_{l,j} (P y_{j+1} - P y_j)

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.
    Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning, equations (2.1) and (2.2).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def feedforward_step(f: Float[Tensor, "*batch width"], tau: Float[Tensor, ""]) -> Float[Tensor, "*batch width"]:
    """One step of the feedforward scheme, y_{l+1} = tau_l f_l(y_l).

    Args:
        f: Layer value f_l(y_l).
        tau: Time step tau_l, a scalar tensor.

    Returns:
        The next state y_{l+1}, shaped like ``f``.

    Example:
        >>> feedforward_step(torch.tensor([2.0]), torch.tensor(0.5))
        tensor([1.])
    """
    return tau * f


def residual_step(
    y: Float[Tensor, "*batch width"] | None, f: Float[Tensor, "*batch width"], tau: Float[Tensor, ""]
) -> Float[Tensor, "*batch width"]:
    """One explicit Euler step, y_{l+1} = P y_l + tau_l f_l(y_l).

    Also one dense step, with the sum of the earlier states as ``y``.

    Args:
        y: What the skip carries over, P y_l; None where the skip is zero.
        f: Layer value f_l(y_l).
        tau: Time step tau_l, a scalar tensor.

    Returns:
        The next state y_{l+1}, shaped like ``f``.

    Example:
        >>> residual_step(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(0.5))
        tensor([2.])
    """
    return tau * f if y is None else y + tau * f


def fractional_step(
    y: Float[Tensor, "*batch width"] | None,
    memory: Float[Tensor, "*batch width"] | None,
    f: Float[Tensor, "*batch width"],
    tau: Float[Tensor, ""],
    gamma: float,
) -> Float[Tensor, "*batch width"]:
    """One explicit step of the Caputo equation, y_{l+1} = P y_l - memory_l + tau_l^gamma Gamma(2-gamma) f_l(y_l).

    Args:
        y: What the skip carries over, P y_l; None where the skip is zero.
        memory: sum_{j<l} a_{l,j} (P y_{j+1} - P y_j); None where the sum is empty.
        f: Layer value f_l(y_l).
        tau: Time step tau_l > 0, a scalar tensor.
        gamma: Order of the derivative, 0 < gamma < 1; in the limit 1 the residual step.

    Returns:
        The next state y_{l+1}, shaped like ``f``.

    Example:
        >>> fractional_step(torch.tensor([1.0]), None, torch.tensor([2.0]), torch.tensor(1.0), 0.999999)
        tensor([3.0000])
    """
    increment = tau**gamma * math.gamma(2.0 - gamma) * f
    if y is None:
        return increment if memory is None else increment - memory
    return y + increment if memory is None else y - memory + increment


def smooth_relu(y: Float[Tensor, "*shape"], eta: float = 1e-4) -> Float[Tensor, "*shape"]:
    """The ReLU with its kink replaced by a parabola: y^2/(4 eta) + y/2 + eta/4 for abs(y) <= eta, else max(0, y).

    Args:
        y: Any shape.
        eta: Half width of the smoothed interval, > 0.

    Returns:
        A tensor shaped like ``y``; continuously differentiable.

    References:
        Antil, Diaz, Herberg (2022), section 7.

    Example:
        >>> smooth_relu(torch.tensor([-1.0, 0.0, 1.0]), eta=0.5)
        tensor([0.0000, 0.1250, 1.0000])
    """
    inside = y.clamp(-eta, eta)
    parabola = inside * inside / (4.0 * eta) + inside / 2.0 + eta / 4.0
    return torch.where(y.abs() >= eta, torch.relu(y), parabola)  # at the joints clamp has no gradient in torch 2.14


def soft_threshold(x: Float[Tensor, "*shape"], amount: float | Tensor) -> Float[Tensor, "*shape"]:
    """The proximal map of ``amount`` * l1 norm, sign(x) max(abs(x) - amount, 0); it lands on exact zeros.

    Args:
        x: Any shape.
        amount: Threshold, >= 0.

    Returns:
        A tensor shaped like ``x``.

    Example:
        >>> soft_threshold(torch.tensor([-1.0, 0.25, 2.0]), 0.5).tolist()
        [-0.5, 0.0, 1.5]
    """
    return torch.sign(x) * torch.relu(x.abs() - amount)


def project_simplex(x: Float[Tensor, " n"], total: float, *, lower: float = 0.0) -> Float[Tensor, " n"]:
    """Euclidean projection onto {z : z_i >= lower, sum z = total}; ``lower`` is met exactly (sorted-threshold rule).

    Args:
        x: A vector of n entries.
        total: Sum of the result; total >= n * lower.
        lower: Smallest entry allowed.

    Returns:
        The nearest point of the set, shape (n,).

    References:
        Held, Wolfe, Crowder (1974), Validation of subgradient optimization, for the sorted rule.

    Example:
        >>> project_simplex(torch.tensor([0.9, 0.4, -0.5]), 1.0)
        tensor([0.7500, 0.2500, 0.0000])
    """
    z = x - x.max()  # the projection does not see a shift
    descending = torch.sort(z, descending=True).values
    excess = (torch.cumsum(descending, 0) - (total - lower * x.numel())) / torch.arange(
        1, x.numel() + 1, dtype=x.dtype, device=x.device
    )
    support = (descending > excess).sum().clamp(min=1)
    return torch.relu(z - excess.gather(0, (support - 1).unsqueeze(0))) + lower


def split_steps(tau: Float[Tensor, " n"], indices: Sequence[int], theta: float = 0.5) -> Float[Tensor, " m"]:
    """Steps of a finer grid: tau_l becomes theta tau_l and tau_l - theta tau_l; their sum is kept.

    Args:
        tau: Steps, (n,).
        indices: Positions l to split, each once.
        theta: Share of the first of the two, in (0, 1).

    Returns:
        n + len(indices) steps.

    Example:
        >>> split_steps(torch.tensor([1.0, 2.0]), [1], 0.25).tolist()
        [1.0, 0.5, 1.5]
    """
    halves = [(theta * step, step - theta * step) if l in indices else (step,) for l, step in enumerate(tau)]
    return torch.stack([step for each in halves for step in each])


def insert_steps(tau: Float[Tensor, " n"], behind: Sequence[int], size: float = 0.0) -> Float[Tensor, " m"]:
    """Steps with new ones behind some of them.

    Args:
        tau: Steps, (n,).
        behind: Positions behind which a step comes, each once.
        size: The new steps.

    Returns:
        n + len(behind) steps.

    Example:
        >>> insert_steps(torch.tensor([1.0, 2.0]), [0]).tolist()
        [1.0, 0.0, 2.0]
    """
    new = torch.full_like(tau[:1], size)
    return torch.cat([part for l in range(len(tau)) for part in (tau[l : l + 1], *[new] * (l in behind))])


def half_mse_loss(output: Float[Tensor, "batch *out"], target: Float[Tensor, "batch *out"]) -> Float[Tensor, ""]:
    """The papers' mean squared error, 1/(2m) sum_i norm(output_i - target_i)^2 over the m samples of the batch.

    Args:
        output: Network outputs, (m, ...).
        target: Targets of the same shape.

    Returns:
        A scalar: half the batch mean of the squared Euclidean norm (``torch.nn.functional.mse_loss`` averages over the
        components too).

    Raises:
        ValueError: If the shapes differ (broadcasting would silently compare every sample with every other).

    References:
        Antil, Diaz, Herberg (2022), section 2.

    Example:
        >>> half_mse_loss(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2))
        tensor(1.)
    """
    if output.shape != target.shape:
        raise ValueError(
            f"target must have the shape of the output {tuple(output.shape)}, got {tuple(target.shape)}: reshape it"
        )
    return (output - target).square().sum() / (2 * output.shape[0])
