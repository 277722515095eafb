"""The step sizes of a network, one vector with its constraint.

The constraints:

    free        tau is the parameter
    fixed       tau is a buffer: in the state dict, never trained
    dependent   tau_{N-1} = T - (tau_0 + .. + tau_{N-2}), computed in the forward pass: gradients flow through it
    simplex     tau is the parameter, projected after each optimiser step onto {tau >= lower_bound, sum tau = T}

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.
    Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning, section 3.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import functional
from .._errors import is_number, positive_integer, unknown_name

CONSTRAINTS = ("free", "fixed", "dependent", "simplex")


class TimeSteps(nn.Module):
    """One vector of time steps tau with its constraint, which networks, penalties, pruning and records talk to.

    Args:
        num_steps: Number N >= 1 of layers with a time step.
        horizon: Time horizon T > 0, in the unit of tau.
        constraint: "free", "fixed", "dependent" (the last step is T minus the others) or "simplex" (positive with sum
            T).
        lower_bound: Smallest step after :meth:`project_`; with "dependent" also the smallest effective last step. None:
            no bound (simplex: 0).
        init: Step size of every layer, or one per layer. None: horizon / num_steps.
        dtype: Floating point type of tau.
        device: Where tau lives.

    Attributes:
        values: The parameter (a buffer with "fixed"): N entries, N - 1 with "dependent".
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
        constraint: str = "free",
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
        if constraint not in CONSTRAINTS:
            raise unknown_name("constraint", constraint, CONSTRAINTS)
        if lower_bound is not None and not (is_number(lower_bound) and math.isfinite(lower_bound) and lower_bound >= 0):
            raise ValueError(f"lower_bound must be None or a finite number >= 0, got {lower_bound!r}")
        if constraint in ("simplex", "dependent") and (lower_bound or 0.0) * num_steps > horizon:
            raise ValueError(
                f"lower_bound * num_steps must not exceed horizon, got {lower_bound} * {num_steps} > {horizon}: "
                "no such steps exist; lower the bound or raise the horizon"
            )
        self.horizon = float(horizon)
        self.constraint = constraint
        self.lower_bound = None if lower_bound is None else float(lower_bound)
        self.origin: tuple[int, ...] = tuple(range(num_steps))
        start = self._start(num_steps, init, dtype or torch.get_default_dtype(), device)
        if constraint == "fixed":
            self.register_buffer("values", start)
        else:
            self.values = nn.Parameter(start[:-1].clone() if constraint == "dependent" else start)

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
        if self.constraint == "simplex" and bool((steps < 0).any()):
            raise ValueError(f"init must be >= 0 with constraint 'simplex', got {steps.tolist()}")
        total = float(steps.sum())
        if self.constraint in ("dependent", "simplex") and abs(total - self.horizon) > 1e-6 * self.horizon:
            raise ValueError(
                f"init must sum to horizon = {self.horizon} with constraint {self.constraint!r}, got {total}: "
                "change one of the two, or leave init out"
            )
        return steps.to(dtype=dtype, device=device)

    @property
    def num_steps(self) -> int:
        """Number of layers that exist now."""
        return len(self.origin)

    @property
    def raw_tau(self) -> Float[Tensor, " num_steps"]:
        """The steps before the lower bound is applied to a dependent last step, shape (num_steps,)."""
        if self.constraint != "dependent":
            return self.values
        return torch.cat([self.values, (self.horizon - self.values.sum()).unsqueeze(0)])

    @property
    def tau(self) -> Float[Tensor, " num_steps"]:
        """The steps that the network uses, shape (num_steps,)."""
        if self.constraint != "dependent":
            return self.values
        last = self.horizon - self.values.sum()
        if self.lower_bound is not None:
            last = last.clamp(min=self.lower_bound)
        return torch.cat([self.values, last.unsqueeze(0)])

    @property
    def bounded(self) -> bool:
        """Whether the record needs both :attr:`raw_tau` and :attr:`tau`, because they can differ."""
        return self.constraint == "dependent" and self.lower_bound is not None

    def projected(self, values: Tensor) -> Tensor:
        """The projection of :meth:`project_` as a pure function of the parameter vector.

        Args:
            values: A vector shaped like :attr:`values`.

        Returns:
            The nearest vector that fulfils bound and, with "simplex", sum.
        """
        if self.constraint == "simplex":
            return functional.project_simplex(values, self.horizon, lower=self.lower_bound or 0.0)
        if self.constraint != "fixed" and self.lower_bound is not None:
            return values.clamp(min=self.lower_bound)
        return values

    @torch.no_grad()
    def project_(self) -> None:
        """Put the parameter back onto its constraint, in place; to be called after each optimiser step."""
        if self.constraint == "simplex" or (self.constraint != "fixed" and self.lower_bound is not None):
            self.values.copy_(self.projected(self.values))

    @torch.no_grad()
    def keep_(self, indices: Iterable[int]) -> None:
        """Delete all steps but those at ``indices``; a dependent last step stays and takes up what was deleted.

        The parameter becomes a new object of the new size: an optimiser must be told (``taulearn.prune`` does).

        Args:
            indices: Current positions, in increasing order.

        Raises:
            ValueError: If they are not increasing positions, or leave out a dependent last step.
        """
        kept = list(indices)
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.num_steps:
            raise ValueError(f"indices must be increasing numbers in 0 .. {self.num_steps - 1}, got {kept}")
        if self.constraint == "dependent" and kept[-1] != self.num_steps - 1:
            raise ValueError(f"indices must contain the dependent last step {self.num_steps - 1}, got {kept}")
        own = kept[:-1] if self.constraint == "dependent" else kept
        remaining = self.values[torch.tensor(own, dtype=torch.long, device=self.values.device)]
        self.origin = tuple(self.origin[i] for i in kept)
        if isinstance(self.values, nn.Parameter):
            remaining = self.projected(remaining) if self.constraint == "simplex" else remaining
            self.values = nn.Parameter(remaining, requires_grad=self.values.requires_grad)
        else:
            self.values = remaining

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
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
