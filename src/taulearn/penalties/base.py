"""The interface of penalties, and what they ask of a model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._errors import is_number


def non_negative(name: str, value: float) -> float:
    """A weight, which must not be negative."""
    if not (is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}: 0 switches the penalty off")
    return float(value)


class Penalty(ABC):
    """A scalar function of the model that is added to the data loss.

    Attributes:
        name: The penalty's name in records.
        differentiated: Whether its gradient enters the step; a proximal penalty acts after the step instead.
        needs_states: Whether it asks for the states of the forward pass.
        needs_outputs: Whether it is called with ``outputs=``, the model's outputs.
        loss: The loss (output, target) -> scalar that it takes means of over the batch, or None: it says how parts of
            a batch count in its value and its columns.
        columns: What it records besides its value, by the name in the record: a "number"; "layers", a number for each
            layer; or "depths", a number for each intermediate output (the last place, that of the final output, is
            the data loss where there is a ``loss``, else NaN).
        only_eager: Why an objective with it is not compiled; empty: it is.
        scheduled: Whether it changes over training with the share of the epochs done: then a resumed run cannot have
            another number of epochs.
    """

    name: str
    differentiated = True
    needs_states = False
    needs_outputs = False
    loss: Callable[[Any, Tensor], Tensor] | None = None
    columns: Mapping[str, str] = {}
    only_eager = ""
    scheduled = False

    def start_epoch(self, epoch: int, epochs: int) -> None:  # noqa: B027  most have nothing to do
        """Told by ``fit`` before each epoch, for penalties that change over training.

        Args:
            epoch: Number of the epoch, from 0.
            epochs: Number of epochs in all.
        """

    def check(self, model: nn.Module, inputs: Any, targets: Any, outputs: Any) -> None:  # noqa: B027
        """Refuse what does not fit, before training starts; most find it at the first step.

        Args:
            model: The model.
            inputs: A few samples.
            targets: Their targets.
            outputs: What the model makes of them.
        """

    def counts(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor | None:
        """How much a part of a batch counts in the value; None: as its ``loss`` counts, or the samples.

        Args:
            model: The model.
            inputs: The part's inputs.
            targets: The part's targets.
        """
        return None

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """The penalty's value, and its columns where it has some."""

    def measured(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
        outputs: Any = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Value and columns, whatever the call answers; ``outputs`` are handed on to those that need them."""
        options: dict[str, Any] = {"outputs": outputs} if self.needs_outputs else {}
        found = self(model, inputs, targets, states, **options)
        value, columns = found if isinstance(found, tuple) else (found, {})
        if hasattr(value, "full_tensor"):  # of sharded weights
            from .._together import whole

            value, columns = whole(value), {name: whole(column) for name, column in columns.items()}
        if sorted(columns) != sorted(self.columns):
            raise ValueError(
                f"columns of the penalty {self.name!r} must be {sorted(self.columns)}, as its attribute says, got "
                f"{sorted(columns)}: return (value, {{name: tensor}})"
            )
        return value, columns

    def proximal(self, values: Tensor, lr: float | Tensor) -> Tensor:
        """The proximal step on the parameter of the time steps, after an optimiser step of size ``lr``."""
        return values
