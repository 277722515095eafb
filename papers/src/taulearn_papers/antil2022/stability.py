"""Stability of the continuous fractional network in its initial value (claim A8), on problems with known constants.

For D^gamma y = f(t, y) with Lipschitz constant L, two solutions fulfil

    int_0^T abs(y_a - y_b) dt  <=  C abs(y_a(0) - y_b(0)),      C = T E_{gamma,2}(L T^gamma)

with the Mittag-Leffler function E_{a,b}(z) = sum_k z^k / Gamma(a k + b); the linear problem f = L y attains it. The
article prints the pointwise growth exp(L t^(1-gamma) / Gamma(2-gamma)), which the linear problem exceeds.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, Proposition 3.2.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taulearn.caputo import solve

ORDERS = (0.3, 0.5, 0.8)
CONSTANTS = (0.5, 1.0, 2.0)
HORIZON = 1.0
PROBLEMS = ("linear", "network")
GRID = 800
"""Time steps, graded quadratically towards 0, where the solutions have an infinite slope."""


def mittag_leffler(a: float, b: float, z: float) -> float:
    """E_{a,b}(z) = sum_k z^k / Gamma(a k + b) for z >= 0, by its series of positive terms.

    Example:
        >>> mittag_leffler(1.0, 1.0, 2.0)  # the exponential
        7.38905609893065
    """
    if z < 0:
        raise ValueError(f"z must be >= 0, got {z}: the series of positive terms is exact there alone")
    total, k = 0.0, 0
    while True:
        term = math.exp(k * math.log(z) - math.lgamma(a * k + b)) if z > 0 else float(k == 0) / math.gamma(b)
        total += term
        if k * a > 2 and term < 1e-17 * total:
            return total
        k += 1


def measure(_: Path) -> dict[str, Any]:
    """Two trajectories of each problem, their distance in L1(0, T) over that at the start, and the bounds.

    Args:
        _: The member's folder, which is not looked at.

    Returns:
        Rows with "problem", "gamma", "lipschitz", "ratio" (measured), "bound" (C above), "printed" (the integral of the
        article's exponential).
    """
    rows: list[dict[str, Any]] = []
    for gamma in ORDERS:
        for L in CONSTANTS:
            bound = HORIZON * mittag_leffler(gamma, 2.0, L * HORIZON**gamma)
            printed = printed_constant(gamma, L)
            common = {"gamma": gamma, "lipschitz": L, "bound": bound, "printed": printed}
            rows += [{"problem": p, "ratio": distance_ratio(p, gamma, L), **common} for p in PROBLEMS]
    return {"rows": rows}


def printed_constant(gamma: float, lipschitz: float) -> float:
    """The integral of the growth that the article prints, exp(L t^(1-gamma) / Gamma(2-gamma)), over (0, T).

    Example:
        >>> printed_constant(0.5, 0.0)
        1.0
    """
    from scipy.integrate import quad

    rate = lipschitz / math.gamma(2.0 - gamma)
    return float(quad(lambda t: math.exp(rate * t ** (1.0 - gamma)), 0.0, HORIZON)[0])


def distance_ratio(problem: str, gamma: float, lipschitz: float, steps: int = GRID) -> float:
    """int_0^T abs(y_a - y_b) dt over abs(y_a(0) - y_b(0)) for two trajectories, by the explicit L1 scheme.

    Example:
        >>> distance_ratio("linear", 0.5, 0.0)
        1.0
    """
    grid = HORIZON * (torch.arange(steps + 1, dtype=torch.float64) / steps) ** 2
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    start = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def f(_: Tensor, y: Tensor) -> Tensor:
        return lipschitz * (y if problem == "linear" else torch.tanh(y) @ Q.T)

    with torch.no_grad():
        y = solve(f, start, torch.diff(grid), gamma)
    distance = (y[:, 0] - y[:, 1]).norm(dim=1)
    return float(np.trapezoid(distance.numpy(), grid.numpy()) / distance[0])
