"""A model at a glance: its layers, their steps, their parameters, their time."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._table import format_table
from ..nn.builders import FullyConnected
from ..penalties import time_steps_of
from ._models import evaluation, layers_of, scheme_of

_REPEATS = 15


@dataclass(frozen=True)
class Summary:
    """One entry per layer; prints as a table with a total line.

    Attributes:
        scheme: Name of the scheme.
        layers: Numbers of the layers at the start.
        tau: Effective steps.
        shares: abs(tau)^p / sum abs(tau)^p, with p = gamma for the fractional scheme and 1 otherwise: what pruning
            compares with its threshold.
        parameters: Numbers of variables of the layer functions (a shared variable counts where it comes first).
        kinds: What the layers are.
        milliseconds: Median time of each layer function in a forward pass, or None without example inputs.
        total_parameters: Number of variables of the whole model.
        total_milliseconds: Median time of the whole forward pass, or None.
    """

    scheme: str
    layers: tuple[int, ...]
    tau: tuple[float, ...]
    shares: tuple[float, ...]
    parameters: tuple[int, ...]
    kinds: tuple[str, ...]
    milliseconds: tuple[float, ...] | None
    total_parameters: int
    total_milliseconds: float | None

    def __str__(self) -> str:
        rest = self.total_parameters - sum(self.parameters)
        columns: dict[str, list[object]] = {
            "layer": [*self.layers, None],
            "tau": [*self.tau, None],
            "share": [*self.shares, None],
            "parameters": [*self.parameters, rest],
            "kind": [*self.kinds, "all else"],
        }
        total: list[object] = [len(self.layers), sum(self.tau), None, self.total_parameters, f"{self.scheme} network"]
        if self.milliseconds is not None and self.total_milliseconds is not None:
            columns["ms"] = [*self.milliseconds, max(0.0, self.total_milliseconds - sum(self.milliseconds))]
            total.append(self.total_milliseconds)
        return format_table(columns, total=total)


def summary(model: nn.Module, example_inputs: Tensor | None = None) -> Summary:
    """The layers of a model with their steps, shares, parameters and, on example inputs, milliseconds.

    Args:
        model: A model with time steps and one layer per step.
        example_inputs: A batch on which forward passes are timed, in evaluation mode and without gradients. None:
            nothing is timed.

    Returns:
        The summary; ``print`` it.

    Raises:
        TypeError: If the model has no time steps, or not one layer per step.

    Example:
        >>> from taulearn.nn import resnet
        >>> print(summary(resnet(4, 3, 2, 2, init=[0.75, 0.25])))
        layer     tau   share  parameters  kind
        -------------------------------------------------------------
            0  0.7500  0.7500          15  FullyConnected(4, 3, ReLU)
            1  0.2500  0.2500          12  FullyConnected(3, 3, ReLU)
                                        8  all else
        -------------------------------------------------------------
            2  1.0000                  35  residual network
    """
    steps, layers = time_steps_of(model), layers_of(model)
    scheme, power = scheme_of(model)
    tau = steps.tau.detach().double().cpu()
    sizes = tau.abs() ** power
    seen: set[nn.Parameter] = set()
    counts = []
    for layer in layers:
        new = [p for p in layer.parameters() if p not in seen]
        seen.update(new)
        counts.append(sum(p.numel() for p in new))
    milliseconds, total = (None, None) if example_inputs is None else _time(model, layers, example_inputs)
    return Summary(
        scheme=scheme,
        layers=steps.origin,
        tau=tuple(tau.tolist()),
        shares=tuple((sizes / sizes.sum()).tolist()),
        parameters=tuple(counts),
        kinds=tuple(_kind(layer) for layer in layers),
        milliseconds=milliseconds,
        total_parameters=sum(p.numel() for p in model.parameters()),
        total_milliseconds=total,
    )


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, FullyConnected):
        linear = layer.linear
        return f"FullyConnected({linear.in_features}, {linear.out_features}, {type(layer.activation).__name__})"
    return type(layer).__name__


def _time(model: nn.Module, layers: Sequence[nn.Module], inputs: Tensor) -> tuple[tuple[float, ...], float]:
    """Milliseconds of each layer and of the whole, medians over repeated forward passes."""
    clock = _clock(inputs.device)
    started: dict[int, float] = {}
    taken: list[list[float]] = [[] for _ in layers]

    def start(l: int) -> Callable[..., None]:
        return lambda *_: started.__setitem__(l, clock())

    def stop(l: int) -> Callable[..., None]:
        return lambda *_: taken[l].append(clock() - started[l])

    whole = []
    with evaluation(model), torch.no_grad():
        for _ in range(2):
            model(inputs)
        for _ in range(_REPEATS):
            before = clock()
            model(inputs)
            whole.append(clock() - before)
        with ExitStack() as hooks:
            for l, layer in enumerate(layers):
                hooks.callback(layer.register_forward_pre_hook(start(l)).remove)
                hooks.callback(layer.register_forward_hook(stop(l)).remove)
            for _ in range(_REPEATS):
                model(inputs)
    return tuple(statistics.median(times) for times in taken), statistics.median(whole)


def _clock(device: torch.device) -> Callable[[], float]:
    """Milliseconds once the device has done its work."""

    def clock() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return 1e3 * time.perf_counter()

    return clock
