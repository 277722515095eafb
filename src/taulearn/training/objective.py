"""The objective of training: data loss plus penalties, with one row of record per evaluation."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._batches import leading, no_loss, own_loss, with_labels
from .._calls import call
from .._counting import BY_SAMPLES, Counting
from ..nn.network import TimeVariableNetwork
from ..nn.time_steps import time_steps_of
from ..penalties import Penalty
from .history import Row

Loss = Callable[[Any, Any], Tensor]


def as_float(inputs: Any, dtype: torch.dtype) -> Any:
    """Images kept as uint8, one tensor, become numbers in [0, 1]; all else passes unchanged."""
    return inputs.to(dtype) / 255 if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8 else inputs


def input_dtype(model: nn.Module) -> torch.dtype:
    """The type of floating point inputs that a model is made for: that of its first parameter, the steps apart."""
    steps = time_steps_of(model).values
    found = (p.dtype for p in model.parameters() if p is not steps and p.is_floating_point())
    return next(found, steps.dtype)


def as_penalties(penalties: Penalty | Iterable[Penalty]) -> tuple[Penalty, ...]:
    """Penalties as a caller gives them, one or several."""
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
    Row(found)  # refuses columns of one name
    return found


class Objective(nn.Module):
    """J = loss(model(inputs), targets) + sum of the differentiated penalties; every kind of step differentiates it.

    Without a loss it is the one that the model returns when it gets the targets as labels.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        penalties: Penalty | Iterable[Penalty],
        countings: Sequence[Counting] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.penalties = as_penalties(penalties)
        self.dtype = input_dtype(model)
        self.row = Row(self.penalties, raw=time_steps_of(model).bounded)
        given = [] if countings is None else list(countings)
        self.countings = [*given, *[BY_SAMPLES] * (1 + len(self.penalties) - len(given))]
        self.forward_with_states: Callable[..., Any] | None = None
        if any(p.needs_states for p in self.penalties):
            from ..depth.states import forward_with_states

            self.forward_with_states = forward_with_states

    @property
    def only_eager(self) -> str:
        """Why the objective cannot be compiled; empty if nothing is known to be in the way."""
        looks = any(p.needs_states for p in self.penalties) and not isinstance(self.model, TimeVariableNetwork)
        states = "a penalty looks at the states of a wrapped model" if looks else ""
        parts = (getattr(self.model, "scheme", None), *self.penalties)
        return next(filter(None, [states, *(getattr(part, "only_eager", "") for part in parts)]), "")

    def weights(
        self, parts: Sequence[tuple[Any, Any]], add: Callable[[Tensor], Tensor], *, counts: bool = True
    ) -> list[Tensor]:
        """For each part of a batch the weights of means over samples, of the loss, and of each penalty."""
        kinds = [BY_SAMPLES, *self.countings]
        device = time_steps_of(self.model).values.device

        def of(inputs: Any, targets: Any) -> Tensor:
            rows = leading((inputs, targets))
            own = [None, None, *(each.counts(self.model, inputs, targets) for each in self.penalties)]
            found = [k.of(rows, device) if o is None else o.double() for k, o in zip(kinds, own, strict=True)]
            return torch.stack(found)

        counted = torch.stack([of(*part) for part in parts])
        counted = counted if counts else torch.zeros_like(counted)  # (parts, kinds)
        whole = add(counted.sum(0))  # of all processes
        columns = []
        for i, kind in enumerate(kinds):
            weights = counted[:, i] if kind.summed else counted[:, i] / whole[i]
            # a mean over something else than labels is 0/0, too, where no label of a part counts
            empty = [] if kind.by == "labels" else [e for part in parts if (e := kind.empty(leading(part))) is not None]
            columns.append(weights.masked_fill(torch.stack(empty).to(device), 0) if empty else weights)
        return list(torch.stack(columns, 1))

    def forward(self, inputs: Any, targets: Any, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """J on one batch, or what a part of a batch adds to it with its :meth:`weights`; and the row of the record."""
        steps = time_steps_of(self.model)
        inputs = as_float(inputs, self.dtype)
        states = None

        def weighted(value: Tensor, i: int) -> Tensor:
            if weights is None:
                return value
            dtype = torch.promote_types(value.dtype, torch.float32)
            return weights[i].to(dtype) * value.to(dtype)

        def labels(i: int) -> Any:
            return targets if weights is None or targets is None else self.countings[i].filled(targets)

        given = inputs if self.loss is not None else with_labels(inputs, labels(0))
        if self.forward_with_states is not None:
            output, states = self.forward_with_states(self.model, given)
        else:
            output = call(self.model, given)
        value = own_loss(output) if self.loss is None else self.loss(output, labels(0))
        if value is None:
            raise no_loss("train")
        total = weighted(value, 1)
        row = {"loss": total, "tau": weighted(steps.tau, 0)}
        if steps.bounded:
            row["raw_tau"] = weighted(steps.raw_tau, 0)
        for i, penalty in enumerate(self.penalties, start=1):
            own, its_targets = i + 1, targets if penalty.loss is None else labels(i)
            value, columns = penalty.measured(self.model, inputs, its_targets, states, output)
            value = weighted(value, own)
            row |= {f"penalty.{penalty.name}": value, **{name: weighted(c, own) for name, c in columns.items()}}
            total = total + value if penalty.differentiated else total
        return total, self.row.pack(row | {"total": total})


def autocast_of(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of forward passes at a precision that :func:`fit` takes."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class StepOptions:
    """Options of a step besides forward, backward and update."""

    clip_norm: float | None = None  # largest norm of the gradient, or None
    accumulate: int = 1  # number of parts a batch is split into, to save memory; the step is that of the whole batch
    precision: str = "float32"  # "float32" (the model's own type) or "bf16" (autocast of the forward pass)
    averaged: AveragedModel | None = None  # averaged weights, updated after each step
    least: int = 1  # fewest samples of a part
