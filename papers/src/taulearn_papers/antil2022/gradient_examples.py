"""The article's examples on the propagation of gradients (claim A7).

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, examples 6.3
        and 6.8.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....caputo import l1_weights
from ....diagnostics import dense_gradients, feedforward_gradients, fractional_gradients, residual_gradients

SLOPE = 99.0
STEPS = (1.0, 0.01)
"""tau_1 of example 6.3: one that lets the gradient explode, and one that keeps 1 + tau_1 SLOPE near 2."""
GAMMA = 0.5


def measure(_: Path) -> dict[str, Any]:
    """Both examples.

    Args:
        _: The member's folder, which is not looked at.

    Returns:
        "6.3": for each tau_1 the W-, b- and tau-parts of layer 0 ("far") and of layer 1 ("near"); "6.8": relative
        differences between recursion and closed form, by scheme.
    """
    return {"6.3": {str(tau): example_63(tau) for tau in STEPS}, "6.8": example_68()}


def example_63(tau: float) -> dict[str, list[float]]:
    """d y_2 / d theta_0 and d y_2 / d theta_1 in the residual scheme, one node per layer.

    Args:
        tau: tau_1. Besides, tau_0 = 1, f_0 = f_1 = 2 with y_0 = y_1 = 1 and sigma' = 1, and the slope of f_1 is 99.

    Returns:
        The derivatives by W, b and tau of layer 0, "far", (1 + 99 tau) (1, 1, 2), and of layer 1, "near",
        (tau, tau, 2).

    Example:
        >>> example_63(1.0)["far"]
        [100.0, 100.0, 200.0]
    """
    steps = torch.tensor([1.0, tau], dtype=torch.float64)
    D = [torch.full((1, 1), slope, dtype=torch.float64) for slope in (0.0, SLOPE)]
    starts = [torch.tensor([[step, step, 2.0]], dtype=torch.float64) for step in steps.tolist()]
    far, near = (residual_gradients(start, D, steps, j)[2][0].tolist() for j, start in enumerate(starts))
    return {"far": far, "near": near}


def example_68() -> dict[str, float]:
    """d y_3 / d theta_0 by the recursions against the closed forms, with a_{l-1,k} where the article prints a_{l,k}.

    Returns:
        Relative differences by scheme.

    Example:
        >>> max(example_68().values()) < 1e-14
        True
    """
    generator = torch.Generator().manual_seed(0)
    D0, D1, D2, start = torch.randn(4, 2, 2, dtype=torch.float64, generator=generator)
    D = [D0, D1, D2]
    tau = torch.tensor([0.3, 0.2, 0.7], dtype=torch.float64)
    I, a = torch.eye(2, dtype=torch.float64), l1_weights(tau, GAMMA)
    _, t1, t2 = tau
    both = t1 * D1 + t2 * D2 + t1 * t2 * D2 @ D1
    s = tau**GAMMA * math.gamma(2 - GAMMA)

    first = (1 - a[1, 0]) * I + s[1] * D1
    fractional = ((1 - a[2, 1]) * I + s[2] * D2) @ first + (a[2, 1] - a[2, 0]) * I
    found = {
        "feedforward": (feedforward_gradients(start, D, tau, 0), t2 * D2 @ (t1 * D1)),
        "residual": (residual_gradients(start, D, tau, 0), I + both),
        "dense": (dense_gradients(start, D, tau, 0), 2 * I + both),
        "fractional": (fractional_gradients(start, D, tau, 0, gamma=GAMMA, memory_from=0), fractional),
    }
    return {name: _error(G[3], matrix @ start) for name, (G, matrix) in found.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
