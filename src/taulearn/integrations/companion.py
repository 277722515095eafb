"""Penalties, projection, pruning and record beside another trainer's loop: the common part of the callbacks."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._distributed import refuse_distributed
from ..adaptivity.coarsen import PruneReport, prune
from ..adaptivity.controller import Pruner
from ..adaptivity.optimizer_state import check_holds, check_holds_steps
from ..adaptivity.policies import Pruning
from ..adaptivity.target import SteeredL1
from ..adaptivity.transaction import all_or_nothing
from ..nn.time_steps import time_steps_of
from ..optim import group_of, register_projection
from ..optim.groups import overflows
from ..penalties import Penalty
from ..training.check_arguments import check_pruning
from ..training.history import Deletion, History, Recorder
from ..training.objective import as_penalties
from .checkpoints import models_with_time_steps


def model_with_time_steps(module: nn.Module) -> nn.Module:
    """The one part of a module, or itself, that has time steps.

    Args:
        module: A model, or something that contains it.

    Returns:
        The model.

    Raises:
        TypeError: If there is none, or more than one.

    Example:
        >>> from taulearn.nn import resnet
        >>> type(model_with_time_steps(nn.ModuleDict({"network": resnet(2, 3, 1, 4)}))).__name__
        'TimeVariableNetwork'
    """
    averaged = {part for average in averages_in(module) for part in average.modules()}
    found = {name: part for name, part in models_with_time_steps(module).items() if part not in averaged}
    if len(found) != 1:
        which = f" ({', '.join(repr(name) for name in found)})" if found else ""
        raise TypeError(
            f"model must contain one model with time steps, got a {type(module).__name__} with {len(found)}{which}: "
            "build it with taulearn.nn, or wrap it with taulearn.wrap before it is handed to the trainer; several are "
            "trained with taulearn.optim.register_projection and taulearn.prune"
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
    """The training of time steps beside another trainer's loop.

    Args:
        penalties: Added to the loss.
        pruning: When and what is deleted. None: nothing.
        progress: Whether deletions are printed.

    Raises:
        TypeError: If ``pruning`` is no policy.
        ValueError: If a penalty needs data, which callbacks do not have, or is that of the target of pruning.
    """

    def __init__(self, penalties: Penalty | Sequence[Penalty], pruning: Pruning | None, *, progress: bool) -> None:
        self.penalties, self.policy, self.progress = as_penalties(penalties), pruning, progress
        for penalty in self.penalties:
            if penalty.needs_states:
                raise ValueError(
                    f"penalties must depend on the model alone in a callback, got {penalty.name!r}, which needs the "
                    "states of the forward pass: train with taulearn.fit, or add it to the loss yourself"
                )
        if pruning is not None and not isinstance(pruning, Pruning):
            raise TypeError(f"pruning must be a Pruning policy, got {pruning!r}: write pruning=taulearn.Pruning(0.01)")
        steered = pruning is not None and pruning.targeted and pruning.penalised != "none"
        if steered and any(penalty.name == SteeredL1.name for penalty in self.penalties):
            raise ValueError(
                "penalties must not contain L1 where pruning has a target: the controller finds its weight"
            )
        self.past = History()
        self.state: Mapping[str, Any] | None = None
        self.losses: dict[int, float | Tensor] = {}
        self.recorder: Recorder | None = None
        self.pruner: Pruner | None = None
        self._measuring: ExitStack | None = None
        self._row: Tensor | None = None
        self._find_averages: Callable[[], Sequence[nn.Module]] = list

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        per_epoch: int,
        processes: int,
        averages: Callable[[], Sequence[nn.Module]],
    ) -> None:
        """Start beside a loop, from the record and the state of a checkpoint where these were set.

        Args:
            model: The model with time steps.
            optimizer: The optimiser of torch whose step it is.
            epochs: Number of epochs.
            per_epoch: Optimiser steps per epoch.
            processes: Number of processes that train the model.
            averages: Finds averaged copies of the model, or of what contains it, which lose the same layers.

        Raises:
            ValueError: If the model cannot be pruned, or not by this trainer, the optimiser lacks the time steps, or an
                average is that of another model.
        """
        refuse_distributed("model", model)
        if self.policy is not None and processes > 1:
            raise ValueError(
                f"pruning must be None where {processes} processes train in this trainer, whose wrapper around the "
                "model would keep averaging the gradients of deleted layers: use one process, or train with "
                "taulearn.fit under torchrun"
            )
        check_pruning(self.policy, model)
        check_holds(optimizer, model)
        check_holds_steps(optimizer, model)
        self.model, self.optimizer, self.steps = model, optimizer, time_steps_of(model)
        self._find_averages = averages
        self.averaged()
        warn_of_frozen(model)
        active = self.penalties
        if self.policy is not None:
            self.pruner = Pruner(self.policy, model, optimizer, epochs, per_epoch)
            if self.state is not None:
                self.pruner.load_state(self.state)
            else:
                self.pruner.begin(self.policy.example_inputs)
            if self.pruner.penalty is not None:
                active = (*active, self.pruner.penalty)
        self.active = active
        columns = ["loss", "total", *(f"penalty.{p.name}" for p in active)]
        past = self.past if self.past.num_iterations else None
        layers = max(self.steps.origin) + 1 if past is None else past.iterations["tau"].shape[1]
        self.recorder = Recorder(columns, layers, raw=self.steps.bounded, history=past)
        self.losses = {} if past is None else dict(enumerate(past.iterations["loss"].tolist(), start=1))
        self.iteration = self._seen = self.past.num_iterations
        self.epochs = epochs
        if past is None:
            self._record_epoch()
        self.past, self.state = History(), None  # another training begins anew

    def averaged(self) -> list[nn.Module]:
        """The models with time steps in the averages that there are now."""
        found = {part for whole in self._find_averages() for part in models_with_time_steps(whole).values()}
        shapes = [p.shape for p in self.model.parameters()]
        for part in found:
            if [p.shape for p in part.parameters()] != shapes:
                raise ValueError(
                    "averaged models must be copies of the model, got one whose parameters have other shapes: make "
                    "them from the model as it is when training begins"
                )
        return [part for part in found if part is not self.model]

    def constrained(self, until: ExitStack) -> None:
        """Let the optimiser's steps end with the proximal step and the projection, and be counted.

        Args:
            until: Its end is the end of that.
        """
        until.callback(register_projection(self.optimizer, self.model, self.active).remove)
        until.callback(self.optimizer.register_step_post_hook(lambda *_: self._count()).remove)

    def _count(self) -> None:
        """Record the step that was taken; one that a GradScaler skipped is none."""
        if self._row is None or any(bool(found.any()) for found in overflows(self.optimizer)):
            return
        assert self.recorder is not None
        self.recorder.add(self._row)
        self._row = None
        self.iteration += 1

    def warn_of_decay(self, remedy: str) -> None:
        """Say that the optimiser shrinks the time steps.

        Args:
            remedy: What to write instead.
        """
        group = group_of(self.optimizer, self.steps.values)
        decay = 0.0 if group is None else float(group.get("weight_decay", 0.0))
        if decay:
            warnings.warn(f"the optimizer shrinks the time steps by weight decay, {decay:g}: {remedy}", stacklevel=3)

    def warn_of_target(self) -> None:
        """Warn where training ended before the policy's target was reached."""
        if self.pruner is not None and (shortfall := self.pruner.shortfall(self.iteration)):
            warnings.warn(shortfall, stacklevel=3)

    def start_epoch(self, epoch: int) -> None:
        """Tell the penalties the epoch, from 0."""
        for penalty in self.active:
            penalty.start_epoch(epoch, self.epochs)

    def start_iteration(self) -> None:
        """Measure the forward passes that follow, where the policy asks for it."""
        if self._measuring is not None:
            return  # a trainer that accumulates gradients comes here for each part of a batch
        measuring = None if self.pruner is None else self.pruner.measuring(self.iteration)
        if measuring is not None:
            self._measuring = ExitStack()
            self._measuring.enter_context(measuring)

    def _measured(self) -> None:
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def before_step(self) -> None:
        """Add the penalties' gradients to those of the loss, and note the steps; gradients are complete."""
        self._measured()
        values = [penalty(self.model) for penalty in self.active]
        differentiated = [v for p, v in zip(self.active, values, strict=True) if p.differentiated and v.requires_grad]
        if differentiated:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(torch.stack(differentiated).sum(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        steps = self.steps
        unknown = [steps.values.new_full((), float("nan"))] * 2
        row = [torch.stack([*unknown, *(v.detach().to(steps.values.dtype) for v in values)]), steps.tau.detach()]
        if steps.bounded:
            row.append(steps.raw_tau.detach())
        self._row = torch.cat([part.clone() for part in row]).unsqueeze(0)

    def after_step(self, loss: Tensor | float | None, *, epoch: int) -> None:
        """Note the loss, and prune where the policy counts iterations; nothing where no step was taken since.

        Args:
            loss: Of the iteration, where known.
            epoch: Number of the epoch, from 1.
        """
        if self.iteration == self._seen:
            return  # gradients accumulate, or a GradScaler skipped the step
        self._seen = self.iteration
        if loss is not None:
            self.losses[self.iteration] = loss.detach() if isinstance(loss, Tensor) else loss
        if self.pruner is not None and self.pruner.every is not None:
            self._prune(epoch, epoch_ends=False)

    def end_epoch(self, epoch: int) -> None:
        """Prune where the policy counts epochs, and record the epoch.

        Args:
            epoch: Number of the epoch, from 1.
        """
        if self.pruner is not None and self.pruner.every is None:
            self._prune(epoch, epoch_ends=True)
        self._record_epoch()

    def _record_epoch(self) -> None:
        number = sum(p.numel() for p in self.model.parameters())
        self._flushed().add_epoch({"iteration": self.iteration, "layers": self.steps.num_steps, "parameters": number})

    def _prune(self, epoch: int, *, epoch_ends: bool) -> None:
        assert self.pruner is not None
        if not self.pruner.due(self.iteration, epoch_ends=epoch_ends):
            return
        self._measured()
        recorder = self._flushed()
        report = self._deleted()
        if report is not None:
            recorder.deletions += [
                Deletion(self.iteration, epoch, d.layer, d.share, d.parameters) for d in report.deleted
            ]
            if self.progress:
                sys.stdout.write(f"epoch {epoch}, iteration {self.iteration}: {report}\n")
                sys.stdout.flush()

    def _deleted(self) -> PruneReport | None:
        """Let the policy delete layers, in the model and its averages or in none of them."""
        assert self.pruner is not None
        averaged = self.averaged()
        with all_or_nothing([self.model, *averaged], self.optimizer):
            report = self.pruner.prune(self.iteration, None)
            if report is not None:
                for each in averaged:
                    prune(each, keep=report.kept)
        return report

    def _flushed(self) -> Recorder:
        assert self.recorder is not None
        self.recorder.flush(self.steps.origin)
        return self.recorder

    def end(self) -> None:
        """Leave the model as it was found, but trained."""
        self._measured()
        self._find_averages = list

    def history(self) -> History:
        """The record so far; losses that the trainer did not tell are NaN."""
        if self.recorder is None:
            return self.past
        history = self._flushed().history()
        if history.num_iterations:
            loss = np.full(history.num_iterations, np.nan)
            for iteration, value in self.losses.items():
                if 0 < iteration <= len(loss):
                    loss[iteration - 1] = float(value)
            columns = [history.iterations[f"penalty.{p.name}"] for p in self.active if p.differentiated]
            history.iterations |= {"loss": loss, "total": sum(columns, loss)}
        return history
