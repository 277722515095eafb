"""Fast memory of a fractional network for training: earlier blocks as K sums of exponentials, O(N K) instead of O(N^2).

Layers come in blocks of b. Within a block the weights are the exact ones; what lies before its start t_s enters by

    memory_l = sum_{s<=j<l} a_{l,j} d_j + (1-gamma) tau_l^gamma sum_i w_i exp(-s_i (t_{l+1} - t_s)) H_i
    H_i <- exp(-s_i (t_{s+b} - t_s)) H_i + sum_{s<=j<s+b} exp(-s_i (t_{s+b} - t_{j+1})) mu(s_i tau_j) d_j

with d_j = y_{j+1} - y_j, H_i = 0 at first and mu(x) = (1 - exp(-x)) / x: the recurrence of
:mod:`~taulearn.caputo.exponentials` taken b layers at a time, which makes matrix products of it. Backward, the adjoint
of H runs down the blocks by the transposed products. The recurrence itself cannot be run backwards (exp(s_i t)
amplifies errors), so H is kept at the start of every sqrt(N/b)-th block and computed again in between: about
2 K sqrt(N/b) states beside the N of the network.

References:
    Jiang, Zhang, Zhang, Zhang (2017), Fast evaluation of the Caputo fractional derivative and its applications to
        fractional diffusion equations.
    Beylkin, Monzon (2010), Approximation by exponential sums revisited.
"""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from .exponentials import ExponentialKernel, mean_decay
from .memory import LAYERS_PER_BLOCK, Adjoint, Memory
from .weights import plain_left_weights


def kernel_for(tau: Float[Tensor, " layers"], gamma: float, tolerance: float) -> ExponentialKernel | None:
    """The sum of exponentials for a grid, on a range that contains [min tau, sum tau] with a margin.

    The range ends at powers of two and depends on tau alone, not on earlier calls: a run that is resumed gets the same
    nodes, and while tau moves within the range they stay. Kernels are kept: going back to a range costs nothing.

    Args:
        tau: Steps. Reading their smallest and their sum is one synchronisation on an accelerator.
        gamma: Order.
        tolerance: Largest relative error of the kernel.

    Returns:
        The kernel. None if a step is not positive and finite.

    Raises:
        ValueError: If the tolerance cannot be met.

    Example:
        >>> kernel_for(torch.full((1000,), 1e-3), 0.5, 1e-6)
        ExponentialKernel(gamma=0.5, tau_min=0.000976562, horizon=2, nodes=18, error=8.9e-07)
    """
    steps = tau.detach().double()
    shortest, total = torch.stack([steps.min(), steps.sum()]).tolist()
    if not (shortest > 0.0 and math.isfinite(total)):
        return None
    # a step equal to a power of two lies a rounding error from leaving its range
    low = math.floor(math.log2(shortest) - 0.01)
    high = math.ceil(math.log2(total) + 0.01)
    return _kernel(gamma, low, high, tolerance)


@functools.lru_cache(maxsize=64)
def _kernel(gamma: float, low: int, high: int, tolerance: float) -> ExponentialKernel:
    return ExponentialKernel(gamma, 2.0**low, 2.0**high, tolerance)


def fast_weights(
    tau: Float[Tensor, " layers"],
    kernel: ExponentialKernel,
    memory_from: int,
    dtype: torch.dtype = torch.float64,
    *,
    block: int = LAYERS_PER_BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arrays of a :class:`FastMemory`, computed in float64 from the steps; differentiable in tau.

    Args:
        tau: Steps within the range of the kernel, (N,).
        kernel: The sum of exponentials; its nodes are constants.
        memory_from: First difference that is remembered.
        dtype: Type of the results.
        block: Layers b per block; B = ceil(N / b) blocks.

    Returns:
        Weights of the states of the block, (B, b, b); of H in y_{l+1}, (B, b, K); of the states y_s .. y_{s+b} in the
        next H, (B, b+1, K); and of H in the next H, (B, K).

    Example:
        >>> [tuple(w.shape) for w in fast_weights(torch.ones(5), ExponentialKernel(0.5, 1.0, 5.0, 1e-6), 1, block=2)]
        [(3, 2, 2), (3, 2, 8), (3, 3, 8), (3, 8)]
    """
    gamma, s, w = kernel.gamma, kernel.nodes.to(tau.device), kernel.weights.to(tau.device)
    # steps that fill up the last block: nothing before them depends on them
    steps = torch.nn.functional.pad(tau.double(), (0, -len(tau) % block), value=1.0).unflatten(0, (-1, block))
    near = plain_left_weights(steps, gamma)
    until = torch.cumsum(steps, 1)
    remaining = torch.cat([steps.flip(1).cumsum(1).flip(1)[:, 1:], steps.new_zeros(len(steps), 1)], 1)
    amplitude = -(1.0 - gamma) * steps**gamma
    out = amplitude[..., None] * w * torch.exp(-until[..., None] * s)
    into = torch.exp(-remaining[..., None] * s) * mean_decay(steps[..., None] * s)
    if memory_from:
        forgotten = torch.zeros_like(near, dtype=torch.bool)
        forgotten[0, 1:, 0] = True
        near = near.masked_fill(forgotten, 0.0)
        into = into.masked_fill(forgotten[:, -1:, :].transpose(1, 2), 0.0)
    # from differences to states
    near = near - torch.nn.functional.pad(near, (1, -1))
    into = torch.nn.functional.pad(into, (0, 0, 1, 0)) - torch.nn.functional.pad(into, (0, 0, 0, 1))
    decay = torch.exp(-until[:, -1:] * s)
    return near.to(dtype), out.to(dtype), into.to(dtype), decay.to(dtype)


class FastMemory(Memory):
    """Earlier blocks by the K values H_i per entry of a state; arguments beside beta are :func:`fast_weights`."""

    def __init__(self, block: int, factors: Tensor, near: Tensor, out: Tensor, into: Tensor, decay: Tensor) -> None:
        super().__init__(block, factors)
        self.blocks, self.out, self.into, self.decay = near, out, into, decay
        self.stride = math.isqrt(len(decay) - 1) + 1  # blocks from one kept H to the next

    def near(self, start: int, stop: int) -> Tensor:
        return self.blocks[start // self.block, : stop - start, : stop - start]

    def buffers(self, rows: Tensor, *, keep: bool) -> tuple[Tensor, ...]:
        """H at the start of every ``stride``-th block, and a last one that goes from block to block."""
        kept = -(-len(self.decay) // self.stride) if keep else 0
        return (rows.new_empty(kept + 1, self.decay.shape[1], rows.shape[1]),)

    def enter(self, start: int, stop: int, rows: Tensor, *buffers: Tensor) -> None:
        (histories,) = buffers
        k, history = start // self.block, histories[-1]
        if k == 0:
            history.zero_()
            rows[2 : stop + 1].zero_()
        else:
            self.advance(k - 1, history, rows)
            torch.mm(self.out[k, : stop - start], history, out=rows[start + 1 : stop + 1])
        if len(histories) > 1 and k % self.stride == 0:
            histories[k // self.stride] = history

    def advance(self, k: int, history: Tensor, rows: Tensor) -> None:
        """Take H from the start of block k to its end, in place."""
        start = k * self.block
        history.mul_(self.decay[k, :, None]).addmm_(self.into[k].t(), rows[start : start + self.block + 1])

    def adjoint(self, last: int, learned: bool, rows: Tensor, *buffers: Tensor) -> Adjoint:
        return _FastAdjoint(self, last, learned, rows, buffers[0])


class _FastAdjoint(Adjoint):
    def __init__(self, memory: FastMemory, last: int, learned: bool, rows: Tensor, histories: Tensor) -> None:
        super().__init__(memory, last, learned, rows)
        self.memory, self.histories = memory, histories
        weights = (memory.blocks, memory.out, memory.into, memory.decay)
        self.d_near, self.d_out, self.d_into, self.d_decay = (
            [torch.zeros_like(w) for w in weights] if learned else weights
        )
        self.g = rows.new_empty(memory.block, rows.shape[1])
        self.d_history: Tensor | None = None  # dJ/dH at the end of the block
        self.d_states: Tensor | None = None  # what the block's states get from later blocks
        self.segment: list[Tensor] = []  # H at the blocks of the current segment
        self.first_of_segment = -1

    def enter(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self.g[: stop - start], self.d_states

    def leave(self, start: int, stop: int, gradient: Tensor) -> None:
        k, g, memory = start // self.block, self.window, self.memory
        if self.learned:
            self.d_near[k, : len(g), : len(g)] = g @ self.rows[start:stop].t()
        if k == 0:
            return
        out = memory.out[k, : len(g)].t() @ g
        if self.learned:
            history = self._history(k)
            self.d_out[k, : len(g)] = g @ history.t()
            if self.d_history is not None:
                self.d_decay[k] = torch.linalg.vecdot(self.d_history, history)
        if self.d_history is not None:
            out.addcmul_(self.d_history, memory.decay[k, :, None])
        self.d_history = out
        before = start - self.block
        if self.learned:
            self.d_into[k - 1] = self.rows[before : start + 1] @ out.t()
        d_states = memory.into[k - 1] @ out
        gradient += d_states[-1]
        self.d_states = d_states[:-1]

    def _history(self, k: int) -> Tensor:
        """H at the start of block k, from the last one that was kept."""
        stride = self.memory.stride
        first = k - k % stride
        if first != self.first_of_segment:
            self.first_of_segment, self.segment = first, [self.histories[first // stride]]
            for block in range(first, k):
                history = self.segment[-1].clone()
                self.memory.advance(block, history, self.rows)
                self.segment.append(history)
        return self.segment[k - first]

    def gradients(self) -> tuple[Tensor, ...]:
        return self.d_near, self.d_out, self.d_into, self.d_decay
