"""What training minimises: data loss plus penalties, with one row of record per evaluation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._stages import forward_with_states
from ..nn.network import TimeVariableNetwork
from ..penalties import Penalty, StageCost, time_steps_of
from .target import SteeredL1

Loss = Callable[[Tensor, Tensor], Tensor]


def as_float(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Images kept as uint8 become numbers in [0, 1]; all else passes unchanged.

    Example:
        >>> as_float(torch.tensor([0, 255], dtype=torch.uint8), torch.float32)
        tensor([0., 1.])
    """
    return inputs.to(dtype) / 255 if inputs.dtype == torch.uint8 else inputs


def as_penalties(penalties: Penalty | Iterable[Penalty]) -> tuple[Penalty, ...]:
    """Penalties as a caller gives them, one or several.

    Args:
        penalties: A penalty, or any number of them.

    Raises:
        TypeError: If there is something else among them.
        ValueError: If two have the same name.

    Example:
        >>> from taulearn.penalties import L1
        >>> len(as_penalties(L1(0.01)))
        1
    """
    if isinstance(penalties, Penalty):
        return (penalties,)
    several = isinstance(penalties, Iterable) and not isinstance(penalties, str | bytes)
    found: tuple[Any, ...] = tuple(penalties) if several else (penalties,)
    for penalty in found:
        if not isinstance(penalty, Penalty):
            given = f"the class {penalty.__name__}" if isinstance(penalty, type) else repr(penalty)
            raise TypeError(
                f"penalties must be objects of taulearn.penalties, got {given}: "
                "write for instance penalties=[taulearn.penalties.L1(0.01)]"
            )
    names = [p.name for p in found]
    if len(set(names)) < len(names):
        raise ValueError(f"penalties must have different names, got {names}: add their weights up instead")
    return found


class Objective(nn.Module):
    """J = loss(model(inputs), targets) + sum of the differentiated penalties, which every kind of step differentiates.

    Args:
        model: A model with time steps.
        loss: Maps (output, target) to a scalar.
        penalties: One, or any number of them; names must differ.

    Raises:
        TypeError, ValueError: As :func:`as_penalties`.
    """

    def __init__(self, model: nn.Module, loss: Loss, penalties: Penalty | Iterable[Penalty]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.penalties = as_penalties(penalties)

    @property
    def columns(self) -> list[str]:
        """Names of the record's entries before the steps."""
        weights = (f"weight.{p.name}" for p in self.penalties if isinstance(p, SteeredL1))
        return ["loss", "total", *(f"penalty.{p.name}" for p in self.penalties), *weights]

    @property
    def only_eager(self) -> str:
        """Why the objective cannot be compiled; empty if nothing is known to be in the way."""
        looks = any(p.needs_states for p in self.penalties) and not isinstance(self.model, TimeVariableNetwork)
        return "a penalty looks at the states of a wrapped model" if looks else ""

    @property
    def at_each_depth(self) -> bool:
        """Whether the record ends with the loss at each depth."""
        return any(isinstance(p, StageCost) for p in self.penalties)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The objective on one batch.

        Args:
            inputs: (batch, ...), floating point, or uint8 images.
            targets: (batch, ...).

        Returns:
            J, a scalar; and the detached record: loss, J, each penalty, weights that are steered, then tau (N,), then,
            where they can differ, the raw steps (N,), then, with a stage cost, the losses at the intermediate outputs
            and at the final one.
        """
        steps = time_steps_of(self.model)
        inputs = as_float(inputs, steps.values.dtype)
        states = None
        if any(p.needs_states for p in self.penalties):
            output, states = forward_with_states(self.model, inputs)
        else:
            output = self.model(inputs)
        data_loss = self.loss(output, targets)
        values, losses = [], []
        for penalty in self.penalties:
            if isinstance(penalty, StageCost):
                value, of_stages = penalty.measured(self.model, inputs, targets, states)
                losses = [of_stages, data_loss.detach().unsqueeze(0)]
            else:
                value = penalty(self.model, inputs, targets, states)
            values.append(value)
        total = data_loss
        for penalty, value in zip(self.penalties, values, strict=True):
            total = total + value if penalty.differentiated else total
        weights = [p.alpha for p in self.penalties if isinstance(p, SteeredL1)]
        scalars = torch.stack([v.detach().to(steps.values.dtype) for v in (data_loss, total, *values, *weights)])
        record = [scalars, steps.tau.detach()]
        if steps.bounded:
            record.append(steps.raw_tau.detach())
        return total, torch.cat([*record, *(each.to(steps.values.dtype) for each in losses)])


@dataclass(frozen=True)
class StepOptions:
    """What a step does besides forward, backward and update.

    Attributes:
        clip_norm: Largest norm of the gradient, or None.
        accumulate: Number of parts a batch is split into, to save memory; the step is that of the whole batch.
        precision: "float32" (the model's own type) or "bf16" (autocast of the forward pass).
        averaged: Averaged weights, updated after each step.
    """

    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "float32"
    averaged: AveragedModel | None = None
