"""``fit`` on a model that ``fully_shard`` sharded: what its processes do otherwise than those of whole models.

The backward pass has averaged the gradients of shards already, and those of the steps are added up as ever. A forward
pass needs all processes, so that each of them evaluates and decides, on the same data, and they compare. What is to be
written is gathered first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._together import gathered, whole
from ..adaptivity.optimizer_state import with_inner
from ..optim.projections import searches
from .distributed import TrainingRanks
from .session import needs_batch


class ShardedRanks(TrainingRanks):
    """The processes of a training of which each holds a part of the parameters."""

    each_decides = True

    def check(self, model: nn.Module, optimizer: Any, policies: Sequence[Any], penalties: Any, compiling: str) -> str:
        from .attaching import work_together

        work_together(model, *policies)
        if searches(optimizer):
            raise ValueError(
                f"optimizer must take one gradient a step for a sharded model, got {type(optimizer).__name__}: use "
                "another one"
            )
        for penalty in penalties:
            if not needs_batch(penalty) and hasattr(penalty(model), "full_tensor"):
                raise ValueError(
                    f"penalties must not look at the weights of a sharded model, got {penalty.name!r}: train with "
                    "taulearn.attach, which takes their gradients apart from those of the loss"
                )
        if compiling == "always":
            raise ValueError("compile must be 'auto' or 'never' for a sharded model, got 'always': its steps are eager")
        return "never"

    def decided(self, act: Callable[[], Any]) -> Any:
        return act()

    def written(self, write: Callable[[], Any], model: nn.Module, optimizer: Any) -> None:
        with gathered(model, list(with_inner([optimizer]))):
            self.told(write)

    def add_(self, parameters: Iterable[Tensor], total: Tensor, record: Tensor) -> tuple[Tensor, Tensor]:
        given = [*parameters]
        for p in given:
            if hasattr(p, "full_tensor") and p.grad is not None:
                p.grad *= self.size  # a mean so far
        return super().add_([p for p in given if not hasattr(p, "full_tensor")], total, record)

    def finite(self, tensors: Iterable[Tensor]) -> bool:
        return all(bool(whole(tensor.detach().isfinite().all())) for tensor in tensors)

    @torch.no_grad()
    def clip_(self, model: nn.Module, norm: float) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        parts = [g for g in gradients if hasattr(g, "full_tensor")]
        others = [g for g in gradients if not hasattr(g, "full_tensor")]
        norms = [whole(nn.utils.get_total_norm(some)) for some in (parts, others) if some]
        factor = (norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
