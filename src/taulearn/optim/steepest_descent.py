"""Steepest descent with a backtracking (Armijo) line search.

With g the gradient of J at x and C what follows a step (a proximal map, a projection; the identity without), the trial

    x(t) = C(x - t g)

is accepted for the first t = lr, lr/2, lr/4, .. with

    J(x(t)) <= J(x) + <g, d> + (1 - c) norm(d)^2 / t          d = x(t) - x,  0 < c < 1

Without constraint d = -t g, and this is Armijo's rule J(x(t)) <= J(x) - c t norm(g)^2. For a projection onto a convex
set it implies J(x(t)) <= J(x) - c norm(d)^2 / t, and for the proximal map of a convex h the same decrease of J + h: the
objective, all penalties included, never rises.

References:
    Armijo (1966), Minimization of functions having Lipschitz continuous first partial derivatives.
    Bertsekas (1976), On the Goldstein-Levitin-Polyak gradient projection method.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .._errors import positive_integer

Closure = Callable[[], Tensor | float]


class SteepestDescent(torch.optim.Optimizer):
    """Full-batch steepest descent whose step size is found by backtracking; the objective never rises.

    ``step`` takes a closure, as torch.optim.LBFGS does. Each step costs one gradient and, on average, between one and
    two values of the objective. After a step a group's ``lr`` is the accepted step size; the next step starts there, or
    ``growth`` times as far if the first trial was accepted. Groups with different ``lr`` keep their ratio.

    The closure must give the same value for the same parameters: all samples at once, no dropout.

    Args:
        params: Parameters or groups, as every torch optimiser takes them.
        lr: First step size that is tried.
        decrease: c in (0, 1), the share of the decrease of a straight line that a step must reach.
        shrink: Factor in (0, 1) after a rejected trial.
        growth: Factor >= 1 after a step whose first trial was accepted.
        max_trials: Trials per step, >= 1; if none is accepted the parameters stay, and the next step goes on from the
            smallest.

    Attributes:
        trials: Trials of the last step; 0 where the gradient vanished.

    Raises:
        ValueError: If an option lies outside its range; the message names it.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> optimizer = SteepestDescent([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     J = x[0] ** 2 + 10 * x[1] ** 2
        ...     J.backward()
        ...     return J
        >>> values = [optimizer.step(closure).item() for _ in range(60)]
        >>> values == sorted(values, reverse=True), values[-1] < 1e-9
        (True, True)
    """

    trials = 0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        *,
        decrease: float = 1e-4,
        shrink: float = 0.5,
        growth: float = 2.0,
        max_trials: int = 30,
    ) -> None:
        _check("decrease", decrease, 0.0 < decrease < 1.0, "lie in (0, 1)")
        _check("shrink", shrink, 0.0 < shrink < 1.0, "lie in (0, 1)")
        _check("growth", growth, 1.0 <= growth < math.inf, "be a finite number >= 1")
        positive_integer("max_trials", max_trials)
        search = {"decrease": decrease, "shrink": shrink, "growth": growth, "max_trials": max_trials}
        # "grow": whether the last step took its first trial; with the options, so that it is in the state dict
        super().__init__(params, {"lr": lr, **search, "grow": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with an ``lr`` of its own; see torch.optim.Optimizer."""
        lr = param_group.get("lr", self.defaults["lr"])
        _check("lr", lr, 0.0 < lr < math.inf, "be a positive number")
        super().add_param_group(param_group)

    def register_constraint(self, constrain: Callable[[], None]) -> RemovableHandle:
        """Let every trial of the line search be followed by a proximal map or a projection onto a convex set.

        A step hook would come too late: the line search would have judged another point.
        ``taulearn.optim.register_projection`` and ``fit`` do this for models with time steps.

        Args:
            constrain: Changes the parameters in place; finds the size of the trial step in the groups' ``lr``.

        Returns:
            A handle whose ``remove()`` undoes it.

        Example:
            >>> x = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = SteepestDescent([x])
            >>> handle = optimizer.register_constraint(lambda: x.clamp_(min=0.5))
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     J = x.square().sum()
            ...     J.backward()
            ...     return J
            >>> _ = optimizer.step(closure)
            >>> x.tolist()
            [0.5]
        """
        constraints = vars(self).setdefault("_constraints", OrderedDict())
        handle = RemovableHandle(constraints)
        constraints[handle.id] = constrain
        return handle

    @torch.no_grad()
    def step(self, closure: Closure, value: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Clears the gradients, computes the objective, calls ``backward`` and returns the objective.
            value: Returns the objective alone, without gradient, which is what a trial needs. None: ``closure`` is used
                for trials too, at the cost of a gradient each.

        Returns:
            The objective before the step.
        """
        with torch.enable_grad():
            start = closure()
        self.trials = 0
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad.clone() for _, p in moving]
        before = [p.clone() for _, p in moving]
        J = _number(start)  # the one synchronisation a line search cannot do without; one more per trial
        if not math.isfinite(J) or all(not bool(g.any()) for g in gradients):
            return start
        precision = max(torch.finfo(p.dtype).eps for _, p in moving)
        options, constraints = self.param_groups[0], vars(self).get("_constraints", {})
        for group in self.param_groups:
            group["lr"] *= options["growth"] if group["grow"] else 1.0
            group["grow"] = False
        while self.trials < options["max_trials"]:
            self.trials += 1
            for (group, p), x, g in zip(moving, before, gradients, strict=True):
                p.copy_(x).sub_(g, alpha=group["lr"])
            versions = [p._version for _, p in moving]
            for constrain in constraints.values():
                constrain()
            constrained = versions != [p._version for _, p in moving]
            slope, curvature = self._model(moving, before, gradients)
            if abs(slope) <= precision * abs(J):  # rounding would hide the decrease: a longer step next time, or none
                self._grow(slope != 0.0)
                break
            c = options["decrease"]
            expected = slope + (1.0 - c) * curvature if constrained else c * slope
            if math.isfinite(slope) and self._evaluate(value or closure) <= J + expected:
                self._grow(True)
                return start
            for group in self.param_groups:
                group["lr"] *= options["shrink"]
        for (_, p), x in zip(moving, before, strict=True):
            p.copy_(x)
        return start

    def _grow(self, advance: bool) -> None:
        """Note whether the next step tries ``growth`` times this one, which had to be the first trial."""
        for group in self.param_groups:
            group["grow"] = advance and self.trials == 1

    def _model(
        self, moving: list[tuple[dict[str, Any], Tensor]], before: list[Tensor], gradients: list[Tensor]
    ) -> tuple[float, float]:
        """<g, d> and the sum of norm(d)^2 / t over the parameters, d being where they have gone."""
        moves = [p - x for (_, p), x in zip(moving, before, strict=True)]
        slope = torch.stack([(g * d).sum().double() for g, d in zip(gradients, moves, strict=True)]).sum()
        parts = [d.square().sum().double() / group["lr"] for (group, _), d in zip(moving, moves, strict=True)]
        slope, curvature = torch.stack([slope, torch.stack(parts).sum()]).tolist()
        return slope, curvature

    def _evaluate(self, closure: Closure) -> float:
        with torch.enable_grad():  # a closure may want gradients; one that does not switches them off
            return _number(closure())


def _number(value: Tensor | float) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _check(name: str, value: float, fits: bool, must: str) -> None:
    if not fits:
        raise ValueError(f"{name} must {must}, got {value!r}")
