"""Processes that work together: what one decides the others are told, and what they have is compared or added up.

They meet in two groups of torch.distributed: in ``gradients`` one that ends or hangs is noticed within TIMEOUT; in
``control`` they wait for each other as long as it takes, for instance while rank 0 writes a checkpoint.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._errors import first_line

TIMEOUT = timedelta(seconds=50)
"""How long a process waits for the gradients of the others."""


class RankLost(ConnectionError):
    """Another process of the training failed, ended, or stopped answering."""


class RanksDisagree(ValueError):
    """The processes of a training do not have the same model, or not the same settings."""


class Ranks:
    """Processes that work together, until the end of a ``with`` block; without groups one alone, at no cost."""

    def __init__(self, gradients: Any = None, control: Any = None) -> None:
        self._gradients, self._control = gradients, control
        self.rank = 0 if control is None else dist.get_rank()
        self.size = 1 if control is None else dist.get_world_size()

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

    @torch.no_grad()
    def add(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size == 1:
            return value
        self._sum_([total := value.clone()])
        return total

    def _sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, those of a type in one flat buffer."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            alike = [t for t in tensors if t.dtype == dtype]
            buffer = torch.cat([t.reshape(-1) for t in alike])
            self._meet(dist.all_reduce, buffer, group=self._gradients)
            for t, part in zip(alike, buffer.split([t.numel() for t in alike]), strict=True):
                t.copy_(part.view(t.shape))

    @torch.no_grad()
    def copy_first(self, models: Iterable[nn.Module], *, buffers_alone: bool = False) -> None:
        """Give all processes the weights and buffers of rank 0; running statistics of normalisations are buffers."""
        for model in models if self.size > 1 else ():
            for t in (*(() if buffers_alone else model.parameters()), *model.buffers()):
                if not hasattr(t, "full_tensor"):  # a shard is each process's own
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
