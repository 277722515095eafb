"""The step sizes of a network: one vector, the constraint on it, and the numbers of its layers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._errors import is_number, positive_integer
from .constraints import Constraint, constraint_of

if TYPE_CHECKING:
    from .grid import Grid


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
        origin: For each step the number of its layer, which it had at the start or got when it was made; kept through
            all changes of the grid.
        next_number: The number that the next new layer gets; none is used twice.
        held: Numbers of the layers whose steps get no gradient.
        resting: Numbers of new layers that a policy of refinement has neither deleted nor penalised for now.
        parent: For each layer that was not there at the start, by its number, that of the layer that it was made from.

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
        self.next_number = num_steps
        self.parent: Mapping[int, int] = {}
        self.held: frozenset[int] = frozenset()
        self.resting: frozenset[int] = frozenset()
        self._spared: Tensor | None = None  # which layers rest; changed in place, so that compiled steps see it
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
    def grid(self) -> "Grid":
        """Which layers there are."""
        from .grid import Grid

        return Grid(self.origin, self.next_number, self.parent)

    @property
    def raw_tau(self) -> Float[Tensor, " num_steps"]:
        """The steps before the lower bound is applied to a dependent last step, shape (num_steps,)."""
        return self.rule.raw_tau(self._training)

    @property
    def tau(self) -> Float[Tensor, " num_steps"]:
        """The steps that the network uses, shape (num_steps,)."""
        return self.rule.tau(self._training)

    @property
    def _training(self) -> Tensor:
        """The values, without gradients of those that are held."""
        if not self.held:
            return self.values
        held = [self.origin[i] in self.held for i in self.rule.entries(range(self.num_steps))]
        return torch.where(torch.tensor(held, device=self.values.device), self.values.detach(), self.values)

    def rest_(self, numbers: Iterable[int] | None) -> None:
        """Let these layers rest, and no others, until the grid changes again; None: the training is over."""
        self.resting = frozenset(numbers or ()) & frozenset(self.origin)
        if numbers is None:
            self._spared = None
            return
        mask = torch.tensor([number in self.resting for number in self.origin], device=self.values.device)
        if self._spared is not None and self._spared.shape == mask.shape:
            self._spared.copy_(mask)
        elif self.resting or self._spared is not None:
            self._spared = mask

    @property
    def penalised(self) -> Float[Tensor, " num_steps"]:
        """The steps as penalties see them, without gradients of those that rest, shape (num_steps,)."""
        return self.tau if self._spared is None else torch.where(self._spared, self.tau.detach(), self.tau)

    def sparing(self, values: Tensor, change: Tensor) -> Tensor:
        """A proximal step on the parameter, but for the layers that rest."""
        if self._spared is None:
            return change
        return torch.where(self._spared[self.rule.entries(range(self.num_steps))], values, change)

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
        self.take_(self.changed("keep", len(kept), kept), [self.origin[i] for i in kept])

    def split_(self, indices: Iterable[int], theta: float = 0.5) -> None:
        """Let each step at ``indices`` become two, theta and 1 - theta of it: the same equation on a finer grid.

        The parameter becomes a new object, as with :meth:`keep_`. The first half keeps the layer's number.

        Args:
            indices: Current positions, each once.
            theta: Share of the first half, in (0, 1).

        Raises:
            ValueError: If an argument lies outside its range, a half would lie below the lower bound, or a constraint
                of your own does not say how its values are split; nothing is changed then.

        Example:
            >>> steps = TimeSteps(2)
            >>> steps.split_([0])
            >>> steps.tau.tolist(), steps.origin, steps.parent
            ([0.25, 0.25, 0.5], (0, 2, 1), {2: 0})
        """
        from .finer_steps import split_

        split_(self, indices, theta)

    def insert_(self, behind: Iterable[int]) -> None:
        """Insert steps of 0, or of the lower bound.

        Args:
            behind: Current positions behind which a step comes, each once.

        Raises:
            ValueError: If they are no such positions, or the constraint does not allow it; nothing is changed then.

        Example:
            >>> steps = TimeSteps(2)
            >>> steps.insert_([1])
            >>> steps.tau.tolist(), steps.origin
            ([0.5, 0.5, 0.0], (0, 1, 2))
        """
        from .finer_steps import insert_

        insert_(self, behind)

    @torch.no_grad()
    def grow_(self, sources: Sequence[int], new: Iterable[int], values: Tensor) -> None:
        """Take the steps of a finer grid.

        Args:
            sources: For each of the layers then the position now, its own or its parent's, in order.
            new: Positions then of those that are new; they get numbers that were never used.
            values: The parameter vector then.
        """
        numbers, parent = [self.origin[i] for i in sources], dict(self.parent)
        for l in sorted(new):
            parent[self.next_number], numbers[l] = numbers[l], self.next_number
            self.next_number += 1
        self.parent = parent
        self.take_(values, numbers)

    def take_(self, values: Tensor, numbers: Iterable[int]) -> None:
        """Take another vector, and the numbers of its layers."""
        if isinstance(self.values, nn.Parameter):
            values = nn.Parameter(values.detach(), requires_grad=self.values.requires_grad)
        self.values = values
        self.origin = tuple(numbers)

    def take_grid_(self, grid: "Grid") -> None:
        """Let the layers have numbers and parents that they had before, as far as it goes."""
        self.origin, self.parent = grid.origin, dict(grid.parent)
        self.next_number = max(self.next_number, grid.next_number)

    def changed(self, method: str, number: int, *arguments: object) -> Tensor:
        """The values for so many steps that the constraint's method makes; where it fails, its attributes are back."""
        held, rule = vars(self.rule).copy(), self.rule
        values: Tensor = getattr(rule, method)(self.values, *arguments)
        if (found := len(rule.tau(values))) != number:
            vars(rule).clear()
            vars(rule).update(held)
            kind = type(rule).__name__
            raise ValueError(
                f"{kind}.tau must have {number} entries, one a layer, got {found}: let {kind}.{method} follow the "
                "change of the layers"
            )
        return values

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
