"""All that time steps ask of a training loop, whoever writes the loop.

With the penalties R_i of the time steps and the weights, and the constraint's set C, one iteration is

    before_step    g <- g + sum_i grad R_i(x)            a row of the record is taken
    the step       x <- x - lr g                         that of any optimiser
    after_step     tau <- P_C(prox(tau))                 the iteration counts
    change_grid    now and then layers come to model, optimisers, averages and record, or go from them, together

``fit`` differentiates the penalties together with the loss, and compiles the first three; the callbacks for other
trainers call them one by one; :func:`taulearn.attach` hangs them on the optimiser.
"""

import math
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._batches import inputs_and_targets
from ..adaptivity.adaptation import Adaptation, Changed
from ..adaptivity.coarsen import PruneReport
from ..adaptivity.optimizer_state import optimizers_in, parameters_held
from ..nn.module_on_states import running_statistics_held
from ..nn.pruned_models import prunable_of
from ..nn.time_steps import time_steps_of
from ..optim import constrain_
from ..optim.projections import overflows, steps_under_way
from ..penalties import Penalty
from .history import FLUSH_EVERY, Array, Deletion, History, Insertion, Recorder, Row


def active_penalties(penalties: tuple[Penalty, ...], policies: Adaptation) -> tuple[Penalty, ...]:
    """The caller's penalties, and that which the target of pruning steers."""
    pruner = policies.pruner
    return penalties if pruner is None or pruner.penalty is None else (*penalties, pruner.penalty)


def needs_batch(penalty: Penalty) -> bool:
    """Whether a penalty is a function of more than the model."""
    return penalty.needs_states or penalty.needs_outputs


def _mean(told: Sequence[Tensor]) -> Tensor:
    """The mean of what was told for a step, without what is not finite before the last: its batch was left out."""
    values = torch.stack(list(told))
    counts = values.isfinite()
    counts[-1] = True
    return values.where(counts, 0.0).sum(0) / counts.sum(0)


class Session:
    """The training of a model's time steps beside a loop; :func:`taulearn.attach` makes one for a loop of yours.

    Args:
        model: The model with time steps.
        optimizer: Its optimiser, or several, each of which steps once an iteration.
        penalties: All of them, with that of the target of pruning.
        policies: Those at work, of pruning and of refinement. None: none.
        epochs: Number of epochs that penalties are told.
        past: The record that is gone on with, or None.
        averages: Finds averaged copies of the model, which follow all changes.

    Attributes:
        iteration: Number of iterations taken.
        epochs: Number of epochs that penalties are told.

    Example:
        >>> from taulearn import attach
        >>> from taulearn.nn import resnet
        >>> from taulearn.penalties import L1
        >>> network = resnet(2, 3, 1, 4)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> session = attach(network, optimizer, penalties=L1(0.1, proximal=True))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     session.loss(network(torch.ones(5, 2)).square().mean()).backward()
        ...     optimizer.step()
        >>> session.history.iterations["tau"].shape
        (3, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        penalties: tuple[Penalty, ...] = (),
        policies: Adaptation | None = None,
        *,
        epochs: float = 1,
        past: History | None = None,
        averages: Callable[[], Sequence[nn.Module]] = list,
    ) -> None:
        self.model, self.steps, self.penalties = model, time_steps_of(model), penalties
        self.policies = Adaptation(None, None, model, optimizer) if policies is None else policies
        self.pruner, refiner = self.policies.pruner, self.policies.refiner
        self.optimizers = optimizers_in(optimizer)
        self._looks_at_batch = refiner is not None and refiner.needs_batch
        self._batch: Any = None  # that of the last loss, where refinement looks at it
        self.averages, self.epochs = averages, max(1, math.ceil(epochs))
        known = {} if past is None else past.iterations
        layers = known["tau"].shape[1] if "tau" in known else max(self.steps.origin) + 1
        self.row = Row(penalties, raw=self.steps.bounded)
        self.recorder = Recorder(self.row, layers, past)
        self._known = frozenset(range(self.steps.next_number))  # numbers that were used before
        self.iteration = 0 if past is None else past.num_iterations
        self._losses, self._pending = dict[int, float](), dict[int, float | Tensor]()
        self._measuring: ExitStack | None = None
        self._taken: Tensor | None = None
        self._begun: list[Any] = []
        self._stepped: list[Any] = []
        self._leader: Any = None  # with it the last iteration began
        self._added: dict[int, tuple[Tensor, int]] = {}
        self._told: dict[str, list[Tensor]] = {}
        self._hooks = ExitStack()

    @property
    def history(self) -> History:
        """The record so far; losses that nobody told are NaN."""
        self.flush()
        history = self.recorder.history()
        if history.num_iterations:
            loss = history.iterations["loss"].astype(np.float64)
            loss[[iteration - 1 for iteration in self._losses]] = list(self._losses.values())
            columns = [history.iterations[f"penalty.{p.name}"] for p in self.penalties if p.differentiated]
            history.iterations |= {"loss": loss, "total": sum(columns, loss)}
        return history

    def loss(self, loss: Tensor, *, outputs: Any = None, inputs: Any = None, targets: Any = None) -> Tensor:
        """Record the loss of a batch, and add the penalties to it that need the batch; to be called before backward.

        Penalties that look at the states of the forward pass cost another one here, which leaves the running statistics
        of normalisations alone. Where gradients accumulate over several batches, divide what this returns by their
        number; the mean of the losses is recorded. A batch that the loop leaves out looks like one of several: of the
        losses before a step, those that are not finite count only where they come last.

        Args:
            loss: The loss, a scalar.
            outputs: What the model returned, for penalties that compare outputs.
            inputs: What the model was given, for penalties that need the batch; of a dictionary its labels are the
                targets.
            targets: The batch's targets, for penalties that contain a loss.

        Returns:
            What is to be differentiated: the loss, and those penalties. All others enter the gradient in the step.

        Raises:
            TypeError: If the loss is no tensor.
            ValueError: If a penalty needs what is not given.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, of which backward is called, got {loss!r}")
        told, states = {"loss": loss.detach().mean()}, None
        if isinstance(inputs, Mapping):
            inputs, labels = inputs_and_targets(inputs)
            targets = labels if targets is None else targets
        if self._looks_at_batch and inputs is not None:
            self._batch = inputs, targets
        if inputs is not None and any(p.needs_states for p in self.penalties):
            from ..depth.states import forward_with_states

            with running_statistics_held(self.model):
                states = forward_with_states(self.model, inputs)[1]
        for penalty in filter(needs_batch, self.penalties):
            if inputs is None:
                raise ValueError(
                    f"inputs must be given to session.loss with {penalty.name!r} among the penalties, got None: write "
                    "session.loss(loss, outputs=outputs, inputs=inputs, targets=targets)"
                )
            value, columns = penalty.measured(self.model, inputs, targets, states, outputs)
            told |= {name: each.detach() for name, each in {f"penalty.{penalty.name}": value, **columns}.items()}
            loss = loss + value if penalty.differentiated else loss
        for name, number in told.items():
            self._told.setdefault(name, []).append(number)
        return loss

    def detach(self) -> None:
        """Leave the optimisers as they were before :func:`taulearn.attach`; the record stays.

        A target that is not reached is warned of.

        Raises:
            RuntimeError: If a step is under way, as in a hook of the optimiser.
        """
        frames = traceback.walk_stack(None)
        if any(frame.f_locals.get("self") is each for frame, _ in frames for each in self.optimizers):
            raise RuntimeError(
                "detach must be called between two steps, got it in a hook of the optimiser, whose step is under way: "
                "call it after optimizer.step()"
            )
        self.stop_measuring()
        self._hooks.close()
        self.policies.end()
        self.warn_of_target()

    def warn_of_target(self, stacklevel: int = 3) -> None:
        """Warn where training ended before the target of a policy was reached."""
        for shortfall in self.policies.shortfall(self.iteration):
            warnings.warn(shortfall, stacklevel=stacklevel)

    def start_epoch(self, epoch: int) -> None:
        """Tell the penalties the epoch, from 0."""
        for penalty in self.penalties:
            penalty.start_epoch(epoch, self.epochs)

    def measure(self) -> None:
        """Measure the forward passes until the next step, where the policy asks for it."""
        if self._measuring is not None or self.pruner is None:
            return  # a loop that accumulates gradients comes here for each part of a batch
        if (measuring := self.pruner.measuring(self.iteration)) is not None:
            self._measuring = ExitStack()
            self._measuring.enter_context(measuring)

    def stop_measuring(self) -> None:
        """Take what was measured."""
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def before_step(self, optimizer: torch.optim.Optimizer | None = None, scale: Tensor | float | None = None) -> None:
        """Add the penalties' gradients to those of the loss, which are complete; the first takes the record's row.

        Each optimiser gets those of its own parameters. An iteration begins with the one that the last began with, and
        where one steps again before the others: what they left unfinished is none.

        Args:
            optimizer: The one that steps. None: the only one.
            scale: What the gradients of the loss are multiplied by, as GradScaler does; None: 1.

        Raises:
            RuntimeError: If a penalty needs the batch, and :meth:`loss` was not called since the last step.
            ValueError: If refinement looks at the batch, and :meth:`loss` was never told one.
        """
        self.stop_measuring()
        if self._looks_at_batch:
            self._told_batch()
        optimizer = self.optimizers[0] if optimizer is None else optimizer
        if optimizer is self._leader or optimizer in self._begun:
            self._begin()
        with torch.enable_grad():
            columns = self._columns()
            values = [columns[f"penalty.{p.name}"] for p in self.penalties if p.differentiated]
            enter = [value for value in values if value.requires_grad]
            held = {id(p) for p in parameters_held([optimizer])}
            parameters = [p for p in self.model.parameters() if p.requires_grad and id(p) in held]
            if enter and parameters:
                gradients = torch.autograd.grad(torch.stack(enter).sum(), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        self._add(parameter, gradient if scale is None else gradient * scale)
        if self._leader is None and not self._begun and self._others_left_out(optimizer):
            return  # it is not known yet which one steps first
        self._begun.append(optimizer)
        if self._taken is None:
            self._taken = self.row.pack(columns).unsqueeze(0)

    def _others_left_out(self, optimizer: Any) -> bool:
        """Whether another optimiser takes no step now, as its gradients are not finite."""
        others = parameters_held([each for each in self.optimizers if each is not optimizer])
        return any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in others)

    def _begin(self) -> None:
        """Forget the iteration that is under way."""
        self._taken, self._begun, self._stepped = None, [], []

    def _add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add a gradient to the parameter's, once for each step: one that fails and is tried again has it already."""
        old = parameter.grad
        added, version = self._added.get(id(parameter), (None, 0))
        if old is not None and old is added and old._version == version:
            return
        parameter.grad = gradient if old is None else old + gradient
        self._added[id(parameter)] = (parameter.grad, parameter.grad._version)

    def _columns(self) -> dict[str, Tensor]:
        """The columns of the row; of penalties that need the batch they are what :meth:`loss` was told."""
        steps = self.steps
        unknown = steps.values.new_full((), float("nan"))
        found = {"loss": unknown, "total": unknown, "tau": steps.tau}
        found |= {name: _mean(parts) for name, parts in self._told.items()}
        if steps.bounded:
            found["raw_tau"] = steps.raw_tau
        for penalty in self.penalties:
            name = f"penalty.{penalty.name}"
            if not needs_batch(penalty):
                value, columns = penalty.measured(self.model)
                found |= {name: value, **columns}
            elif name not in self._told:
                raise RuntimeError(
                    f"session.loss must be called before each step with {penalty.name!r} among the penalties, which "
                    "needs the batch: write session.loss(loss, outputs=outputs, inputs=inputs, targets=targets)"
                    ".backward()"
                )
        return found

    def after_step(self, optimizer: torch.optim.Optimizer, scaler: Any = None) -> bool:
        """The proximal step and the projection after a step of an optimiser; a step that GradScaler skips is none.

        Args:
            optimizer: The one whose step it was.
            scaler: The GradScaler that was handed to the step, if it was.

        Returns:
            Whether this ended an iteration: all optimisers have taken their step since it began.
        """
        if steps_under_way(optimizer) > 1 or any(bool(found.any()) for found in overflows(optimizer, scaler)):
            return False
        self._added.clear()
        constrain_(self.model, optimizer, self.penalties)
        if self._taken is None:
            return False
        self._stepped.append(optimizer)
        if len(self._stepped) < len(self.optimizers):
            return False
        self.take(self._taken)
        if "loss" in self._told:
            self.note(_mean(self._told["loss"]))
        self._leader, self._told = self._begun[0], {}
        self._begin()
        if self.iteration % FLUSH_EVERY == 0:
            self.flush()
        return True

    def note(self, loss: Tensor | float) -> None:
        """Record the loss of the iteration that was taken last."""
        self._pending[self.iteration] = loss.detach() if isinstance(loss, Tensor) else loss

    def take(self, rows: Tensor) -> None:
        """Record iterations, (k, columns), without looking at them."""
        self.recorder.add(rows)
        self.iteration += len(rows)

    def flush(self) -> Array:
        """Bring the record to the host; returns the objective's values that are new, as the rows have them."""
        self._losses |= {iteration: float(loss) for iteration, loss in self._pending.items()}
        self._pending.clear()
        return self.recorder.flush(self.steps.origin)

    def due(self, *, epoch_ends: bool) -> tuple[Any, ...]:
        """The policies that look at the layers now."""
        return self.policies.due(self.iteration, epoch_ends=epoch_ends)

    def change_grid(
        self,
        epoch: int,
        due: Sequence[Any],
        batch: Callable[[], Any] | None = None,
        change: Callable[..., list[Changed]] | None = None,
    ) -> list[Changed]:
        """Let policies change the layers: model, optimisers, averages and record follow together.

        Args:
            epoch: Number of the epoch, from 1, for the record.
            due: The policies, of :meth:`due`.
            batch: Makes the batch that refinement looks at. None: that of :meth:`loss`.
            change: ``Adaptation.change``, where processes have to agree. None: this one alone.
        """
        self.stop_measuring()
        self.flush()
        act = self.policies.change if change is None else change
        changes = act(self.iteration, due, self.averages(), self._told_batch if batch is None else batch)
        for report, _ in changes:
            if isinstance(report, PruneReport):
                self.recorder.deletions += [
                    Deletion(self.iteration, epoch, d.layer, d.share, d.parameters) for d in report.deleted
                ]
            else:
                self.note_new_layers(epoch)
        return changes

    def _told_batch(self) -> Any:
        if self._batch is None:
            raise ValueError(
                "data must be given where refinement looks at the loss and session.loss was not told the batch, got "
                "None: write Refinement(.., data=batches), or session.loss(loss, inputs=inputs, targets=targets)"
            )
        return self._batch

    def note_new_layers(self, epoch: int) -> None:
        """Record the layers that have come since the last record; nothing may be pending from before.

        Args:
            epoch: Number of the epoch, from 1.
        """
        known = {each.layer for each in self.recorder.insertions} | self._known
        own, layers = int(isinstance(self.steps.values, nn.Parameter)), prunable_of(self.model).layers
        for l, (number, step) in enumerate(zip(self.steps.origin, self.steps.tau.tolist(), strict=True)):
            if number not in known:
                parameters = own + sum(p.numel() for p in layers[l].parameters())
                parent = self.steps.parent[number]
                self.recorder.insertions.append(Insertion(self.iteration, epoch, number, parent, step, parameters))

    def record_epoch(self) -> None:
        """Record the layers at the end of an epoch, or before training."""
        self.flush()
        number = sum(p.numel() for p in self.model.parameters())
        self.recorder.add_epoch({"iteration": self.iteration, "layers": self.steps.num_steps, "parameters": number})
