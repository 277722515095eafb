"""Penalties on time steps, weights and biases.

    L1                 alpha norm(tau)_1                                                    [2], section 3
    L2                 weight norm(tau)_2^2
    ElasticNet         (weight/2) (norm(tau)_2^2 + norm(tau)_1)                             [1], section 5
    TimeHorizon        (weight/2) (T - sum tau)^2                                           [2], section 3
    WeightElasticNet   (weight/2) sum_l (norm(W_l)_F^2 + norm(W_l)_1 + the same of b_l)     [1], equation (2.4)
    GroupLasso         weight sum_l norm((W_l, b_l))_2
    BiasOrdering       (beta/2) sum_l sum_j max(0, b_j - b_{j+1})^2                         [1], section 7

Called as ``penalty(model, inputs, targets, states)``; ``fit`` adds the values to the data loss and records each.

References:
    [1] Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks.
    [2] Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .functional import soft_threshold
from .nn.time_steps import TimeSteps


def time_steps_of(model: nn.Module) -> TimeSteps:
    """The time steps of a model.

    Args:
        model: A TimeVariableNetwork or a wrapped model.

    Returns:
        Its ``time_steps``.

    Raises:
        TypeError: If it has none.

    Example:
        >>> from taulearn.nn import resnet
        >>> time_steps_of(resnet(2, 3, 1, 4)).num_steps
        4
    """
    steps = getattr(model, "time_steps", None)
    if not isinstance(steps, TimeSteps):
        raise TypeError(
            f"model must have time steps, got {type(model).__name__}: build it with taulearn.nn, or wrap it with "
            "taulearn.wrap"
        )
    return steps


def _non_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}: 0 switches the penalty off")
    return float(value)


class Penalty(ABC):
    """A scalar function of the model that is added to the data loss.

    Attributes:
        name: The penalty's name in records.
        differentiated: Whether its gradient enters the step; a proximal penalty acts after the step instead.
        needs_states: Whether it asks for the states of the forward pass.
    """

    name: str
    differentiated = True
    needs_states = False

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """The penalty's value.

        Args:
            model: The model with time steps.
            inputs: The batch's inputs, for penalties that depend on data.
            targets: The batch's targets, likewise.
            states: The states of the forward pass on ``inputs``, where known.

        Returns:
            A scalar tensor.
        """

    def proximal(self, values: Tensor, lr: float | Tensor) -> Tensor:
        """The proximal step on the parameter of the time steps, after an optimiser step of size ``lr``."""
        return values


class _StepPenalty(Penalty):
    """A penalty that depends on tau alone."""

    @abstractmethod
    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        """The value at ``tau``."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        steps = time_steps_of(model)
        return self.of(steps.tau, steps)


class L1(_StepPenalty):
    """alpha norm(tau)_1, which drives steps to zero so that their layers can be pruned.

    Args:
        alpha: Weight >= 0.
        proximal: False: the subgradient alpha sign(tau) enters the gradient, as in the paper; it never lands on zero.
            True: after each optimiser step
            tau <- sign(tau) max(abs(tau) - lr alpha, 0) with the current learning rate of tau's group, which does; the
            value is recorded, not differentiated.

    Raises:
        ValueError: If alpha is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(L1(0.01)(resnet(2, 3, 1, 4)).detach())
        0.009999999776482582
    """

    name = "l1"

    def __init__(self, alpha: float, proximal: bool = False) -> None:
        self.alpha = _non_negative("alpha", alpha)
        self.differentiated = not proximal

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        return self.alpha * tau.abs().sum()

    def proximal(self, values: Tensor, lr: float | Tensor) -> Tensor:
        return values if self.differentiated else soft_threshold(values, lr * self.alpha)


class L2(_StepPenalty):
    """weight norm(tau)_2^2, for comparison: it shrinks steps, and none to zero.

    Args:
        weight: Weight >= 0.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(L2(4.0)(resnet(2, 3, 1, 4)).detach())
        1.0
    """

    name = "l2"

    def __init__(self, weight: float) -> None:
        self.weight = _non_negative("weight", weight)

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        return self.weight * tau.square().sum()


class ElasticNet(_StepPenalty):
    """(weight/2) (norm(tau)_2^2 + norm(tau)_1).

    Args:
        weight: Weight lambda_2 >= 0.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(ElasticNet(1.0)(resnet(2, 3, 1, 4)).detach())
        0.625
    """

    name = "elastic_net"

    def __init__(self, weight: float) -> None:
        self.weight = _non_negative("weight", weight)

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        return 0.5 * self.weight * (tau.square().sum() + tau.abs().sum())


class TimeHorizon(_StepPenalty):
    """(weight/2) (T - sum tau)^2.

    Args:
        horizon: T > 0. None: the horizon of the model's time steps.
        weight: Weight >= 0; 1 in the paper.

    Raises:
        ValueError: If horizon is not positive or weight is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(TimeHorizon(3.0)(resnet(2, 3, 1, 4)).detach())
        2.0
    """

    name = "time_horizon"

    def __init__(self, horizon: float | None = None, weight: float = 1.0) -> None:
        if horizon is not None and not horizon > 0:
            raise ValueError(f"horizon must be positive, got {horizon!r}")
        self.horizon = horizon
        self.weight = _non_negative("weight", weight)

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        horizon = steps.horizon if self.horizon is None else self.horizon
        return 0.5 * self.weight * (horizon - tau.sum()).square()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(
            f"model must have layers, got {type(model).__name__}: penalties on weights need a TimeVariableNetwork"
        )
    yield from layers


class _WeightPenalty(Penalty):
    """A penalty that is a sum over layers."""

    def __init__(self, weight: float) -> None:
        self.weight = _non_negative("weight", weight)

    @abstractmethod
    def of_layer(self, parameters: list[Tensor]) -> Tensor:
        """The share of one layer with these weights and biases."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        total = time_steps_of(model).values.new_zeros(())
        for module in self.modules(model):
            parameters: list[Tensor] = list(module.parameters())
            if parameters:
                total = total + self.of_layer(parameters)
        return self.weight * total

    def modules(self, model: nn.Module) -> Iterator[nn.Module]:
        """The modules whose parameters are penalised."""
        yield from _layers(model)


class WeightElasticNet(_WeightPenalty):
    """(weight/2) sum_l (norm(W_l)_F^2 + norm(W_l)_1) plus the same for the biases, over layers and output layer.

    Args:
        weight: Weight lambda_1 >= 0.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> WeightElasticNet(0.0)(resnet(2, 3, 1, 4)).item()
        0.0
    """

    name = "weight_elastic_net"

    def of_layer(self, parameters: list[Tensor]) -> Tensor:
        return 0.5 * torch.stack([w.square().sum() + w.abs().sum() for w in parameters]).sum()

    def modules(self, model: nn.Module) -> Iterator[nn.Module]:
        yield from _layers(model)
        head = getattr(model, "head", None)
        if isinstance(head, nn.Module):
            yield head


class GroupLasso(_WeightPenalty):
    """weight sum_l norm((W_l, b_l))_2, one group per layer, for comparison with penalties on tau.

    Args:
        weight: Weight >= 0.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> GroupLasso(0.0)(resnet(2, 3, 1, 4)).item()
        0.0
    """

    name = "group_lasso"

    def of_layer(self, parameters: list[Tensor]) -> Tensor:
        # gradient 0 at 0, where the root of a sum of squares gives NaN
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(w) for w in parameters]))


class BiasOrdering(Penalty):
    """(beta/2) sum_l sum_j max(0, b_j - b_{j+1})^2: the biases of a layer in increasing order.

    It breaks the permutation symmetry of the neurons. The standard Moreau-Yosida form; the exact normalisation of the
    article that introduced bias ordering could not be confirmed.

    Args:
        beta: Weight >= 0; 10 in the paper.

    Raises:
        ValueError: If beta is negative.

    References:
        Antil, Diaz, Herberg (2022), section 7.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 2, 1, 1)
        >>> with torch.no_grad():
        ...     _ = network.layers[0].linear.bias.copy_(torch.tensor([2.0, 1.0]))
        >>> BiasOrdering()(network).item()
        5.0
    """

    name = "bias_ordering"

    def __init__(self, beta: float = 10.0) -> None:
        self.beta = _non_negative("beta", beta)

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        total = time_steps_of(model).values.new_zeros(())
        for layer in _layers(model):
            for module in layer.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    total = total + torch.relu(module.bias[:-1] - module.bias[1:]).square().sum()
        return 0.5 * self.beta * total
