"""The constraints on time steps: how the steps follow from the vector that is stored, and what becomes of both.

    free        tau is the parameter
    fixed       tau is a buffer: in the state dict, never trained
    dependent   tau_{N-1} = T - (tau_0 + .. + tau_{N-2}), computed in the forward pass: gradients flow through it
    simplex     tau is the parameter, projected after each optimiser step onto {tau >= lower_bound, sum tau = T}

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.
    Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning, section 3.
"""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import functional
from .._errors import unknown_name


class Constraint:
    """The base class of constraints on :class:`TimeSteps`; a subclass changes what is different in it.

    By itself the steps are the stored values, which train and are projected onto the lower bound.

    Attributes:
        name: In ``TimeSteps.constraint``, records and manifests; a subclass must have one.
        trains: Whether the values are a parameter; a buffer otherwise.
        adds_up: Whether the steps always add up to the horizon.
        deletion_note: What a deletion does to the steps that are left, for reports; empty: nothing.
        horizon: Time horizon T, set by the time steps.
        lower_bound: Smallest step or None, set by the time steps.

    Example:
        >>> class Halves(Constraint):
        ...     name = "halves"
        ...
        ...     def projected(self, values):
        ...         return (2 * values).round() / 2
        >>> from taulearn import TimeSteps
        >>> steps = TimeSteps(2, constraint=Halves(), init=0.7)
        >>> steps.project_()
        >>> steps.tau.tolist()
        [0.5, 0.5]
    """

    name: str
    trains = True
    adds_up = False
    deletion_note = ""
    horizon = 1.0
    lower_bound: float | None = None

    def check(self, steps: Float[Tensor, " num_steps"]) -> None:
        """Refuse steps to start with that it excludes, with a ValueError about ``init``."""
        total = float(steps.sum())
        if self.adds_up and abs(total - self.horizon) > 1e-6 * self.horizon:
            raise ValueError(
                f"init must sum to horizon = {self.horizon} with constraint {self.name!r}, got {total}: "
                "change one of the two, or leave init out"
            )

    def values(self, steps: Float[Tensor, " num_steps"]) -> Float[Tensor, " values"]:
        """The values to store for these steps."""
        return steps

    def tau(self, values: Float[Tensor, " values"]) -> Float[Tensor, " num_steps"]:
        """The steps that the network uses."""
        return values

    def raw_tau(self, values: Float[Tensor, " values"]) -> Float[Tensor, " num_steps"]:
        """The steps before a bound that acts in :meth:`tau`."""
        return self.tau(values)

    @property
    def restricts(self) -> bool:
        """Whether there are steps that it excludes."""
        return True

    @property
    def bounded(self) -> bool:
        """Whether :meth:`raw_tau` and :meth:`tau` can differ."""
        return False

    def projected(self, values: Float[Tensor, " values"]) -> Float[Tensor, " values"]:
        """The nearest values that are allowed, as a pure function; taken after each optimiser step."""
        return values if self.lower_bound is None else values.clamp(min=self.lower_bound)

    def fixed(self, number: int) -> dict[int, str]:
        """Positions among ``number`` layers that cannot be deleted, each with the reason."""
        return {}

    def entries(self, indices: Sequence[int]) -> list[int]:
        """For each of the values after a change of the grid the position, in those before, that it continues.

        Args:
            indices: For each layer its position before, or that of the layer whose half it is; -1 of an inserted one.

        Returns:
            Positions; what is none of the values before stands for a value that is new.
        """
        return list(indices)

    def keep(self, values: Float[Tensor, " values"], indices: Sequence[int]) -> Float[Tensor, " left"]:
        """The values after a deletion of all steps but those at ``indices``."""
        return values[torch.tensor(self.entries(indices), dtype=torch.long, device=values.device)]

    def split(self, values: Float[Tensor, " values"], indices: Sequence[int], theta: float) -> Float[Tensor, " more"]:
        """The values after the steps at ``indices`` became two each, theta and 1 - theta of them.

        Raises:
            ValueError: If it does not say how.
        """
        raise self._silent("split(values, indices, theta)")

    def insert(self, values: Float[Tensor, " values"], behind: Sequence[int]) -> Float[Tensor, " more"]:
        """The values with steps of 0, or of the lower bound, behind those at ``behind``.

        Raises:
            ValueError: If it does not say how, or no such steps are possible.
        """
        raise self._silent("insert(values, behind)")

    def _silent(self, method: str) -> ValueError:
        kind, name = type(self).__name__, method.partition("(")[0]
        return ValueError(
            f"constraint must say what becomes of its values in a refinement, got {kind}, which does not: define "
            f"{kind}.{method}; where the values are the steps, {name} = taulearn.nn.constraints.Stored.{name} will do"
        )

    def not_inserted(self, number: int) -> dict[int, str]:
        """Positions among ``number`` layers behind which no step can be inserted, each with the reason."""
        return {}

    def room(self, values: Float[Tensor, " values"]) -> float:
        """How many more steps of the lower bound there is room for."""
        return math.inf


class Stored(Constraint):
    """The values are the steps, also after a refinement."""

    def split(self, values: Tensor, indices: Sequence[int], theta: float) -> Tensor:
        return functional.split_steps(values, indices, theta)

    def insert(self, values: Tensor, behind: Sequence[int]) -> Tensor:
        return functional.insert_steps(values, behind, self.lower_bound or 0.0)


class Free(Stored):
    """The steps are the parameter."""

    name = "free"

    @property
    def restricts(self) -> bool:
        return self.lower_bound is not None


class Fixed(Stored):
    """The steps are a buffer."""

    name = "fixed"
    trains = False

    def projected(self, values: Tensor) -> Tensor:
        return values

    def not_inserted(self, number: int) -> dict[int, str]:
        return dict.fromkeys(range(number), "constraint 'fixed' never trains a step of 0: split, or take another")


class Dependent(Constraint):
    """The last step is the horizon minus the others, which are the parameter; it takes up what is deleted."""

    name = "dependent"
    adds_up = True
    deletion_note = "the last step took up those that went"

    def values(self, steps: Tensor) -> Tensor:
        return steps[:-1].clone()

    def tau(self, values: Tensor) -> Tensor:
        last = self.horizon - values.sum()
        if self.lower_bound is not None:
            last = torch.where(last < self.lower_bound, self.lower_bound, last)  # a gradient at the bound, too
        return torch.cat([values, last.unsqueeze(0)])

    def raw_tau(self, values: Tensor) -> Tensor:
        return torch.cat([values, (self.horizon - values.sum()).unsqueeze(0)])

    @property
    def bounded(self) -> bool:
        return self.lower_bound is not None

    def fixed(self, number: int) -> dict[int, str]:
        return {number - 1: "its step is the dependent one, T minus the others"}

    def entries(self, indices: Sequence[int]) -> list[int]:
        return list(indices[:-1])

    def split(self, values: Tensor, indices: Sequence[int], theta: float) -> Tensor:
        return functional.split_steps(self.tau(values), indices, theta)[:-1]

    def insert(self, values: Tensor, behind: Sequence[int]) -> Tensor:
        return functional.insert_steps(values, behind, self.lower_bound or 0.0)

    def room(self, values: Tensor) -> float:
        return math.floor(self.raw_tau(values)[-1] / self.lower_bound + 1e-9) - 1 if self.lower_bound else math.inf

    def not_inserted(self, number: int) -> dict[int, str]:
        return {number - 1: "the dependent step, T minus the others, must stay the last"}


class Simplex(Stored):
    """The steps are the parameter, not below the bound (0 if None), with the horizon as their sum."""

    name = "simplex"
    adds_up = True
    deletion_note = "the steps that are left were projected, so that they add up to the horizon"

    def check(self, steps: Tensor) -> None:
        if bool((steps < 0).any()):
            raise ValueError(f"init must be >= 0 with constraint {self.name!r}, got {steps.tolist()}")
        super().check(steps)

    def projected(self, values: Tensor) -> Tensor:
        return functional.project_simplex(values, self.horizon, lower=self.lower_bound or 0.0)

    def keep(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        return self.projected(super().keep(values, indices))

    def insert(self, values: Tensor, behind: Sequence[int]) -> Tensor:
        more = super().insert(values, behind)
        return self.projected(more) if self.lower_bound else more  # with steps of 0 the sum is what it was

    def room(self, values: Tensor) -> float:
        return math.floor(self.horizon / self.lower_bound + 1e-9) - len(values) if self.lower_bound else math.inf


CONSTRAINTS: dict[str, type[Constraint]] = {each.name: each for each in (Free, Fixed, Dependent, Simplex)}


def constraint_of(constraint: str | Constraint, horizon: float, lower_bound: float | None) -> Constraint:
    """A constraint by its name, or a copy of an object, with this horizon and bound."""
    if isinstance(constraint, Constraint):
        rule = copy.copy(constraint)
    elif isinstance(constraint, str) and constraint in CONSTRAINTS:
        rule = CONSTRAINTS[constraint]()
    else:
        raise unknown_name("constraint", constraint, CONSTRAINTS)
    if not isinstance(getattr(rule, "name", None), str):
        raise TypeError(f"{type(rule).__name__} must have a name, by which files and records call it: write name = ...")
    if type(rule) is not CONSTRAINTS.get(rule.name, type(rule)):
        raise ValueError(f"constraint must have a name of its own, got {type(rule).__name__} with {rule.name!r}")
    rule.horizon, rule.lower_bound = horizon, lower_bound
    return rule
