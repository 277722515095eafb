"""The fractional scheme with a learned order: gamma is a parameter beside the time steps.

    gamma = 0.01 + 0.98 sigma(g),  so that it stays inside of (0.01, 0.99) by itself

The weights a_{l,j} and the factor tau_l^gamma Gamma(2-gamma) are smooth in gamma, and autograd differentiates them. The
order is one number for the network; a deletion or refinement of layers leaves it as it is.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.2.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .._errors import is_number
from ..caputo.weights import plain_left_weights
from .schemes import Fractional
from .skips import Skips

LOWEST, HIGHEST = 0.01, 0.99


@dataclass(frozen=True)
class LearnedOrder:
    """An order that is learned, for ``fractional_dnn(gamma=LearnedOrder(0.5))``.

    Args:
        initial: The order at the start, in (0.01, 0.99).

    Raises:
        ValueError: If it lies outside.

    Example:
        >>> from taulearn.nn import fractional_dnn
        >>> fractional_dnn(8, 4, 2, 3, gamma=LearnedOrder(0.7)).scheme
        FractionalLearned(gamma=0.7, memory_from=1)
    """

    initial: float = 0.5

    def __post_init__(self) -> None:
        if not (is_number(self.initial) and LOWEST < self.initial < HIGHEST):
            raise ValueError(
                f"initial must lie in ({LOWEST:g}, {HIGHEST:g}), got {self.initial!r}: it is the order of the "
                "derivative; for a fixed one give gamma the number"
            )


@dataclass
class _Coefficients:
    """The steps one by one, the order as a tensor, and all weights."""

    steps: tuple[Tensor, ...]
    gamma: Tensor
    weights: Tensor

    def matrix(self) -> Tensor:
        return self.weights


class FractionalLearned(Fractional):
    """The fractional scheme whose order is a parameter; its memory is exact, by plain operations.

    Args:
        initial: The order at the start, in (0.01, 0.99).
        memory_from: See :class:`Fractional`.

    Attributes:
        order: The parameter g.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> round(FractionalLearned(0.3).gamma, 5)
        0.3
    """

    name = "fractional-learned"

    def __init__(self, initial: float = 0.5, memory_from: int = 1) -> None:
        super().__init__(LearnedOrder(initial).initial, memory_from, memory="exact")  # which sets gamma
        self.caputo_order = None  # no adjoint system is written down

    def value(self) -> Tensor:
        """gamma, a float64 scalar."""
        return LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(self.order.double())

    @property
    def gamma(self) -> float:
        """The order now; setting it makes a new parameter."""
        return self.initial if self.order.is_meta else self.value().item()

    @gamma.setter
    def gamma(self, value: float) -> None:
        self.initial = value
        share = (value - LOWEST) / (HIGHEST - LOWEST)
        self.order = nn.Parameter(torch.tensor(math.log(share / (1.0 - share)), dtype=torch.float64))

    def factor(self, tau: Tensor) -> Tensor:
        gamma = self.value().detach().to(tau.dtype)
        return tau.abs() ** gamma * F.gamma_function(2.0 - gamma)

    def prepare(self, tau: Tensor) -> Any:
        gamma = self.value()
        return _Coefficients(tau.unbind(), gamma, plain_left_weights(tau.double(), gamma))

    def init(self, y_0: Tensor) -> Any:
        return ()

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        states, value = (*carry, y), f(y)
        memory = self._memory(coefficients.weights[l], states, skips) if l else None
        gamma = coefficients.gamma.to(coefficients.steps[l].dtype)
        return F.fractional_step(skips(y, l, l + 1), memory, value, coefficients.steps[l], gamma), states

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, memory_from={self.memory_from}"


def scheme_of(order: LearnedOrder, memory_from: int, memory: str) -> FractionalLearned:
    """The scheme of a builder's ``gamma=LearnedOrder(..)``."""
    if not isinstance(order, LearnedOrder):
        raise ValueError(f"gamma must be a number in (0, 1) or a LearnedOrder, got {order!r}")
    if memory == "fast":
        raise ValueError("memory must not be 'fast' with a learned order: the nodes of its exponentials are constants")
    return FractionalLearned(order.initial, memory_from)
