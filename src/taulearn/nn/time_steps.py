"""The step sizes of a network: one vector, the constraint on it, and the numbers of its layers."""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._errors import is_number, positive_integer
from .constraints import Constraint, constraint_of


class TimeSteps(nn.Module):
    """One vector of time steps tau with its constraint, which networks, penalties, pruning and records talk to.

    Args:
        num_steps: Number N >= 1 of layers with a time step.
        horizon: Time horizon T > 0, in the unit of tau.
        constraint: "free", "fixed", "dependent" (the last step is T minus the others) or "simplex" (positive with sum
            T); or an object of a :class:`~taulearn.nn.constraints.Constraint` of your own.
        lower_bound: Smallest step after :meth:`project_`; with "dependent" also the smallest effective last step. None:
            no bound (simplex: 0).
        init: Step size of every layer, or one per layer. None: horizon / num_steps.
        dtype: Floating point type of tau.
        device: Where tau lives.

    Attributes:
        values: The parameter (a buffer with "fixed"): N entries, N - 1 with "dependent".
        rule: The constraint as an object.
        origin: For each step the number its layer had at the start, kept through pruning.

    Raises:
        ValueError: If an argument lies outside its range, or ``init`` contradicts the constraint.

    Example:
        >>> steps = TimeSteps(4, horizon=2.0, constraint="dependent")
        >>> steps.tau
        tensor([0.5000, 0.5000, 0.5000, 0.5000], grad_fn=<CatBackward0>)
    """

    values: Tensor

    def __init__(
        self,
        num_steps: int,
        *,
        horizon: float = 1.0,
        constraint: str | Constraint = "free",
        lower_bound: float | None = None,
        init: float | Sequence[float] | Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        num_steps = positive_integer("num_steps", num_steps, "a network needs at least one layer")
        if not (is_number(horizon) and math.isfinite(horizon) and horizon > 0):
            raise ValueError(
                f"horizon must be a positive finite number, got {horizon!r}: it is the time the steps add up to"
            )
        self.rule = constraint_of(constraint, float(horizon), None)
        if lower_bound is not None and not (is_number(lower_bound) and math.isfinite(lower_bound) and lower_bound >= 0):
            raise ValueError(f"lower_bound must be None or a finite number >= 0, got {lower_bound!r}")
        if self.rule.adds_up and (lower_bound or 0.0) * num_steps > horizon:
            raise ValueError(
                f"lower_bound * num_steps must not exceed horizon, got {lower_bound} * {num_steps} > {horizon}: "
                "no such steps exist; lower the bound or raise the horizon"
            )
        self.lower_bound = None if lower_bound is None else float(lower_bound)
        self.origin: tuple[int, ...] = tuple(range(num_steps))
        start = self._start(num_steps, init, dtype or torch.get_default_dtype(), device)
        if self.rule.trains:
            self.values = nn.Parameter(self.rule.values(start))
        else:
            self.register_buffer("values", self.rule.values(start))

    def _start(
        self,
        num_steps: int,
        init: float | Sequence[float] | Tensor | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """The initial steps, checked against number, bound and horizon."""
        try:
            steps = torch.as_tensor(self.horizon / num_steps if init is None else init, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"init must be a number or {num_steps} numbers, got {init!r}") from error
        if steps.ndim > 1 or (steps.ndim == 1 and steps.numel() != num_steps):
            raise ValueError(f"init must be a number or {num_steps} numbers, got shape {tuple(steps.shape)}")
        steps = steps.detach().expand(num_steps).clone()
        if not bool(torch.isfinite(steps).all()):
            raise ValueError(f"init must be finite, got {steps.tolist()}")
        if self.lower_bound is not None and bool((steps < self.lower_bound).any()):
            raise ValueError(f"init must not lie below lower_bound = {self.lower_bound}, got {steps.tolist()}")
        self.rule.check(steps)
        return steps.to(dtype=dtype, device=device)

    @property
    def constraint(self) -> str:
        """The constraint's name."""
        return self.rule.name

    @property
    def horizon(self) -> float:
        """Time horizon T."""
        return self.rule.horizon

    @horizon.setter
    def horizon(self, value: float) -> None:
        self.rule.horizon = value

    @property
    def lower_bound(self) -> float | None:
        """Smallest step, or None."""
        return self.rule.lower_bound

    @lower_bound.setter
    def lower_bound(self, value: float | None) -> None:
        self.rule.lower_bound = value

    @property
    def num_steps(self) -> int:
        """Number of layers that exist now."""
        return len(self.origin)

    @property
    def raw_tau(self) -> Float[Tensor, " num_steps"]:
        """The steps before the lower bound is applied to a dependent last step, shape (num_steps,)."""
        return self.rule.raw_tau(self.values)

    @property
    def tau(self) -> Float[Tensor, " num_steps"]:
        """The steps that the network uses, shape (num_steps,)."""
        return self.rule.tau(self.values)

    @property
    def bounded(self) -> bool:
        """Whether the record needs both :attr:`raw_tau` and :attr:`tau`, because they can differ."""
        return self.rule.bounded

    def projected(self, values: Tensor) -> Tensor:
        """The projection of :meth:`project_` as a pure function of the parameter vector.

        Args:
            values: A vector shaped like :attr:`values`.

        Returns:
            The nearest vector that fulfils bound and, with "simplex", sum.
        """
        return self.rule.projected(values)

    @torch.no_grad()
    def project_(self) -> None:
        """Put the parameter back onto its constraint, in place; to be called after each optimiser step."""
        values = self.projected(self.values)
        if values is not self.values:
            self.values.copy_(values)

    @torch.no_grad()
    def keep_(self, indices: Iterable[int]) -> None:
        """Delete all steps but those at ``indices``; a dependent last step stays and takes up what was deleted.

        The parameter becomes a new object of the new size: an optimiser must be told (``taulearn.prune`` does).

        Args:
            indices: Current positions, in increasing order.

        Raises:
            ValueError: If they are not increasing positions, or leave out a step that the constraint fixes, or if a
                constraint of your own has not one step a layer afterwards; nothing is changed then.
        """
        kept = list(indices)
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.num_steps:
            raise ValueError(f"indices must be increasing numbers in 0 .. {self.num_steps - 1}, got {kept}")
        for layer, reason in self.rule.fixed(self.num_steps).items():
            if layer not in kept:
                raise ValueError(f"indices must contain step {layer}, got {kept}: {reason}")
        held = vars(self.rule).copy()
        left = self.rule.keep(self.values, kept)
        if (found := len(self.rule.tau(left))) != len(kept):
            vars(self.rule).clear()
            vars(self.rule).update(held)
            kind = type(self.rule).__name__
            raise ValueError(
                f"{kind}.tau must have {len(kept)} entries, one a layer, got {found}: "
                f"let {kind}.keep follow the deletion"
            )
        if isinstance(self.values, nn.Parameter):
            left = nn.Parameter(left, requires_grad=self.values.requires_grad)
        self.values = left
        self.origin = tuple(self.origin[i] for i in kept)

    def extra_repr(self) -> str:
        """The line of ``print(model)``."""
        parts = [f"{self.num_steps}", f"constraint={self.constraint!r}", f"horizon={self.horizon:g}"]
        if self.lower_bound is not None:
            parts.append(f"lower_bound={self.lower_bound:g}")
        if self.origin != tuple(range(self.num_steps)):
            parts.append(f"origin={self.origin}")
        return ", ".join(parts)


def time_steps_of(model: nn.Module) -> TimeSteps:
    """The time steps of a model.

    Args:
        model: A TimeVariableNetwork or a wrapped model.

    Returns:
        Its ``time_steps``.

    Raises:
        TypeError: If it has none.

    Example:
        >>> from taulearn.nn import resnet
        >>> time_steps_of(resnet(2, 3, 1, 4)).num_steps
        4
    """
    steps = getattr(model, "time_steps", None)
    if not isinstance(steps, TimeSteps):
        raise TypeError(
            f"model must have time steps, got {type(model).__name__}: build it with taulearn.nn, or wrap it with "
            "taulearn.wrap"
        )
    return steps
