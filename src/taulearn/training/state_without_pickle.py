"""State of optimisers, schedulers and the like as JSON and tensors: what a checkpoint can hold without pickle."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def to_plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it; tensors go to ``tensors`` and leave their name behind."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [to_plain(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        pairs = [[key, to_plain(v, f"{name}/{key}", tensors)] for key, v in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which a checkpoint cannot keep without pickle: "
        "use an optimiser and a scheduler with plain state"
    )


def from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`to_plain`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind in ("dict", "counter"):
        pairs = {key: from_plain(v, tensors) for key, v in content}
        return Counter(pairs) if kind == "counter" else pairs
    items = [from_plain(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
