"""Problems with exact solutions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import torch
from torch import Tensor


def mittag_leffler(alpha: float, z: complex, beta: float = 1.0, *, digits: int = 30) -> complex:
    """E_{alpha,beta}(z) = sum_k z^k / Gamma(alpha k + beta), summed with as many digits as its terms cancel."""
    peak = float(abs(z)) ** (1.0 / alpha)  # the largest term is about exp(peak)
    with mpmath.workdps(int(digits + 10 + peak / math.log(10.0))):
        a, b, x = mpmath.mpf(alpha), mpmath.mpf(beta), mpmath.mpmathify(z)
        total, k, power = mpmath.mpf(0), 0, mpmath.mpf(1)
        while True:
            term = power * mpmath.rgamma(a * k + b)
            total += term
            if alpha * k > peak + 2.0 and abs(term) < mpmath.mpf(10) ** -digits:
                return complex(total)
            k, power = k + 1, power * x


@dataclass(frozen=True)
class LinearProblem:
    """x' = A x, or x'' = pull A x - friction x' from a state at rest, solved by the exponential of a matrix."""

    matrix: Tensor
    y0: Tensor

    def first_order(self, t: float) -> Tensor:
        return torch.linalg.matrix_exp(t * self.matrix) @ self.y0

    def second_order(self, t: float, friction: float = 0.0, pull: float = 1.0) -> Tensor:
        """x'' = pull A x - friction x', x'(0) = 0."""
        zero, one = torch.zeros_like(self.matrix), torch.eye(len(self.y0), dtype=self.y0.dtype)
        whole = torch.cat([torch.cat([zero, one], 1), torch.cat([pull * self.matrix, -friction * one], 1)])
        start = torch.cat([self.y0, torch.zeros_like(self.y0)])
        return (torch.linalg.matrix_exp(t * whole) @ start)[: len(self.y0)]


def coupled_springs() -> LinearProblem:
    """Two masses between three springs of different stiffness."""
    matrix = torch.tensor([[-2.0, 0.7], [0.7, -1.3]], dtype=torch.float64)
    return LinearProblem(matrix, torch.tensor([1.0, -0.4], dtype=torch.float64))


def caputo_derivative_of_power(p: float, gamma: float, t: Tensor) -> Tensor:
    """The left Caputo derivative of t^p, p > 0: Gamma(p+1) / Gamma(p+1-gamma) t^(p-gamma)."""
    return math.gamma(p + 1.0) / math.gamma(p + 1.0 - gamma) * t ** (p - gamma)


@dataclass(frozen=True)
class CaputoProblem:
    """D^gamma y = f(t, y), y(0) = y0, with its solution at one time."""

    gamma: float
    y0: Tensor
    f: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[float], Tensor]


def relaxation(gamma: float, rate: float = 1.0) -> CaputoProblem:
    """D^gamma y = -rate y, y(0) = 1, solved by E_gamma(-rate t^gamma), which behaves as t^gamma at 0."""
    return CaputoProblem(
        gamma,
        torch.tensor(1.0, dtype=torch.float64),
        lambda t, y: -rate * y,
        lambda t: torch.tensor(mittag_leffler(gamma, -rate * t**gamma).real, dtype=torch.float64),
    )


def oscillation(gamma: float, frequency: float = 1.0) -> CaputoProblem:
    """D^gamma (u, v) = frequency (-v, u), (u, v)(0) = (1, 0), solved by u + iv = E_gamma(i frequency t^gamma)."""

    def exact(t: float) -> Tensor:
        value = mittag_leffler(gamma, 1j * frequency * t**gamma)
        return torch.tensor([value.real, value.imag], dtype=torch.float64)

    return CaputoProblem(
        gamma,
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        lambda t, y: frequency * torch.stack([-y[1], y[0]]),
        exact,
    )


def smooth_growth(gamma: float) -> CaputoProblem:
    """D^gamma y = t^2 - y + 2 t^(2-gamma) / Gamma(3-gamma), y(0) = 0, solved by the smooth y = t^2."""
    return CaputoProblem(
        gamma,
        torch.tensor(0.0, dtype=torch.float64),
        lambda t, y: t**2 - y + caputo_derivative_of_power(2.0, gamma, t),
        lambda t: torch.tensor(t**2, dtype=torch.float64),
    )
