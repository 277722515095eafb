"""The training loop: epochs, iterations, pruning, evaluation, checkpoints, in the order in which they happen."""

import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from ..optim import register_projection
from ..penalties import time_steps_of
from .batches import LoaderBatches, TensorBatches
from .checkpoint import Parts, Position, load_checkpoint, save_checkpoint
from .events import Diverged, EpochEnd, Interrupted, StopTraining
from .history import Deletion, History, Recorder
from .metrics import Metric, evaluate
from .objective import Objective, StepOptions
from .progress import Progress
from .pruner import Pruner
from .run import Run
from .step import Engine

COMPILE_PAYS_FROM = 40_000
"""Iterations ahead from which "auto" compiles: compiling takes some 20 s and saves about a millisecond an iteration."""

_FLUSH_EVERY = 1000


@dataclass(frozen=True)
class Settings:
    """What the loop needs besides the objects it works on; see ``fit`` for the meaning."""

    epochs: int
    validation: Any
    metrics: str | Mapping[str, Metric]
    callbacks: tuple[Callable[[EpochEnd], None], ...]
    compile: str
    checkpoint_every: int
    progress: bool


class Loop:
    """One run of training.

    Args:
        objective: What is minimised.
        batches: Where batches come from.
        parts: Model, optimiser, scheduler, averaged weights.
        options: What a step does besides.
        settings: The rest.
        folder: Where the run is written, or None.
    """

    def __init__(
        self,
        objective: Objective,
        batches: TensorBatches | LoaderBatches,
        parts: Parts,
        options: StepOptions,
        settings: Settings,
        folder: Run | None,
    ) -> None:
        self.objective, self.batches, self.parts, self.options = objective, batches, parts, options
        self.settings, self.folder = settings, folder
        self.model, self.steps = parts.model, time_steps_of(parts.model)
        self.per_iteration = isinstance(parts.scheduler, OneCycleLR | CyclicLR)
        self.total = settings.epochs * len(batches)
        if isinstance(batches, LoaderBatches):
            parts.generator = batches.loader.generator

    def run(self, *, resume: bool) -> History:
        """Train to the end, from the start or from the newest checkpoint."""
        layers, past = max(self.steps.origin) + 1, None
        self.position = Position()
        if resume and self.folder is not None and any(self.folder.checkpoints.glob("*.safetensors")):
            self.position, past, complaints = load_checkpoint(self.folder.checkpoints, self.parts)
            for line in complaints:
                warnings.warn(line, stacklevel=3)
        if past is not None and "tau" in past.iterations:
            layers = past.iterations["tau"].shape[1]
        self.recorder = Recorder(
            self.objective.columns,
            layers,
            raw=self.steps.bounded,
            depths=self.objective.at_each_depth,
            history=past,
        )
        if past is None:
            self.position.compiled = self._decide_compile()
        pruner = self.parts.pruner
        self.engine = Engine(
            self.objective,
            self.parts.optimizer,
            self.batches,
            self.options,
            compiled=self.position.compiled,
            pruner=pruner,
            single=self.per_iteration,
        )
        if self.folder is not None:
            self.folder.decide("step", self.engine.kind)
            if pruner is not None and pruner.target is not None:
                self.folder.decide("target", str(pruner.target))
        self.progress = Progress(self.total, self.position.iteration, enabled=self.settings.progress)
        hook = register_projection(self.parts.optimizer, self.model, self.objective.penalties)
        try:
            if past is None:
                self._record_epoch(seconds=0.0, first=0)
                self._checkpoint()
            with _interruptible() as interrupted:
                for epoch in range(self.position.epoch, self.settings.epochs):
                    self._epoch(epoch, interrupted)
                    if self._end_of_epoch(epoch, interrupted):
                        break
        finally:
            hook.remove()
            self.progress.close(self.position.iteration)
        if self.folder is not None:
            from ..saving import save_model

            save_model(self.model, self.folder.path)
        return self.recorder.history()

    def _epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        """All iterations of one epoch, from the position on."""
        self.model.train()
        for penalty in self.objective.penalties:
            penalty.start_epoch(epoch, self.settings.epochs)
        position, pruner = self.position, self.parts.pruner
        began, before, pending = time.perf_counter(), position.seconds, 0
        for rows in self.engine.epoch(epoch, position.batch, position.iteration):
            position.iteration += len(rows)
            position.batch += len(rows)
            self.recorder.add(rows)
            pending += len(rows)
            if self.per_iteration and self.parts.scheduler is not None:
                _step(self.parts.scheduler)
            ends = position.batch >= len(self.batches)
            if pruner is not None and pruner.due(position.iteration, epoch_ends=ends):
                self._prune(pruner, epoch)
            if pending >= _FLUSH_EVERY:
                self._flush()
                pending = 0
            self.progress.advance(
                position.iteration, rows, f"epoch {epoch + 1}/{self.settings.epochs}, {_layers(self.steps.num_steps)}"
            )
            if interrupted() and not ends:
                position.seconds = before + time.perf_counter() - began
                if not isinstance(self.batches, LoaderBatches):
                    self._check(self.model.parameters())
                    self._checkpoint()
                raise Interrupted(self.folder)
        self._flush()
        self._check(self.model.parameters())
        position.seconds = before + time.perf_counter() - began

    def _prune(self, pruner: Pruner, epoch: int) -> None:
        """Delete what the policy deletes; the record, the compiled step and the optimiser follow."""
        self._flush()
        self._check([self.steps.values])
        report = pruner.prune(self.position.iteration, self.parts.averaged)
        if report is None:
            return
        for d in report.deleted:
            self.recorder.deletions.append(Deletion(self.position.iteration, epoch + 1, d.layer, d.share, d.parameters))
        self.progress.say(f"epoch {epoch + 1}, iteration {self.position.iteration}: {report}")
        self.position.compiled = self.position.compiled and self._decide_compile()
        self.engine.rebuild(self.position.compiled)

    def _end_of_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> bool:
        """Evaluate, record, step the scheduler, tell the callbacks, save; returns whether training ends here."""
        position, scheduler = self.position, self.parts.scheduler
        first, seconds = position.iteration - position.batch, position.seconds
        position.epoch, position.batch, position.seconds = epoch + 1, 0, 0.0
        row = self._record_epoch(seconds=seconds, first=first)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(row.get("validation.loss", row["train.loss"]))
        elif scheduler is not None and not self.per_iteration:
            _step(scheduler)
        self.progress.say(_line(epoch + 1, self.settings.epochs, row))
        end = EpochEnd(
            epoch + 1, position.iteration, row, self.model, self.parts.optimizer, tuple(self.recorder.deletions)
        )
        stop = last = epoch + 1 == self.settings.epochs
        for callback in self.settings.callbacks:
            try:
                callback(end)
            except StopTraining:
                stop = True
        if stop or interrupted() or (epoch + 1) % self.settings.checkpoint_every == 0:
            self._checkpoint()
        if interrupted() and not last:
            raise Interrupted(self.folder)
        return stop

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
            figures = evaluate(
                self.model, self.settings.validation, loss=self.objective.loss, metrics=self.settings.metrics
            )
            row |= {f"validation.{name}": value for name, value in figures.items()}
        self.recorder.add_epoch(row)
        return row

    def _flush(self) -> None:
        """Bring the record to the host and end the run if the objective is no longer finite."""
        total = self.recorder.flush(self.steps.origin)
        bad = np.flatnonzero(~np.isfinite(total))
        if len(bad):
            at = self.recorder.history().num_iterations - len(total) + int(bad[0])
            raise self._diverged(f"the loss is not finite from iteration {at + 1} on", at)

    def _check(self, tensors: Iterable[Tensor]) -> None:
        """End the run if the last step, whose loss was finite, left weights that are not: they must not be saved."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            at = self.position.iteration
            raise self._diverged(f"the weights are not finite after iteration {at}", at)

    def _diverged(self, what: str, at: int) -> Diverged:
        """The error that says what happened after ``at`` good iterations, and what may help."""
        columns = self.recorder.history().iterations
        last = "there was no finite value before"
        if at > 0:
            values = ", ".join(f"{name} = {columns[name][at - 1]:.6g}" for name in self.objective.columns)
            tau = np.round(columns["tau"][at - 1], 4).tolist()
            last = f"last finite values, at iteration {at}: {values}, tau = {tau}"
        kept = f"; the last good checkpoint in {self.folder.checkpoints} is kept" if self.folder is not None else ""
        return Diverged(
            f"{what}; {last}{kept}. Lower the learning rate (lr, tau_lr), clip gradients (clip_norm), "
            "or bound the steps (constraint, lower_bound, penalties.TimeHorizon)"
        )

    def _checkpoint(self) -> None:
        if self.folder is not None:
            self._flush()
            history = self.recorder.history()
            save_checkpoint(self.folder.checkpoints, self.parts, self.position, history)
            history.save(self.folder.history_path)

    def _decide_compile(self) -> bool:
        """Whether to compile for the iterations ahead: from counts, never from timings."""
        mode, ahead = self.settings.compile, self.total - self.position.iteration
        if mode == "never":
            answer, why = False, "never (as asked)"
        elif not _compiler_found():
            answer, why = False, "eager: no C++ compiler was found (install g++, or set CXX)"
            if mode == "always" or ahead >= COMPILE_PAYS_FROM:
                warnings.warn(f"training runs {why}", stacklevel=4)
        elif mode == "always":
            answer, why = True, "always (as asked)"
        else:
            answer = ahead >= COMPILE_PAYS_FROM
            kind = "compiled" if answer else "eager"
            why = f"{kind}: {ahead} iterations ahead, compiling pays from {COMPILE_PAYS_FROM}"
        if self.folder is not None:
            after = f" after iteration {self.position.iteration}" if self.position.iteration else ""
            self.folder.decide(f"compile{after}", why)
        return answer


def _compiler_found() -> bool:
    if torch.cuda.is_available():
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))


def _layers(number: int) -> str:
    return f"{number} layer" if number == 1 else f"{number} layers"


def _step(scheduler: LRScheduler) -> None:
    """One step, without torch's warning that no optimiser step came before: fused steps are none that it can see."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before", category=UserWarning
        )
        scheduler.step()


def _line(epoch: int, epochs: int, row: Mapping[str, float]) -> str:
    """An epoch in one line."""
    parts = [f"epoch {epoch:>{len(str(epochs))}}/{epochs}", f"loss {row['train.loss']:.4f}"]
    parts += [
        f"{name.removeprefix('validation.')} {value:.4f}"
        for name, value in row.items()
        if name.startswith("validation.") and name != "validation.loss"
    ]
    if "validation.accuracy" not in row and "validation.loss" in row:
        parts.append(f"validation loss {row['validation.loss']:.4f}")
    return "  ".join([*parts, _layers(int(row["layers"])), f"{row['seconds']:.1f} s"])


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a question the loop can ask between two steps; the second one ends at once."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(*_: object) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
