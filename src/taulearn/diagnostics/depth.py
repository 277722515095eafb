"""How much of its depth a network uses: loss and accuracy of the network cut after each layer, and what layers add.

References:
    Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet training.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._table import format_table
from ..nn.network import TimeVariableNetwork
from ._models import check_batch, evaluation

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DepthProfile:
    """Row k is the network cut after k layers; prints as a table.

    Attributes:
        depths: The numbers k: 1 .. N, or 0 .. N where the skips carry the input.
        loss: Loss of the cut networks, (len(depths),).
        accuracy: Share of samples with the right class, or None if the targets are no classes.
        layers: Numbers of the layers at the start, (N,).
        contribution: Root mean square over the samples of norm(s_l f_l(y_l)), what layer l adds, with
            s_l = tau_l or tau_l^gamma Gamma(2-gamma), (N,).
        relative: The same divided by that of norm(y_{l+1}), (N,).
    """

    depths: tuple[int, ...]
    loss: Tensor
    accuracy: Tensor | None
    layers: tuple[int, ...]
    contribution: Tensor
    relative: Tensor

    def __str__(self) -> str:
        blank = [None] if self.depths[0] == 0 else []
        columns: dict[str, list[object]] = {"depth": [*self.depths], "loss": [*self.loss.tolist()]}
        if self.accuracy is not None:
            columns["accuracy"] = [*self.accuracy.tolist()]
        columns["last layer"] = [*blank, *self.layers]
        columns["contribution"] = [*blank, *self.contribution.tolist()]
        columns["relative"] = [*blank, *self.relative.tolist()]
        return format_table(columns)


def depth_profile(
    network: TimeVariableNetwork, inputs: Float[Tensor, "batch *features"], targets: Tensor, loss: Loss
) -> DepthProfile:
    """Loss and accuracy of the network cut after each layer, and the size of what each layer adds to the state.

    The cut network has tau_l = 0 for all l >= k: the state y_k is carried by the remaining skips to the head
    (``network.intermediate_outputs``). All come from one forward pass, in evaluation mode.

    Args:
        network: A TimeVariableNetwork of any scheme.
        inputs: (batch, ...).
        targets: Class numbers (batch,), for which the accuracy is computed too, or anything ``loss`` takes.
        loss: Maps (output, target) to a scalar.

    Returns:
        The profile; its last row is the whole network.

    Raises:
        TypeError: If ``network`` is no TimeVariableNetwork.
        ValueError: If inputs and targets have different numbers of samples, or the loss is not a scalar.

    References:
        Püttschneider, Heilig, Fischer, Faulwasser (2025), for the intermediate outputs.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 2, 3, init=[0.5, 0.25, 0.0])
        >>> profile = depth_profile(network, torch.ones(4, 2), torch.zeros(4, dtype=torch.long), cross_entropy)
        >>> profile.depths, bool(profile.loss[1] == profile.loss[2]), profile.contribution[2].item()
        ((1, 2, 3), True, 0.0)
    """
    if not isinstance(network, TimeVariableNetwork):
        raise TypeError(
            f"network must be a TimeVariableNetwork, got {type(network).__name__}: only there it is known what the "
            "remaining skips and the head are"
        )
    check_batch(inputs)
    if len(targets) != len(inputs):
        raise ValueError(f"targets must have one entry per sample, got {len(targets)} for {len(inputs)} inputs")
    values: dict[int, Tensor] = {}
    with evaluation(network), torch.no_grad(), ExitStack() as hooks:
        for l, layer in enumerate(network.layers):
            hooks.callback(layer.register_forward_hook(_keep(values, l)).remove)
        states = network.states(inputs)
        outputs = network.intermediate_outputs(inputs, states=states)
        losses = torch.stack([_scalar(loss(output, targets)) for output in outputs.values()])
        factors = _factors(network)
        added = torch.stack([factors[l] * _size(values[l]) for l in range(len(states))])
        sizes = torch.stack([_size(y) for y in states])
        classes = targets.ndim == 1 and not targets.is_floating_point()
        right = [(y.argmax(1) == targets).double().mean() for y in outputs.values()] if classes else None
    return DepthProfile(
        depths=tuple(outputs),
        loss=losses.cpu(),
        accuracy=None if right is None else torch.stack(right).cpu(),
        layers=network.time_steps.origin,
        contribution=added.cpu(),
        relative=(added / sizes).cpu(),
    )


def _keep(values: dict[int, Tensor], l: int) -> Callable[..., None]:
    return lambda _module, _arguments, output: values.__setitem__(l, output)


def _factors(network: TimeVariableNetwork) -> Tensor:
    """abs(s_l), what multiplies the layer functions, (N,)."""
    power = network.scheme.step_power
    return network.time_steps.tau.double().abs() ** power * math.gamma(2.0 - power)


def _size(y: Tensor) -> Tensor:
    """Root mean square over the samples of the Euclidean norm."""
    return y.double().flatten(1).square().sum(1).mean().sqrt()


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}: take its mean over the batch")
    return value.double().reshape(())
