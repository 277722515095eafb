"""Time steps of a finer grid, for :class:`TimeSteps`: the vector after splits or insertions, and where there are none.

split       tau_l becomes theta tau_l and (1 - theta) tau_l; the first half keeps the layer's number
insertion   a step of 0, or of the lower bound, comes behind tau_l
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._errors import is_number
from .grid import twice
from .time_steps import TimeSteps


def check_theta(theta: float) -> None:
    """Refuse what is no share of a step."""
    if not (is_number(theta) and 0.0 < theta < 1.0):
        raise ValueError(f"theta must lie in (0, 1), got {theta!r}: it is the first half's share of a step that splits")


@torch.no_grad()
def split_(steps: TimeSteps, indices: Iterable[int], theta: float) -> None:
    """See :meth:`TimeSteps.split_`."""
    chosen = _chosen("indices", indices, steps.num_steps)
    steps.grow_(*twice(steps.num_steps, chosen), split(steps, chosen, theta))


@torch.no_grad()
def insert_(steps: TimeSteps, behind: Iterable[int]) -> None:
    """See :meth:`TimeSteps.insert_`."""
    chosen = _chosen("behind", behind, steps.num_steps)
    steps.grow_(*twice(steps.num_steps, chosen), insert(steps, chosen))


@torch.no_grad()
def split(steps: TimeSteps, indices: Sequence[int], theta: float = 0.5) -> Tensor:
    """The parameter vector after these steps were split."""
    _refuse("indices", indices, not_split(steps, theta))
    return steps.changed("split", steps.num_steps + len(indices), indices, theta)


@torch.no_grad()
def insert(steps: TimeSteps, behind: Sequence[int]) -> Tensor:
    """The parameter vector after steps were inserted behind these."""
    _refuse("behind", behind, steps.rule.not_inserted(steps.num_steps))
    if len(behind) > (room := steps.rule.room(steps.values)):
        raise ValueError(
            f"lower_bound must leave room for {len(behind)} more steps of {steps.lower_bound:g} in the horizon "
            f"{steps.horizon:g} of constraint {steps.constraint!r}, got room for {max(0, room):g}: insert fewer, "
            "split, or lower the bound"
        )
    return steps.changed("insert", steps.num_steps + len(behind), behind)


def not_split(steps: TimeSteps, theta: float = 0.5) -> dict[int, str]:
    """Positions whose step cannot be split, with the reason: a half would lie below the lower bound."""
    check_theta(theta)
    if steps.lower_bound is None:
        return {}
    tau = steps.tau.detach()
    too_small = torch.minimum(theta * tau, tau - theta * tau) < torch.full_like(tau, steps.lower_bound)
    return {
        int(l): f"a half of its step {float(tau[l]):g} would lie below the lower bound {steps.lower_bound:g}"
        for l in too_small.nonzero().flatten()
    }


def _chosen(argument: str, given: Iterable[int], number: int) -> list[int]:
    """Positions in order."""
    chosen = sorted(given)
    if not chosen or len(set(chosen)) < len(chosen) or chosen[0] < 0 or chosen[-1] >= number:
        raise ValueError(f"{argument} must be numbers in 0 .. {number - 1}, each once, got {chosen}")
    return chosen


def _refuse(argument: str, chosen: Sequence[int], reasons: dict[int, str]) -> None:
    for l in (l for l in chosen if l in reasons):
        raise ValueError(f"{argument} must not contain {l}, got {list(chosen)}: {reasons[l]}")
