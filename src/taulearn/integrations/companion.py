"""What the callbacks do beside another trainer's loop: penalties, projection, pruning, record."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._deletion import check_holds, check_holds_steps
from .._distributed import refuse_distributed
from ..nn.time_steps import TimeSteps
from ..optim import group_of, register_projection
from ..penalties import Penalty, time_steps_of
from ..pruning import Pruning
from ..training.checks import check_pruning
from ..training.history import Deletion, History, Recorder
from ..training.objective import as_penalties
from ..training.pruner import Pruner


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
    found = [
        part
        for part in module.modules()
        if isinstance(getattr(part, "time_steps", None), TimeSteps) and not hasattr(part, "_orig_mod")
    ]
    if len(found) != 1:
        raise TypeError(
            f"model must contain one model with time steps, got a {type(module).__name__} with {len(found)}: build it "
            "with taulearn.nn, or wrap it with taulearn.wrap before it is handed to the trainer"
        )
    return found[0]


class Companion:
    """The training of time steps beside another trainer's loop.

    Args:
        penalties: Added to the loss.
        pruning: When and what is deleted. None: nothing.
        progress: Whether deletions are printed.

    Raises:
        TypeError: If ``pruning`` is no policy.
        ValueError: If a penalty needs data, which callbacks do not have.
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
        self.past = History()
        self.state: Mapping[str, Any] | None = None
        self.losses: dict[int, float | Tensor] = {}
        self.recorder: Recorder | None = None
        self.pruner: Pruner | None = None
        self._measuring: ExitStack | None = None

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, epochs: int, per_epoch: int, processes: int
    ) -> None:
        """Start beside a loop, from the record and the state of a checkpoint where these were set.

        Args:
            model: The model with time steps.
            optimizer: The optimiser of torch whose step it is.
            epochs: Number of epochs.
            per_epoch: Optimiser steps per epoch.
            processes: Number of processes that train the model.

        Raises:
            ValueError: If the model cannot be pruned, or not by this trainer, or the optimiser lacks the time steps.
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
        self.iteration, self.epochs = self.past.num_iterations, epochs
        if past is None:
            self._record_epoch()
        self.past, self.state = History(), None  # another training begins anew

    def constrained(self) -> RemovableHandle:
        """Let the optimiser's steps end with the proximal step and the projection, until ``remove()``."""
        return register_projection(self.optimizer, self.model, self.active)

    def warn_of_decay(self, remedy: str) -> None:
        """Say that the optimiser shrinks the time steps.

        Args:
            remedy: What to write instead.
        """
        group = group_of(self.optimizer, self.steps.values)
        decay = 0.0 if group is None else float(group.get("weight_decay", 0.0))
        if decay:
            warnings.warn(f"the optimizer shrinks the time steps by weight decay, {decay:g}: {remedy}", stacklevel=3)

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
        """Add the penalties' gradients to those of the loss, and record the steps; gradients are complete."""
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
        assert self.recorder is not None
        self.recorder.add(torch.cat([part.clone() for part in row]).unsqueeze(0))
        self.iteration += 1

    def after_step(self, loss: Tensor | float | None, *, epoch: int) -> None:
        """Note the loss, and prune where the policy counts iterations.

        Args:
            loss: Of the iteration, where known.
            epoch: Number of the epoch, from 1.
        """
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
        report = self.pruner.prune(self.iteration, None)
        if report is not None:
            recorder.deletions += [
                Deletion(self.iteration, epoch, d.layer, d.share, d.parameters) for d in report.deleted
            ]
            if self.progress:
                sys.stdout.write(f"epoch {epoch}, iteration {self.iteration}: {report}\n")
                sys.stdout.flush()

    def _flushed(self) -> Recorder:
        assert self.recorder is not None
        self.recorder.flush(self.steps.origin)
        return self.recorder

    def end(self) -> None:
        """Leave the model as it was found, but trained."""
        self._measured()

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
