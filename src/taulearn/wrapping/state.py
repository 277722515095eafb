"""Which tensor of a block's arguments and of its output is the state."""

from collections.abc import Mapping
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
    for value in tensors_of(output):
        return value
    return None


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors directly in an output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [value for value in output.values() if isinstance(value, Tensor)]
    if isinstance(output, tuple | list):
        return [value for value in output if isinstance(value, Tensor)]
    return []


def with_state(output: Any, state: Tensor) -> Any:
    """The same output with another state in it.

    Args:
        output: What the block returned.
        state: The new state.

    Returns:
        An output of the same type; tuples of a named type keep it, all other entries are those of ``output``.

    Example:
        >>> import torch
        >>> with_state((torch.zeros(1), "rest"), torch.ones(1))
        (tensor([1.]), 'rest')
    """
    if isinstance(output, Tensor):
        return state
    if isinstance(output, Mapping):
        first = next(key for key, value in output.items() if isinstance(value, Tensor))
        values: dict[str, Any] = {**output, first: state}
        return type(output)(**values) if type(output) is not dict else values
    at = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    items = [*output[:at], state, *output[at + 1 :]]
    if isinstance(output, list):
        return items
    return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
