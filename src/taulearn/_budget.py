"""How many layers a budget leaves: a number of them, or as many as stay within a latency on this machine."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ._calls import milliseconds
from ._deletion import prunable_of
from ._errors import positive_integer
from ._undisturbed import Before

Budget = int | Mapping[str, Any]
_LATENCY = {"latency_ms", "example_inputs"}


def check_budget(budget: Budget) -> None:
    """Refuse what is neither a number of layers nor a latency with example inputs.

    Args:
        budget: What the caller gave.

    Raises:
        ValueError: If it is something else, or out of range.

    Example:
        >>> check_budget(4)
    """
    if not isinstance(budget, Mapping):
        positive_integer("budget", budget, "at least one layer stays")
        return
    if set(budget) != _LATENCY:
        raise ValueError(
            "budget must be a number of layers or {'latency_ms': x, 'example_inputs': inputs}, "
            f"got keys {sorted(map(str, budget))}"
        )
    limit = budget["latency_ms"]
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0.0 < limit < math.inf:
        raise ValueError(f"budget['latency_ms'] must be a positive number of milliseconds, got {limit!r}")


def within_latency(model: nn.Module, order: Sequence[int], number: int, budget: Mapping[str, Any]) -> tuple[int, float]:
    """The smallest number of deletions after which a forward pass takes no longer than allowed.

    Deletions are carried out, timed in evaluation mode and undone; by bisection, so that few are tried.

    Args:
        model: The model, left as it is.
        order: Positions in the order of deletion.
        number: Number of layers now.
        budget: latency_ms and example_inputs.

    Returns:
        The number of deletions, and the milliseconds measured with it.

    Raises:
        ValueError: If even with all deletions it takes longer.
    """
    limit, taken = float(budget["latency_ms"]), dict[int, float]()

    def time(deletions: int) -> float:
        if deletions not in taken:
            gone = set(order[:deletions])
            taken[deletions] = _time_without(model, gone, number, budget["example_inputs"])
        return taken[deletions]

    if time(len(order)) > limit:
        raise ValueError(
            f"budget['latency_ms'] must be at least what the smallest model takes, got {limit:g}: with "
            f"{number - len(order)} of {number} layers it takes {time(len(order)):.3g} ms on this machine"
        )
    deletions = _smallest(lambda k: time(k) <= limit, len(order))
    return deletions, time(deletions)


def _smallest(fits: Callable[[int], bool], last: int) -> int:
    """The smallest number up to ``last``, which fits, from which on all fit."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _time_without(model: nn.Module, gone: set[int], number: int, inputs: Any) -> float:
    with Before(model).kept(()):  # nothing is copied here: the passes inside put values back themselves
        if gone:
            prunable_of(model).keep_layers_([i for i in range(number) if i not in gone])
        return milliseconds(model, inputs)
