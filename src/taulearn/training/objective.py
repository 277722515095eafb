"""What training minimises: data loss plus penalties, with one row of record per evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..penalties import Penalty, time_steps_of

Loss = Callable[[Tensor, Tensor], Tensor]


def as_float(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Images kept as uint8 become numbers in [0, 1]; all else passes unchanged.

    Example:
        >>> as_float(torch.tensor([0, 255], dtype=torch.uint8), torch.float32)
        tensor([0., 1.])
    """
    return inputs.to(dtype) / 255 if inputs.dtype == torch.uint8 else inputs


class Objective(nn.Module):
    """J = loss(model(inputs), targets) + sum of the differentiated penalties, which every kind of step differentiates.

    Args:
        model: A model with time steps.
        loss: Maps (output, target) to a scalar.
        penalties: Any number; names must differ.

    Raises:
        ValueError: If two penalties have the same name.
    """

    def __init__(self, model: nn.Module, loss: Loss, penalties: Sequence[Penalty]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.penalties = tuple(penalties)
        names = [p.name for p in penalties]
        if len(set(names)) < len(names):
            raise ValueError(f"penalties must have different names, got {names}: add their weights up instead")

    @property
    def columns(self) -> list[str]:
        """Names of the record's entries before the steps."""
        return ["loss", "total", *(f"penalty.{p.name}" for p in self.penalties)]

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The objective on one batch.

        Args:
            inputs: (batch, ...), floating point, or uint8 images.
            targets: (batch, ...).

        Returns:
            J, a scalar; and the detached record: loss, J, each penalty, then tau (N,), then, where they can differ, the
            raw steps (N,).
        """
        steps = time_steps_of(self.model)
        inputs = as_float(inputs, steps.values.dtype)
        states = None
        if any(p.needs_states for p in self.penalties):
            network = cast(Any, self.model)
            states = network.states(inputs)
            output = network.head(states[-1])
        else:
            output = self.model(inputs)
        data_loss = self.loss(output, targets)
        values = [p(self.model, inputs, targets, states) for p in self.penalties]
        total = data_loss
        for penalty, value in zip(self.penalties, values, strict=True):
            total = total + value if penalty.differentiated else total
        scalars = torch.stack([v.detach().to(steps.values.dtype) for v in (data_loss, total, *values)])
        record = [scalars, steps.tau.detach()]
        if steps.bounded:
            record.append(steps.raw_tau.detach())
        return total, torch.cat(record)


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
