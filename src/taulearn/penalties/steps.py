"""Penalties on the time steps."""

from abc import abstractmethod

from torch import Tensor, nn

from .._errors import is_number
from ..functional import soft_threshold
from ..nn.time_steps import TimeSteps, time_steps_of
from .base import Penalty, non_negative


class _StepPenalty(Penalty):
    """A penalty that depends on tau alone."""

    @abstractmethod
    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        """The value at ``tau``."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        steps = time_steps_of(model)
        return self.of(steps.penalised, steps)


class L1(_StepPenalty):
    """alpha norm(tau)_1, which drives steps to zero so that their layers can be pruned.

    Args:
        alpha: Weight >= 0.
        proximal: False: the subgradient alpha sign(tau) enters the gradient, as in the paper; it never lands on zero.
            True: after each optimiser step
            tau <- sign(tau) max(abs(tau) - lr alpha, 0) with the current learning rate of tau's group, which does; the
            value is recorded, not differentiated.

    Raises:
        ValueError: If alpha is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(L1(0.01)(resnet(2, 3, 1, 4)).detach())
        0.009999999776482582
    """

    name = "l1"

    def __init__(self, alpha: float, proximal: bool = False) -> None:
        self.alpha = non_negative("alpha", alpha)
        self.differentiated = not proximal

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        return self.alpha * tau.abs().sum()

    def proximal(self, values: Tensor, lr: float | Tensor) -> Tensor:
        return values if self.differentiated else soft_threshold(values, lr * self.alpha)


class L2(_StepPenalty):
    """weight norm(tau)_2^2, for comparison: it shrinks steps, and none to zero.

    Args:
        weight: Weight >= 0.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(L2(4.0)(resnet(2, 3, 1, 4)).detach())
        1.0
    """

    name = "l2"

    def __init__(self, weight: float) -> None:
        self.weight = non_negative("weight", weight)

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        return self.weight * tau.square().sum()


class ElasticNet(_StepPenalty):
    """(weight/2) (norm(tau)_2^2 + norm(tau)_1).

    Args:
        weight: Weight lambda_2 >= 0.

    Raises:
        ValueError: If it is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(ElasticNet(1.0)(resnet(2, 3, 1, 4)).detach())
        0.625
    """

    name = "elastic_net"

    def __init__(self, weight: float) -> None:
        self.weight = non_negative("weight", weight)

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        return 0.5 * self.weight * (tau.square().sum() + tau.abs().sum())


class TimeHorizon(_StepPenalty):
    """(weight/2) (T - sum tau)^2.

    Args:
        horizon: T > 0. None: the horizon of the model's time steps.
        weight: Weight >= 0; 1 in the paper.

    Raises:
        ValueError: If horizon is not positive or weight is negative.

    Example:
        >>> from taulearn.nn import resnet
        >>> float(TimeHorizon(3.0)(resnet(2, 3, 1, 4)).detach())
        2.0
    """

    name = "time_horizon"

    def __init__(self, horizon: float | None = None, weight: float = 1.0) -> None:
        if horizon is not None and not (is_number(horizon) and horizon > 0):
            raise ValueError(f"horizon must be positive, got {horizon!r}")
        self.horizon = horizon
        self.weight = non_negative("weight", weight)

    def of(self, tau: Tensor, steps: TimeSteps) -> Tensor:
        horizon = steps.horizon if self.horizon is None else self.horizon
        return 0.5 * self.weight * (horizon - tau.sum()).square()
