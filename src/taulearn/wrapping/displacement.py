"""Steps in units of displacement: what a block adds to the state is divided by its running root mean square.

In a network with normalisation a step of half the size with weights of twice the size computes the same, so that a
penalty on steps is evaded. In units of displacement the block with the increment d = B(x) - x computes

    x + tau (r_0 / r) d,    r^2 <- (1 - m) r^2 + m mean(d^2)    in training,

with r_0, the root mean square on the first batch in training: tau is the displacement over that at the start, whatever
the weights do. A block that starts as the identity (weights of 0 at its end) would be held at the size of its first
tiny increment; for it r_0 and r start from a tenth of the root mean square of the state. On the first batch r = r_0 and
the block computes x + tau d to the bit. Gradients are those of the increment over the root mean square of its own
batch, so that they do not try to change its size in vain, as in batch renormalisation (Ioffe 2017, Batch
renormalization, section 3).

r moves with each forward pass in training mode: two passes on the same batch differ, as they do with dropout, so that a
line search (LBFGS, SteepestDescent) compares values of slightly different objectives. With activation checkpointing
each forward pass must be followed by its backward pass, before the next one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._calls import transforming
from ..nn.constraints import Constraint, constraint_of

_MOMENTUM = 0.02
_IDENTITY = 0.1


def check_unrestricted(constraint: str | Constraint, lower_bound: float | None) -> None:
    """Refuse a constraint that the plain steps of a saved model would not fulfil."""
    rule = constraint_of(constraint, 1.0, lower_bound)
    if rule.restricts:
        found = f"constraint {rule.name!r}" if lower_bound is None else f"lower_bound {lower_bound:g}"
        raise ValueError(
            f"units must be 'steps' with {found}, got 'displacement': such steps are folded into plain ones when the "
            "model is saved, which then would not fulfil it; wrap with constraint='free' and no lower_bound"
        )


class DisplacementUnits(nn.Module):
    """Running mean squares of the blocks' increments."""

    squares: Tensor  # (2, number): r_0 squared, 0 before there was a batch; and running mean squares

    def __init__(
        self, number: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("squares", torch.zeros(2, number, dtype=dtype, device=device))
        self._before: dict[int, Tensor] = {}

    @classmethod
    def like(cls, steps: Tensor) -> "DisplacementUnits":
        """Units for steps, of their type and on their device."""
        return cls(len(steps), dtype=steps.dtype, device=steps.device)

    def gains(self) -> Tensor:
        """What the steps are multiplied with now, r_0 / r for each block, (number,)."""
        start, now = self.squares
        return torch.where(now > 0, (start / now).sqrt(), 1.0)

    def factor(self, index: int, increment: Tensor, state: Tensor | None = None) -> Tensor:
        """What the step of one block is multiplied with; in training mode the running mean follows afterwards.

        Increments that are 0 or not finite leave no trace in it. What the backward pass computes again (activation
        checkpointing) takes the factor of the last forward pass.
        """
        if not self.training:
            return self.gains()[index]
        square = increment.to(self.squares.dtype).square().mean()
        differentiated = torch.is_grad_enabled()
        with torch.no_grad():
            watched = not transforming()
            recomputed = watched and torch._C._current_graph_task_id() >= 0
            before = self._before.get(index, self.squares[:, index]) if recomputed else self.squares[:, index]
            start, now = before
            first, begin = now == 0, square
            if state is not None:
                begin = torch.where(square == 0, _IDENTITY**2 * state.to(square.dtype).square().mean(), square)
            start, now = torch.where(first, begin, start), torch.where(first, begin, now)
            gain = torch.where(now > 0, (start / now).sqrt(), 1.0)
            after = torch.stack([start, torch.where(square > 0, torch.lerp(now, square, _MOMENTUM), now)])
            after = torch.where(begin.isfinite(), after, before)
            if differentiated and torch.compiler.is_compiling():
                # a new tensor: of a changed one, compiled functions would take the gain in their backward pass
                self.squares = torch.select_scatter(self.squares, after, 1, index)
            elif not recomputed:
                if watched:
                    self._before[index] = before.clone()
                self.squares[:, index] = after
        tiny = torch.finfo(square.dtype).tiny
        return gain * ((square.detach() + tiny) / (square + tiny)).sqrt()

    def keep_(self, indices: Sequence[int]) -> None:
        """Forget all blocks but those at ``indices``."""
        self._before = {}
        self.squares = self.squares[:, torch.tensor(list(indices), dtype=torch.long, device=self.squares.device)]
