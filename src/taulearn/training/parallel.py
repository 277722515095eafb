"""Data parallel training: how the processes meet, and what they do alike (batches, pruning, the run's folder)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .._errors import first_line
from ..adaptivity.coarsen import DeletedLayer, PruneReport
from ..adaptivity.controller import Pruner
from .batches import LoaderBatches, TensorBatches
from .distributed import CHANGED, TIMEOUT, Ranks
from .run_folder import Run

_PATIENCE = timedelta(hours=24)
_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, or that torch.distributed was initialised for; else this one alone.

    Yields:
        The processes, whose groups are closed if the body fails; else who got them closes them (``with ranks``).

    Raises:
        ConnectionError: If the processes do not find each other.
    """
    ranks = _join()
    try:
        yield ranks
    except BaseException as error:
        ranks.__exit__(error)
        raise


def _join() -> Ranks:
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        environment = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        if not environment <= os.environ.keys() or int(os.environ["WORLD_SIZE"]) < 2:
            return Ranks()
        _initialise()
    if dist.get_world_size() == 1:
        return Ranks()
    try:
        gradients = dist.new_group(timeout=TIMEOUT)
        return Ranks(gradients, dist.new_group(backend="gloo", timeout=_PATIENCE))
    except RuntimeError as error:
        raise ConnectionError(f"the processes of this training do not find each other: {first_line(error)}") from error


def _initialise() -> None:
    """Join the processes named in the environment, as torchrun sets it."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(timeout=TIMEOUT)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise ConnectionError(
                f"{where}, where the processes of this training are to meet, is in use by another program: choose "
                "another port (torchrun --master-port, or MASTER_PORT), or let torchrun find one (--standalone)"
            ) from error
        raise ConnectionError(
            f"the processes of this training do not find each other at {where}: {first_line(error)}. Start all of "
            "them, and choose another MASTER_PORT where another program listens there"
        ) from error


def _sampler(batches: LoaderBatches) -> Any:
    """What decides the order, also within a batch sampler, beside which ``loader.sampler`` is a mere placeholder."""
    return getattr(batches.loader.batch_sampler, "sampler", batches.loader.sampler)


def has_whole_batches(batches: TensorBatches | LoaderBatches) -> bool:
    """Whether each process has whole batches, to be divided: all but a loader with a DistributedSampler."""
    return isinstance(batches, TensorBatches) or not isinstance(_sampler(batches), DistributedSampler)


def check_batch_size(ranks: Ranks, batch_size: int, samples: int, *, resumed: bool = False) -> None:
    """Refuse batches that the processes cannot share evenly.

    Args:
        ranks: The processes.
        batch_size: Samples per batch, of all processes together.
        samples: Number of samples; all of them at once need not divide evenly.
        resumed: Whether a run goes on, whose batch size cannot change.

    Raises:
        ValueError: If the size is no multiple of the number of processes.

    Example:
        >>> check_batch_size(Ranks(), 3, 10)
    """
    if batch_size < samples and batch_size % ranks.size:
        nearest = max(1, round(batch_size / ranks.size)) * ranks.size
        fewer = next(number for number in range(ranks.size - 1, 0, -1) if batch_size % number == 0)
        remedy = "it cannot change in a run: use " if resumed else f"use {nearest}, or "
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {ranks.size}, got {batch_size}: it is that of "
            f"all processes together; {remedy}{fewer} {'process' if fewer == 1 else 'processes'}"
        )


def check_shares(
    ranks: Ranks, batches: TensorBatches | LoaderBatches, batch_size: int, *, resumed: bool = False
) -> None:
    """Refuse batches that the processes cannot share evenly, or that would not be the same in all of them.

    Args:
        ranks: The processes.
        batches: Where batches come from.
        batch_size: Samples per batch, of all processes together.
        resumed: Whether a run goes on.

    Raises:
        ValueError: If the size is no multiple of the number of processes, or a loader has an order of its own in each.
    """
    if ranks.size == 1 or not has_whole_batches(batches):
        return
    if isinstance(batches, TensorBatches):
        check_batch_size(ranks, batch_size, len(batches.inputs), resumed=resumed)
        return
    size, sampler = getattr(batches.loader.batch_sampler, "batch_size", None), _sampler(batches)
    if isinstance(sampler, _DRAWING) and sampler.generator is None:
        raise ValueError(
            f"train must yield the same batches in all {ranks.size} processes, got a DataLoader whose order each of "
            "them draws for itself: pass generator=torch.Generator().manual_seed(0) to it (to its sampler, where you "
            "made one), or use a DistributedSampler"
        )
    if size is not None:
        check_batch_size(ranks, size, size * len(batches), resumed=resumed)


def start_epoch(batches: LoaderBatches, epoch: int) -> None:
    """Tell a DistributedSampler the epoch, on which its order depends.

    Args:
        batches: A loader's batches.
        epoch: Number of the epoch.
    """
    sampler = _sampler(batches)
    if isinstance(sampler, DistributedSampler):
        sampler.set_epoch(epoch)


def begin_pruning(ranks: Ranks, pruner: Pruner, sample: Tensor) -> None:
    """Let rank 0 find out what has to go, which may depend on times that it measures.

    Args:
        ranks: The processes.
        pruner: The policy at work.
        sample: Inputs of one sample.
    """

    def begin() -> dict[str, Any] | None:
        pruner.begin(sample)
        return None if pruner.target is None else pruner.target.state()

    state = ranks.told(begin)
    if not ranks.first:
        pruner.aim(state)


def prune_alike(ranks: Ranks, pruner: Pruner, iteration: int, averaged: AveragedModel | None) -> PruneReport | None:
    """Let rank 0 decide which layers go, and delete them in all processes.

    Args:
        ranks: The processes.
        pruner: The policy at work.
        iteration: Number of iterations taken.
        averaged: Averaged weights, pruned alike.

    Returns:
        What was deleted, or None if nothing was.

    Raises:
        RanksDisagree: If the steps that are left are not the same, to the bit, in all processes.
    """
    if ranks.size == 1:
        return pruner.prune(iteration, averaged)
    if pruner.running is not None and pruner.running.number:
        pruner.running.values = ranks.add(pruner.running.values) / ranks.size
    reports: list[PruneReport | None] = []

    def decide() -> dict[str, Any]:
        report = pruner.prune(iteration, averaged)
        reports.append(report)
        return {
            "target": None if pruner.target is None else pruner.target.state(),
            "kept": None if report is None else report.kept,
            "deleted": () if report is None else [astuple(each) for each in report.deleted],
        }

    told = ranks.told(decide)
    if not ranks.first:
        report = pruner.follow(told["kept"], told["target"], averaged)
        deleted = tuple(DeletedLayer(*each) for each in told["deleted"])
        reports.append(None if report is None else replace(report, deleted=deleted))
    if told["kept"] is not None:
        steps = pruner.prunable.time_steps
        ranks.same(
            f"the time steps after iteration {iteration}",
            (steps.origin, steps.tau.tolist()),
            CHANGED,
        )
    return reports[0]


def open_alike(ranks: Ranks, open_run: Callable[[], Run | None]) -> Run | None:
    """Let rank 0 make or find the run's folder; the others read it.

    Args:
        ranks: The processes.
        open_run: Makes or finds the folder, called on rank 0.

    Returns:
        The run; None if nothing is to be written.
    """
    found: list[Run | None] = []

    def opened() -> str | None:
        run = open_run()
        found.append(run)
        return None if run is None else str(run.path)

    path = ranks.told(opened)
    if found:
        return found[0]
    return None if path is None else Run.open(path)
