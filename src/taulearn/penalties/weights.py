"""Penalties on weights and biases."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..nn.time_steps import time_steps_of
from .base import Penalty, non_negative


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
        self.weight = non_negative("weight", weight)

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
        self.beta = non_negative("beta", beta)

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
