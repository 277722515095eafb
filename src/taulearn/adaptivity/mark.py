"""Which layers a deletion takes: those with the smallest shares, by a threshold or down to a number."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..nn.time_steps import TimeSteps
from .estimate import Exponent, normalised, shares

Budget = int | Mapping[str, Any]
Again = Callable[[Sequence[int]], Sequence[float]]
"""The scores of the layers that are left when some, by their positions, are gone."""


def plan(
    steps: TimeSteps,
    threshold: float,
    *,
    power: Exponent = 1.0,
    fixed: Iterable[int] = (),
    scores: Sequence[float] | Mapping[int, float] | None = None,
    number: int | None = None,
    again: Again | None = None,
) -> list[tuple[int, float]]:
    """Which layers the rule deletes: the smallest share first, while one lies below the threshold.

    The shares are computed anew after each deletion; the scores too, where ``again`` gives those of the layers left.
    """
    steps = copy.deepcopy(steps)
    positions = list(range(steps.num_steps))
    kept_always = set(fixed)
    chosen = []
    while len(positions) > (1 if number is None else number):
        left = tuple(power[l] for l in positions) if isinstance(power, tuple) else power
        now = shares(steps, left).tolist() if scores is None else normalised([scores[l] for l in positions])
        if scores is not None and number is None and not any(now):
            break  # a criterion that says nothing of any layer
        candidates = [(share, i) for i, share in enumerate(now) if positions[i] not in kept_always]
        if not candidates or (number is None and min(candidates)[0] >= threshold):
            break
        share, i = min(candidates)
        chosen.append((positions.pop(i), share))
        if again is not None and len(positions) > (number or 1):
            scores = dict(zip(positions, again([layer for layer, _ in chosen]), strict=True))
        steps.keep_(j for j in range(steps.num_steps) if j != i)
    return chosen
