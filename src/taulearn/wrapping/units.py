"""Steps in units of displacement: what a block adds to the state is divided by its running root mean square.

In a network with normalisation a step of half the size with weights of twice the size computes the same, so that a
penalty on steps is evaded. In units of displacement the block with the increment d = B(x) - x computes

    x + tau (r_0 / r) d,    r^2 <- (1 - m) r^2 + m mean(d^2)    in training,

with r_0, the root mean square on the first batch in training: tau is the displacement over that at the start, whatever
the weights do. On the first batch r = r_0 and the block computes x + tau d to the bit. Gradients are those of the
increment over the root mean square of its own batch, so that they do not try to change its size in vain, as in batch
renormalisation (Ioffe 2017, Batch renormalization, section 3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MOMENTUM = 0.02


class DisplacementUnits(nn.Module):
    """Running mean squares of the blocks' increments.

    Args:
        number: Number of blocks.
        dtype: Floating point type of the steps.
        device: Where they live.

    Attributes:
        start: Mean squares on the first batch, (number,); 0 before there was one.
        now: Running mean squares, (number,).

    Example:
        >>> units = DisplacementUnits(1)
        >>> _ = units.factor(0, torch.tensor([1.0, -1.0]))
        >>> for _ in range(300):
        ...     _ = units.factor(0, torch.tensor([2.0, -2.0]))
        >>> round(units.gains().item(), 2)
        0.5
    """

    start: Tensor
    now: Tensor

    def __init__(
        self, number: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("start", torch.zeros(number, dtype=dtype, device=device))
        self.register_buffer("now", torch.zeros(number, dtype=dtype, device=device))

    def gains(self) -> Tensor:
        """What the steps are multiplied with now, r_0 / r for each block, (number,)."""
        return torch.where(self.now > 0, (self.start / self.now).sqrt(), 1.0)

    def factor(self, index: int, increment: Tensor) -> Tensor:
        """What the step of one block is multiplied with; in training mode the running mean follows afterwards.

        Args:
            index: Position of the block.
            increment: B(x) - x.

        Returns:
            r_0 / r, a scalar; in training its gradient is that of r_0 over the batch's own root mean square.
        """
        start, now = self.start[index], self.now[index]
        if not self.training:
            return torch.where(now > 0, (start / now).sqrt(), 1.0)
        square = increment.to(now.dtype).square().mean()
        with torch.no_grad():
            first = now == 0
            start = torch.where(first, square, start)
            before = torch.where(first, square, now)
            gain = torch.where(before > 0, (start / before).sqrt(), 1.0)
            self.start[index] = start
            self.now[index] = torch.lerp(before, square, _MOMENTUM)
        tiny = torch.finfo(square.dtype).tiny
        return gain * ((square.detach() + tiny) / (square + tiny)).sqrt()

    def keep_(self, indices: Sequence[int]) -> None:
        """Forget all blocks but those at ``indices``."""
        kept = torch.tensor(list(indices), dtype=torch.long, device=self.now.device)
        self.start, self.now = self.start[kept], self.now[kept]
