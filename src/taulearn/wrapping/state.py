"""Which tensor of a block's arguments and of its output is the state, and how an output holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def state_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The state among a block's arguments: the first positional tensor, else ``hidden_states``, else the first tensor.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The tensor, or None if there is none.

    Example:
        >>> import torch
        >>> state_in((), {"mask": torch.ones(2), "hidden_states": torch.zeros(3)}).shape
        torch.Size([3])
    """
    for value in args:
        if isinstance(value, Tensor):
            return value
    value = kwargs.get("hidden_states")
    if isinstance(value, Tensor):
        return value
    for value in kwargs.values():
        if isinstance(value, Tensor):
            return value
    return None


def _items(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    return list(enumerate(output)) if isinstance(output, tuple | list) else []


def state_out(output: Any) -> Tensor | None:
    """The state in a block's output: itself, or the first tensor of a tuple, list, dictionary or ModelOutput.

    Args:
        output: What the block returned.

    Returns:
        The tensor, or None if there is none.

    Example:
        >>> import torch
        >>> state_out((torch.zeros(3), None)).shape
        torch.Size([3])
    """
    if isinstance(output, Tensor):
        return output
    return next((value for _, value in _items(output) if isinstance(value, Tensor)), None)


def with_state(output: Any, state: Tensor) -> Any:
    """The same output with another state in it.

    Args:
        output: What the block returned, with a tensor in it.
        state: The new state.

    Returns:
        An output of the same type, whose other entries are those of ``output``.

    Example:
        >>> import torch
        >>> with_state((torch.zeros(1), "rest"), torch.ones(1))
        (tensor([1.]), 'rest')
    """
    return state if isinstance(output, Tensor) else Form.of(output).around(state, dict(_items(output)))


@dataclass(frozen=True)
class Form:
    """How an output holds its state.

    Attributes:
        kind: Its type; None: it is the state.
        key: Position or key of the state.
        size: Number of entries of a tuple or list.

    Example:
        >>> import torch
        >>> Form.of((None, torch.zeros(1))).around(torch.ones(1))
        (None, tensor([1.]))
    """

    kind: type[Any] | None = None
    key: int | str = 0
    size: int = 1

    @classmethod
    def of(cls, output: Any) -> "Form":
        """The form of an output with a tensor in it."""
        if isinstance(output, Tensor):
            return cls()
        items = _items(output)
        return cls(type(output), next(key for key, value in items if isinstance(value, Tensor)), len(items))

    def around(self, state: Any, others: Mapping[Any, Any] | None = None) -> Any:
        """An output of this form: the state, with the other entries, None where there are none."""
        if self.kind is None:
            return state
        entries: dict[Any, Any] = {**(others or {}), self.key: state}
        if issubclass(self.kind, Mapping):
            return entries if self.kind is dict else self.kind(**entries)
        values = [entries.get(i) for i in range(self.size)]
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)
