"""Shared by the callbacks for other trainers: the model and its averages are found, a session trains its steps."""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._batches import LABELS
from .._distributed import refuse_distributed
from ..adaptivity.adaptation import Adaptation
from ..adaptivity.optimizer_state import check_holds, check_holds_steps
from ..adaptivity.policies import Pruning
from ..adaptivity.refiner import Refinement
from ..nn.time_steps import time_steps_of
from ..optim import group_of
from ..optim.projections import check_unattached
from ..penalties import Penalty
from ..training.attaching import work_together
from ..training.check_arguments import check_policies
from ..training.history import History
from ..training.objective import as_penalties
from ..training.session import Session, active_penalties, needs_batch
from .checkpoints import models_with_time_steps


def model_with_time_steps(module: nn.Module) -> nn.Module:
    """The one part of a module, or itself, that has time steps."""
    averaged = {part for average in averages_in(module) for part in average.modules()}
    found = {name: part for name, part in models_with_time_steps(module).items() if part not in averaged}
    if len(found) != 1:
        which = f" ({', '.join(repr(name) for name in found)})" if found else ""
        raise TypeError(
            f"model must contain one model with time steps, got a {type(module).__name__} with {len(found)}{which}: "
            "build it with taulearn.nn, or wrap it with taulearn.wrap before it is handed to the trainer; several are "
            "trained in a loop of your own, with taulearn.attach and an optimizer for each"
        )
    return next(iter(found.values()))


def averages_in(module: nn.Module) -> list[AveragedModel]:
    """The averages, of torch's class, in a module."""
    return [part for part in module.modules() if isinstance(part, AveragedModel)]


def warn_of_frozen(model: nn.Module) -> None:
    """Say that the time steps do not train, as PEFT leaves those of a model that it is put around."""
    values = time_steps_of(model).values
    if isinstance(values, nn.Parameter) and not values.requires_grad:
        warnings.warn(
            "the time steps do not train, since their requires_grad is False; get_peft_model sets it so: write "
            "model.time_steps.values.requires_grad_(True) after it, and before the optimizer is made",
            stacklevel=4,
        )


class Companion:
    """A session beside another trainer's loop, and what it is begun with."""

    session: Session

    def __init__(
        self,
        penalties: Penalty | Sequence[Penalty],
        pruning: Pruning | None,
        refinement: Refinement | None = None,
        *,
        progress: bool,
    ) -> None:
        self.penalties, self.progress = as_penalties(penalties), progress
        self.pruning, self.refinement = pruning, refinement
        self.of_batches = [penalty.name for penalty in self.penalties if needs_batch(penalty)]
        check_policies(pruning, refinement, self.penalties)
        if refinement is not None and refinement.named is not None and refinement.data is None:
            raise ValueError(
                f"data must be given with indicator {refinement.named!r} in this trainer, got None: write "
                "Refinement(.., data=batches), and loss= where the model returns none"
            )
        self.past = History()
        self.state: Mapping[str, Any] | None = None
        self.policies: Adaptation | None = None
        self._seen = 0
        self._call: tuple[Any, Any] | None = None  # inputs and outputs of the model's last forward pass
        self.adding = False

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        per_epoch: int,
        averages: Callable[[], Sequence[nn.Module]],
    ) -> None:
        """Start beside a loop, from the record and the state of a checkpoint where these were set."""
        refuse_distributed("model", model)
        shared = work_together(model, self.pruning, self.refinement)
        check_holds(optimizer, model)
        check_holds_steps(optimizer, model)
        check_unattached(optimizer, model)
        _averages_of(model, averages())
        warn_of_frozen(model)
        self.policies = Adaptation(self.pruning, self.refinement, model, optimizer, epochs, per_epoch, recording=True)
        if self.policies and self.state is not None:
            self.policies.load_state(self.state)
        else:
            self.policies.begin(None)
        if self.policies.pruner is not None and shared is not None:
            self.policies.pruner.criterion.mean = shared.mean
        self.session = Session(
            model,
            optimizer,
            active_penalties(self.penalties, self.policies),
            self.policies,
            epochs=epochs,
            past=self.past if self.past.num_iterations else None,
            averages=lambda: _averages_of(model, averages()),
        )
        self._seen = self.session.iteration
        if not self.past.num_iterations:
            self.session.record_epoch()
        self.past, self.state = History(), None  # another training begins anew

    @property
    def changes(self) -> bool:
        """Whether there is a policy."""
        return self.pruning is not None or self.refinement is not None

    def policy_state(self) -> dict[str, Any] | None:
        """How far the policies are, None without any."""
        return self.policies.state() if self.policies else None

    def constrained(self, until: ExitStack) -> None:
        """Let the optimiser's steps end with the proximal step and the projection, and be counted."""
        (optimizer,) = self.session.optimizers

        def after(stepped: torch.optim.Optimizer, _: Any, options: Mapping[str, Any]) -> None:
            self.session.after_step(stepped, options.get("grad_scaler"))

        until.callback(optimizer.register_step_post_hook(after).remove)

    def watch(self, until: ExitStack) -> None:
        """Know what the model is called with and answers in training, for penalties that need the batch."""
        self._call = None
        if not self.of_batches:
            return

        def after(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], outputs: Any) -> None:
            if torch.is_grad_enabled() and not self.adding:
                names = inspect.signature(module.forward).parameters if options else ()
                given = dict(zip(names, args, strict=False)) | options
                given.pop("num_items_in_batch", None)  # for the loss alone
                self._call = (given or (args[0] if len(args) == 1 else args)), outputs

        until.callback(self.session.model.register_forward_hook(after, with_kwargs=True).remove)

    def added(self, loss: Any, batch: Any, where: str, share: float = 1.0) -> Tensor:
        """The loss that a model or a module returned, with the penalties that need the batch.

        Args:
            loss: What was returned.
            batch: The batch, for its targets.
            where: What returned it.
            share: What a mean over the batch is multiplied by to be added, as the loss was.
        """
        if not isinstance(loss, Tensor) or self._call is None:
            found = f"a loss of type {type(loss).__name__}" if self._call else "one without a forward pass of the model"
            raise ValueError(
                f"{where} must return the loss with {self.of_batches[0]!r} among the penalties, which is added to it, "
                f"got {found}: let it return the loss, or train with taulearn.fit"
            )
        (inputs, outputs), self._call, self.adding = self._call, None, True
        try:
            targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
            if isinstance(batch, Mapping):
                targets = batch.get(LABELS)
            # the mean of losses that were multiplied by their share of several batches is that of all
            return self.session.loss(loss / share, outputs=outputs, inputs=inputs, targets=targets) * share
        finally:
            self.adding = False

    def warn_of_decay(self, remedy: str) -> None:
        """Say that the optimiser shrinks the time steps, and what to write instead."""
        group = group_of(self.session.optimizers, self.session.steps.values)
        decay = 0.0 if group is None else float(group.get("weight_decay", 0.0))
        if decay:
            warnings.warn(f"the optimizer shrinks the time steps by weight decay, {decay:g}: {remedy}", stacklevel=3)

    def after_step(self, loss: Tensor | None, *, epoch: int) -> None:
        """Note the loss, and let policies act that count iterations; nothing where no step was taken since."""
        if self.session.iteration == self._seen:
            return  # gradients accumulate, or a GradScaler skipped the step
        self._seen = self.session.iteration
        if loss is not None and not self.of_batches:  # else the session was told the loss without penalties
            self.session.note(loss)
        self._change(epoch, epoch_ends=False)

    def end_epoch(self, epoch: int) -> None:
        """Let policies act that count epochs, and record the epoch, counted from 1."""
        if self.session.pruner is not None and self.session.pruner.every is None:
            self._change(epoch, epoch_ends=True)
        self.session.record_epoch()

    def _change(self, epoch: int, *, epoch_ends: bool) -> None:
        if due := self.session.due(epoch_ends=epoch_ends):
            for report, _ in self.session.change_grid(epoch, due):
                if self.progress:
                    sys.stdout.write(f"epoch {epoch}, iteration {self.session.iteration}: {report}\n")
                    sys.stdout.flush()

    def end(self) -> None:
        """Leave the model as it was found, but trained."""
        self.session.stop_measuring()
        self.session.policies.end()
        self.session.averages = list

    def history(self) -> History:
        """The record so far; losses that the trainer did not tell are NaN."""
        return self.session.history if hasattr(self, "session") else self.past


def _averages_of(model: nn.Module, wholes: Sequence[nn.Module]) -> list[nn.Module]:
    """The models with time steps in averages, which must be copies of the model."""
    found = {part for whole in wholes for part in models_with_time_steps(whole).values()}
    shapes = [p.shape for p in model.parameters()]
    for part in found:
        if [p.shape for p in part.parameters()] != shapes:
            raise ValueError(
                "averaged models must be copies of the model, got one whose parameters have other shapes: make "
                "them from the model as it is when training begins"
            )
    return [part for part in found if part is not model]
