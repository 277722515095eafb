"""Schemes from the numerics of differential equations, all of them local: a step looks at the last state alone.

    Midpoint, Heun, RungeKutta4   x' = f(x)               k_i = f_l(y_l + tau_l sum_{j<i} a_ij k_j)
                                                          y_{l+1} = y_l + tau_l sum_i b_i k_i
    Momentum                      epsilon x'' + x' = f(x)  v_{l+1} = v_l + (tau_l / epsilon) (f_l(y_l) - v_l)
                                                          y_{l+1} = y_l + tau_l v_{l+1}
    Verlet                        x'' = f(x)              y_h = y_l + (tau_l / 2) v_l
                                                          v_{l+1} = v_l + tau_l f_l(y_h)
                                                          y_{l+1} = y_h + (tau_l / 2) v_{l+1}

The last two carry the velocity v, which is 0 at the start. At tau_l = 0 a step is the identity on y and v, so that
layers can be deleted and inserted exactly. A first layer whose skip is not the identity, as that of a builder, takes
the step y_1 = P y_0 + tau_0 f_0(y_0) in every scheme, and v starts behind it.

Each scheme has its step back as well, from the derivatives phi = dJ/dy_{l+1} and psi = dJ/dv_{l+1} to those one layer
before, for :func:`taulearn.adjoint.gradients`. An integrator of one's own derives from :class:`LocalScheme`.

References:
    Hairer, Norsett, Wanner (1993), Solving ordinary differential equations I. Sander, Ablin, Blondel, Peyre (2021),
    Momentum residual neural networks. Ruthotto, Haber (2018), Deep neural networks motivated by partial differential
    equations. Hairer, Lubich, Wanner (2003), Geometric numerical integration illustrated by the Stoermer-Verlet method.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import functional as F
from .._errors import is_number, unknown_name
from .schemes import Dense, Feedforward, Fractional, Residual, Scheme
from .skips import Skips


class LayerBack(Protocol):
    """A layer function for the step back; the gradients of its own parameters are summed on the way."""

    def __call__(self, y: Tensor) -> Tensor:
        """f(y)."""

    def back(self, y: Tensor, bar: Tensor) -> Tensor:
        """(df/dy)^T bar at y."""


class LocalScheme(Scheme):
    """A scheme whose step looks at the last state alone: y, and the velocity v where there is one."""

    deletes_exactly = True
    second_order = False

    def init(self, y_0: Tensor) -> Any:
        return torch.zeros_like(y_0) if self.second_order else None

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        if skips.is_identity(l):
            return self.advance(f, y, carry, coefficients[l])
        if l > 0:
            raise ValueError(
                f"skips must be identities past all layers but the first in the {self.name} scheme, got another one "
                f"past layer {l}: let all hidden layers have the same width, or take the residual scheme"
            )
        y = F.residual_step(skips(y, l, l + 1), f(y), coefficients[l])
        return y, self.init(y)

    @abstractmethod
    def advance(self, f: nn.Module, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
        """One step.

        Args:
            f: The layer function f_l, which keeps the shape.
            y: The state y_l, (batch, ...).
            v: The velocity v_l, or None.
            tau: The step tau_l.

        Returns:
            y_{l+1}, and v_{l+1} or None.
        """

    def step_back(
        self, f: LayerBack, y: Tensor, v: Any, tau: Tensor, phi: Tensor, psi: Any
    ) -> tuple[Tensor, Any, Tensor]:
        """The adjoint of one step.

        Args:
            f: The layer function f_l.
            y: The state y_l, (batch, ...).
            v: The velocity v_l, or None.
            tau: The step tau_l.
            phi: dJ/dy_{l+1}.
            psi: dJ/dv_{l+1}, or None.

        Returns:
            dJ/dy_l, dJ/dv_l or None, and dJ/dtau_l.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no step_back")


class RungeKutta(LocalScheme):
    """An explicit Runge-Kutta scheme, by its tableau; a subclass gives the name, a and b.

    A layer function is evaluated as often as b has entries.

    Attributes:
        a: The rows a_i1 .. a_i,i-1, from the second stage on.
        b: The weights of the stages.

    Example:
        >>> class Ralston(RungeKutta):
        ...     name, a, b = "ralston", ((2 / 3,),), (1 / 4, 3 / 4)
    """

    a: Sequence[Sequence[float]]
    b: Sequence[float]

    def advance(self, f: nn.Module, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
        return y + tau * _sum(self.b, self._stages(f, y, tau)[1]), v

    def step_back(
        self, f: LayerBack, y: Tensor, v: Any, tau: Tensor, phi: Tensor, psi: Any
    ) -> tuple[Tensor, Any, Tensor]:
        points, k = self._stages(f, y, tau)
        dtau, before, bars = (phi * _sum(self.b, k)).sum(), phi, []  # bars: of the points behind, last one first
        for i in range(len(k) - 1, -1, -1):
            columns = [self.a[j - 1][i] for j in range(len(k) - 1, i, -1)]
            bars.append(f.back(points[i], tau * (self.b[i] * phi + _sum(columns, bars))))
            before = before + bars[-1]
            if i:
                dtau = dtau + (bars[-1] * _sum(self.a[i - 1], k)).sum()
        return before, psi, dtau

    def _stages(self, f: Any, y: Tensor, tau: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where the layer is evaluated, and its values k."""
        points, k = [y], [f(y)]
        for row in self.a:
            points.append(y + tau * _sum(row, k))
            k.append(f(points[-1]))
        return points, k


def _sum(weights: Sequence[float], values: Sequence[Tensor]) -> Any:
    """sum_i w_i v_i over as many as there are weights, without those that are 0; 0 where none is left."""
    parts = [value if w == 1.0 else w * value for w, value in zip(weights, values, strict=False) if w]
    return sum(parts[1:], parts[0]) if parts else 0.0


class Midpoint(RungeKutta):
    """The midpoint rule, y_{l+1} = y_l + tau_l f_l(y_l + (tau_l / 2) f_l(y_l)), of order 2.

    Example:
        >>> Midpoint().deletes_exactly
        True
    """

    name, a, b = "midpoint", ((0.5,),), (0.0, 1.0)


class Heun(RungeKutta):
    """Heun's scheme, y_{l+1} = y_l + (tau_l / 2) (k + f_l(y_l + tau_l k)) with k = f_l(y_l), of order 2.

    Example:
        >>> Heun().name
        'heun'
    """

    name, a, b = "heun", ((1.0,),), (0.5, 0.5)


class RungeKutta4(RungeKutta):
    """The classical Runge-Kutta scheme with four evaluations of a layer, of order 4.

    Example:
        >>> len(RungeKutta4().b)
        4
    """

    name = "rk4"
    a, b = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class Momentum(LocalScheme):
    """A step of epsilon x'' + x' = f(x): the velocity moves towards f, the state with the velocity; of order 1.

    Momentum residual networks with the factor mu are those with tau_l = (1 - mu) epsilon; with epsilon = tau_l a step
    is the residual one.

    Args:
        epsilon: The inertia, > 0.

    Raises:
        ValueError: If epsilon is not positive.

    Example:
        >>> Momentum(0.5).epsilon
        0.5
    """

    name = "momentum"
    second_order = True

    def __init__(self, epsilon: float = 1.0) -> None:
        super().__init__()
        if not (is_number(epsilon) and 0.0 < epsilon < float("inf")):
            raise ValueError(
                f"epsilon must be positive, got {epsilon!r}: it is the inertia in epsilon x'' + x' = f(x); without "
                "inertia take the residual scheme"
            )
        self.epsilon = float(epsilon)

    def advance(self, f: nn.Module, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
        v = v + tau / self.epsilon * (f(y) - v)
        return y + tau * v, v

    def step_back(
        self, f: LayerBack, y: Tensor, v: Any, tau: Tensor, phi: Tensor, psi: Any
    ) -> tuple[Tensor, Any, Tensor]:
        rate, pull = tau / self.epsilon, f(y) - v
        bar = psi + tau * phi
        dtau = (phi * (v + rate * pull)).sum() + (bar * pull).sum() / self.epsilon
        return phi + f.back(y, rate * bar), (1.0 - rate) * bar, dtau

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon:g}"


class Verlet(LocalScheme):
    """Leapfrog (position Verlet) for x'' = f(x): half a step of y, a step of v, half a step of y; of order 2.

    Example:
        >>> Verlet().second_order
        True
    """

    name = "verlet"
    second_order = True

    def advance(self, f: nn.Module, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
        half = y + tau / 2.0 * v
        v = v + tau * f(half)
        return half + tau / 2.0 * v, v

    def step_back(
        self, f: LayerBack, y: Tensor, v: Any, tau: Tensor, phi: Tensor, psi: Any
    ) -> tuple[Tensor, Any, Tensor]:
        half = y + tau / 2.0 * v
        value, bar = f(half), psi + tau / 2.0 * phi
        before = phi + f.back(half, tau * bar)
        dtau = (phi * (v + tau * value)).sum() / 2.0 + (bar * value).sum() + (before * v).sum() / 2.0
        return before, bar + tau / 2.0 * before, dtau


INTEGRATORS: dict[str, type[LocalScheme]] = {
    scheme.name: scheme for scheme in (Midpoint, Heun, RungeKutta4, Momentum, Verlet)
}


def make_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme by its name; a scheme is answered as it is.

    Example:
        >>> make_scheme("momentum")
        Momentum(epsilon=1)
    """
    if isinstance(scheme, Dense | Feedforward | Fractional):
        raise ValueError(f"scheme must not be {scheme.name!r} here, which has a builder of its own in taulearn.nn")
    if isinstance(scheme, Scheme):
        return scheme
    known: dict[str, type[Scheme]] = {"residual": Residual, **INTEGRATORS}
    if scheme not in known:
        raise unknown_name("scheme", scheme, known)
    return known[scheme]()
