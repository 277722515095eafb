"""One optimiser step: plain, with a compiled objective, or several steps fused into one compiled function.

    plain      forward, backward, ``optimizer.step()``: any model, any optimiser, any option
    objective  the same with forward and backward compiled
    values     the objective, and the objective with its gradient, compiled (fast/line_search.py): for a line search
    fused      gradient, SGD update, projection and record of some steps in one compiled call (fast/fused.py)

All of them compute the same iterates up to rounding; :class:`Engine` chooses per batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .._batches import leading, split
from ..adaptivity.adaptation import Adaptation
from ..nn.pruned_models import wrapping_of
from ..nn.time_steps import time_steps_of
from ..optim import constrain_
from ..optim.projections import constrains_trials, searches
from .batches import LoaderBatches, TensorBatches
from .distributed import TrainingRanks, has_whole_batches, start_epoch
from .fast.compiler import compile_once
from .objective import Objective, StepOptions, as_float, autocast_of, input_dtype

if TYPE_CHECKING:  # loaded where steps are compiled
    from .fast.fused import FusedSGD
    from .fast.line_search import CompiledValues

Part = tuple[Any, Any, Tensor | None]  # inputs, targets, and what the part weighs

UNROLL = 6
"""Most steps per compiled call: a call costs a tenth of a millisecond, each step unrolled some seconds of compiling."""


class PlainStep:
    """Forward, backward, ``optimizer.step()``, proximal step and projection on one batch.

    In a :class:`~taulearn.optim.SteepestDescent` the last two follow every trial of the line search.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        ranks: TrainingRanks | None = None,
    ) -> None:
        self.objective, self.optimizer, self.options = objective, optimizer, options
        self.ranks = TrainingRanks() if ranks is None else ranks
        self.device = time_steps_of(objective.model).values.device

    def __call__(
        self,
        inputs: Any,
        targets: Any,
        evaluate: Callable[..., Any] | None = None,
        samples: int = 1,
        values: "CompiledValues | None" = None,
        measured: contextlib.AbstractContextManager[None] | None = None,
    ) -> Tensor:
        """Take one step, measured where it begins; returns the row of the record before it, (1, columns)."""
        records: list[Tensor] = []
        parts = self._parts(inputs, targets, samples)

        def closure() -> Any:
            if values is not None:
                ((x, z, weights),) = parts
                total, record = values.differentiate_(x, z, weights)
            else:
                self.optimizer.zero_grad()
                with contextlib.nullcontext() if records or measured is None else measured:
                    total, record = self._backward(evaluate or self.objective, parts)
            total, record = self.ranks.add_(self.objective.parameters(), total, record)
            records.append(record)
            return total

        def value() -> Tensor:
            if values is not None:
                return self.ranks.add(values.value(*parts[0]))
            return self.ranks.add(self._value(evaluate or self.objective, parts))

        if constrains_trials(self.optimizer):
            optimizer = cast(Any, self.optimizer)
            with optimizer.register_constraint(self._constrain):
                optimizer.step(closure, value)
        elif searches(self.optimizer):
            self.optimizer.step(closure)
            self._constrain()
        else:
            closure()
            if self.options.clip_norm is not None:
                self.ranks.clip_(self.objective.model, self.options.clip_norm)
            self.optimizer.step()
            self._constrain()
        if self.options.averaged is not None:
            if wrapping_of(self.objective.model) is not None:
                from ..wrapping.folding import fold_average

                fold_average(self.objective.model, self.options.averaged)
            self.options.averaged.update_parameters(self.objective.model)
        return records[0].unsqueeze(0)

    def _constrain(self) -> None:
        constrain_(self.objective.model, self.optimizer, self.objective.penalties)

    def _parts(self, inputs: Any, targets: Any, samples: int) -> list[Part]:
        """The parts in which a batch is taken, with what they weigh in it; None for a whole batch."""
        batch = inputs, targets
        number = max(1, min(self.options.accumulate, len(leading(batch)) // self.options.least))
        if number == 1 and self.ranks.size == 1:
            return [(inputs, targets, None)]
        parts = split(batch, number)
        weights = self.objective.weights(parts, self.ranks.add, counts=samples > 0)
        return [(*part, each) for part, each in zip(parts, weights, strict=True)]

    @torch.no_grad()
    def _value(self, evaluate: Callable[..., Any], parts: Sequence[Part]) -> Tensor:
        """The objective alone, in the parts in which :meth:`_backward` takes it."""
        with autocast_of(self.options.precision, self.device):
            totals = [evaluate(*part)[0] for part in parts]
        return torch.stack(totals).sum()

    def _backward(self, evaluate: Callable[..., Any], parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        totals, records = [], []
        for part in parts:
            with autocast_of(self.options.precision, self.device):
                total, record = evaluate(*part)
            total.backward()
            totals.append(total.detach())
            records.append(record)
        if len(parts) == 1:
            return totals[0], records[0]
        return torch.stack(totals).sum(), torch.stack(records).sum(0)


class Engine:
    """Runs through the batches of an epoch with the fastest kind of step that fits."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        batches: TensorBatches | LoaderBatches,
        options: StepOptions,
        *,
        compiled: bool,
        policies: Adaptation | None = None,
        single: bool = False,
        failed: Callable[[str], None] | None = None,
        ranks: TrainingRanks | None = None,
    ) -> None:
        self.objective, self.optimizer, self.batches, self.options = objective, optimizer, batches, options
        self.ranks, self.whole = TrainingRanks() if ranks is None else ranks, has_whole_batches(batches)
        self.plain = PlainStep(objective, optimizer, options, self.ranks)
        self.pruner = pruner = None if policies is None else policies.pruner
        self.refiner, self.failed = None if policies is None else policies.refiner, failed
        self._latest: Any = None  # the batch that was taken last, or its samples' numbers
        self.looks_back = pruner is not None and pruner.by_steps and pruner.every is not None
        intervals = () if pruner is None or self.looks_back else (pruner.every, pruner.measure_every)
        self.intervals = [every for every in intervals if every is not None]
        often = [*self.intervals, *([] if self.refiner is None else [self.refiner.rounds.every])]
        self.most = 1 if single else min(UNROLL, *often, UNROLL)
        if isinstance(batches, TensorBatches):
            self.most = min(self.most, batches.full)
        names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        self.hooked = any(getattr(optimizer, name, None) for name in names)
        self.rebuild(compiled)

    def rebuild(self, compiled: bool) -> None:
        """Follow a changed network; compiled functions of the old one are dropped."""
        self.compiled = compiled
        self.fused: FusedSGD | None = None
        self.values: CompiledValues | None = None
        self.evaluate: Callable[..., Any] | None = None
        self.kind, self.unroll = "eager", 1
        if compiled:
            self._compile()

    def _compile(self) -> None:
        from .fast.fused import FusedSGD, steps_per_call, why_not_fused, why_not_pure

        keys = isinstance(self.batches, LoaderBatches) and self.batches.keys is not None
        if keys or self.objective.only_eager:
            self.kind = f"eager ({'batches are dictionaries' if keys else self.objective.only_eager})"
            return
        if searches(self.optimizer):
            reason = why_not_pure(self.objective, self.options, self.batches)
            if reason is None:
                from .fast.line_search import CompiledValues

                self.values = CompiledValues(self.objective, self.batches.sample(), self.failed)
                self.kind = "compiled objective and gradient"
                return
        reason = why_not_fused(self.objective, self.optimizer, self.options, self.batches)
        if reason is None and self.hooked:
            reason = "the optimiser has hooks"
        if reason is None and self.ranks.size > 1:
            reason = "several processes average their gradients"
        if reason is None:
            self.unroll = steps_per_call(self.objective, self.most)
            sample = self.batches.sample()
            self.fused = FusedSGD(self.objective, self.optimizer, self.unroll, sample, self.plain, self.failed)
            self.kind = f"compiled, {self.unroll} SGD steps fused"
        else:
            self.evaluate = compile_once(self.objective.forward, failed=self.failed)
            self.kind = f"compiled objective ({reason})"

    def batch(self) -> Any:
        """The batch that was taken last, of all processes together where they share one, in the parts it comes in."""
        latest = self.batches.gather(self._latest) if isinstance(self.batches, TensorBatches) else self._latest
        latest = as_float(latest[0], input_dtype(self.objective.model)), *latest[1:]
        return split(latest, max(1, min(self.options.accumulate, len(leading(latest)) // self.options.least)))

    def epoch(self, epoch: int, start: int, iteration: int) -> Iterator[Tensor]:
        """Go through an epoch, rows by rows; the caller may prune and :meth:`rebuild` between two yields."""
        if isinstance(self.batches, LoaderBatches):
            start_epoch(self.batches, epoch)
            for whole in self.batches.epoch(epoch):
                self._latest = whole
                (inputs, targets), samples = self.ranks.share(whole, whole=self.whole)
                yield self._plain(self._measured(iteration), inputs, targets, samples, evaluate=self.evaluate)
                iteration += 1
            return
        size, order = self.batches.batch_size, self.batches.order(epoch)
        batch, pieces = start, self.batches.split(order)
        # callbacks had control between two epochs
        unchanged = self.fused is not None and self.fused.unchanged()
        stale = self.values if self.values is not None and not self.values.unchanged() else None
        while batch < len(self.batches):
            stops = [every - iteration % every for every in self.intervals]
            if self.refiner is not None and (following := self.refiner.next(iteration)) is not None:
                stops.append(following - iteration)
            until_stop = min(stops, default=self.unroll)
            fits = batch + self.unroll <= self.batches.full and self.unroll <= until_stop
            measured, rows = self._measured(iteration), None
            if measured is None and self.fused is not None and unchanged and fits and self.fused.ready():
                inputs, targets = self.batches.gather(order[batch * size : (batch + self.unroll) * size])
                rows = self._together(self.fused, inputs, targets, iteration)
            if rows is None:
                (index, _), samples = self.ranks.share((pieces[batch], None))
                inputs, targets = self.batches.gather(index)
                values = None if self.values is stale else self.values
                compiled = (self.evaluate, values) if batch < self.batches.full else ()
                rows = self._plain(measured, inputs, targets, samples, *compiled)
            batch += len(rows)
            iteration += len(rows)
            self._latest = pieces[batch - 1]
            yield rows

    def _together(self, fused: "FusedSGD", inputs: Tensor, targets: Tensor, iteration: int) -> Tensor | None:
        """Fused steps; None, with all as before them, where a layer has to go in their midst."""
        pruner, looks = self.pruner, []
        if pruner is not None and pruner.every is not None and self.looks_back and not pruner.over:
            looks = [i for i in range(1, self.unroll) if (iteration + i) % pruner.every == 0]
        if pruner is None or not looks:
            return fused(inputs, targets)
        put_back = fused.undo()
        rows = fused(inputs, targets)
        columns = self.objective.row.split(rows, time_steps_of(self.objective.model).num_steps)
        if pruner.idle(columns["tau"][looks]):  # each row is before its step
            return rows
        put_back()
        return None

    def _measured(self, iteration: int) -> contextlib.AbstractContextManager[None] | None:
        return None if self.pruner is None else self.pruner.measuring(iteration)

    def _plain(
        self,
        measured: contextlib.AbstractContextManager[None] | None,
        inputs: Any,
        targets: Any,
        samples: int,
        evaluate: Callable[..., Any] | None = None,
        values: "CompiledValues | None" = None,
    ) -> Tensor:
        """One plain step, uncompiled where it is measured."""
        if measured is not None:
            evaluate = values = None
        return self.plain(inputs, targets, evaluate, samples, values, measured)
