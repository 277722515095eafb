"""Calling a model on example inputs, with other forwards in it; and whether something looks into a computation."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model: a tuple or list as positional arguments, a mapping as keywords, anything else as one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@contextmanager
def forwards(others: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards on the instances of modules; their own come back afterwards.

    Not by hooks: torch's TransformerEncoderLayer leaves its fast path where there are any, and some hosts call the
    forward of their parts.
    """
    own = {module: vars(module).get("forward") for module in others}
    for module, other in others.items():
        vars(module)["forward"] = other
    try:
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward


def transforming() -> bool:
    """Whether something looks into the computation: torch.compile, export, torch.func, tracing or forward mode.

    A torch.autograd.Function with state would be wrong or refused there; plain operations always work.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
