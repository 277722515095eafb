"""Which layers a deletion takes: shares of the steps or of a user's scores, a threshold or a budget."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ._budget import Budget, check_budget, within_latency
from ._deletion import Prunable
from ._errors import unknown_name
from .nn.time_steps import TimeSteps

Criterion = Callable[[Tensor, nn.Module], Tensor]


@torch.no_grad()
def shares(steps: TimeSteps, power: float = 1.0) -> Tensor:
    """Each layer's share abs(tau_l)^power / sum_j abs(tau_j)^power.

    Args:
        steps: The time steps.
        power: 1 for the residual scheme, gamma for the fractional one.

    Returns:
        Shares (num_steps,), float64, with sum 1 (all 0 where every step is 0).

    Raises:
        ValueError: If a step is not finite.

    Example:
        >>> shares(TimeSteps(2, init=[3.0, -1.0])).tolist()
        [0.75, 0.25]
    """
    if not bool(torch.isfinite(steps.tau).all()):
        raise ValueError(
            f"tau must be finite, got {steps.tau.tolist()}: training has diverged; lower the learning rate"
        )
    return shares_of(steps.tau, power)


def shares_of(tau: Tensor, power: float) -> Tensor:
    """The shares of any numbers of steps.

    Args:
        tau: Steps (..., num_steps).
        power: As for :func:`shares`.

    Returns:
        Shares (..., num_steps), float64.
    """
    magnitude = tau.double().abs() ** power
    return magnitude / magnitude.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def plan(
    steps: TimeSteps,
    threshold: float,
    *,
    power: float = 1.0,
    fixed: Iterable[int] = (),
    scores: Sequence[float] | None = None,
    number: int | None = None,
) -> list[tuple[int, float]]:
    """Which layers the rule deletes: the smallest share first, while one lies below the threshold.

    The shares are computed anew after each deletion.

    Args:
        steps: The time steps; not changed. A dependent last step takes up what is deleted, simplex steps are projected
            again.
        threshold: In (0, 1).
        power: Exponent of the shares.
        fixed: Positions that must stay.
        scores: Shares are taken of these instead of abs(tau)^power.
        number: Layers are deleted until so many are left, whatever the threshold.

    Returns:
        Pairs of position (before any deletion) and share at the moment of choice, in the order of deletion; at least
        one layer stays.

    Example:
        >>> plan(TimeSteps(4, init=[1.0, 0.004, 0.5, -0.002]), 0.01, fixed=[0])
        [(3, 0.001328), (1, 0.002660)]
    """
    steps = copy.deepcopy(steps)
    positions = list(range(steps.num_steps))
    kept_always = set(fixed)
    chosen = []
    while len(positions) > (1 if number is None else number):
        now = shares(steps, power).tolist() if scores is None else normalised([scores[l] for l in positions])
        candidates = [(share, i) for i, share in enumerate(now) if positions[i] not in kept_always]
        if not candidates or (number is None and min(candidates)[0] >= threshold):
            break
        share, i = min(candidates)
        chosen.append((positions.pop(i), share))
        steps.keep_(j for j in range(steps.num_steps) if j != i)
    return chosen


def scores_of(
    criterion: str | Criterion | None, prunable: Prunable, model: nn.Module
) -> tuple[list[float] | None, float]:
    """What shares are taken of: scores of a user's function, or a power of abs(tau).

    Args:
        criterion: As ``prune`` takes it.
        prunable: The model, or its wrapping.
        model: The model.

    Returns:
        The scores, None for abs(tau); and its exponent.

    Raises:
        ValueError: If the name is unknown, or the function returns something else than scores.
    """
    power = prunable.scheme.step_power
    if criterion is None or criterion == "power":
        return None, power
    if isinstance(criterion, str):
        if criterion == "contribution":
            raise ValueError(
                "criterion must be taulearn.contribution(inputs), got 'contribution', which has no data outside fit: "
                "give a batch of inputs"
            )
        if criterion != "share":
            raise unknown_name("criterion", criterion, ("power", "share"))
        return None, 1.0
    if not callable(criterion):
        raise TypeError(f"criterion must be a name or a function (tau, model) -> scores, got {criterion!r}")
    tau = prunable.time_steps.tau.detach()
    given = criterion(tau, model)
    try:
        scores = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"criterion must return {len(tau)} finite scores >= 0, one per layer, got {given!r}: return a tensor "
            "shaped like tau"
        ) from error
    if scores.shape != tau.shape or not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(
            f"criterion must return {len(tau)} finite scores >= 0, one per layer, got "
            f"{scores.tolist() if scores.numel() < 50 else f'shape {tuple(scores.shape)}'}"
        )
    return scores.tolist(), power


def normalised(scores: Sequence[float]) -> list[float]:
    """Scores over their sum.

    Example:
        >>> normalised([3.0, 1.0])
        [0.75, 0.25]
    """
    total = sum(scores) or 1.0
    return [score / total for score in scores]


def within_budget(
    budget: Budget,
    model: nn.Module,
    steps: TimeSteps,
    power: float,
    scores: list[float] | None,
    fixed: Mapping[int, str],
) -> tuple[list[tuple[int, float]], str]:
    """What a budget deletes.

    Args:
        budget: As ``prune`` takes it.
        model: The model.
        steps: Its time steps.
        power: Exponent of the shares.
        scores: What the shares are taken of instead of abs(tau)^power.
        fixed: Positions that must stay, with reasons.

    Returns:
        Pairs of position and share, and what the report says of the budget.

    Raises:
        ValueError: If the budget is none, or cannot be met.
    """
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
    order = plan(steps, 0.5, power=power, fixed=fixed, scores=scores, number=int(number))
    notes = []
    if isinstance(budget, Mapping):
        deletions, taken = within_latency(model, [i for i, _ in order], steps.num_steps, budget)
        order = order[:deletions]
        notes.append(f"a forward pass takes {taken:.3g} ms, allowed are {float(budget['latency_ms']):g}")
    sizes = shares(steps, power).tolist() if scores is None else scores
    gone = {i for i, _ in order}
    left = [size for i, size in enumerate(sizes) if i not in gone and i not in fixed]
    if gone and left and min(left) <= max(sizes[i] for i in gone) * (1.0 + 1e-9):
        notes.append(
            "of layers with equal shares the first went; criterion=taulearn.contribution(inputs) tells them apart"
        )
    return order, "; ".join(notes)
