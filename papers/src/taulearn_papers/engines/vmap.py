"""Members of equal structure trained at once in this process, which fills a GPU that one small network leaves idle.

Members that differ in nothing but seed and learning rates form a group. When layers of some are deleted, those are
trained on with others of their new depth. Members whose training is not plain SGD on whole batches are run one by one,
as are those of a group that cannot go on together. There are no checkpoints on the way: an interrupted group begins
anew.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taulearn.adaptivity.coarsen import prune
from taulearn.adaptivity.policies import Pruning
from taulearn.app import build
from taulearn.app.members import Busy, Event, Member, Report, conclude, is_finished, locked
from taulearn.app.run_members import Options, attempt
from taulearn.app.train import make_network, record_of
from taulearn.report import write_html
from taulearn.saving import save_model
from taulearn.training import Run, evaluate
from taulearn.training.batches import TensorBatches
from taulearn.training.fast.compiler import worth_compiling
from taulearn.training.fast.fused import why_not_pure
from taulearn.training.history import Deletion, Recorder
from taulearn.training.objective import Objective, StepOptions
from taulearn.training.thinned_records import thinned

from .stacked_networks import GRAPH_STEPS, Stack, Trainee

DIVERGED = "the loss or a parameter is not finite: lower the learning rate, clip gradients, or bound the steps"


def run(members: Sequence[Member], out: Path, report: Report, options: Options) -> None:
    """Run all members, group by group."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for group in grouped(members):
            # on a GPU a single one gains, too: its steps are CUDA graphs
            together = why_alone(group[0]) is None and (len(group) > 1 or torch.cuda.is_available())
            for member in _run_group(group, out, report) if together else group:
                report(attempt(member, out, report))
    finally:
        torch.set_num_threads(before)


def _run_group(group: Sequence[Member], out: Path, report: Report) -> list[Member]:
    """Train members at once; returns those that are left to be run one by one, when their locks are free again."""
    with contextlib.ExitStack() as locks:
        mine = []
        for member in group:
            try:
                member.folder(out).parent.mkdir(parents=True, exist_ok=True)
                locks.enter_context(locked(member, out))
                if is_finished(member, out):
                    report(Event("finished", member.name, member.epochs))
                else:
                    mine.append(member)
            except Busy:
                report(Event("skipped", member.name, text="another process trains it"))
            except Exception as error:  # noqa: BLE001  the others are trained
                report(Event("failed", member.name, text=_words(error)))
        if not mine:
            return []
        for member in mine:
            report(Event("started", member.name))
        ended: set[str] = set()

        def followed(event: Event) -> None:
            ended.update([event.member] if event.kind in ("finished", "failed") else [])
            report(event)

        try:
            Group(mine, followed).train(out)
        except Exception as error:  # noqa: BLE001  what goes wrong in one group must not end the others
            left = [member for member in mine if member.name not in ended]
            count = f"{len(left)} of {len(mine)} members"
            warnings.warn(f"trained one by one instead of at once: {count} ({_words(error)})", stacklevel=2)
            return left
    return []


class Group:
    """The training of one group."""

    def __init__(self, members: Sequence[Member], report: Report) -> None:
        self.report, self.began = report, time.perf_counter()
        first = members[0].config
        assert first is not None
        self.config, self.device = first, build.make_device(first)
        self.splits = build.load_splits(first)
        _, loss = build.make_loss(first, classes=self.splits.classes is not None)
        train = [tensor.to(self.device) for tensor in self.splits.train]
        self.held_out = [tensor.to(self.device) for tensor in self.splits.validation]
        self.policy = _policy(members[0])
        self.trainees: list[Trainee] = []
        for member in members:
            try:
                self.trainees.append(self._trainee(member, loss, train))
            except Exception as error:  # noqa: BLE001  the others are trained
                self.report(Event("failed", member.name, text=_words(error)))
        self.per_epoch = len(self.trainees[0].batches) if self.trainees else 0
        for each in self.trainees[:1]:
            if (reason := why_not_pure(each.objective, StepOptions(), each.batches)) is not None:
                raise ValueError(f"the step is not a pure function, {reason}")

    def _trainee(self, member: Member, loss: Callable[[Tensor, Tensor], Tensor], train: list[Tensor]) -> Trainee:
        config = member.config
        assert config is not None
        torch.manual_seed(config.seed)
        model = make_network(config, self.splits, member.hooks).to(self.device)
        objective = Objective(model, loss, build.make_penalties(config, loss))
        batches = TensorBatches(train[0], train[1], build.batch_size(config, len(train[0])), config.seed)
        recorder = Recorder(objective.row, model.time_steps.num_steps)
        return Trainee(member, objective, batches, recorder, (config.lr, config.tau_lr or config.lr))

    def train(self, out: Path) -> None:
        """All epochs, then each member's files.

        Args:
            out: Folder of the suite.
        """
        self._end_of_epoch(self._stacks(0), 0)
        for epoch in range(self.config.epochs):
            waiting, done = [(stack, 0) for stack in self._stacks(epoch)], list[Stack]()
            while waiting:
                stack, batch = waiting.pop()
                batch = self._run_stack(stack, epoch, batch)
                rest = self._restacked(stack, epoch)
                if batch < self.per_epoch:
                    waiting += [(each, batch) for each in rest]
                else:
                    done += rest
            self.trainees = [each for stack in done for each in stack.trainees]
            self._end_of_epoch(done, epoch + 1)
        for each in self.trainees:
            try:
                event = self._finish(each, out)
            except Exception as error:  # noqa: BLE001  the others are finished
                event = Event("failed", each.member.name, text=_words(error))
            self.report(event)

    def _stacks(self, epoch: int, trainees: Sequence[Trainee] | None = None) -> list[Stack]:
        """The networks by their depth."""
        compiled, _ = worth_compiling(self.config.compile, (self.config.epochs - epoch) * self.per_epoch)
        by_depth = sorted(self.trainees if trainees is None else trainees, key=_depth)
        return [
            Stack(list(some), weight_decay=self.config.weight_decay, compiled=compiled)
            for _, some in groupby(by_depth, key=_depth)
        ]

    def _restacked(self, stack: Stack, epoch: int) -> list[Stack]:
        """The same stack, or what is left of it by depth, where networks were pruned or have diverged."""
        alive = [each for each in stack.trainees if each.error is None]
        for each in stack.trainees:
            if each.error is not None:
                self.report(Event("failed", each.member.name, text=each.error))
        if len(alive) == len(stack.trainees) and len(set(map(_depth, alive))) == 1:
            return [stack] if stack.depth == _depth(alive[0]) else self._stacks(epoch, alive)
        return self._stacks(epoch, alive)

    def _run_stack(self, stack: Stack, epoch: int, batch: int) -> int:
        """Train to the end of the epoch, or to the next deletion; returns the number of batches that are done."""
        began, batches = time.perf_counter(), stack.trainees[0].batches
        orders = torch.stack([each.batches.order(epoch) for each in stack.trainees])
        pruned = False
        while batch < self.per_epoch and not pruned:
            at = epoch * self.per_epoch + batch
            steps = 1 if batch >= batches.full else min(GRAPH_STEPS, batches.full - batch)
            index = orders[:, batch * batches.batch_size : (batch + steps) * batches.batch_size]
            rows = self._advance(stack, index.unflatten(1, (steps, -1)).movedim(1, 0), at)
            steps = len(rows)
            for k, each in enumerate(stack.trainees):
                each.recorder.add(rows[:, k])
            batch, at = batch + steps, at + steps
            if self.policy is not None and self.policy.due(iteration=at, epoch_ends=batch >= self.per_epoch):
                pruned = self._prune(stack, self.policy, epoch, at)
        if not pruned:
            stack.unstack()
            for each, finite in zip(stack.trainees, stack.finite(), strict=True):
                each.error = each.error if finite else DIVERGED
        for each in stack.trainees:
            _flush(each)
            each.seconds += (time.perf_counter() - began) / len(stack.trainees)
        return batch

    def _advance(self, stack: Stack, index: Tensor, at: int) -> Tensor:
        """Take steps, but none beyond the first after which a network has to be pruned; returns their records.

        Most often none has to be: so they are taken at once, and again up to there where the records say otherwise.
        """
        policy = self.policy
        if policy is None or policy.threshold is None or policy.every == "epoch":
            return stack.advance(index)
        before = stack.copy()
        rows = stack.advance(index)
        tau = stack.objective.row.split(rows, stack.depth)["tau"][1:]  # after each step but the last
        small = stack.small(tau, policy.threshold).any(1)
        for step in small.nonzero().flatten().tolist():
            if policy.due(iteration=at + step + 1, epoch_ends=False):
                stack.restore(before)
                return stack.advance(index[: step + 1])
        return rows

    def _prune(self, stack: Stack, policy: Pruning, epoch: int, at: int) -> bool:
        """Delete layers of the networks that have small shares; the stack is then to be made anew."""
        assert policy.threshold is not None
        if not bool(stack.small(stack.tau, policy.threshold).any()):
            return False
        stack.unstack()
        deleted = False
        for each in stack.trainees:
            _flush(each)
            if each.error is None:
                found = prune(each.model, policy.threshold).deleted
                deleted = deleted or bool(found)
                each.recorder.deletions += [Deletion(at, epoch + 1, d.layer, d.share, d.parameters) for d in found]
        return deleted

    def _end_of_epoch(self, stacks: Sequence[Stack], epoch: int) -> None:
        """One row for each network, as the training of one writes it."""
        for stack in stacks:
            figures = stack.evaluate(self.held_out[0], self.held_out[1])
            for each, found in zip(stack.trainees, figures, strict=True):
                first = max(epoch - 1, 0) * self.per_epoch
                row: dict[str, float] = {
                    "iteration": epoch * self.per_epoch,
                    "layers": each.model.time_steps.num_steps,
                    "parameters": sum(p.numel() for p in each.model.parameters()),
                    "seconds": each.seconds,
                    "train.loss": each.recorder.mean_since("loss", first),
                    "train.total": each.recorder.mean_since("total", first),
                }
                each.recorder.add_epoch(row | {f"validation.{name}": value for name, value in found.items()})
                each.seconds = 0.0
                if epoch:
                    self.report(Event("epoch", each.member.name, epoch, time.perf_counter() - self.began))

    def _finish(self, each: Trainee, out: Path) -> Event:
        """The files of one member, as if it had been trained alone; returns what to report."""
        config, hooks, folder = each.member.config, each.member.hooks, each.member.folder(out)
        assert config is not None
        run = Run.create(folder, record_of(config, hooks), overwrite=True)
        run.decide("device", str(self.device))
        for name, note in self.splits.notes.items():
            run.decide(name, note)
        run.decide("step", f"one of {len(self.trainees)} networks trained at once")
        history = each.recorder.history()
        (thinned(history) if config.trace == "thinned" else history).save(run.history_path)
        if hooks is not None:
            hooks.restore_(each.model)
        save_model(each.model, folder)
        loss = each.objective.loss
        test = evaluate(each.model, tuple(tensor.to(self.device) for tensor in self.splits.test), loss=loss)
        write_html(run, run.report_path)
        return conclude(each.member, folder, test, time.perf_counter() - self.began)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _depth(trainee: Trainee) -> int:
    return trainee.model.time_steps.num_steps


def _flush(trainee: Trainee) -> None:
    """Bring the record to the host; a network whose objective is no longer finite ends here."""
    total = trainee.recorder.flush(trainee.model.time_steps.origin)
    if not np.isfinite(total).all() and trainee.error is None:
        trainee.error = DIVERGED


MOST = 128
"""Members in one group, which bounds memory."""


def grouped(members: Iterable[Member]) -> list[list[Member]]:
    """Members that differ in seed and learning rates alone, at most MOST together, in the order of their first ones.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> members = [Member("a", seed, TrainConfig(seed=seed)) for seed in (0, 1)]
        >>> [len(group) for group in grouped([*members, Member("b", 0, TrainConfig(width=8))])]
        [2, 1]
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(_structure(member), []).append(member)
    return [group[start : start + MOST] for group in groups.values() for start in range(0, len(group), MOST)]


def _structure(member: Member) -> str:
    if member.config is None:
        return member.name
    settings = member.config.model_dump_json(exclude={"seed", "lr", "tau_lr", "run", "overwrite", "checkpoint_every"})
    return settings if member.hooks is None else f"{settings} {member.hooks.name}"


def _policy(member: Member) -> Pruning | None:
    """The policy of pruning that settings and hooks mean."""
    assert member.config is not None
    return build.make_pruning(member.config) if member.hooks is None else member.hooks.pruning(member.config)


def why_alone(member: Member) -> str | None:
    """Why a member is not trained together with others, or None.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> why_alone(Member("a", 0, TrainConfig(optimizer="adam")))
        'its optimiser is not plain SGD'
    """
    config = member.config
    if config is None:
        return "it only measures"
    refined = config.refine is not None if member.hooks is None else member.hooks.refinement(config) is not None
    reasons = {
        "its optimiser is not plain SGD": config.optimizer.lower() != "sgd" or config.momentum > 0,
        "its learning rate is scheduled": config.scheduler != "none",
        "its gradients are clipped": config.clip_norm is not None,
        "its batches are split": config.accumulate != 1,
        "it has mixed precision": config.precision == "bf16",
        "its weights are averaged": config.average_weights,
        "it writes events for TensorBoard": config.tensorboard,
        "layers come while it trains": refined,
        "it learns its order": config.learn_order,
        "it has a stage cost": bool(config.stage_cost) or config.depth_losses,
        "its network keeps statistics of batches": config.network == "resnet-v2",
        "its stage cost changes over training": config.stage_cost_schedule != "constant",
    }
    policy = _policy(member)
    if policy is not None:
        reasons["its pruning looks at more than its steps"] = policy.targeted or policy.criterion is not None
    return next((reason for reason, holds in reasons.items() if holds), None)
