"""Some SGD steps as one compiled function of tensors: gradient, update, proximal step, projection and record.

The Python side of a step costs as much as its arithmetic when layers are small. Here torch.func differentiates the
objective as a pure function of the parameters, SGD's update rule is written out (torch.optim.SGD's own formulas), and
inductor turns the whole into one call; the optimiser's state stays in the optimiser.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad

from ...nn.time_steps import time_steps_of
from ..batches import Batch, LoaderBatches, TensorBatches
from ..objective import Objective, StepOptions
from .compiler import compile_once

_STATES_PER_CALL = 36


def why_not_fused(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    options: StepOptions,
    batches: TensorBatches | LoaderBatches,
) -> str | None:
    """Why the steps cannot be fused, or None if they can."""
    if type(optimizer) is not torch.optim.SGD:
        return "the optimiser is not plain torch.optim.SGD"
    return why_not_pure(objective, options, batches)


def why_not_pure(objective: Objective, options: StepOptions, batches: TensorBatches | LoaderBatches) -> str | None:
    """Why the gradient is not a pure function of parameters and batch that could be compiled as such, or None."""
    steps = time_steps_of(objective.model)
    changing = [name for name, buffer in objective.named_buffers() if buffer is not steps.values]
    reasons = {
        "the model updates buffers": bool(changing),
        "gradients are clipped": options.clip_norm is not None,
        "batches are split": options.accumulate != 1,
        "mixed precision": options.precision != "float32",
        "weights are averaged": options.averaged is not None,
        "batches come from a loader": isinstance(batches, LoaderBatches),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def steps_per_call(objective: Objective, most: int) -> int:
    """How many steps to fuse, so that compilation stays within about half a minute whatever the depth."""
    layers, scheme = time_steps_of(objective.model).num_steps, getattr(objective.model, "scheme", None)
    evaluations = layers if getattr(scheme, "remembers", False) else len(getattr(scheme, "stage_weights", (1.0,)))
    return max(1, min(most, _STATES_PER_CALL // (layers * evaluations)))


def used_parameters(objective: Objective, batch: Batch) -> set[int]:
    """The ids of the parameters that have a gradient; optimisers leave the others as they are."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    with torch.random.fork_rng():
        total, _ = objective(*batch)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def fingerprint(objective: Objective) -> tuple[Any, ...]:
    """Values that are compiled in and that a callback may change: options of modules and penalties, what trains."""
    plain = (bool, int, float, str)
    parts = (*objective.penalties, *objective.modules(), time_steps_of(objective.model).rule)
    options = [
        {k: v for k, v in vars(part).items() if k != "training" and (v is None or isinstance(v, plain))}
        for part in parts
    ]
    return options, [p.requires_grad for p in objective.parameters()]


class FusedSGD:
    """``steps`` iterations of torch.optim.SGD in one compiled call."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        steps: int,
        sample: Batch,
        plain: Callable[[Tensor, Tensor], Tensor],
        failed: Callable[[str], None] | None = None,
    ) -> None:
        self.objective, self.optimizer, self.steps = objective, optimizer, steps
        self.time_steps = time_steps_of(objective.model)
        position = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        tensors = dict(objective.named_parameters()) | dict(objective.named_buffers())
        used = used_parameters(objective, sample)
        self.parameters = {name: t for name, t in tensors.items() if id(t) in used and id(t) in position}
        self.group_of = {name: position[id(p)] for name, p in self.parameters.items()}
        self.constants = {name: t.detach() for name, t in tensors.items() if name not in self.parameters}
        self.forms, self.fingerprint = self._forms(), fingerprint(objective)
        self.plain = plain
        self._call = compile_once(self._steps, fused=True, fallback=self._plain_steps, failed=failed)

    def _forms(self) -> list[tuple[bool, ...]]:
        """Options that decide the form of the update, group by group; numbers are inputs of the compiled function."""
        forms = ("momentum", "weight_decay", "dampening", "nesterov", "maximize")
        return [tuple(bool(group[name]) for name in forms) for group in self.optimizer.param_groups]

    def unchanged(self) -> bool:
        """Whether the objective is as at compilation; to be asked whenever somebody else had control."""
        return fingerprint(self.objective) == self.fingerprint

    def ready(self) -> bool:
        """Whether the update is as at compilation and the momentum buffers exist, which the first plain step makes."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        return self._forms() == self.forms and all(
            not groups[i]["momentum"] or state[self.parameters[name]].get("momentum_buffer") is not None
            for name, i in self.group_of.items()
        )

    def undo(self) -> Callable[[], None]:
        """A function that puts parameters, momentum and random numbers back to where they are now."""
        state = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.parameters.values()]
        changing = [*(p.detach() for p in self.parameters.values()), *(b for b in state if b is not None)]
        copies = [(tensor, tensor.clone()) for tensor in changing]
        devices = {tensor.device for tensor in changing if tensor.is_cuda}
        random, random_on = torch.get_rng_state(), {each: torch.cuda.get_rng_state(each) for each in devices}

        def put_back() -> None:
            for tensor, copy in copies:
                tensor.copy_(copy)
            torch.set_rng_state(random)
            for device, numbers in random_on.items():
                torch.cuda.set_rng_state(numbers, device)

        return put_back

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the steps."""
        groups, parts = self.optimizer.param_groups, (self.steps, len(inputs) // self.steps)
        values = {name: p.detach() for name, p in self.parameters.items()}
        buffers = {
            name: self.optimizer.state[self.parameters[name]]["momentum_buffer"]
            for name, i in self.group_of.items()
            if groups[i]["momentum"]
        }
        numbers = [
            torch.tensor(
                [float(group[name]) for name in ("lr", "momentum", "weight_decay", "dampening")], dtype=torch.float64
            )
            for group in groups
        ]
        with torch.no_grad():
            rows: Tensor = self._call(
                values, buffers, self.constants, numbers, inputs.unflatten(0, parts), targets.unflatten(0, parts)
            )
        return rows

    def _steps(
        self,
        values: dict[str, Tensor],
        buffers: dict[str, Tensor],
        constants: dict[str, Tensor],
        numbers: list[Tensor],
        inputs: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """The function that is compiled; it changes ``values`` and ``buffers`` in place at its end."""
        now, momentum, rows = dict(values), dict(buffers), []
        for x, z in zip(inputs.unbind(), targets.unbind(), strict=True):

            def total(parameters: dict[str, Tensor], x: Tensor = x, z: Tensor = z) -> tuple[Tensor, Tensor]:
                result: tuple[Tensor, Tensor] = functional_call(self.objective, (parameters, constants), (x, z))
                return result

            gradients, record = grad(total, has_aux=True)(now)
            rows.append(record)
            for name, gradient in gradients.items():
                now[name] = self._update(name, now[name], gradient, momentum, numbers[self.group_of[name]])
        for name, value in now.items():
            values[name].copy_(value)
        for name, buffer in momentum.items():
            buffers[name].copy_(buffer)
        return torch.stack(rows)

    def _plain_steps(self, *args: Any) -> Tensor:
        """The same, step by step."""
        *_, inputs, targets = args
        with torch.enable_grad():
            return torch.cat([self.plain(x, z) for x, z in zip(inputs.unbind(), targets.unbind(), strict=True)])

    def _update(self, name: str, p: Tensor, g: Tensor, momentum: dict[str, Tensor], numbers: Tensor) -> Tensor:
        """torch.optim.SGD's rule for one parameter; proximal step and projection for the time steps."""
        lr, mu, decay, dampening = numbers.to(p.dtype).unbind()
        has_momentum, has_decay, has_dampening, nesterov, maximize = self.forms[self.group_of[name]]
        if maximize:
            g = -g
        if has_decay:
            g = g + decay * p
        if has_momentum:
            momentum[name] = mu * momentum[name] + ((1 - dampening) * g if has_dampening else g)
            g = g + mu * momentum[name] if nesterov else momentum[name]
        p = p - lr * g
        if self.parameters[name] is self.time_steps.values:
            for penalty in self.objective.penalties:
                p = self.time_steps.sparing(p, penalty.proximal(p, lr))
            p = self.time_steps.projected(p)
        return p
