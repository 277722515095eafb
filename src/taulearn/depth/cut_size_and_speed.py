"""Size and speed of a network cut after each of its layers."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from .._milliseconds import milliseconds
from ..nn.constraints import Free
from ..nn.early_exit import tail_of
from ..nn.network import TimeVariableNetwork
from ..nn.time_steps import time_steps_of
from .layers_and_states import layers_of
from .truncate import truncate
from .wrapped_states import skipping

_REPEATS = 5


def parameters(network: nn.Module, depth: int) -> int:
    """Number of variables of the network cut after ``depth`` layers."""
    layers, values = layers_of(network), time_steps_of(network).values
    gone = {p for layer in layers[depth:] for p in layer.parameters()}
    gone -= {p for layer in layers[:depth] for p in layer.parameters()}
    left = sum(p.numel() for p in network.parameters() if p not in gone)
    return left - (min(len(layers) - depth, values.numel()) if isinstance(values, nn.Parameter) else 0)


def times(network: nn.Module, depths: tuple[int, ...], inputs: Any) -> Iterator[float]:
    """Milliseconds of a forward pass of each cut network."""
    if not isinstance(network, TimeVariableNetwork):
        for k in depths:
            with skipping(network, k):
                yield milliseconds(network, inputs, _REPEATS)
        return
    network = copy.deepcopy(network)
    steps = network.time_steps
    steps.rule, steps.values = Free(), nn.Parameter(steps.tau.detach().clone())  # every constraint lets layers go then
    found: list[float] = []
    for k in reversed(depths):
        if k == 0:
            found.append(milliseconds(nn.Sequential(network.stem, *tail_of(network, 0)), inputs, _REPEATS))
            continue
        truncate(network, k)
        found.append(milliseconds(network, inputs, _REPEATS))
    yield from reversed(found)
