"""Several networks of equal structure trained at once: torch.func.vmap over their stacked parameters.

Each network has its own initial weights, its own order of the samples, its own learning rates. The data are shared and
stay on the device; batches are gathered there. The steps are those of ``torch.optim.SGD`` without momentum, so that
each network goes the way it would go alone, up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call, grad, vmap

from taulearn.adaptivity.estimate import shares_of
from taulearn.app.members import Member
from taulearn.nn.network import TimeVariableNetwork
from taulearn.training.batches import TensorBatches
from taulearn.training.fast.compiler import compile_once
from taulearn.training.history import Recorder
from taulearn.training.metrics import accuracy_of_classes
from taulearn.training.objective import Objective, as_float

GRAPH_STEPS = 60
"""Steps in one CUDA graph: what the launch of a graph costs is then divided by so many."""


@dataclass
class Trainee:
    """One network under way.

    Attributes:
        member: What it is.
        objective: Its network, loss and penalties.
        batches: Its order of the samples.
        recorder: Its record.
        rates: Learning rate, and that of the time steps.
        seconds: Its share of the time of the epoch under way.
        error: What ended it before its time.
    """

    member: Member
    objective: Objective
    batches: TensorBatches
    recorder: Recorder
    rates: tuple[float, float]
    seconds: float = 0.0
    error: str | None = None
    model: TimeVariableNetwork = field(init=False)

    def __post_init__(self) -> None:
        model = self.objective.model
        assert isinstance(model, TimeVariableNetwork)
        self.model = model


class Stack:
    """Networks of equal structure with one tensor for each parameter of all of them.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> from taulearn_papers.engines.vmap import Group
        >>> config = TrainConfig(width=8, epochs=1)
        >>> members = [Member("a", seed, config.model_copy(update={"seed": seed})) for seed in (0, 1)]
        >>> stack = Stack(Group(members, lambda event: None).trainees, weight_decay=0.0, compiled=False)
        >>> stack.advance(torch.zeros(3, 2, 10, dtype=torch.long)).shape
        torch.Size([3, 2, 8])
    """

    def __init__(self, trainees: Sequence[Trainee], *, weight_decay: float, compiled: bool) -> None:
        self.trainees, self.weight_decay = list(trainees), weight_decay
        first = self.trainees[0]
        self.objective, self.steps = first.objective, first.model.time_steps
        self.depth = self.steps.num_steps
        trains = dict(first.objective.named_parameters())
        self.step_name = next((name for name, p in trains.items() if p is self.steps.values), None)
        self.values = {name: self._stacked(name) for name in trains}
        self.constants = {name: self._stacked(name) for name, _ in first.objective.named_buffers()}
        device = self.steps.values.device
        rates = torch.tensor([each.rates for each in self.trainees], device=device, dtype=self.steps.values.dtype)
        self.rates, self.device = rates, device
        self._step: Callable[..., Tensor] = compile_once(self._advance, fused=True) if compiled else self._advance
        self._graph: _Graph | None = None
        self.captures = compiled and device.type == "cuda"

    def _stacked(self, name: str) -> Tensor:
        tensors = [dict((*t.objective.named_parameters(), *t.objective.named_buffers()))[name] for t in self.trainees]
        return torch.stack([tensor.detach() for tensor in tensors])

    def advance(self, index: Int[Tensor, "steps members batch"]) -> Float[Tensor, "steps members columns"]:
        """Take steps with the samples of these numbers, each network with its own."""
        with torch.no_grad():
            if self.captures and len(index) == GRAPH_STEPS:
                if self._graph is None:
                    self._graph = _Graph(self._one_after_the_other, index)
                return self._graph.replay(index)
            return self._one_after_the_other(index)

    def _one_after_the_other(self, index: Tensor) -> Tensor:
        return torch.stack([self._step_on(rows) for rows in index])

    def _step_on(self, index: Int[Tensor, "members batch"]) -> Float[Tensor, "members columns"]:
        batches = self.trainees[0].batches
        inputs = batches.inputs.index_select(0, index.reshape(-1)).unflatten(0, index.shape)
        targets = batches.targets.index_select(0, index.reshape(-1)).unflatten(0, index.shape)
        function = self._step if index.shape[1] == batches.batch_size else self._advance
        return function(self.values, self.constants, self.rates, inputs, targets)

    def _advance(
        self, values: dict[str, Tensor], constants: dict[str, Tensor], rates: Tensor, inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """One step of all networks; ``values`` are changed in place."""

        def alone(
            values: dict[str, Tensor], constants: dict[str, Tensor], rates: Tensor, x: Tensor, z: Tensor
        ) -> tuple[dict[str, Tensor], Tensor]:
            def total(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                result: tuple[Tensor, Tensor] = functional_call(self.objective, (parameters, constants), (x, z))
                return result

            gradients, record = grad(total, has_aux=True)(values)
            return {name: self._updated(name, values[name], g, rates) for name, g in gradients.items()}, record

        new, records = vmap(alone)(values, constants, rates, inputs, targets)
        for name, value in new.items():
            values[name].copy_(value)
        return records

    def _updated(self, name: str, p: Tensor, g: Tensor, rates: Tensor) -> Tensor:
        if name != self.step_name:
            return p - rates[0] * (g + self.weight_decay * p if self.weight_decay else g)
        p = p - rates[1] * g
        for penalty in self.objective.penalties:
            p = penalty.proximal(p, rates[1])
        return self.steps.projected(p)

    @property
    def tau(self) -> Float[Tensor, "members layers"]:
        """The steps of each network."""
        return vmap(self.steps.rule.tau)(self.values[self.step_name or ""])  # steps that do not train are not pruned

    def small(self, tau: Float[Tensor, "*times members layers"], threshold: float) -> Bool[Tensor, "*times members"]:
        """Whether a layer that can be deleted has a smaller share of the steps than a threshold."""
        model = self.trainees[0].model
        fixed = model.fixed_layers()
        shares = shares_of(tau, model.scheme.step_power)
        return (shares[..., [layer for layer in range(self.depth) if layer not in fixed]] < threshold).any(-1)

    def copy(self) -> dict[str, Tensor]:
        """The parameters of all networks as they are now, for :meth:`restore`."""
        return {name: value.clone() for name, value in self.values.items()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Undo the steps since :meth:`copy`; parameters stay where they are, so that CUDA graphs find them."""
        for name, value in values.items():
            self.values[name].copy_(value)

    def finite(self) -> list[bool]:
        """Whether all parameters of each network are finite."""
        found = torch.stack([value.flatten(1).isfinite().all(1) for value in self.values.values()])
        return [bool(each) for each in found.all(0).tolist()]

    def unstack(self) -> None:
        """Bring the parameters back into the networks."""
        with torch.no_grad():
            for k, each in enumerate(self.trainees):
                for name, parameter in each.objective.named_parameters():
                    parameter.copy_(self.values[name][k])

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor, batch_size: int = 1000) -> list[dict[str, float]]:
        """Loss and metrics of each network, as :func:`taulearn.training.evaluate` gives them for one."""
        functions = {"loss": self.objective.loss, **accuracy_of_classes(targets)}
        model = self.objective.model
        weights = {name.removeprefix("model."): value for name, value in (self.values | self.constants).items()}
        sums = {name: torch.zeros(len(self.trainees), dtype=torch.float64, device=self.device) for name in functions}
        model.eval()
        for x, z in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            batch = as_float(x, self.steps.values.dtype)
            output = vmap(lambda own, batch=batch: functional_call(model, own, (batch,)))(weights)
            for name, function in functions.items():
                sums[name] += vmap(lambda y, z=z, function=function: function(y, z))(output).double() * len(x)
        model.train()
        columns = {name: (total / len(inputs)).tolist() for name, total in sums.items()}
        return [{name: column[k] for name, column in columns.items()} for k in range(len(self.trainees))]


class _Graph:
    """Steps recorded once as a CUDA graph and replayed with other samples."""

    def __init__(self, function: Callable[[Tensor], Tensor], index: Tensor) -> None:
        self.index = index.clone()
        kept = _parameters_of(function)
        before = {name: value.clone() for name, value in kept.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function(self.index)
        torch.cuda.current_stream().wait_stream(side)
        for name, value in kept.items():
            value.copy_(before[name])
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.records = function(self.index)

    def replay(self, index: Tensor) -> Tensor:
        """Take the steps with these samples."""
        self.index.copy_(index)
        self.graph.replay()
        return self.records.clone()


def _parameters_of(function: Any) -> dict[str, Tensor]:
    stack: Stack = function.__self__
    return stack.values
