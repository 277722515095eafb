"""The stage cost: the loss at every intermediate output, which makes deep layers unnecessary.

    J = loss(yhat_N) + weight sum_{k<N} c_k loss(yhat_k)

yhat_k is the output of the network cut after k layers: the state y_k, carried by the remaining skips to the head. In
terms of optimal control the sum is the stage cost and loss(yhat_N) the terminal cost.

References:
    Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet training.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import is_number, unknown_name
from ..nn.time_steps import time_steps_of
from ..penalties.base import Penalty, non_negative
from .states import forward_with_states, scalar, stage_numbers, stage_outputs

Loss = Callable[[Tensor, Tensor], Tensor]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "rising": lambda progress: progress,
    "falling": lambda progress: 1.0 - progress,
}


class StageCost(Penalty):
    """weight sum_{k<N} c_k loss(yhat_k) over the intermediate outputs; the final one is the data loss itself.

    The outputs come from the states of the forward pass: they run through the remaining skips and the head, all at
    once. ``fit`` records the loss at each depth, the final one included, in the column "stage_loss" of the history.

    Args:
        weight: Weight >= 0, the same at every depth.
        loss: Maps (output, target) to a scalar, as a rule the data loss.
        schedule: Over training: "constant", "rising" (from 0 to 1), "falling" (from 1 to 0), or a function from the
            share of training that is over, in (0, 1), to a factor. It changes from epoch to epoch.
        factors: c_k for single outputs, by the number k < N that the state had at the start; 1 where none is given.
        terminal_only: Record the losses and add nothing to the objective, which is ordinary training.

    Raises:
        ValueError: If the weight or a factor is negative, a schedule is unknown or answers no finite number >= 0. At
            the first call, if a factor belongs to no intermediate output; at each, if the loss is no scalar.
        TypeError: If ``loss`` or a schedule is no function, or ``factors`` no mapping.

    References:
        Püttschneider, Heilig, Fischer, Faulwasser (2025).

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> from taulearn.nn import resnet
        >>> network, x, z = resnet(2, 3, 1, 4), torch.ones(5, 2), torch.zeros(5, 1)
        >>> outputs = network.intermediate_outputs(x)
        >>> cost = StageCost(0.5, mse_loss)(network, x, z)
        >>> torch.allclose(cost, 0.5 * sum(mse_loss(outputs[k], z) for k in (1, 2, 3)))
        True
    """

    name = "stage_cost"
    needs_states = True
    columns: Mapping[str, str] = {"stage_loss": "depths"}
    loss: Loss

    def __init__(
        self,
        weight: float,
        loss: Loss,
        *,
        schedule: str | Callable[[float], float] = "constant",
        factors: Mapping[int, float] | None = None,
        terminal_only: bool = False,
    ) -> None:
        self.weight = non_negative("weight", weight)
        if not callable(loss):
            raise TypeError(f"loss must be a function (output, target) -> scalar, got {loss!r}")
        self.loss = loss
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        self.schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        if not callable(self.schedule):
            raise TypeError(
                "schedule must be a name or a function of the share of training that is over, got "
                f"{schedule!r}: write 'constant' for none"
            )
        self.factors = _factors(factors)
        self._checked = not self.factors
        self.differentiated = not terminal_only
        # a tensor changes without another compilation
        self._share = None if schedule == "constant" else torch.ones(())
        self.scheduled = self._share is not None

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self._checked |= epoch > 0  # a resumed run may have lost layers already
        if self._share is None:
            return
        progress = (epoch + 0.5) / epochs
        share = self.schedule(progress)
        if not (is_number(share) and 0.0 <= share < math.inf):
            raise ValueError(f"schedule must answer a finite number >= 0, got {share!r} at {progress:.3g} of training")
        self._share.fill_(share)

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        return self.measured(model, inputs, targets, states)[0]

    def measured(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
        outputs: Any = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The cost, and the losses at the intermediate outputs, of which it is made."""
        if inputs is None or targets is None:
            raise ValueError("inputs and targets must be given to a stage cost, got None: it is a loss on data")
        if states is None:
            states = forward_with_states(model, inputs)[1]
        if not self.differentiated:
            states = [y.detach() for y in states]
        outputs = stage_outputs(model, inputs, states)
        if not outputs:
            return states[-1].new_zeros(()), {"stage_loss": states[-1].new_zeros(0)}
        losses = torch.stack([scalar(self.loss(output, targets)) for output in outputs.values()])
        numbers = stage_numbers(model, outputs)
        if not torch.compiler.is_compiling() and not self._checked:
            self._check(numbers, time_steps_of(model).origin)
        c = [self.factors.get(k, 1.0) for k in numbers]
        total = losses.sum() if set(c) == {1.0} else (losses * losses.new_tensor(c)).sum()  # autocast leaves it alone
        value = self.weight * total if self._share is None else self.weight * self._share * total
        value = value if self.differentiated else torch.zeros_like(value.detach())
        return value, {"stage_loss": losses.detach()}

    def _check(self, numbers: list[int], origin: tuple[int, ...]) -> None:
        """Refuse factors without effect, before anything was deleted: later their outputs may be gone rightly."""
        strangers = sorted(set(self.factors) - set(numbers))
        if strangers and origin == tuple(range(len(origin))):
            raise ValueError(
                f"factors must belong to intermediate outputs, {numbers[0]} .. {numbers[-1]} here, got "
                f"{strangers}: leave those out (the last output is the data loss itself)"
            )
        self._checked = True


def _factors(given: Mapping[int, float] | None) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"factors must map numbers of layers to factors, got {given!r}: write for instance {{1: 0.5}}")
    for k in given:
        if isinstance(k, bool) or not hasattr(k, "__index__") or k < 0:
            raise ValueError(f"factors must have numbers of layers >= 0 as keys, got {k!r}: write it as an integer")
    return {int(k): non_negative(f"factors[{k}]", c) for k, c in given.items()}
