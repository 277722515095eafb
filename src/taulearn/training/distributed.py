"""The processes of a data parallel training: each holds the whole model and a share of each batch.

    g = sum_r c_r g_r / sum_r c_r,        c_r what the loss counts on rank r (taulearn/_counting.py)

Gradients are added up in one flat buffer after the backward pass, before clipping and the optimiser's step, so that all
processes take the same step. Nothing is wrapped around the model that a deletion would leave behind, as
DistributedDataParallel would be, which holds on to the parameters that it was made with.

Decisions (which layers go, figures on validation data) are taken by rank 0 and told to the others; only rank 0 writes.
The processes meet in two groups: in ``gradients`` one that ends or hangs is noticed within TIMEOUT; in ``control`` they
wait for each other as long as it takes, for instance while rank 0 writes a checkpoint.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._errors import first_line
from .objective import Objective

TIMEOUT = timedelta(seconds=50)
"""How long a process waits for the gradients of the others."""

CHANGED = "something changed weights in one process alone, a callback perhaps; change them alike in all of them"
"""The remedy where the processes' weights drift apart."""

_LOOK_EVERY = 32


class RankLost(ConnectionError):
    """Another process of the training failed, ended, or stopped answering."""


class RanksDisagree(ValueError):
    """The processes of a training do not have the same model, or not the same settings."""


class Ranks:
    """The processes of a training. One alone does everything itself, at no cost.

    Args:
        gradients: The group in which gradients are averaged; None for a process alone.
        control: The group in which processes wait for each other; None for a process alone.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.

    Example:
        >>> Ranks().told(lambda: 3)
        3
    """

    def __init__(self, gradients: Any = None, control: Any = None) -> None:
        self._gradients, self._control = gradients, control
        self.rank = 0 if control is None else dist.get_rank()
        self.size = 1 if control is None else dist.get_world_size()
        self._interrupted: Callable[[], bool] = lambda: False
        self._seen, self._sums = False, 0

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def told(self, decide: Callable[[], Any]) -> Any:
        """The decision of rank 0; the others wait for it.

        Args:
            decide: Called on rank 0 alone; returns something that JSON holds, or nothing.

        Returns:
            The same on all processes.

        Raises:
            RankLost: On the others, if it fails on rank 0.
        """
        if self.size == 1:
            return decide()
        if self.first:
            try:
                value = decide()
            except BaseException as error:
                self._broadcast(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
                raise
            self._broadcast(json.dumps({"value": value}))
            return value
        found = json.loads(self._broadcast(""))
        if "failed" in found:
            raise RankLost(f"rank {self.rank} ends because rank 0 failed: {found['failed']}")
        return found["value"]

    def in_turn(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0, and on the others once it is through: the first call may download a file.

        Args:
            function: Called on all processes.

        Returns:
            What it returned here.
        """
        found: list[Any] = []
        self.told(lambda: found.append(function()))
        return found[0] if found else function()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any of the processes."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        self._meet(dist.all_reduce, flags, dist.ReduceOp.MAX, group=self._control)
        return bool(flags)

    def same(self, what: str, content: object, remedy: str) -> None:
        """Compare something between the processes, by a hash of eight bytes.

        Args:
            what: What it is, for the message.
            content: A tensor, compared to the bit, or anything whose ``repr`` tells it.
            remedy: What to do where it differs.

        Raises:
            RanksDisagree: On all processes, if it differs.
        """
        if self.size == 1:
            return
        raw = _bytes(content) if isinstance(content, Tensor) else repr(content).encode()
        digest = torch.frombuffer(bytearray(hashlib.blake2b(raw, digest_size=8).digest()), dtype=torch.uint8)
        digests = [torch.zeros_like(digest) for _ in range(self.size)]
        self._meet(dist.all_gather, digests, digest, group=self._control)
        others = [str(rank) for rank, each in enumerate(digests) if not torch.equal(each, digests[0])]
        if others:
            raise RanksDisagree(
                f"{what} must be the same in all processes, got others on rank {', '.join(others)} than on rank 0: "
                f"{remedy}"
            )

    def begin(self, models: Sequence[nn.Module], settings: Mapping[str, object]) -> None:
        """Let all processes start with the weights and buffers of rank 0.

        Args:
            models: The model, and averaged weights where there are some.
            settings: What must be the same besides, by name.

        Raises:
            RanksDisagree: If models or settings are not the same.
        """
        if self.size == 1:
            return
        shapes = [(name, t.shape, t.dtype) for model in models for name, t in model.state_dict().items()]
        self.same("the model's tensors", shapes, "build the same model in all processes")
        for name, value in settings.items():
            self.same(name, value, "call fit with the same arguments in all processes")
        self._copy_first([t for model in models for t in (*model.parameters(), *model.buffers())])

    def share_buffers(self, models: Iterable[nn.Module]) -> None:
        """Give all processes the buffers of rank 0, such as the running statistics of batch normalisation.

        Args:
            models: Whose buffers.
        """
        if self.size > 1:
            self._copy_first([t for model in models for t in model.buffers()])

    def share(self, tensors: tuple[Tensor, ...], *, whole: bool = True) -> tuple[tuple[Tensor, ...], int]:
        """This process's part of a batch.

        Args:
            tensors: With the samples in front.
            whole: Whether all processes have the same batch; otherwise they have parts of one already.

        Returns:
            The part, and the number of its samples. Where there are fewer samples than processes, some get one that
            does not count.
        """
        if self.size == 1 or not whole:
            return tensors, len(tensors[0])
        part = tuple(each.tensor_split(self.size)[self.rank] for each in tensors)
        if len(part[0]) == 0:
            return tuple(each[:1] for each in tensors), 0
        return part, len(part[0])

    @torch.no_grad()
    def add_(self, objective: Objective, total: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
        """Add up gradients, objective and record, which are weighted already, over the processes.

        Args:
            objective: Its parameters' gradients become the sum; those for which no process has one keep none.
            total: What this process's part adds to the objective, a scalar.
            record: Likewise to the record, (columns,).

        Returns:
            Objective and record on the whole batch.

        Raises:
            RankLost: If another process ended, or did not answer in time.
        """
        if self.size == 1:
            return total, record
        parameters = [p for p in objective.parameters() if p.requires_grad]
        present = [float(p.grad is not None) for p in parameters]
        flags = record.new_tensor([self._interrupted(), *present])
        values = torch.cat([total.detach().reshape(1).to(record.dtype), record])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flags, values, *gradients = self._sum([flags, values, *gradients])
        for p, gradient, anywhere in zip(parameters, gradients, flags[1:], strict=True):
            if p.grad is not None:
                p.grad.copy_(gradient)
            elif anywhere > 0:  # a synchronisation, only for parameters without a gradient here
                p.grad = gradient.clone()
        self._sums += 1
        if flags.device.type == "cpu" or self._sums % _LOOK_EVERY == 0:
            self._seen = bool(flags[0] > 0)
        return values[0], values[1:]

    @torch.no_grad()
    def add(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return value if self.size == 1 else self._sum([value.detach()])[0]

    def agreed(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        """A question about this process as one about all of them, which all answer alike after the same iteration.

        Args:
            interrupted: Whether this process was interrupted; it is asked whenever gradients are averaged.

        Returns:
            Whether any process was, as of the last averaging.
        """
        if self.size == 1:
            return interrupted
        self._interrupted = interrupted
        return lambda: self._seen

    def reseed(self, seed: int, epoch: int) -> None:
        """Give all processes but the first random numbers of their own for an epoch, so that their dropout differs.

        Args:
            seed: Of the training.
            epoch: Number of the epoch.
        """
        if not self.first:
            words = hashlib.blake2b(repr((seed, epoch, self.rank)).encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(words) >> 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the groups, which ends the waiting of others for this process."""
        if self._control is not None and dist.is_initialized():
            dist.destroy_process_group(self._gradients)
            dist.destroy_process_group(self._control)
            self._control = self._gradients = None

    def _sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, in one flat buffer for each type."""
        sums = list(tensors)
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, t in enumerate(sums):
            kinds.setdefault((t.dtype, t.device), []).append(i)
        for numbers in kinds.values():
            buffer = torch.cat([sums[i].reshape(-1) for i in numbers])
            self._meet(dist.all_reduce, buffer, group=self._gradients)
            for i, part in zip(numbers, buffer.split([sums[i].numel() for i in numbers]), strict=True):
                sums[i] = part.view(sums[i].shape)
        return sums

    @torch.no_grad()
    def _copy_first(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            received = t.detach().contiguous()
            self._meet(dist.broadcast, received, 0, group=self._gradients)
            t.copy_(received)

    def _broadcast(self, text: str) -> str:
        """The text of rank 0."""
        raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0).byte()
        length = torch.tensor(len(raw))
        self._meet(dist.broadcast, length, 0, group=self._control)
        if not self.first:
            raw = torch.zeros(int(length), dtype=torch.uint8)
        self._meet(dist.broadcast, raw, 0, group=self._control)
        return raw.numpy().tobytes().decode()

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


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
