"""A training from its settings: everything made, trained, evaluated, saved and drawn; and resumed."""

import datetime as dt
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..adaptivity.adaptation import Adaptation
from ..adaptivity.policies import Pruning
from ..adaptivity.refiner import Refinement
from ..nn.network import TimeVariableNetwork
from ..report import write_html
from ..training import EpochEnd, History, Run, evaluate, fit
from ..training.checkpoint import read_start
from ..training.distributed import check_batch_size, join
from ..training.thinned_records import thinned
from . import build
from .config import TrainConfig, explain, split_hooks
from .memory_estimate import check_memory

_SLOWEST_AVERAGE = 1e-3

MAY_CHANGE = {"epochs", "threads", "device", "checkpoint_every", "trace", "tensorboard"}
"""Settings that do not decide the iterates, and the number of epochs, which may grow."""

_SCHEDULES = ("cosine", "onecycle", "step")


class Hooks(Protocol):
    """Changes to a training that no setting stands for; a class that inherits from this one writes what differs.

    The run notes them as a setting of their name that is true, and is resumed with them alone.
    """

    @property
    def name(self) -> str:
        """The name of the hooks in the run, unlike that of any setting."""

    def check(self, config: TrainConfig) -> None:
        """Raise a ValueError for settings that they do not go with; none here."""
        return

    def adapt_(self, network: TimeVariableNetwork, config: TrainConfig) -> None:
        """Change the network that was made from the settings, before it is trained; not here."""
        return

    def pruning(self, config: TrainConfig) -> Pruning | None:
        """The policy of pruning; that of the settings here."""
        return build.make_pruning(config)

    def refinement(self, config: TrainConfig) -> Refinement | None:
        """The policy of refinement; that of the settings here."""
        return build.make_refinement(config)

    def restore_(self, network: TimeVariableNetwork) -> None:
        """Make the trained network one that can be saved; it is here."""
        return


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        run: Its folder.
        config: Its settings.
        model: The trained network.
        history: The record.
        test: Loss and, for classes, accuracy on the test data.
    """

    run: Run
    config: TrainConfig
    model: nn.Module
    history: History
    test: dict[str, float]

    @property
    def layers(self) -> tuple[int, int]:
        """Number of layers before and after."""
        column = self.history.epochs["layers"]
        return int(column[0]), int(column[-1])

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of variables before and after."""
        column = self.history.epochs["parameters"]
        return int(column[0]), int(column[-1])

    @property
    def seconds(self) -> float:
        """Time spent in iterations, over all sittings."""
        return float(self.history.epochs["seconds"].sum())


def train(
    config: TrainConfig,
    *,
    hooks: Hooks | None = None,
    on_start: Callable[[Run], None] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[EpochEnd], None]] = (),
) -> Result:
    """Train as the settings say, and leave a folder with settings, record, checkpoints, network and report.

    The same settings give the same bits on the same machine with the same versions and number of threads (CPU).

    Args:
        config: The settings.
        hooks: What is to change that no setting stands for: an object with a name and the methods ``check``,
            ``adapt_``, ``pruning``, ``refinement`` and ``restore_``, called with the settings, the network, or both.
            None: nothing.
        on_start: Called with the run when everything has been checked and its folder made.
        progress: Whether to show a bar or a line per epoch.
        callbacks: Called after each epoch, as by :func:`taulearn.fit`.

    Returns:
        The trained network, the record, the figures on the test data.

    Raises:
        ValueError: If a setting does not do; the message names it, and nothing has been written.
        FileExistsError: If the folder holds a run that is not to be overwritten.
        NotADirectoryError: If it is a file.
        taulearn.training.Diverged: If the loss stops being finite.
        taulearn.training.Interrupted: On Ctrl-C, after a checkpoint was written; :func:`resume` goes on.

    Example:
        >>> import tempfile
        >>> config = TrainConfig(epochs=1, hidden_layers=2, width=8, run=tempfile.mkdtemp())
        >>> train(config, progress=False).layers
        (2, 2)
    """
    if hooks is not None:
        hooks.check(config)

    def make_run() -> Run:
        folder = _new_folder(config) if config.run is None else Path(config.run)
        run = Run.create(folder, record_of(config, hooks), overwrite=config.overwrite)
        if on_start is not None:
            on_start(run)
        return run

    return _train(config, hooks, make_run, progress=progress, callbacks=callbacks)


def resume(
    run: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    hooks: Hooks | None = None,
    on_start: Callable[[Run], None] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[EpochEnd], None]] = (),
) -> Result:
    """Go on with a training from its newest checkpoint, to the result that it would have had without the interruption.

    Args:
        run: The run's folder. Of the settings in its run.toml those may have been changed that do not decide the
            iterates; others are refused.
        epochs: Number of epochs in all, which is recorded then. None: that of run.toml.
        hooks: Those with which the run was started.
        on_start: As for :func:`train`.
        progress: As for :func:`train`.
        callbacks: As for :func:`train`.

    Returns:
        As :func:`train`; of a run that is complete, what it left.

    Raises:
        FileNotFoundError: If it is not a run's folder, or a run with results whose checkpoints are gone.
        ValueError: If it belongs to another format version, was not made by :func:`train`, or is damaged; if settings
            were changed on which the result depends, or ``epochs`` is less than what is done, or a schedule depends on
            it; if it was started with other hooks.
    """
    opened = Run.open(run)
    config = settings_of(opened) if epochs is None else settings_of(opened, epochs=epochs)
    _check_hooks(opened, hooks)
    _check_resumed(config, opened)

    def make_run() -> Run:
        if on_start is not None:
            on_start(opened)
        return opened

    return _train(config, hooks, make_run, opened, progress=progress, callbacks=callbacks)


def settings_of(run: Run, **changes: int) -> TrainConfig:
    """The settings of a run that :func:`train` made."""
    if not {"data", "network"} <= run.config.keys():
        raise ValueError(
            f"run must have been made by `taulearn train`, got {str(run.path)!r}, which names no data and no network: "
            "go on with it in Python, with taulearn.fit(..., run=..., resume=True)"
        )
    try:
        return TrainConfig.model_validate({**split_hooks(run.config)[0], **changes, "run": str(run.path)})
    except ValidationError as error:
        raise ValueError(f"{run.path / 'run.toml'}: {explain(error)}") from error


def record_of(config: TrainConfig, hooks: Hooks | None) -> dict[str, Any]:
    """The note of a run on its settings and hooks."""
    return config.record() | ({} if hooks is None else {hooks.name: True})


def _check_hooks(run: Run, hooks: Hooks | None) -> None:
    """Refuse other hooks than the run was started with."""
    noted, given = split_hooks(run.config)[1], None if hooks is None else hooks.name
    if noted == given:
        return
    remedy = "leave them out"
    if noted is not None:
        remedy = "taulearn.experiments.resume(run, hooks=...), or the same `taulearn reproduce` as before"
    raise ValueError(
        f"hooks must be those with which run {str(run.path)!r} was started, {noted!r}, got {given!r}: {remedy}"
    )


def _check_resumed(config: TrainConfig, run: Run) -> None:
    """Refuse settings that the run was not started with."""
    run.check_resumable()
    found = read_start(run.checkpoints)
    if found is None:
        return
    start, position = found
    now, fields = config.record(), TrainConfig.model_fields
    began = {name: start.config.get(name, fields[name].default) for name in fields}
    changed = [
        f"{name} = {now.get(name)!r} (was {began[name]!r})"
        for name in fields
        if name not in MAY_CHANGE | {"run", "overwrite"} and now.get(name) != began[name]
    ]
    if start.config and changed:
        raise ValueError(
            f"{run.path / 'run.toml'} must hold the settings that the run was started with, got {', '.join(changed)}: "
            "put them back, or start a new run with them (taulearn train --config FILE --run OTHER)"
        )
    if config.scheduler in _SCHEDULES and config.epochs != began["epochs"]:
        raise ValueError(
            f"epochs must stay {began['epochs']} with scheduler {config.scheduler!r}, whose learning rates are laid "
            f"out over all epochs, got {config.epochs}: start a new run"
        )
    if config.epochs < position.epoch:
        raise ValueError(
            f"epochs must be at least {position.epoch}, the number that are done, got {config.epochs}: "
            "start a new run for fewer"
        )


def _train(
    config: TrainConfig,
    hooks: Hooks | None,
    make_run: Callable[[], Run],
    resumed: Run | None = None,
    *,
    progress: bool,
    callbacks: Sequence[Callable[[EpochEnd], None]],
) -> Result:
    resume = resumed is not None
    with _threads(config.threads), join() as ranks:
        device = build.make_device(config)
        splits = ranks.in_turn(lambda: build.load_splits(config, resumed))
        torch.manual_seed(config.seed)
        check_memory(config, *build.features(splits), device)
        model = make_network(config, splits, hooks).to(device)
        loss_name, loss = build.make_loss(config, classes=splits.classes is not None)
        optimizer = build.make_optimizer(config, model)
        batch_size = build.batch_size(config, len(splits.train.inputs))
        check_batch_size(ranks, batch_size, len(splits.train.inputs), resumed=resume)
        iterations = config.epochs * -(-len(splits.train.inputs) // batch_size)
        scheduler = build.make_scheduler(config, optimizer, iterations)
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("tensorboard must be installed for this: pip install 'taulearn[tensorboard]'")
        pruning = build.make_pruning(config) if hooks is None else hooks.pruning(config)
        refinement = build.make_refinement(config) if hooks is None else hooks.refinement(config)
        if not resume:
            per_epoch = iterations // config.epochs
            build.check_room(config, Adaptation(pruning, refinement, model, optimizer, config.epochs, per_epoch))
        averaged = None
        if config.average_weights:
            averaged = AveragedModel(model, multi_avg_fn=_average_)

        decisions = {"device": device, "loss": loss_name, "batch_size": batch_size}
        chosen = {name: str(value) for name, value in decisions.items() if getattr(config, name) == "auto"}
        chosen["validation"] = "the test data" if splits.validation is splits.test else "the validation data"
        chosen |= splits.notes
        if ranks.size > 1:
            chosen["processes"] = str(ranks.size)

        def begin() -> Run:
            begun = make_run()
            for name, decision in chosen.items():
                begun.decide(name, decision)
            return begun

        run: Run = ranks.told(begin)

        def make_result() -> nn.Module:
            made: nn.Module = model if averaged is None else averaged.module
            if hooks is not None:
                hooks.restore_(cast(TimeVariableNetwork, made))
            return made

        run.result = make_result
        history = fit(
            model,
            tuple(splits.train),
            loss=loss,
            optimizer=optimizer,
            epochs=config.epochs,
            batch_size=batch_size,
            penalties=build.make_penalties(config, loss),
            pruning=pruning,
            refinement=refinement,
            validation=tuple(splits.validation),
            run=run,
            resume=resume,
            callbacks=callbacks,
            compile=build.compile_mode(config),
            scheduler=scheduler,
            seed=config.seed,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
            precision="bf16" if config.precision == "bf16" else "float32",
            averaged=averaged,
            checkpoint_every=config.checkpoint_every,
            progress=progress,
            tensorboard=config.tensorboard,
        )
        if config.trace == "thinned":
            history = thinned(history)
        result = make_result()

        def finish() -> dict[str, float]:
            if resume or config.trace == "thinned":
                # A run that had ended is not trained on, and its record may be what was damaged.
                history.save(run.history_path)
            figures = evaluate(result, tuple(splits.test), loss=loss)
            write_html(run, run.report_path)
            return figures

        test = ranks.told(finish)
    return Result(run, config, result, history, test)


def make_network(config: TrainConfig, splits: build.Splits, hooks: Hooks | None) -> TimeVariableNetwork:
    """The network that the settings and the hooks mean."""
    network = build.make_network(config, splits)
    if hooks is not None:
        hooks.adapt_(network, config)
    return network


def _new_folder(config: TrainConfig) -> Path:
    """A new folder in runs/ that says what the run is about."""
    stem = f"{Path(config.data).stem}-{config.network}-{dt.date.today():%Y-%m-%d}"
    for number in itertools.count(1):
        folder = Path("runs") / f"{stem}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise type(error)(
                f"run must be given, because the folder {str(folder)!r} cannot be made ({error.strerror})"
            ) from error
        return folder
    raise AssertionError


@torch.no_grad()
def _average_(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
    """An exponential average that forgets the start: fast at first, slower with the number of iterations."""
    weight = (9.0 / (10.0 + torch.as_tensor(count))).clamp(min=_SLOWEST_AVERAGE)
    for average, value in zip(averaged, current, strict=True):
        average.lerp_(value, weight.to(average.dtype))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let torch compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
