"""The four schemes: how the states y_1 .. y_N follow from layers, skips and time steps, one step at a time.

Each is one class whose ``step`` is the recursion, written with the formulas of :mod:`taulearn.functional`:

    Feedforward   y_{l+1} = tau_l f_l(y_l)
    Residual      y_{l+1} = P y_l + tau_l f_l(y_l)
    Dense         y_{l+1} = sum_{k<=l} P y_k + tau_l f_l(y_l)
    Fractional    y_{l+1} = P y_l - sum_{j<l} a_{l,j} (P y_{j+1} - P y_j) + tau_l^gamma Gamma(2-gamma) f_l(y_l)

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .._calls import transforming
from .._errors import is_number, unknown_name
from .skips import Skips

if TYPE_CHECKING:
    from ..caputo.memory import Recall

MEMORIES = ("auto", "exact", "fast")
_BLOCKED_FROM = 8  # fewer layers are no slower without blocks
_FUSED_UP_TO = 12  # terms of a sum that a compiler fuses
_FAST_FROM = 256  # measured: benchmarks/fractional_memory.py
_TOLERANCE = 1e-6


class Scheme(nn.Module):
    """One step from state to state, which networks and early exit take layer by layer.

    A subclass defines :meth:`step`; and :meth:`prepare` and :meth:`init` where it needs them.

    Attributes:
        name: The scheme's name in records and manifests.
        deletes_exactly: Whether a layer with an identity skip is the identity in the limit tau_l -> 0, so that it can
            be pruned.
        step_power: Exponent p for which tau^p multiplies the layer function, or one for each layer; pruning compares
            shares of abs(tau)^p.
        per_layer: How many variables it learns for each layer.
        stage_weights: Weights, in the step, of the values of a layer with an identity skip, in the order in which it is
            asked for them; so many evaluations a step takes.
        remembers: Whether a step looks at all states before it, so that its cost grows with their number.
        uses_skips: Whether a step asks for the skips.
        memory_from: Number of the first state that is remembered; where it is 1, layer 0 cannot be deleted.
        caputo_order: Order in (0, 1] of the Caputo derivative in the equation whose L1 scheme this is (1: an ordinary
            derivative and Euler's steps), for which the papers write down adjoints. None: there is no such equation.
        growth: Factor by which each layer enlarges derivatives whatever tau >= 0.
    """

    name: str
    deletes_exactly = False
    step_power: float | tuple[float, ...] = 1.0
    per_layer = 0
    stage_weights: Sequence[float] = (1.0,)
    remembers = False
    uses_skips = True
    memory_from = 0
    caputo_order: float | None = None
    growth = 1.0
    runs_whole = False  # the class defines `states` by itself, which cannot be stopped on the way

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in vars(cls):
            cls.runs_whole = False
        elif "states" in vars(cls):
            cls.runs_whole = True
            warnings.warn(
                f"{cls.__name__}.states is deprecated: define step(l, f, y, carry, skips, coefficients) -> (y, carry), "
                "so that samples can leave on the way (early exit)",
                DeprecationWarning,
                stacklevel=2,
            )

    def factor(self, tau: Tensor) -> Tensor:
        """The factor of the layer function in a step, by itself abs(tau)^p.

        Args:
            tau: Time steps, (N,).

        Returns:
            Factors >= 0, (N,).
        """
        p = self.step_power
        return tau.abs() ** (tau.new_tensor(p) if isinstance(p, tuple) else p)

    def prepare(self, tau: Tensor) -> Any:
        """All that the steps take from tau, once per forward pass; nothing in it has a batch axis.

        Args:
            tau: Time steps, (N,).

        Returns:
            The coefficients that :meth:`step` gets; by itself the N steps one by one.
        """
        return tau.unbind()

    def init(self, y_0: Tensor) -> Any:
        """The carry that the first step is handed beside the state; by itself None.

        Args:
            y_0: The input state, (batch, ...).

        Returns:
            None, or tensors that all have the batch first, in tuples, lists or dictionaries.
        """
        return None

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        """The next state.

        Args:
            l: Number of the layer.
            f: The layer function f_l.
            y: The state y_l, (batch, ...).
            carry: What the step before handed over.
            skips: The maps P.
            coefficients: What :meth:`prepare` answered.

        Returns:
            y_{l+1}, and what the next step is handed.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define step(l, f, y, carry, skips, coefficients) -> (y, carry)"
        )

    def states(self, x: Tensor, layers: Iterable[nn.Module], skips: Skips, tau: Tensor) -> list[Tensor]:
        """The states y_1 .. y_N, all steps in a row.

        Args:
            x: The input state y_0, (batch, ...).
            layers: Layer functions f_0 .. f_{N-1}.
            skips: The maps P.
            tau: Time steps, (N,).

        Returns:
            N tensors.
        """
        states: list[Tensor] = []
        y, carry, coefficients = x, self.init(x), self.prepare(tau)
        for l, f in enumerate(layers):
            y, carry = pair_of(self, self.step(l, f, y, carry, skips, coefficients))
            states.append(y)
        return states

    def follow_(self, sources: Sequence[int]) -> dict[Any, Any]:
        """Follow a change to layers that have what those at ``sources`` have; new parameters, with their parents."""
        return {}

    def check_shape(self, l: int, value: Tensor, carried: Tensor | None) -> None:
        """Refuse a layer's value that broadcasting would add to what the skip carries over."""
        if carried is not None and value.shape != carried.shape:
            raise ValueError(
                f"layers must return the shape that the skip past them carries over, {tuple(carried.shape)}, in the "
                f"{self.name} scheme, got {tuple(value.shape)} from layer {l}: change the width in layer and skip "
                "alike, or in the stem or the head"
            )

    def last(self, x: Tensor, layers: nn.ModuleList, skips: Skips, tau: Tensor) -> Tensor:
        """The state y_N alone; arguments as those of :meth:`states`."""
        return self.states(x, layers, skips, tau)[-1]


def pair_of(scheme: Scheme, result: Any) -> tuple[Tensor, Any]:
    """The result of a step, refused where it is no pair of state and carry."""
    if isinstance(result, tuple) and len(result) == 2:
        return result
    raise TypeError(
        f"{type(scheme).__name__}.step must return the next state and the carry, (y, carry), got a "
        f"{type(result).__name__}: write return y, carry"
    )


class Feedforward(Scheme):
    """The feedforward scheme, y_{l+1} = tau_l f_l(y_l).

    Example:
        >>> Feedforward().name
        'feedforward'
    """

    name = "feedforward"
    uses_skips = False

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        return F.feedforward_step(f(y), coefficients[l]), carry


class Residual(Scheme):
    """The residual scheme, explicit Euler steps y_{l+1} = P y_l + tau_l f_l(y_l).

    Example:
        >>> Residual().deletes_exactly
        True
    """

    name = "residual"
    deletes_exactly = True
    caputo_order = 1.0

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        carried, value = skips(y, l, l + 1), f(y)
        self.check_shape(l, value, carried)
        return F.residual_step(carried, value, coefficients[l]), carry


class Dense(Scheme):
    """The dense scheme, y_{l+1} = sum_{k<=l} P y_k + tau_l f_l(y_l). It carries the states y_0 .. y_{l-1}.

    Example:
        >>> Dense().deletes_exactly
        False
    """

    name = "dense"
    remembers = True
    growth = 2.0

    def init(self, y_0: Tensor) -> Any:
        return ()

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        total, states = None, (*carry, y)
        for k, state in enumerate(states):
            carried = skips(state, k, l + 1)
            total = carried if total is None else total if carried is None else total + carried
        value = f(y)
        self.check_shape(l, value, total)
        return F.residual_step(total, value, coefficients[l]), states


class _Coefficients:
    """The steps of a fractional network one by one, and the weights a_{l,j}, computed when first asked for."""

    def __init__(self, tau: Tensor, gamma: float) -> None:
        self.tau, self.gamma, self.steps = tau, gamma, tau.unbind()
        self.weights: Tensor | None = None

    def matrix(self) -> Tensor:
        """All a_{l,j}, (N, N)."""
        if self.weights is None:
            from ..caputo import l1_weights

            self.weights = l1_weights(self.tau, self.gamma, validate=False)
        return self.weights

    def row(self, l: int) -> Tensor:
        """a_{l,0} .. a_{l,N-1}."""
        return self.matrix()[l]


class Fractional(Scheme):
    """The fractional scheme: the L1 scheme for the Caputo derivative of order gamma, remembering all earlier states.

    It carries the states y_0 .. y_{l-1} and, where blocks can be used, their buffer.

    With identity skips past all layers but the first, the memory of deep networks is computed block by block
    (:mod:`taulearn.caputo.memory`), with a backward pass of its own that can be differentiated no further. Everywhere
    else each layer contracts the stored states by itself: with other skips, fewer than 8 layers, states that change
    their shape or type, and wherever a transform looks into the computation (torch.compile, torch.export, torch.func,
    forward mode), which is also the way to second derivatives; ``memory`` has no effect there.

    Args:
        gamma: Order of the derivative, 0 < gamma < 1; in the limit 1 the residual scheme.
        memory_from: First difference that is remembered: 1 leaves out y_1 - P y_0 (Herberg, Herzog, Koehne 2023), 0
            counts it (Antil, Diaz, Herberg 2022).
        memory: "exact", O(N^2) operations for N layers; "fast", O(N) by a sum of exponentials with an error
            (:mod:`taulearn.caputo.fast_memory`); "auto", fast from 256 layers on.
        tolerance: Largest relative error of fast memory's kernel, and so of every weight, > 0.

    Attributes:
        kernel_error: Relative error of the kernel that the last forward pass used; None if it was exact.

    Raises:
        ValueError: If an argument lies outside its range. In the forward pass, if the tolerance cannot be met.

    Example:
        >>> Fractional(gamma=0.3).step_power
        0.3
    """

    name = "fractional"
    deletes_exactly = True
    remembers = True

    def __init__(
        self, gamma: float = 0.5, memory_from: int = 1, *, memory: str = "auto", tolerance: float = _TOLERANCE
    ) -> None:
        super().__init__()
        if not (is_number(gamma) and 0.0 < gamma < 1.0):
            raise ValueError(
                f"gamma must lie in (0, 1), got {gamma!r}: it is the order of the derivative; for 1 take Residual()"
            )
        if memory_from not in (0, 1):
            raise ValueError(
                f"memory_from must be 0 or 1, got {memory_from!r}: it is the first difference in the memory"
            )
        if memory not in MEMORIES:
            raise unknown_name("memory", memory, MEMORIES)
        if not (is_number(tolerance) and 0.0 < tolerance < 1.0):
            raise ValueError(f"tolerance must lie in (0, 1), got {tolerance!r}: it is a relative error, such as 1e-6")
        self.gamma = float(gamma)
        self.memory_from = int(memory_from)
        self.memory = memory
        self.tolerance = float(tolerance)
        self.kernel_error: float | None = None
        self.caputo_order = self.gamma

    @property
    def step_power(self) -> float:  # type: ignore[override]
        return self.gamma

    def factor(self, tau: Tensor) -> Tensor:
        return tau.abs() ** self.gamma * math.gamma(2.0 - self.gamma)

    def prepare(self, tau: Tensor) -> _Coefficients:
        return _Coefficients(tau, self.gamma)

    def init(self, y_0: Tensor) -> Any:
        return (), None

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        (past, recall), value = carry, f(y)
        states = (*past, y)
        if recall is not None and recall.fits(value):
            return recall.step(l, value, y), (states, recall)
        memory, carried = self._memory(coefficients.row(l), states, skips) if l else None, skips(y, l, l + 1)
        self.check_shape(l, value, carried)
        after = F.fractional_step(carried, memory, value, coefficients.steps[l], self.gamma)
        return after, (states, self._recall(y, after, skips, coefficients.tau) if l == 0 else None)

    def _recall(self, x: Tensor, y: Tensor, skips: Skips, tau: Tensor) -> "Recall | None":
        """The blocked memory for the layers after the first, where it can be used; x and y are y_0 and y_1."""
        number = len(tau)
        if number < _BLOCKED_FROM or transforming() or not all(skips.unchanged(l) for l in range(1, number)):
            return None
        first = x if self.memory_from == 0 and skips.from_input else None
        if first is not None and not (skips.unchanged(0) and first.shape == y.shape and first.dtype == y.dtype):
            return None
        from ..caputo.fast_memory import FastMemory, fast_weights, kernel_for
        from ..caputo.memory import ExactMemory, Recall, memory_weights

        kernel = None
        if self.memory == "fast" or (self.memory == "auto" and number >= _FAST_FROM):
            kernel = kernel_for(tau, self.gamma, self.tolerance)
        self.kernel_error = None if kernel is None else kernel.error
        factors = tau**self.gamma * math.gamma(2.0 - self.gamma)
        if kernel is None:
            weights = memory_weights(tau, self.gamma, self.memory_from, y.dtype)
            return Recall(ExactMemory, (factors, weights), first, y)
        return Recall(FastMemory, (factors, *fast_weights(tau, kernel, self.memory_from, y.dtype)), first, y)

    def _memory(self, weights: Tensor, states: tuple[Tensor, ...], skips: Skips) -> Tensor | None:
        """sum_{j<l} a_{l,j} (P y_{j+1} - P y_j), regrouped as one contraction; None where it is empty."""
        l = len(states) - 1
        first = self.memory_from
        if l <= first:
            return None
        a = weights[first:l]
        jumps = torch.cat([-a[:1], a[:-1] - a[1:], a[-1:]])
        carried = [skips(y, j, l + 1) for j, y in enumerate(states) if j >= first]
        present = [y for y in carried if y is not None]
        factors = jumps[len(carried) - len(present) :]
        if torch.compiler.is_compiling() and len(present) <= _FUSED_UP_TO:
            # part of the kernel that follows, where a stack would copy all states first
            return functools.reduce(torch.add, [a * y for a, y in zip(factors.unbind(), present, strict=True)])
        stacked = torch.stack(present)
        # the states' type, which under autocast is not the input's
        return torch.tensordot(factors.to(stacked.dtype), stacked, dims=1)

    def extra_repr(self) -> str:
        memory = "" if self.memory == "auto" else f", memory={self.memory!r}"
        tolerance = "" if self.tolerance == _TOLERANCE else f", tolerance={self.tolerance:g}"
        return f"gamma={self.gamma:g}, memory_from={self.memory_from}{memory}{tolerance}"


def make_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme that takes steps from state to state, by its name; one that is made already is answered as it is."""
    if scheme == "residual":
        return Residual()
    from .integrators import integrator

    return integrator(scheme)


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Feedforward, Residual, Dense, Fractional)}
