"""Data parallel training: each process holds the whole model and a share of each batch.

    g = sum_r c_r g_r / sum_r c_r,        c_r what the loss counts on rank r (taulearn/_counting.py)

Gradients, objective and record are added up in one flat buffer after the backward pass, before clipping and the
optimiser's step, so that all processes take the same step. DistributedDataParallel takes as long, and does not fit: its
hooks never see the gradients of a compiled line search, the record would need a sum of its own, and it keeps a list of
the parameters that it was made with, which a deletion outdates.

Rank 0 decides (which layers go, figures on validation data) and tells the others; only rank 0 writes. The processes
meet in two groups of torch.distributed: in ``gradients`` one that ends or hangs is noticed within TIMEOUT; in
``control`` they wait for each other as long as it takes, for instance while rank 0 writes a checkpoint.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .._batches import leading, split
from .._errors import first_line
from ..adaptivity.adaptation import Adaptation, Changed
from ..nn.time_steps import time_steps_of
from .batches import Batch, LoaderBatches, TensorBatches
from .objective import Objective

TIMEOUT = timedelta(seconds=50)
"""How long a process waits for the gradients of the others."""
_PATIENCE = timedelta(hours=24)
_LOOK_EVERY = 32
"""Steps on a GPU between two looks at whether a process was interrupted, each of which waits for the GPU."""

CHANGED = "something changed weights in one process alone, a callback perhaps; change them alike in all of them"
"""The remedy where the processes' weights drift apart."""


class RankLost(ConnectionError):
    """Another process of the training failed, ended, or stopped answering."""


class RanksDisagree(ValueError):
    """The processes of a training do not have the same model, or not the same settings."""


class Ranks:
    """The processes of a training, until the end of a ``with`` block; without groups one alone, at no cost."""

    def __init__(self, gradients: Any = None, control: Any = None) -> None:
        self._gradients, self._control = gradients, control
        self.rank = 0 if control is None else dist.get_rank()
        self.size = 1 if control is None else dist.get_world_size()
        self._interrupted: Callable[[], bool] = lambda: False
        self._seen, self._sums = False, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the groups, which ends the waiting of others for this process."""
        if self._control is not None and dist.is_initialized():
            dist.destroy_process_group(self._gradients)
            dist.destroy_process_group(self._control)
            self._control = self._gradients = None

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def told(self, decide: Callable[[], Any]) -> Any:
        """The decision of rank 0, for which the others wait; RankLost on them if it fails there."""
        if self.size == 1:
            return decide()
        decision: list[Any] = [None, ""]
        try:
            if self.first:
                decision[0] = decide()
        except BaseException as error:
            decision[1] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._meet(dist.broadcast_object_list, decision, 0, self._control)
        if decision[1]:
            raise RankLost(f"rank {self.rank} ends because rank 0 failed: {decision[1]}")
        return decision[0]

    def in_turn(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0, and on the others once it is through: the first call may download a file."""
        found: list[Any] = []
        self.told(lambda: found.append(function()))
        return found[0] if found else function()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any of the processes."""
        return any(self._gathered(flag))

    def same(self, what: str, content: object, remedy: str) -> None:
        """Raise RanksDisagree on all processes, unless this has the same ``repr`` in all of them."""
        found = self._gathered(repr(content))
        others = [str(rank) for rank, each in enumerate(found) if each != found[0]]
        if others:
            raise RanksDisagree(
                f"{what} must be the same in all processes, got others on rank {', '.join(others)} than on rank 0: "
                f"{remedy}"
            )

    def begin(self, models: Sequence[nn.Module], settings: Mapping[str, object]) -> None:
        """Let all processes start with the weights and buffers of rank 0, once their models and settings agree."""
        if self.size == 1:
            return
        shapes = [(name, t.shape, t.dtype) for model in models for name, t in model.state_dict().items()]
        self.same("the model's tensors", shapes, "build the same model in all processes")
        for name, value in settings.items():
            self.same(name, value, "call fit with the same arguments in all processes")
        self.copy_first(models)

    def copy_first(self, models: Iterable[nn.Module]) -> None:
        """Give all processes the weights and buffers of rank 0."""
        self._copy_first(t for model in models for t in (*model.parameters(), *model.buffers()))

    def share_buffers(self, models: Iterable[nn.Module]) -> None:
        """Give all processes the buffers of rank 0, such as the running statistics of batch normalisation."""
        self._copy_first(t for model in models for t in model.buffers())

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
    def add_(self, objective: Objective, total: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
        """Add up gradients, objective and record, which are weighted already; a gradient that none has stays None."""
        if self.size == 1:
            return total, record
        parameters = [p for p in objective.parameters() if p.requires_grad]
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

    @torch.no_grad()
    def add(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size == 1:
            return value
        self._sum_([total := value.clone()])
        return total

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

    def _sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, those of a type in one flat buffer."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            alike = [t for t in tensors if t.dtype == dtype]
            buffer = torch.cat([t.reshape(-1) for t in alike])
            self._meet(dist.all_reduce, buffer, group=self._gradients)
            for t, part in zip(alike, buffer.split([t.numel() for t in alike]), strict=True):
                t.copy_(part.view(t.shape))

    @torch.no_grad()
    def _copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        for t in tensors if self.size > 1 else ():
            received = t.detach().contiguous()
            self._meet(dist.broadcast, received, 0, group=self._gradients)
            t.copy_(received)

    def _gathered(self, value: object) -> list[Any]:
        """The objects of all processes, in the order of their ranks."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            self._meet(dist.all_gather_object, found, value, self._control)
        return found

    def _meet(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A collective operation, or an error that says that somebody is missing."""
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            # gloo puts the place in its source in front, and advice behind
            reason = re.sub(r"^\[[^\]]*\] *", "", first_line(error)).partition(". ")[0]
            raise RankLost(
                f"rank {self.rank} of {self.size} ends because another process of this training ended, or did not "
                f"answer for {TIMEOUT.seconds} s ({reason}): what that one printed says why. The last checkpoint "
                "stands: resume the run, on any number of processes"
            ) from error


def join() -> Ranks:
    """The processes that torchrun started, or that torch.distributed was initialised for; else this one alone."""
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
        gradients, control = dist.new_group(timeout=TIMEOUT), dist.new_group(backend="gloo", timeout=_PATIENCE)
        dist.monitored_barrier(control, TIMEOUT)  # one that is refused at once must not leave while another connects
        return Ranks(gradients, control)
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
    """The sampler that decides the order: that of a batch sampler, beside which ``loader.sampler`` is a placeholder."""
    return getattr(batches.loader.batch_sampler, "sampler", batches.loader.sampler)


def has_whole_batches(batches: TensorBatches | LoaderBatches) -> bool:
    """Whether each process has whole batches, to be divided: all but a loader with a DistributedSampler."""
    return isinstance(batches, TensorBatches) or not isinstance(_sampler(batches), DistributedSampler)


def start_epoch(batches: LoaderBatches, epoch: int) -> None:
    """Tell a DistributedSampler the epoch, on which its order depends."""
    if isinstance(sampler := _sampler(batches), DistributedSampler):
        sampler.set_epoch(epoch)


def check_batch_size(ranks: Ranks, batch_size: int, samples: int, *, resumed: bool = False) -> None:
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
    ranks: Ranks, batches: TensorBatches | LoaderBatches, batch_size: int, *, resumed: bool = False
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


def begin_alike(ranks: Ranks, policies: Adaptation, sample: Tensor) -> None:
    """Let rank 0 find out what has to go, which may depend on times that it measures on a sample."""

    def begin() -> dict[str, Any]:
        policies.begin(sample)
        return policies.decisions()

    state = ranks.told(begin)
    if not ranks.first:
        policies.aim(state)


def change_alike(
    ranks: Ranks,
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
    changes, state = ranks.told(decide)
    if not ranks.first:
        policies.follow(changes, state, averages)
    if changes:
        steps = time_steps_of(policies.model)
        ranks.same(f"the time steps after iteration {iteration}", (steps.origin, steps.tau.tolist()), CHANGED)
        if policies.refiner is not None and policies.refiner.policy.layer is not None:
            ranks.copy_first([policies.model, *averages])  # new layers may have random weights
    return changes
