"""How long a model, and its layers, take in a forward pass."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ._calls import call, forwards
from ._undisturbed import Before

REPEATS = 15


def clock(model: nn.Module) -> Callable[[], float]:
    """Milliseconds since some moment, read once the model's device has done its work."""
    types = {each.device.type for each in (*model.parameters(), *model.buffers())} - {"cpu", "meta"}

    def read() -> float:
        if types:
            torch.accelerator.synchronize()
        return 1e3 * time.perf_counter()

    return read


def milliseconds(model: nn.Module, inputs: Any, repeats: int = REPEATS) -> float:
    """Median time of a forward pass without gradients, in evaluation mode. The passes leave nothing behind."""
    now, taken = clock(model), []
    with _passes(model, inputs):
        call(model, inputs)
        for _ in range(repeats):
            start = now()
            call(model, inputs)
            taken.append(now() - start)
    return statistics.median(taken)


@contextmanager
def _passes(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Passes as :class:`Before` keeps them, of which one shows what they write, so that the others are not slower."""
    before = Before(model, inputs)
    with before.kept() as written:
        call(model, inputs)
    with before.kept(written):
        yield


def layer_milliseconds(model: nn.Module, layers: Sequence[nn.Module], inputs: Any) -> tuple[tuple[float, ...], float]:
    """Median times of the layers and of the whole in a forward pass without gradients, in evaluation mode.

    A scheme of several stages calls a layer several times, which counts. The passes leave nothing behind.
    """
    now = clock(model)
    taken: dict[nn.Module, list[float]] = {layer: [] for layer in layers}

    def timed(layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            before = now()
            output = forward(*args, **kwargs)
            taken[layer].append(now() - before)
            return output

        return run

    whole = milliseconds(model, inputs)
    with _passes(model, inputs), forwards({layer: timed(layer) for layer in layers}):
        for _ in range(REPEATS):
            call(model, inputs)
    often = {layer: len(times) / REPEATS / layers.count(layer) for layer, times in taken.items()}
    return tuple(often[layer] * statistics.median(taken[layer]) for layer in layers), whole
