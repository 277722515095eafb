"""The functions of a line search, compiled: the objective alone, and the objective with its gradient.

Two pure functions of the parameters, one call each; a step of ``taulearn.optim.SteepestDescent`` takes one gradient and
a value or two. As in fused.py, torch.func differentiates the objective and inductor makes the code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad

from ..batches import Batch
from ..objective import Objective
from .compiler import compile_once
from .fused import fingerprint, used_parameters

_TOTAL = 1  # the column of the record that holds the objective


class CompiledValues:
    """The objective and its gradient on batches of one size, each as one compiled call."""

    def __init__(self, objective: Objective, sample: Batch, failed: Callable[[str], None] | None = None) -> None:
        self.objective = objective
        used = used_parameters(objective, sample)
        tensors = dict(objective.named_parameters()) | dict(objective.named_buffers())
        self.parameters = {name: t for name, t in tensors.items() if id(t) in used}
        self.constants = {name: t.detach() for name, t in tensors.items() if name not in self.parameters}
        self.fingerprint = fingerprint(objective)
        self._value = compile_once(self._value_of, fused=True, by_columns=True, failed=failed)
        self._gradient = compile_once(self._gradient_of, fused=True, by_columns=True, failed=failed)

    def unchanged(self) -> bool:
        """Whether the objective is as at compilation; to be asked whenever somebody else had control."""
        return fingerprint(self.objective) == self.fingerprint

    @torch.no_grad()
    def value(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The objective at the parameters as they are, a scalar; weights as the objective takes them."""
        total: Tensor = self._value(self._now(), self.constants, inputs, targets, weights)
        return total

    @torch.no_grad()
    def differentiate_(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The objective and its record; the gradients are put into ``.grad``, in place of what was there."""
        gradients, record = self._gradient(self._now(), self.constants, inputs, targets, weights)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        return record[_TOTAL], record

    def _now(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def _value_of(self, values: dict[str, Tensor], constants: dict[str, Tensor], *batch: Tensor | None) -> Tensor:
        total: Tensor = functional_call(self.objective, (values, constants), batch)[0]
        return total

    def _gradient_of(
        self, values: dict[str, Tensor], constants: dict[str, Tensor], *batch: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        def total(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = functional_call(self.objective, (parameters, constants), batch)
            return result

        result: Any = grad(total, has_aux=True)(values)
        gradients, record = result
        return gradients, record
