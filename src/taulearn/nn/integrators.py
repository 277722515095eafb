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
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import functional as F
from .._calls import transforming
from .._errors import is_number, positive_integer, unknown_name
from .schemes import SCHEMES, Dense, Feedforward, Fractional, Residual, Scheme
from .skips import Skips

MEMORIES = ("stored", "reversible")
LayerFunction = Callable[[Tensor], Tensor]


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
            return self.advance(shape_kept(f, self), y, carry, coefficients[l])
        self._check_skip(skips, l)
        y = F.residual_step(skips(y, l, l + 1), f(y), coefficients[l])
        return y, self.init(y)

    def _check_skip(self, skips: Skips, l: int) -> None:
        if l > 0 and not skips.is_identity(l):
            raise ValueError(
                f"skips must be identities past all layers but the first in the {self.name} scheme, got another one "
                f"past layer {l}: let all hidden layers have the same width, or take the residual scheme"
            )

    @abstractmethod
    def advance(self, f: LayerFunction, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
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


def shape_kept(f: LayerFunction, scheme: Scheme) -> LayerFunction:
    """A layer function that is refused where it changes the shape of the state, which broadcasting could hide."""

    def kept(y: Tensor) -> Tensor:
        value = f(y)
        if value.shape != y.shape:
            raise ValueError(
                f"layers must keep the shape of the state in the {scheme.name} scheme, got {tuple(value.shape)} from "
                f"{type(f).__name__} for {tuple(y.shape)}: change the shape in the stem or the head"
            )
        return value

    return kept


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

    @property
    def stage_weights(self) -> Sequence[float]:  # type: ignore[override]
        return self.b

    def advance(self, f: LayerFunction, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
        return y + tau * _sum(self.b, self._stages(f, y, tau)[1]), v

    def step_back(
        self, f: LayerBack, y: Tensor, v: Any, tau: Tensor, phi: Tensor, psi: Any
    ) -> tuple[Tensor, Any, Tensor]:
        points, k = self._stages(f, y, tau)
        dtau, before = (phi * _sum(self.b, k)).sum(), phi
        bars: list[Tensor] = []  # of the points behind, the last one first
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


class InvertibleScheme(LocalScheme):
    """A scheme of second order whose steps can be taken back.

    With ``memory="reversible"`` the forward pass of a network stores no states for the backward pass, which computes
    them again from the last one. Where states are asked for (``network.states``, penalties on them) or a transform
    looks into the computation (torch.compile, torch.func), they are stored all the same; ``fit`` does not compile
    such a network. Layers are called twice then, in the forward and in the backward pass, and their hooks with them.

    Args:
        memory: "stored" or "reversible".
        store_every: With reversible memory, after how many layers a state is stored nevertheless. 0: none is.

    Raises:
        ValueError: If an argument lies outside its range. In the forward pass, if reversible memory cannot be: steps
            that cannot be taken back without amplifying rounding too much (more than 1e-5), batch normalisation in
            training mode, layers that draw random numbers. In the backward pass, if the layers amplified it too much.
    """

    second_order = True

    def __init__(self, memory: str = "stored", store_every: int = 0) -> None:
        super().__init__()
        if memory not in MEMORIES:
            raise unknown_name("memory", memory, MEMORIES)
        if store_every and memory != "reversible":
            raise ValueError(f"store_every must be left out with memory {memory!r}, which stores every state")
        self.memory = memory
        self.store_every = positive_integer("store_every", store_every) if store_every else 0

    @abstractmethod
    def invert(self, f: LayerBack, y: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """y_l and v_l from y_{l+1} and v_{l+1}; the layer is evaluated once, where the step did."""

    def growth_back(self, tau: Tensor) -> Tensor:
        """The factors by which a step back amplifies rounding, by itself 1; shaped like tau."""
        return torch.ones_like(tau)

    def last(self, x: Tensor, layers: nn.ModuleList, skips: Skips, tau: Tensor) -> Tensor:
        if self.memory == "stored" or not torch.is_grad_enabled() or transforming():
            return super().last(x, layers, skips, tau)
        from .reversible import last_state

        y, v, first = x, self.init(x), 0
        if not skips.is_identity(0):
            y, v = self.step(0, layers[0], y, v, skips, tau.unbind())
            first = 1
        for l in range(first, len(layers)):
            self._check_skip(skips, l)
        return last_state(self, y, v, list(layers)[first:], tau[first:])

    @property
    def only_eager(self) -> str:
        """Why a training is not compiled; empty: it is."""
        return "compiled steps have no reversible memory" if self.memory == "reversible" else ""

    def extra_repr(self) -> str:
        every = f", store_every={self.store_every}" if self.store_every else ""
        return "" if self.memory == "stored" else f"memory={self.memory!r}{every}"


class Momentum(InvertibleScheme):
    """A step of epsilon x'' + x' = f(x): the velocity moves towards f, the state with the velocity; of order 1.

    Momentum residual networks with the factor mu are those with tau_l = (1 - mu) epsilon; with epsilon = tau_l a step
    is the residual one.

    Args:
        epsilon: The inertia, > 0.
        memory: "stored" or "reversible", see :class:`InvertibleScheme`; a step with tau_l = epsilon has no inverse.
        store_every: See :class:`InvertibleScheme`.

    Raises:
        ValueError: If epsilon is not positive, or as :class:`InvertibleScheme` says.

    Example:
        >>> Momentum(0.5).epsilon
        0.5
    """

    name = "momentum"

    def __init__(self, epsilon: float = 1.0, *, memory: str = "stored", store_every: int = 0) -> None:
        super().__init__(memory, store_every)
        if not (is_number(epsilon) and 0.0 < epsilon < float("inf")):
            raise ValueError(
                f"epsilon must be positive, got {epsilon!r}: it is the inertia in epsilon x'' + x' = f(x); without "
                "inertia take the residual scheme"
            )
        self.epsilon = float(epsilon)

    def advance(self, f: LayerFunction, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
        v = v + tau / self.epsilon * (f(y) - v)
        return y + tau * v, v

    def step_back(
        self, f: LayerBack, y: Tensor, v: Any, tau: Tensor, phi: Tensor, psi: Any
    ) -> tuple[Tensor, Any, Tensor]:
        rate, pull = tau / self.epsilon, f(y) - v
        bar = psi + tau * phi
        dtau = (phi * (v + rate * pull)).sum() + (bar * pull).sum() / self.epsilon
        return phi + f.back(y, rate * bar), (1.0 - rate) * bar, dtau

    def invert(self, f: LayerBack, y: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        rate, y = tau / self.epsilon, y - tau * v
        return y, (v - rate * f(y)) / (1.0 - rate)

    def growth_back(self, tau: Tensor) -> Tensor:
        return 1.0 / (1.0 - tau / self.epsilon)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"epsilon={self.epsilon:g}", super().extra_repr())))


class Verlet(InvertibleScheme):
    """Leapfrog (position Verlet) for x'' = f(x): half a step of y, a step of v, half a step of y; of order 2.

    Args:
        memory: "stored" or "reversible", see :class:`InvertibleScheme`.
        store_every: See :class:`InvertibleScheme`.

    Raises:
        ValueError: As :class:`InvertibleScheme` says.

    Example:
        >>> Verlet().second_order
        True
    """

    name = "verlet"

    def advance(self, f: LayerFunction, y: Tensor, v: Any, tau: Tensor) -> tuple[Tensor, Any]:
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

    def invert(self, f: LayerBack, y: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        half = y - tau / 2.0 * v
        v = v - tau * f(half)
        return half - tau / 2.0 * v, v


INTEGRATORS: dict[str, type[LocalScheme]] = {
    scheme.name: scheme for scheme in (Midpoint, Heun, RungeKutta4, Momentum, Verlet)
}


def integrator(scheme: str | Scheme) -> Scheme:
    """One of these schemes by its name; a scheme of one's own is answered as it is.

    Example:
        >>> integrator("momentum")
        Momentum(epsilon=1)
    """
    name = scheme.name if isinstance(scheme, Dense | Feedforward | Fractional) else scheme
    if isinstance(name, Scheme):
        return name
    known: dict[str, type[Scheme]] = {"residual": Residual, **INTEGRATORS}
    if not isinstance(name, str):
        raise TypeError(f"scheme must be a name or a scheme, got {name!r}: take one of {', '.join(known)}")
    if name in SCHEMES and name not in known:
        raise ValueError(f"scheme must not be {name!r} here, which has a builder of its own in taulearn.nn")
    if name not in known:
        raise unknown_name("scheme", name, known)
    return known[name]()
