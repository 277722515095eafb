"""The four schemes: how the states y_1 .. y_N follow from layers, skips and time steps.

Each is one class whose ``states`` is the recursion of MATH, written with the formulas of :mod:`taulearn.functional`:

    Feedforward   y_{l+1} = tau_l f_l(y_l)
    Residual      y_{l+1} = P y_l + tau_l f_l(y_l)
    Dense         y_{l+1} = sum_{k<=l} P y_k + tau_l f_l(y_l)
    Fractional    y_{l+1} = P y_l - sum_{j<l} a_{l,j} (P y_{j+1} - P y_j) + tau_l^gamma Gamma(2-gamma) f_l(y_l)

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import caputo, functional as F
from .._errors import is_number, unknown_name
from ..caputo._arguments import transforming
from ..caputo.fast_memory import FastMemory, fast_weights, kernel_for
from ..caputo.memory import ExactMemory, Recall, memory_weights
from .skips import Skips

MEMORIES = ("auto", "exact", "fast")
_BLOCKED_FROM = 8  # fewer layers are no slower without blocks
_FUSED_UP_TO = 12  # terms of a sum that a compiler fuses
_FAST_FROM = 256  # measured: benchmarks/fractional_memory.py
_TOLERANCE = 1e-6

Stepper = Callable[[int, nn.Module, list[Tensor]], Tensor]
"""From the number l of a layer, the layer and the states [y_0 .. y_l] to y_{l+1}."""


class Scheme(nn.Module):
    """What a network asks of its scheme.

    Attributes:
        name: The scheme's name in records and manifests.
        deletes_exactly: Whether a layer with an identity skip is the identity in the limit tau_l -> 0, so that it can
            be pruned.
        step_power: Exponent p for which tau^p multiplies the layer function; pruning compares shares of abs(tau)^p.
        remembers: Whether a state depends on others than the one before it.
    """

    name: str
    deletes_exactly = False
    step_power = 1.0
    remembers = False

    @abstractmethod
    def stepper(self, skips: Skips, tau: Tensor) -> Stepper:
        """The recursion, one step at a time.

        Args:
            skips: The maps P.
            tau: Time steps, (N,).

        Returns:
            A function of l, f_l and the states [y_0 .. y_l] that answers y_{l+1}. Where the scheme does not remember,
            only the last state is looked at.
        """

    def states(self, x: Tensor, layers: Iterable[nn.Module], skips: Skips, tau: Tensor) -> list[Tensor]:
        """The states y_1 .. y_N.

        Args:
            x: The input state y_0, (batch, ...).
            layers: Layer functions f_0 .. f_{N-1}.
            skips: The maps P.
            tau: Time steps, (N,).

        Returns:
            N tensors.
        """
        states, step = [x], self.stepper(skips, tau)
        for l, layer in enumerate(layers):
            states.append(step(l, layer, states))
        return states[1:]


class Feedforward(Scheme):
    """The feedforward scheme, y_{l+1} = tau_l f_l(y_l).

    Example:
        >>> Feedforward().name
        'feedforward'
    """

    name = "feedforward"

    def stepper(self, skips: Skips, tau: Tensor) -> Stepper:
        steps = tau.unbind()

        def step(l: int, layer: nn.Module, states: list[Tensor]) -> Tensor:
            return F.feedforward_step(layer(states[-1]), steps[l])

        return step


class Residual(Scheme):
    """The residual scheme, explicit Euler steps y_{l+1} = P y_l + tau_l f_l(y_l).

    Example:
        >>> Residual().deletes_exactly
        True
    """

    name = "residual"
    deletes_exactly = True

    def stepper(self, skips: Skips, tau: Tensor) -> Stepper:
        steps = tau.unbind()

        def step(l: int, layer: nn.Module, states: list[Tensor]) -> Tensor:
            y = states[-1]
            return F.residual_step(skips(y, l, l + 1), layer(y), steps[l])

        return step


class Dense(Scheme):
    """The dense scheme, y_{l+1} = sum_{k<=l} P y_k + tau_l f_l(y_l).

    Example:
        >>> Dense().deletes_exactly
        False
    """

    name = "dense"
    remembers = True

    def stepper(self, skips: Skips, tau: Tensor) -> Stepper:
        steps = tau.unbind()

        def step(l: int, layer: nn.Module, states: list[Tensor]) -> Tensor:
            total = None
            for k, y in enumerate(states):
                carried = skips(y, k, l + 1)
                total = carried if total is None else total if carried is None else total + carried
            return F.residual_step(total, layer(states[-1]), steps[l])

        return step


class Fractional(Scheme):
    """The fractional scheme: the L1 scheme for the Caputo derivative of order gamma, remembering all earlier states.

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
        self.step_power = self.gamma

    def states(self, x: Tensor, layers: Iterable[nn.Module], skips: Skips, tau: Tensor) -> list[Tensor]:
        states, step = [x], self._stepper(skips, tau)
        recall: Recall | None = None
        for l, layer in enumerate(layers):
            y = states[-1]
            f = layer(y)
            if recall is not None and recall.fits(f):
                states.append(recall.step(l, f, y))
                continue
            states.append(step(l, f, states))
            if l == 0:
                recall = self._recall(x, states[-1], skips, tau)
        return states[1:]

    def stepper(self, skips: Skips, tau: Tensor) -> Stepper:
        step = self._stepper(skips, tau)
        return lambda l, layer, states: step(l, layer(states[-1]), states)

    def _stepper(self, skips: Skips, tau: Tensor) -> Callable[[int, Tensor, list[Tensor]], Tensor]:
        """The recursion from l, f_l(y_l) and [y_0 .. y_l], in which each layer contracts the stored states."""
        steps = tau.unbind()
        weights: Tensor | None = None

        def step(l: int, f: Tensor, states: list[Tensor]) -> Tensor:
            nonlocal weights
            if l > 0 and weights is None:
                weights = caputo.l1_weights(tau, self.gamma, validate=False)
            memory = None if weights is None else self._memory(weights[l], states, skips)
            return F.fractional_step(skips(states[-1], l, l + 1), memory, f, steps[l], self.gamma)

        return step

    def _recall(self, x: Tensor, y: Tensor, skips: Skips, tau: Tensor) -> Recall | None:
        """The blocked memory for the layers after the first, where it can be used; x and y are y_0 and y_1."""
        number = len(tau)
        if number < _BLOCKED_FROM or transforming() or not all(skips.unchanged(l) for l in range(1, number)):
            return None
        first = x if self.memory_from == 0 and skips.from_input else None
        if first is not None and not (skips.unchanged(0) and first.shape == y.shape and first.dtype == y.dtype):
            return None
        kernel = None
        if self.memory == "fast" or (self.memory == "auto" and number >= _FAST_FROM):
            kernel = kernel_for(tau, self.gamma, self.tolerance)
        self.kernel_error = None if kernel is None else kernel.error
        factors = tau**self.gamma * math.gamma(2.0 - self.gamma)
        if kernel is None:
            weights = memory_weights(tau, self.gamma, self.memory_from, y.dtype)
            return Recall(ExactMemory, (factors, weights), first, y)
        return Recall(FastMemory, (factors, *fast_weights(tau, kernel, self.memory_from, y.dtype)), first, y)

    def _memory(self, weights: Tensor, states: list[Tensor], skips: Skips) -> Tensor | None:
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


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Feedforward, Residual, Dense, Fractional)}
