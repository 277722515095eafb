"""Trainings in which one process does not do as the others, and the run of a killed one to its end."""

import os
import shutil
import signal
import time
from pathlib import Path

import torch

import taulearn
from taulearn.training import EpochEnd, Interrupted
from training.parallel_base import RANK, model_and_optimizer, train
from training.support import digits, run_fit


def meddling(folder: Path) -> None:
    """A callback changes a time step on rank 1 alone, by very little."""

    def meddle(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 1:
            with torch.no_grad():
                end.model.time_steps.values[0] += 1e-12

    train(folder, callbacks=[meddle])


def meddling_unpruned(folder: Path) -> None:
    """The same where no layer goes."""

    def meddle(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 1:
            with torch.no_grad():
                end.model.time_steps.values[0] += 1e-12

    train(folder, callbacks=[meddle], pruning=None, epochs=3)


def stopping(folder: Path) -> None:
    """A callback ends the training on rank 1 alone."""

    def stop(end: EpochEnd) -> None:
        if end.epoch == 3 and RANK == 1:
            raise taulearn.training.StopTraining

    train(folder, callbacks=[stop])


def failing(folder: Path) -> None:
    """A callback fails on rank 1 alone."""

    def fail(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 1:
            raise ZeroDivisionError("this one")

    train(folder, callbacks=[fail])


def failing_first(folder: Path) -> None:
    """Rank 0 cannot write its checkpoint."""

    def fail(end: EpochEnd) -> None:
        if end.epoch == 2 and RANK == 0:
            checkpoints = folder / "run" / "checkpoint"
            checkpoints.rename(folder / "elsewhere")
            checkpoints.touch()

    train(folder, callbacks=[fail], run=folder / "run")


def refused_at_once(folder: Path) -> None:
    """Refused before anything is exchanged, many times over: the faster process left the slower one in the lurch."""
    said, (model, optimizer) = set(), model_and_optimizer()
    for _ in range(30):
        try:
            run_fit(torch.nn.DataParallel(model), digits(40), optimizer)
        except (TypeError, OSError) as error:
            said.add(f"{type(error).__name__}: {error}")
    raise RuntimeError(" and ".join(said))


def undisturbed(folder: Path) -> None:
    """The result of :func:`killed` and :func:`gone_on` without the kill."""
    train(folder, run=folder / "run")


def killed(folder: Path) -> None:
    """Rank 1 dies in the fifth epoch, and leaves the time."""

    def kill(end: EpochEnd) -> None:
        if end.epoch == 5 and RANK == 1:
            (folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, run=folder / "run", callbacks=[kill])


def gone_on(folder: Path) -> None:
    """The run of :func:`killed`, to its end."""
    run = folder.parent / "killed" / "run"
    shutil.copytree(run, folder / "run", dirs_exist_ok=True)
    train(folder, run=folder / "run", resume=True)


def hanging(folder: Path) -> None:
    """Rank 1 stops answering in the fifth epoch."""

    def hang(end: EpochEnd) -> None:
        if end.epoch == 5 and RANK == 1:
            (folder / "killed").write_text(str(time.time()))
            end.model.register_forward_pre_hook(lambda *_: time.sleep(300))

    train(folder, callbacks=[hang])


def interrupted(folder: Path) -> None:
    """Rank 1 alone is interrupted in the fifth epoch."""

    def interrupt(end: EpochEnd) -> None:
        if end.epoch == 5 and RANK == 1:
            signal.raise_signal(signal.SIGINT)

    try:
        train(folder, run=folder / "run", callbacks=[interrupt])
    except Interrupted as error:
        raise RuntimeError(str(error)) from error
