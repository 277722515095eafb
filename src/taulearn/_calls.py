"""Calling a model on example inputs, with other forwards in it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


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
