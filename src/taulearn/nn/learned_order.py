"""The fractional scheme with a learned order: gamma is a parameter beside the time steps.

    gamma = 0.01 + 0.98 sigma(g),  so that it stays inside of (0.01, 0.99) by itself

The weights a_{l,j} and the factor tau_l^gamma Gamma(2-gamma) are smooth in gamma, and autograd differentiates them. The
order is one number for the network, or one a layer: gamma_l in row l of the weights and in the factor of layer l, which
goes with its layer; a new layer begins with the order of the one that it comes behind. As sigma keeps it inside, there
is no projection after a step, and any optimiser and loop will do.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import functional as F
from .._errors import is_number, positive_integer, unknown_name
from ..caputo.weights import plain_left_weights
from .schemes import Fractional
from .skips import Skips

LOWEST, HIGHEST = 0.01, 0.99


@dataclass(frozen=True)
class LearnedOrder:
    """An order that is learned, for ``fractional_dnn(gamma=LearnedOrder(0.5))``.

    Args:
        initial: The order at the start, in (0.01, 0.99).
        per: "network", one order for all layers, or "layer", one for each.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> from taulearn.nn import fractional_dnn
        >>> fractional_dnn(8, 4, 2, 3, gamma=LearnedOrder(0.7)).scheme
        FractionalLearned(gamma=0.7, memory_from=1)
    """

    initial: float = 0.5
    per: Literal["network", "layer"] = "network"

    def __post_init__(self) -> None:
        if not (is_number(self.initial) and LOWEST < self.initial < HIGHEST):
            raise ValueError(
                f"initial must lie in ({LOWEST:g}, {HIGHEST:g}), got {self.initial!r}: it is the order of the "
                "derivative; for a fixed one give gamma the number"
            )
        if self.per not in ("network", "layer"):
            raise unknown_name("per", self.per, ("network", "layer"))


@dataclass
class _Coefficients:
    """The factors of the layers, tau_l^gamma Gamma(2-gamma), one by one, and all weights."""

    factors: tuple[Tensor, ...]
    weights: Tensor

    def matrix(self) -> Tensor:
        return self.weights


class FractionalLearned(Fractional):
    """The fractional scheme whose order is a parameter; its memory is exact, by plain operations.

    Args:
        initial: The order at the start, in (0.01, 0.99).
        memory_from: See :class:`Fractional`.
        layers: Number of layers that have an order each; 0: there is one for the network.

    Attributes:
        orders: The parameter g, or those of the layers, in a list.
        gamma: The order now, or a tuple of the orders; setting it to a number makes new parameters.

    Raises:
        ValueError: If an argument lies outside its range.

    Example:
        >>> round(FractionalLearned(0.3).gamma, 5)
        0.3
    """

    name = "fractional-learned"
    orders: nn.ParameterList

    def __init__(self, initial: float = 0.5, memory_from: int = 1, layers: int = 0) -> None:
        super().__init__(LearnedOrder(initial).initial, memory_from, memory="exact")  # which sets gamma
        self.caputo_order = None  # no adjoint system is written down
        if layers:
            start, self.per_layer = self.orders[0].detach(), 1
            number = positive_integer("layers", layers)
            self.orders = nn.ParameterList(nn.Parameter(start.clone()) for _ in range(number))

    @property
    def layers(self) -> int:
        return self.per_layer * len(self.orders)

    def value(self) -> Tensor:
        """gamma, a float64 scalar, or a vector with one a layer."""
        order = torch.stack([*self.orders]) if self.per_layer else self.orders[0]
        return LOWEST + (HIGHEST - LOWEST) * torch.sigmoid(order.double())

    @property
    def gamma(self) -> Any:
        value = self.value()
        if value.is_meta:
            return (self.initial,) * self.layers or self.initial
        return tuple(value.tolist()) if self.per_layer else value.item()

    @gamma.setter
    def gamma(self, value: float) -> None:
        self.initial = value
        share = (value - LOWEST) / (HIGHEST - LOWEST)
        start = torch.tensor(math.log(share / (1.0 - share)), dtype=torch.float64)
        self.orders = nn.ParameterList(nn.Parameter(start.clone()) for _ in getattr(self, "orders", "1"))

    def follow_(self, sources: Sequence[int]) -> dict[Any, Any]:
        if not self.per_layer:
            return {}
        orders, kin = [self.orders[l] for l in sources], dict[Any, Any]()
        for i, p in enumerate(orders):
            if sources[i] in sources[:i]:
                orders[i] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
                kin[orders[i]] = p
        self.orders = nn.ParameterList(orders)
        return kin

    def factor(self, tau: Tensor) -> Tensor:
        gamma = self.value().detach().to(tau.dtype)
        return tau.abs() ** gamma * torch.lgamma(2.0 - gamma).exp()

    def prepare(self, tau: Tensor, twice: int | None = None) -> Any:
        gamma = self.value()
        if self.per_layer and twice is not None:
            gamma = torch.cat([gamma[: twice + 1], gamma[twice:]])
        factors = (tau.double() ** gamma * torch.lgamma(2.0 - gamma).exp()).to(tau.dtype)
        rows = gamma[:, None] if self.per_layer else gamma
        return _Coefficients(factors.unbind(), plain_left_weights(tau.double(), rows))

    def init(self, y_0: Tensor) -> Any:
        return ()

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        states, before = (*carry, y), skips(y, l, l + 1)
        memory = self._memory(coefficients.weights[l], states, skips) if l else None
        value = f(y)
        self.check_shape(l, value, before)
        if memory is not None:
            before = -memory if before is None else before - memory
        return F.residual_step(before, value, coefficients.factors[l]), states

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        gamma = ", ".join(f"{each:g}" for each in self.gamma) if self.per_layer else f"{self.gamma:g}"
        return f"gamma={f'({gamma})' if self.per_layer else gamma}, memory_from={self.memory_from}"


def scheme_of(
    order: LearnedOrder,
    layers: int,
    memory_from: int,
    memory: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> FractionalLearned:
    """The scheme of a builder's ``gamma=LearnedOrder(..)``."""
    if not isinstance(order, LearnedOrder):
        raise ValueError(f"gamma must be a number in (0, 1) or a LearnedOrder, got {order!r}")
    if memory == "fast":
        raise ValueError("memory must not be 'fast' with a learned order: the nodes of its exponentials are constants")
    scheme = FractionalLearned(order.initial, memory_from, layers if order.per == "layer" else 0)
    return scheme.to(dtype=dtype or torch.get_default_dtype(), device=device)
