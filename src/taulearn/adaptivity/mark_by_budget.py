"""Budgets of a deletion: a number of layers, or as many as a forward pass of so many milliseconds allows."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .._errors import positive_integer
from ..nn.time_steps import TimeSteps
from .estimate import Exponent, shares
from .mark import Again, Budget, plan
from .transaction import taken_out

_LATENCY = {"latency_ms", "example_inputs"}


def within_budget(
    budget: Budget,
    model: nn.Module,
    steps: TimeSteps,
    power: Exponent,
    scores: list[float] | None,
    fixed: Mapping[int, str],
    again: Again | None = None,
) -> tuple[list[tuple[int, float]], str]:
    """The layers that a budget deletes."""
    check_budget(budget)
    number = budget if not isinstance(budget, Mapping) else max(1, len(fixed))
    if number < len(fixed):
        layer, reason = next(iter(fixed.items()))
        raise ValueError(
            f"budget must be at least {len(fixed)}, the number of layers that must stay, got {number}: "
            f"layer {layer} stays because {reason}"
        )
    if number > steps.num_steps:
        raise ValueError(
            f"budget must be at most {steps.num_steps}, the number of layers that there are, got {number}: "
            "there is nothing to delete"
        )
    order = plan(steps, 0.5, power=power, fixed=fixed, scores=scores, number=int(number), again=again)
    notes = []
    if isinstance(budget, Mapping):
        deletions, taken = within_latency(model, [i for i, _ in order], steps.num_steps, budget)
        order = order[:deletions]
        notes.append(f"a forward pass takes {taken:.3g} ms, allowed are {float(budget['latency_ms']):g}")
    sizes = shares(steps, power).tolist() if scores is None else scores
    gone = {i for i, _ in order}
    left = [size for i, size in enumerate(sizes) if i not in gone and i not in fixed]
    if again is None and gone and left and min(left) <= max(sizes[i] for i in gone) * (1.0 + 1e-9):
        notes.append(
            "of layers with equal shares the first went; criterion=taulearn.contribution(inputs) tells them apart"
        )
    return order, "; ".join(notes)


def check_budget(budget: Budget) -> None:
    """Refuse what is neither a number of layers nor a latency with example inputs."""
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
    """
    limit, taken = float(budget["latency_ms"]), dict[int, float]()

    def time(deletions: int) -> float:
        if deletions not in taken:
            gone = set(order[:deletions])
            taken[deletions] = _time_without(model, gone, budget["example_inputs"])
        return taken[deletions]

    if time(len(order)) > limit:
        raise ValueError(
            f"budget['latency_ms'] must be at least what the smallest model takes, got {limit:g}: with "
            f"{number - len(order)} of {number} layers it takes {time(len(order)):.3g} ms on this machine"
        )
    deletions = bisect_left(range(len(order)), True, key=lambda k: time(k) <= limit)
    return deletions, time(deletions)


def _time_without(model: nn.Module, gone: set[int], inputs: Any) -> float:
    from .._milliseconds import milliseconds

    with taken_out(model, gone):
        return milliseconds(model, inputs)
