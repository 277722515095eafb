"""Scores of the layers, of which the rules take shares: powers of the steps, a criterion's, or a user's function.

Criteria that look at the model at work are in :mod:`~taulearn.adaptivity.criteria`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import check_loss
from .._errors import unknown_name
from ..nn.pruned_models import prunable_of
from ..nn.schemes import Scheme
from ..nn.time_steps import TimeSteps

MEASURED = ("contribution", "influence", "sensitivity", "loss")
"""The criteria that need data, or a training to watch."""
NAMES = ("power", "share", *MEASURED)
Exponent = float | tuple[float, ...]


@torch.no_grad()
def shares(steps: TimeSteps, power: Exponent = 1.0) -> Tensor:
    """Each layer's share abs(tau_l)^power / sum_j abs(tau_j)^power.

    Args:
        steps: The time steps.
        power: 1 for the residual scheme, gamma for the fractional one; or one for each layer.

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


def shares_of(tau: Tensor, power: Exponent) -> Tensor:
    """The shares of any numbers of steps.

    Args:
        tau: Steps (..., num_steps).
        power: As for :func:`shares`.

    Returns:
        Shares (..., num_steps), float64.
    """
    p = tau.new_tensor(power, dtype=torch.float64) if isinstance(power, tuple) else power
    magnitude = tau.double().abs() ** p
    return magnitude / magnitude.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


class Criterion(ABC):
    """What each layer is worth: deletions take those with the smallest shares of the scores.

    One of your own defines :meth:`scores`; and ``measuring``, :meth:`keep_` and :meth:`grow_`, where it watches the
    training.

    Attributes:
        power: The exponent p where the scores are abs(tau)^p, which follow the steps while layers go; else None.
        measuring: A method without arguments that returns a context. Forward passes in it are watched: in ``fit`` whole
            iterations, every twentieth or so; otherwise all that happens between two steps, evaluation included. None:
            nothing is watched.
        unseen: Positions of the layers of which nothing is known yet; while there are some, deletions wait.
        number: Number of measurements since layers came in last.
        greedy: Whether scores are taken again after each deletion, with the layers gone that are to go. They go with
            budgets and targets then, not with thresholds.
        mean: Takes the means of the scores over the processes that hold the model, where several do.

    Example:
        >>> from taulearn import prune
        >>> from taulearn.nn import resnet
        >>> class Norms(Criterion):
        ...     def scores(self, model):
        ...         return torch.stack([layer.linear.weight.norm() for layer in model.layers])
        >>> prune(resnet(2, 3, 1, 4), criterion=Norms(), budget=3).layers_after
        3
    """

    power: Exponent | None = None
    measuring: Callable[[], AbstractContextManager[None]] | None = None
    unseen: Sequence[int] = ()
    number: int = 0
    greedy: bool = False
    mean: Callable[[list[float]], list[float]] | None = None

    @abstractmethod
    def scores(self, model: nn.Module) -> Tensor:
        """One number >= 0 for each layer that the model has now."""

    def keep_(self, indices: Sequence[int]) -> None:  # noqa: B027  most have nothing to do
        """Told after a deletion which layers stayed, by their positions before it."""

    def grow_(self, sources: Sequence[int], new: Collection[int]) -> None:  # noqa: B027
        """Told after a refinement which layers there are: nothing is known of new ones, halves of a split or others.

        Args:
            sources: For each layer now the position before, its own or its parent's.
            new: Positions now of those that are new.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed training needs, plain data and tensors by name."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from :meth:`state`; other names are passed over."""

    def average_(self, mean: Callable[[Tensor], Tensor]) -> None:  # noqa: B027
        """Take means over the processes of what each has measured."""


class Power(Criterion):
    """Shares of abs(tau_l)^p, p a number, or that of a scheme, which may learn it."""

    def __init__(self, of: float | Scheme = 1.0) -> None:
        self.of = of

    @property
    def power(self) -> Exponent:  # type: ignore[override]
        return self.of if isinstance(self.of, float) else self.of.step_power

    def scores(self, model: nn.Module) -> Tensor:
        return shares_of(prunable_of(model).time_steps.tau.detach(), self.power)


class Function(Criterion):
    """What a function (tau, model) -> scores answers."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        self.function = function

    def scores(self, model: nn.Module) -> Tensor:
        return self.function(prunable_of(model).time_steps.tau.detach(), model)


def as_criterion(
    given: str | Criterion | Callable[[Tensor, nn.Module], Tensor] | None,
    model: nn.Module,
    *,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    watching: bool = False,
    recording: bool = False,
) -> Criterion:
    """A criterion, as ``prune`` and ``Pruning`` take it, as an object.

    Watching a training, measured criteria need no data; recording, only forward passes count that record gradients.
    """
    check_criterion(given)
    check_given(given, data, watching=watching)
    check_loss(loss)
    if isinstance(given, Criterion):
        return given
    if given == "loss":
        from .loss_without import LossWithout

        return LossWithout(data, loss)
    if isinstance(given, str) and given in MEASURED:
        from .criteria import KINDS, on_data

        return KINDS[given](model, recording=recording) if watching else Function(on_data(given, data, loss))
    if callable(given):
        return Function(given)
    return Power(1.0 if given == "share" else prunable_of(model).scheme)


def check_given(criterion: Any, data: Any, *, watching: bool) -> None:
    """Refuse data that a criterion lacks, or does not look at."""
    named = criterion if isinstance(criterion, str) else None
    asks = named == "loss" or (named in MEASURED and not watching)
    if asks and data is None:
        raise ValueError(
            f"data must be given with criterion {named!r}, got None: hand over batches on which layers are compared, "
            "pairs (inputs, targets) or dictionaries; a few hundred samples do"
        )
    if data is not None and not asks:
        allowed = "'loss' alone in training, where the others watch its own batches" if watching else MEASURED
        raise ValueError(f"data must be left out with criterion {criterion!r}: they are for {allowed}")


def check_criterion(given: Any) -> None:
    """Refuse what is no criterion."""
    if isinstance(given, str):
        if given not in NAMES:
            raise unknown_name("criterion", given, NAMES)
    elif not (given is None or isinstance(given, Criterion) or callable(given)) or isinstance(given, type):
        raise TypeError(
            f"criterion must be a name or a function (tau, model) -> scores, got {given!r}: use one of "
            f"{', '.join(map(repr, NAMES))}, an object of taulearn.Criterion, or leave it out"
        )


def scores_of(criterion: Criterion, model: nn.Module) -> tuple[list[float] | None, Exponent]:
    """The checked scores of all layers; or None and the power of the steps, which change while layers go."""
    if criterion.power is not None:
        return None, criterion.power
    number, given = prunable_of(model).time_steps.num_steps, criterion.scores(model)
    try:
        scores = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"criterion must return {number} finite scores >= 0, one per layer, got {given!r}: return a tensor "
            "shaped like tau"
        ) from error
    if scores.shape != (number,) or not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(
            f"criterion must return {number} finite scores >= 0, one per layer, got "
            f"{scores.tolist() if scores.numel() < 50 else f'shape {tuple(scores.shape)}'}"
        )
    found: list[float] = scores.tolist()
    return found if criterion.mean is None else criterion.mean(found), 1.0


def normalised(scores: Sequence[float]) -> list[float]:
    """Scores over their sum.

    Example:
        >>> normalised([3.0, 1.0])
        [0.75, 0.25]
    """
    total = sum(scores) or 1.0
    return [score / total for score in scores]
