"""The training loop: epochs, iterations, pruning, evaluation, checkpoints, in the order in which they happen."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..adaptivity.coarsen import deleted_layers
from ..adaptivity.estimate import shares_of
from ..adaptivity.optimizer_state import check_holds_steps
from ..adaptivity.transaction import check_averaged
from ..nn.pruned_models import prunable_of
from ..nn.time_steps import time_steps_of
from ..optim.projections import suspended_projections
from .batches import LoaderBatches, TensorBatches
from .check_arguments import Metric, steps_each_iteration
from .distributed import CHANGED, TrainingRanks, change_alike
from .events import Diverged, EpochEnd, Interrupted, StopTraining
from .fast.compiler import worth_compiling
from .history import FLUSH_EVERY, Deletion, History
from .interruption import deferred
from .objective import Objective, StepOptions
from .parts import Parts, Position, Start
from .progress import Progress, epoch_line, layers_left
from .session import Session
from .step import Engine

if TYPE_CHECKING:
    from .run_folder import Run


@dataclass(frozen=True)
class Settings:
    """Options of the loop, besides the objects it works on; see ``fit`` for the meaning."""

    epochs: int
    validation: Any
    metrics: str | Sequence[str] | Mapping[str, Metric]
    callbacks: tuple[Callable[[EpochEnd], None], ...]
    compile: str
    checkpoint_every: int
    progress: bool
    terms: Mapping[str, Any]


class Loop:
    """One run of training."""

    def __init__(
        self,
        objective: Objective,
        batches: TensorBatches | LoaderBatches,
        parts: Parts,
        options: StepOptions,
        settings: Settings,
        folder: "Run | None",
        ranks: TrainingRanks,
    ) -> None:
        self.objective, self.batches, self.parts, self.options = objective, batches, parts, options
        self.settings, self.ranks = settings, ranks
        self.source, self.folder = folder, folder if ranks.first else None
        self.models = [parts.model] if parts.averaged is None else [parts.model, parts.averaged]
        self.model, self.steps = parts.model, time_steps_of(parts.model)
        self.per_iteration = steps_each_iteration(parts.scheduler)
        self.saved = 0
        self.total = settings.epochs * len(batches)
        if isinstance(batches, LoaderBatches):
            parts.generator = batches.loader.generator

    def run(self, *, resume: bool) -> History:
        """Train to the end, from the start or from the newest checkpoint."""
        try:
            self._run(resume)
        except (Diverged, Interrupted):
            self._warn_of_target()
            raise
        self._warn_of_target()
        if (pruner := self.session.pruner) is not None and not self.recorder.deletions and pruner.advice:
            self.progress.say(pruner.advice)
        return self.recorder.history()

    def _run(self, resume: bool) -> None:
        with self.ranks, deferred() as asked, suspended_projections(self.parts.optimizer, self.model):
            interrupted, epochs = self.ranks.agreed(asked), self._begin(resume)
            try:
                if self.fresh:
                    self._record_epoch(seconds=0.0, first=0)
                    self._checkpoint()
                for epoch in epochs:
                    if interrupted():
                        raise self._interrupted()
                    self._epoch(epoch, interrupted)
                    if self._end_of_epoch(epoch, interrupted):
                        break
            finally:
                self.progress.close(self.position.iteration)
                self.session.policies.end()
            self.ranks.written(self._save, self.model, self.parts.optimizer)

    def _warn_of_target(self) -> None:
        """Warn where training ended, in whatever way, before a policy's target was reached."""
        if self.ranks.first:
            self.session.warn_of_target(stacklevel=5)

    def _save(self) -> None:
        """Write what a finished run leaves; also what one killed behind its last checkpoint did not come to."""
        if self.folder is not None:
            from ..saving import save_model
            from .checkpoint import drop_old

            if not self.fresh:
                drop_old(self.folder.checkpoints)
                self.recorder.history().save(self.folder.history_path)
            save_model(self.model if self.folder.result is None else self.folder.result(), self.folder.path)
            if (policies := self.session.policies).targeted:
                self.folder.decide("target reached", "; ".join(policies.shortfall(self.position.iteration)) or "yes")

    def _begin(self, resume: bool) -> range:
        """Restore what is to be gone on with and make the engine; returns the epochs to come."""
        past = None
        self.position, epochs = Position(), self.settings.epochs
        if resume and self.source is not None and any(self.source.checkpoints.glob("*.safetensors")):
            from .checkpoint import load_checkpoint

            self.position, past, began, complaints = load_checkpoint(
                self.source.checkpoints, self.parts, self.settings.terms
            )
            self.saved = self.position.iteration
            for line in complaints if self.ranks.first else ():
                warnings.warn(line, stacklevel=4)
            if self.folder is not None:
                self.folder.change(epochs=epochs)
            self.position.stopped = self.position.stopped and epochs <= began.get("epochs", epochs)
        self.session = Session(
            self.model,
            self.parts.optimizer,
            self.objective.penalties,
            self.parts.policies,
            epochs=epochs,
            past=past,
            averages=lambda: [averaged.module for averaged in (self.parts.averaged,) if averaged is not None],
        )
        self.recorder = self.session.recorder
        self.fresh = past is None
        if self.fresh:
            self.position.compiled = self._decide_compile()
        self.ranks.begin(self.models, {**self.settings.terms, "the iteration": self.position.iteration})
        pruner, refiner = self.session.pruner, self.session.policies.refiner
        self.engine = Engine(
            self.objective,
            self.parts.optimizer,
            self.batches,
            self.options,
            compiled=self.position.compiled,
            policies=self.parts.policies,
            single=self.per_iteration,
            failed=self._compilation_failed,
            ranks=self.ranks,
        )
        if self.folder is not None:
            self.folder.decide("step", self.engine.kind)
            if self.fresh and pruner is not None and pruner.target is not None:
                self.folder.decide("target", str(pruner.target))
            if self.fresh and refiner is not None:
                self.folder.decide("refinement", f"{refiner.policy.target_blocks} layers, {refiner.rounds}")
        progress = self.settings.progress and self.ranks.first
        self.progress = Progress(self.total, self.position.iteration, enabled=progress)
        return range(epochs if self.position.stopped else self.position.epoch, epochs)

    def _epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        """All iterations of one epoch, from the position on."""
        self.model.train()
        self.ranks.reseed(self.settings.terms["seed"], epoch)
        self.session.start_epoch(epoch)
        position = self.position
        began, before, pending, looked = time.perf_counter(), position.seconds, 0, False
        for rows in self.engine.epoch(epoch, position.batch, position.iteration):
            position.iteration += len(rows)
            position.batch += len(rows)
            self.session.take(rows)
            pending += len(rows)
            if self.per_iteration and self.parts.scheduler is not None:
                _step(self.parts.scheduler)
            ends = position.batch >= len(self.batches)
            if due := self.session.due(epoch_ends=ends):
                self._change(due, epoch, trusting=looked)
                looked = True
            if pending >= FLUSH_EVERY:
                self._flush()
                pending = 0
            self.progress.advance(
                position.iteration,
                rows,
                f"epoch {epoch + 1}/{self.settings.epochs}, {layers_left(self.steps.num_steps)}",
            )
            if interrupted() and not ends:
                position.seconds = before + time.perf_counter() - began
                if not isinstance(self.batches, LoaderBatches):
                    self._check(self.model.parameters())
                    self._checkpoint()
                raise self._interrupted()
        self._flush()
        self._check(self.model.parameters())
        position.seconds = before + time.perf_counter() - began

    def _change(self, due: tuple[Any, ...], epoch: int, *, trusting: bool) -> None:
        """Let the policies that are due change the layers; the record, the compiled step and the optimiser follow.

        Trusting that the optimiser still holds the model's parameters, the steps are looked at first.
        """
        pruner, policies = self.session.pruner, self.session.policies
        alone = pruner if due == (pruner,) else None
        idle = alone is not None and alone.by_steps and alone.idle(self.steps.tau.detach()[None])
        if idle and trusting and self.ranks.size == 1:
            return
        self._flush()
        self._check([self.steps.values])
        alike = partial(change_alike, self.ranks, policies)
        changes = self.session.change_grid(epoch + 1, due, self.engine.batch, alike)
        for report, _ in changes:
            self.progress.say(f"epoch {epoch + 1}, iteration {self.position.iteration}: {report}")
        if not changes:
            return
        self.position.compiled = self.position.compiled and self._decide_compile()
        self.engine.rebuild(self.position.compiled)

    def _end_of_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> bool:
        """Evaluate, record, step the scheduler, tell the callbacks, save; returns whether training ends here."""
        position, scheduler = self.position, self.parts.scheduler
        first, seconds = position.iteration - position.batch, position.seconds
        position.epoch, position.batch, position.seconds = epoch + 1, 0, 0.0
        self.ranks.copy_first(self.models, buffers_alone=True)
        row = self._record_epoch(seconds=seconds, first=first)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(row.get("validation.loss", row["train.loss"]))
        elif scheduler is not None and not self.per_iteration:
            _step(scheduler)
        self.progress.say(epoch_line(epoch + 1, self.settings.epochs, row))
        end = EpochEnd(
            epoch + 1, position.iteration, row, self.model, self.parts.optimizer, tuple(self.recorder.deletions)
        )
        stop, before = epoch + 1 == self.settings.epochs, self._layers() if self.settings.callbacks else {}
        for callback in self.settings.callbacks:
            try:
                callback(end)
            except StopTraining:
                stop = position.stopped = True
        if before and self.steps.origin != tuple(before):
            self._follow_callbacks(epoch, before)
        stop, position.stopped = self.ranks.any(stop), self.ranks.any(position.stopped)
        self.ranks.same(f"the time steps after iteration {position.iteration}", self.steps.tau.tolist(), CHANGED)
        if stop and self.folder is not None:
            self.folder.retire_model()
        if stop or interrupted() or (epoch + 1) % self.settings.checkpoint_every == 0:
            self._checkpoint()
        if interrupted() and not stop:
            raise self._interrupted()
        return stop

    def _layers(self) -> dict[int, tuple[float, int]]:
        """By the numbers of the layers, what a record of their deletion says: share and variables."""
        model = prunable_of(self.model)
        sizes = shares_of(self.steps.tau.detach(), model.scheme.step_power).tolist()
        return {each.layer: (each.share, each.parameters) for each in deleted_layers(model, enumerate(sizes))}

    def _follow_callbacks(self, epoch: int, before: Mapping[int, tuple[float, int]]) -> None:
        """Go on with the layers that a callback left, which found these."""
        check_holds_steps(self.parts.optimizer, self.model, "hand it to taulearn.refine and prune")
        if self.parts.averaged is not None:
            check_averaged(self.parts.averaged, self.model)
        gone = {number: what for number, what in before.items() if number not in self.steps.origin}
        now = self.position.iteration
        self.recorder.deletions += [Deletion(now, epoch + 1, number, *what) for number, what in gone.items()]
        self.session.note_new_layers(epoch + 1)
        self.session.policies.follow_grid(now, [*before])
        self.position.compiled = self.position.compiled and self._decide_compile()
        self.engine.rebuild(self.position.compiled)

    def _record_epoch(self, *, seconds: float, first: int) -> dict[str, float]:
        """One row per epoch, with the validation figures of the network as it is now."""
        row: dict[str, float] = {
            "iteration": self.position.iteration,
            "layers": self.steps.num_steps,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": seconds,
            "train.loss": self.recorder.mean_since("loss", first),
            "train.total": self.recorder.mean_since("total", first),
        }
        if self.settings.validation is not None:
            row |= self.ranks.decided(self._evaluate)
        self.recorder.add_epoch(row)
        return row

    def _evaluate(self) -> dict[str, float]:
        from .metrics import evaluate

        figures = evaluate(
            self.model, self.settings.validation, loss=self.objective.loss, metrics=self.settings.metrics
        )
        if self.position.iteration == 0 and not math.isfinite(figures["loss"]):
            from .divergence import check_validation

            check_validation(self.settings.validation)
        return {f"validation.{name}": value for name, value in figures.items()}

    def _flush(self) -> None:
        """Bring the record to the host and end the run if the objective is no longer finite."""
        total = self.session.flush()
        bad = np.flatnonzero(~np.isfinite(total))
        if len(bad):
            at = self.recorder.history().num_iterations - len(total) + int(bad[0])
            raise self._diverged(f"the loss is not finite from iteration {at + 1} on", at, self._cause(at))

    def _cause(self, at: int) -> str | None:
        from .divergence import cause_in

        return cause_in(self.batches, at, self.objective.countings[0])

    def _check(self, tensors: Iterable[Tensor]) -> None:
        """End the run if the last step, whose loss was finite, left weights that are not: they must not be saved."""
        if not self.ranks.finite(tensors):
            at = self.position.iteration
            raise self._diverged(f"the weights are not finite after iteration {at}", at)

    def _diverged(self, what: str, at: int, cause: str | None = None) -> Diverged:
        from .divergence import diverged

        checkpoints = None if self.source is None else self.source.checkpoints
        return diverged(what, at, self.recorder.history(), self.objective.row.numbers, checkpoints, cause)

    def _interrupted(self) -> Interrupted:
        """The exception that ends the run after Ctrl-C; it names iterations that no checkpoint holds."""
        at, every = self.position.iteration, self.settings.checkpoint_every
        detail, lost = f" after iteration {at}" if at else " before its first iteration", at - self.saved
        if lost and self.source is not None:
            detail += (
                f"; the last checkpoint is that of iteration {self.saved}, and what came since is lost: a Dataset or a "
                f"DataLoader cannot start in the middle of an epoch (checkpoint_every={every})"
            )
        return Interrupted(self.source, detail)

    def _checkpoint(self) -> None:
        if self.source is not None:
            self._flush()
            self.ranks.written(self._write_checkpoint, self.model, self.parts.optimizer)
            self.saved = self.position.iteration

    def _write_checkpoint(self) -> None:
        if self.folder is not None:
            from .checkpoint import save_checkpoint

            history = self.recorder.history()
            start = Start(self.settings.terms, self.folder.config)
            save_checkpoint(self.folder.checkpoints, self.parts, self.position, history, start)
            history.save(self.folder.history_path)

    def _compilation_failed(self, reason: str) -> None:
        """Record that steps are eager from now on; a resumed run does not try again."""
        self.position.compiled = False
        if self.folder is not None:
            self.folder.decide("step", f"eager: compilation failed ({reason})")

    def _decide_compile(self) -> bool:
        """Whether to compile for the iterations ahead: from counts, never from timings."""
        answer, why = worth_compiling(self.settings.compile, self.total - self.position.iteration)
        if self.folder is not None:
            after = f" after iteration {self.position.iteration}" if self.position.iteration else ""
            self.folder.decide(f"compile{after}", why)
        return answer


def _step(scheduler: LRScheduler) -> None:
    """One step, without torch's warning that no optimiser step came before: fused steps are none that it can see."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before", category=UserWarning
        )
        scheduler.step()
