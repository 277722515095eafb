"""Data parallel training: each process holds the whole model and a share of each batch.

    g = sum_r c_r g_r / sum_r c_r,        c_r what the loss counts on rank r (taulearn/_counting.py)

Gradients, objective and record are added up in one flat buffer after the backward pass, before clipping and the
optimiser's step, so that all processes take the same step. DistributedDataParallel takes as long, and does not fit: its
hooks never see the gradients of a compiled line search, the record would need a sum of its own, and it keeps a list of
the parameters that it was made with, which a deletion outdates.

Rank 0 decides (which layers go, figures on validation data) and tells the others; only rank 0 writes.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .._batches import leading, split
from .._distributed import several_processes, sharded
from .._ranks import Ranks
from ..adaptivity.adaptation import Adaptation, Changed
from ..nn.time_steps import time_steps_of
from .batches import Batch, LoaderBatches, TensorBatches

_LOOK_EVERY = 32
"""Steps on a GPU between two looks at whether a process was interrupted, each of which waits for the GPU."""

CHANGED = "something changed weights in one process alone, a callback perhaps; change them alike in all of them"
"""The remedy where the processes' weights drift apart."""


class TrainingRanks(Ranks):
    """The processes of a training."""

    each_decides = False  # rather than the first alone

    def __init__(self, gradients: Any = None, control: Any = None) -> None:
        super().__init__(gradients, control)
        self._interrupted: Callable[[], bool] = lambda: False
        self._seen, self._sums = False, 0

    def begin(self, models: Sequence[nn.Module], settings: Mapping[str, object]) -> None:
        """Let all processes start with the weights and buffers of rank 0, once their models and settings agree."""
        if self.size == 1:
            return
        shapes = [(name, t.shape, t.dtype) for model in models for name, t in model.state_dict().items()]
        self.same("the model's tensors", shapes, "build the same model in all processes")
        for name, value in settings.items():
            self.same(name, value, "call fit with the same arguments in all processes")
        self.copy_first(models)

    def share(self, batch: Batch, *, whole: bool = True) -> tuple[Batch, int]:
        """This process's part of a batch, unless it is no whole one, and the number of its samples that count.

        Where there are fewer samples than processes, some get one that does not count.
        """
        samples = len(leading(batch))
        if self.size == 1 or not whole:
            return batch, samples
        number = len(leading(part := split(batch, self.size)[self.rank]))
        return (part, number) if number else (split(batch, samples)[0], 0)

    @torch.no_grad()
    def add_(self, parameters: Iterable[Tensor], total: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
        """Add up gradients, objective and record, which are weighted already; a gradient that none has stays None."""
        if self.size == 1:
            return total, record
        parameters = [p for p in parameters if p.requires_grad]
        flags = record.new_tensor([self._interrupted(), *(p.grad is not None for p in parameters)])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        values = torch.cat([total.reshape(1).to(record.dtype), record])
        self._sum_([flags, values, *gradients])
        for p, gradient, anywhere in zip(parameters, gradients, flags[1:], strict=True):
            if p.grad is not None or anywhere > 0:  # a synchronisation, only for parameters without a gradient here
                p.grad = gradient
        self._sums += 1
        if flags.device.type == "cpu" or self._sums % _LOOK_EVERY == 0:
            self._seen = bool(flags[0] > 0)
        return values[0], values[1:]

    def check(self, model: nn.Module, optimizer: Any, policies: Sequence[Any], penalties: Any, compiling: str) -> str:
        """Refuse what these processes cannot do; returns when steps are compiled."""
        return compiling

    def decided(self, act: Callable[[], Any]) -> Any:
        """What rank 0 decides or finds out by the model; the others are told."""
        return self.told(act)

    def written(self, write: Callable[[], Any], model: nn.Module, optimizer: Any) -> None:
        """Let rank 0 write what the model and its optimiser hold."""
        self.told(write)

    def finite(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all entries are finite."""
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def clip_(self, model: nn.Module, norm: float) -> None:
        """Clip the gradients together."""
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    def agreed(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        """Whether any process was interrupted, as all of them know alike since gradients were last added up."""
        if self.size == 1:
            return interrupted
        self._interrupted = interrupted
        return lambda: self._seen

    def reseed(self, seed: int, epoch: int) -> None:
        """Give all processes but the first random numbers of their own for an epoch, so that their dropout differs."""
        if not self.first:
            words = hashlib.blake2b(repr((seed, epoch, self.rank)).encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(words) >> 1)


def join(model: nn.Module | None = None) -> TrainingRanks:
    """The processes that torchrun started, or that torch.distributed was initialised for; else this one alone."""
    if not several_processes() and "WORLD_SIZE" not in os.environ:
        return TrainingRanks()
    from .._meeting import groups

    if model is not None and sharded(model) is not None:
        from .sharded_ranks import ShardedRanks

        return ShardedRanks(*groups())
    return TrainingRanks(*groups())


def _sampler(batches: LoaderBatches) -> Any:
    """The sampler that decides the order: that of a batch sampler, beside which ``loader.sampler`` is a placeholder."""
    return getattr(batches.loader.batch_sampler, "sampler", batches.loader.sampler)


def has_whole_batches(batches: TensorBatches | LoaderBatches) -> bool:
    """Whether each process has whole batches, to be divided: all but a loader with a DistributedSampler."""
    return isinstance(batches, TensorBatches) or not isinstance(_sampler(batches), DistributedSampler)


def start_epoch(batches: LoaderBatches, epoch: int) -> None:
    """Tell a DistributedSampler the epoch, on which its order depends."""
    if isinstance(sampler := _sampler(batches), DistributedSampler):
        sampler.set_epoch(epoch)


def check_batch_size(ranks: TrainingRanks, batch_size: int, samples: int, *, resumed: bool = False) -> None:
    """Refuse a size that is no multiple of the number of processes; all samples at once need not divide evenly."""
    if batch_size < samples and batch_size % ranks.size:
        nearest = max(1, round(batch_size / ranks.size)) * ranks.size
        fewer = next(number for number in range(ranks.size - 1, 0, -1) if batch_size % number == 0)
        remedy = "it cannot change in a run: use " if resumed else f"use {nearest}, or "
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, {ranks.size}, got {batch_size}: it is that of "
            f"all processes together; {remedy}{fewer} {'process' if fewer == 1 else 'processes'}"
        )


def check_shares(
    ranks: TrainingRanks, batches: TensorBatches | LoaderBatches, batch_size: int, *, resumed: bool = False
) -> None:
    """Refuse batches that the processes cannot share evenly, or a loader that has an order of its own in each."""
    if isinstance(batches, TensorBatches):
        check_batch_size(ranks, batch_size, len(batches.inputs), resumed=resumed)
        return
    if ranks.size == 1 or not has_whole_batches(batches):
        return
    size, sampler = getattr(batches.loader.batch_sampler, "batch_size", None), _sampler(batches)
    drawing = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    if isinstance(sampler, drawing) and sampler.generator is None:
        raise ValueError(
            f"train must yield the same batches in all {ranks.size} processes, got a DataLoader whose order each of "
            "them draws for itself: pass generator=torch.Generator().manual_seed(0) to it (to its sampler, where you "
            "made one), or use a DistributedSampler"
        )
    if size is not None:
        check_batch_size(ranks, size, size * len(batches), resumed=resumed)


def begin_alike(ranks: TrainingRanks, policies: Adaptation, sample: Tensor) -> None:
    """Let rank 0 find out what has to go, which may depend on times that it measures on a sample."""

    def begin() -> dict[str, Any]:
        policies.begin(sample)
        return policies.decisions()

    state = ranks.decided(begin)
    if not ranks.first:
        policies.aim(state)


def change_alike(
    ranks: TrainingRanks,
    policies: Adaptation,
    iteration: int,
    due: Sequence[Any],
    averages: Sequence[nn.Module],
    batch: Callable[[], Any],
) -> list[Changed]:
    """Let rank 0 decide which layers come and go, change them in all processes, and compare the steps then."""
    if (pruner := policies.pruner) is not None and pruner in due:
        pruner.criterion.average_(lambda values: ranks.add(values) / ranks.size)

    def decide() -> tuple[list[Changed], dict[str, Any]]:
        return policies.change(iteration, due, averages, batch), policies.decisions()

    changes: list[Changed]
    changes, state = ranks.decided(decide)
    if not ranks.first and not ranks.each_decides:
        policies.follow(changes, state, averages)
    if changes:
        steps = time_steps_of(policies.model)
        ranks.same(f"the time steps after iteration {iteration}", (steps.origin, steps.tau.tolist()), CHANGED)
        if policies.refiner is not None and policies.refiner.policy.layer is not None:
            ranks.copy_first([policies.model, *averages])  # new layers may have random weights
    return changes
