"""One optimiser step, three ways: plain, with a compiled objective, or several steps fused into one compiled function.

    plain      forward, backward, ``optimizer.step()``: any model, any optimiser, any option
    objective  the same with forward and backward compiled
    fused      gradient, SGD update, projection and record of some steps in one compiled call (training/fused.py)

All three compute the same iterates up to rounding; :class:`Engine` chooses per batch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .batches import LoaderBatches, TensorBatches
from .compiler import compile_once
from .fused import UNROLL, FusedSGD, has_hooks, steps_per_call, why_not_fused
from .objective import Objective, StepOptions


class PlainStep:
    """Forward, backward and ``optimizer.step()`` on one batch.

    Args:
        objective: What is minimised.
        optimizer: Any torch optimiser; those that ask for a closure get one.
        options: Clipping, accumulation, precision, averaging.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, options: StepOptions) -> None:
        self.objective, self.optimizer, self.options = objective, optimizer, options
        self.wants_closure = isinstance(optimizer, torch.optim.LBFGS)

    def __call__(self, inputs: Tensor, targets: Tensor, evaluate: Callable[..., Any] | None = None) -> Tensor:
        """Take one step.

        Args:
            inputs: (batch, ...).
            targets: (batch, ...).
            evaluate: A compiled twin of the objective for full batches, or None.

        Returns:
            The record before the step, (1, columns).
        """
        records: list[Tensor] = []

        def closure() -> Any:
            self.optimizer.zero_grad()
            total, record = self._backward(evaluate or self.objective, inputs, targets)
            records.append(record)
            return total

        if self.wants_closure:
            self.optimizer.step(closure)
        else:
            closure()
            if self.options.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.objective.model.parameters(), self.options.clip_norm)
            self.optimizer.step()
        if self.options.averaged is not None:
            self.options.averaged.update_parameters(self.objective.model)
        return records[0].unsqueeze(0)

    def _backward(self, evaluate: Callable[..., Any], inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        autocast: Any = contextlib.nullcontext()
        if self.options.precision == "bf16":
            autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16)
        if self.options.accumulate == 1:
            with autocast:
                total, record = evaluate(inputs, targets)
            total.backward()
            return total.detach(), record
        totals, sums = [], []
        for x, z in zip(inputs.chunk(self.options.accumulate), targets.chunk(self.options.accumulate), strict=True):
            with autocast:
                total, record = evaluate(x, z)
            weight = len(x) / len(inputs)
            (weight * total).backward()
            totals.append(weight * total.detach())
            sums.append(weight * record)
        return torch.stack(totals).sum(), torch.stack(sums).sum(0)


class Engine:
    """Runs through the batches of an epoch with the fastest kind of step that fits.

    Args:
        objective: What is minimised.
        optimizer: Any torch optimiser; hooks that it has now keep the steps from being fused.
        batches: Where batches come from.
        options: What a step does besides.
        compiled: Whether to compile at all.
        stop_every: Number of iterations after which the caller must get control (to prune), or None.
        single: Whether the caller must get control after each iteration (schedulers that change per iteration).
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        batches: TensorBatches | LoaderBatches,
        options: StepOptions,
        *,
        compiled: bool,
        stop_every: int | None = None,
        single: bool = False,
    ) -> None:
        self.objective, self.optimizer, self.batches, self.options = objective, optimizer, batches, options
        self.plain = PlainStep(objective, optimizer, options)
        self.stop_every = stop_every
        self.most = 1 if single else min(UNROLL, stop_every or UNROLL)
        if isinstance(batches, TensorBatches):
            self.most = min(self.most, batches.full)
        self.hooked = has_hooks(optimizer)
        self.rebuild(compiled)

    def rebuild(self, compiled: bool) -> None:
        """Follow a changed network; compiled functions of the old one are dropped."""
        self.compiled = compiled
        self.fused: FusedSGD | None = None
        self.evaluate: Callable[..., Any] | None = None
        self.kind, self.unroll = "eager", 1
        if not compiled:
            return
        reason = why_not_fused(self.objective, self.optimizer, self.options, self.batches)
        if reason is None and self.hooked:
            reason = "the optimiser has hooks"
        if reason is None:
            self.unroll = steps_per_call(self.objective, self.most)
            self.fused = FusedSGD(self.objective, self.optimizer, self.unroll, self.batches.sample(), self.plain)
            self.kind = f"compiled, {self.unroll} SGD steps fused"
        else:
            self.evaluate = compile_once(self.objective.forward)
            self.kind = f"compiled objective ({reason})"

    def epoch(self, epoch: int, start: int, iteration: int) -> Iterator[Tensor]:
        """Go through an epoch; the caller may prune and :meth:`rebuild` between two yields.

        Args:
            epoch: Number of the epoch, from 0; decides the order.
            start: First batch.
            iteration: Number of iterations taken before.

        Yields:
            Records (k, columns) of the k iterations just taken.
        """
        if isinstance(self.batches, LoaderBatches):
            for inputs, targets in self.batches.epoch(epoch):
                yield self.plain(inputs, targets, self.evaluate)
            return
        size, order = self.batches.batch_size, self.batches.order(epoch)
        batch = start
        unchanged = self.fused is not None and self.fused.unchanged()  # callbacks had control between two epochs
        while batch < len(self.batches):
            until_stop = self.unroll if self.stop_every is None else self.stop_every - iteration % self.stop_every
            fits = batch + self.unroll <= self.batches.full and self.unroll <= until_stop
            if self.fused is not None and unchanged and fits and self.fused.ready():
                inputs, targets = self.batches.gather(order[batch * size : (batch + self.unroll) * size])
                rows = self.fused(inputs, targets)
            else:
                inputs, targets = self.batches.gather(order[batch * size : (batch + 1) * size])
                rows = self.plain(inputs, targets, self.evaluate if len(inputs) == size else None)
            batch += len(rows)
            iteration += len(rows)
            yield rows
