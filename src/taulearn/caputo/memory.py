"""Exact memory of a fractional network for training: the states in one buffer, contracted block by block.

With identity skips the scheme y_{l+1} = y_l - sum_{j<l} a_{l,j} (y_{j+1} - y_j) + beta_l f_l(y_l) is a contraction of
states, beta_l = tau_l^gamma Gamma(2-gamma), with the weights of :func:`memory_weights`, whose rows sum to 1:

    y_{l+1} = sum_{j<=l} c_{l,j} y_j + beta_l f_l(y_l),   c_{l,j} = a_{l,j} - a_{l,j-1},   a_{l,l} = 1, a_{l,-1} = 0

At the start of a block of layers one matrix product brings in all states of earlier blocks; the states of the block
itself follow one by one. Backward, with g_{l+1} = dJ/dy_{l+1}, mirrors it:

    dJ/dy_j  ->  + sum_{l>=j} c_{l,j} g_{l+1},     dJ/dc_{l,j} = <g_{l+1}, y_j>,     dJ/dbeta_l = <g_{l+1}, f_l>

one product per block for what later blocks contribute, and one for the gradient of c. Each layer is one node of
autograd's graph that takes y_l, so that all later layers have run when its turn comes; what the layers share in one
backward pass is an :class:`Adjoint`. The weights enter by a node that all layers depend on, and get their gradient
once, at the end.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.2.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._arguments import apply
from ._rows import BLOCK, cotangent_of_steps, row_blocks

LAYERS_PER_BLOCK = 32


def memory_weights(
    tau: Float[Tensor, " layers"], gamma: float, memory_from: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "layers layers"]:
    """Weights c_{l,j} of the states in y_{l+1}, lower triangular with rows that sum to 1.

    They are computed in float64, with temporaries of a few rows, forward and backward; not under torch.func.

    Args:
        tau: Steps, > 0, (N,).
        gamma: Order, in (0, 1).
        memory_from: First difference that is remembered: a_{l,j} = 0 for j < min(memory_from, l).
        dtype: Type of the result.

    Returns:
        (N, N). Differentiable once in tau.

    Example:
        >>> memory_weights(torch.ones(3), 0.5, 0)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.4142, 0.5858, 0.0000],
                [0.3178, 0.0964, 0.5858]], dtype=torch.float64)
    """
    weights: Tensor = apply(_MemoryWeights, tau.double(), gamma, memory_from, dtype)
    return weights


class _MemoryWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tau: Tensor, gamma: float, memory_from: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.gamma, ctx.memory_from = gamma, memory_from
        weights = tau.new_zeros(len(tau), len(tau), dtype=dtype)
        for start, rows in row_blocks(tau, gamma):
            rows[:, :memory_from] = 0.0
            rows.diagonal(start).fill_(1.0)
            rows[:, 1:] -= rows[:, :-1].clone()
            weights[start : start + len(rows), : rows.shape[1]] = rows.tril_(start)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        (tau,) = ctx.saved_tensors

        def rows(start: int) -> Tensor:
            """The cotangent of a_{l,j}, which enters c_{l,j} and c_{l,j+1}."""
            block = cotangent[start : start + BLOCK].to(torch.float64, copy=True)
            block[:, :-1] -= block[:, 1:].clone()
            block[:, : ctx.memory_from] = 0.0
            return block

        blocks = (rows(start) for start in range(0, len(tau), BLOCK))
        return cotangent_of_steps(tau, ctx.gamma, blocks), None, None, None


class Memory(ABC):
    """The weights of one forward pass, cut into blocks of layers, and how earlier blocks enter a later one.

    Args:
        block: Layers per block.
        factors: beta_0 .. beta_{N-1}, (N,).
    """

    def __init__(self, block: int, factors: Tensor) -> None:
        self.block, self.num_steps = block, len(factors)
        self.factors = factors

    @abstractmethod
    def near(self, start: int, stop: int) -> Tensor:
        """Weights of the states y_start .. y_{stop-1} in y_{start+1} .. y_stop, lower triangular."""

    @abstractmethod
    def buffers(self, rows: Tensor, *, keep: bool) -> tuple[Tensor, ...]:
        """Prepare :meth:`enter`, which needs more than the rows; ``keep`` if a backward pass may follow."""

    @abstractmethod
    def enter(self, start: int, stop: int, rows: Tensor, *buffers: Tensor) -> None:
        """Set the rows of y_{start+1} .. y_stop to what the blocks before ``start`` contribute."""

    @abstractmethod
    def adjoint(self, last: int, learned: bool, rows: Tensor, *buffers: Tensor) -> "Adjoint":
        """A backward pass that begins at layer ``last``."""


class Adjoint(ABC):
    """One backward pass: takes g_{l+1} = dJ/dy_{l+1} for l = last, last-1, .., 1.

    Args:
        memory: The weights.
        last: The layer that comes first.
        learned: Whether the weights need gradients.
        rows: The states.

    Attributes:
        first: dJ/dy_0, flat, after the last step.
    """

    first: Tensor

    def __init__(self, memory: Memory, last: int, learned: bool, rows: Tensor) -> None:
        self.block, self.near, self.last, self.learned, self.rows = memory.block, memory.near, last, learned, rows
        self.factors = torch.zeros_like(memory.factors)

    def step(self, l: int, g: Tensor) -> Tensor:
        """The part of dJ/dy_l that comes from y_{l+1} .. y_N through the memory, flat, given g = dJ/dy_{l+1}, flat."""
        start = l - l % self.block
        stop = min(start + self.block, self.last + 1)
        if l == stop - 1:
            self.window, self.later = self.enter(start, stop)
            self.weights = self.near(start, stop)
            if start == 0:
                self.window[0] = 0.0
        self.window[l - start] = g
        gradient = self._collect(l - start)
        if l == max(start, 1):
            self.leave(start, stop, gradient)
            if start == 0:
                self.first = self._collect(0)
        return gradient

    def _collect(self, i: int) -> Tensor:
        """The part of the i-th state of the block."""
        near, weights = self.window[i:].t(), self.weights[i:, i]
        return torch.mv(near, weights) if self.later is None else torch.addmv(self.later[i], near, weights)

    @abstractmethod
    def enter(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Room for g of a block, and what its states get from later blocks."""

    @abstractmethod
    def leave(self, start: int, stop: int, gradient: Tensor) -> None:
        """All g of the block are there; ``gradient``, that of y_start, may still be added to."""

    @abstractmethod
    def gradients(self) -> tuple[Tensor, ...]:
        """Gradients of the weights."""


class ExactMemory(Memory):
    """All earlier states by their weights c_{l,j}, (N, N): one product with all rows per block."""

    def __init__(self, block: int, factors: Tensor, weights: Tensor) -> None:
        super().__init__(block, factors)
        self.weights = weights

    def near(self, start: int, stop: int) -> Tensor:
        return self.weights[start:stop, start:stop]

    def buffers(self, rows: Tensor, *, keep: bool) -> tuple[Tensor, ...]:
        return ()

    def enter(self, start: int, stop: int, rows: Tensor, *buffers: Tensor) -> None:
        if start:
            torch.mm(self.weights[start:stop, :start], rows[:start], out=rows[start + 1 : stop + 1])
        else:
            rows[2 : stop + 1].zero_()

    def adjoint(self, last: int, learned: bool, rows: Tensor, *buffers: Tensor) -> Adjoint:
        return _ExactAdjoint(self, last, learned, rows)


class _ExactAdjoint(Adjoint):
    def __init__(self, memory: ExactMemory, last: int, learned: bool, rows: Tensor) -> None:
        super().__init__(memory, last, learned, rows)
        self.c = memory.weights
        self.g = torch.empty_like(rows[: last + 1])
        self.gradient = torch.zeros_like(self.c) if learned else self.c

    def enter(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        window = self.g[start:stop]
        if stop > self.last:
            return window, None
        return window, self.c[stop : self.last + 1, start:stop].t() @ self.g[stop:]

    def leave(self, start: int, stop: int, gradient: Tensor) -> None:
        if self.learned:
            torch.mm(self.window, self.rows[:stop].t(), out=self.gradient[start:stop, :stop])

    def gradients(self) -> tuple[Tensor, ...]:
        return (self.gradient,)


class Recall:
    """The states of one forward pass in a buffer, and the steps that make them.

    ``step`` is to be called for l = 1 .. N-1 in turn. The states it returns are views of the buffer (so that nothing
    is stored twice), but for the last one. They can be differentiated once, any number of times with retain_graph.

    Args:
        memory: :class:`ExactMemory` or another kind.
        weights: Its arguments: beta_l, and the coefficients in the states' type; differentiable.
        first: y_0, None where it is zero.
        y: y_1.
        block: Layers per block.
    """

    def __init__(
        self,
        memory: type[Memory],
        weights: tuple[Tensor, ...],
        first: Tensor | None,
        y: Tensor,
        *,
        block: int = LAYERS_PER_BLOCK,
    ) -> None:
        self.memory = memory(block, *(w.detach() for w in weights))
        self.shape, self.strides = y.shape, torch.empty(y.shape, device="meta").stride()
        self.rows = torch.empty((self.memory.num_steps + 1, y.numel()), dtype=y.dtype, device=y.device)
        self.rows[0] = 0.0 if first is None else first.detach().reshape(-1)
        self.rows[1] = y.detach().reshape(-1)
        keep = torch.is_grad_enabled()
        self.buffers = self.memory.buffers(self.rows, keep=keep)
        self.begin: Tensor | None = None
        if keep:
            # A leaf that needs a gradient, so that the node exists whatever is trained. What the node saves is filled
            # later: hooks that copy saved tensors must not see it.
            anchor = torch.zeros((), device=y.device, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(_same, _same):
                self.begin = apply(_Begin, self.memory, (self.rows, *self.buffers), anchor, first, *weights)

    def fits(self, f: Tensor) -> bool:
        """Whether f is shaped and typed as the states are."""
        return f.shape == self.shape and f.dtype == self.rows.dtype and f.device == self.rows.device

    def index_select(self, dim: int, index: Tensor) -> "Recall | None":
        """The memory of these samples alone (dim is 0), as of a tensor; None where it is being differentiated."""
        if self.begin is not None:
            return None
        chosen = copy.copy(self)
        chosen.shape = torch.Size((len(index), *self.shape[1:]))
        chosen.rows, *buffers = (self._samples(rows, index) for rows in (self.rows, *self.buffers))
        chosen.buffers = tuple(buffers)
        return chosen

    def _samples(self, rows: Tensor, index: Tensor) -> Tensor:
        """Flattened states of these samples."""
        dim = rows.ndim - 1
        return rows.unflatten(dim, self.shape).index_select(dim, index).flatten(dim)

    def step(self, l: int, f: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """y_{l+1}, from f = f_l(y_l) and y = y_l."""
        if self.begin is None:
            return self.advance(l, f)
        state: Tensor = apply(_Step, self, l, f, y, self.begin)
        return state

    def advance(self, l: int, f: Tensor) -> Tensor:
        """The arithmetic of :meth:`step`."""
        block, number = self.memory.block, self.memory.num_steps
        start = l - l % block
        if l == max(start, 1):
            stop = min(start + block, number)
            self.memory.enter(start, stop, self.rows, *self.buffers)
            self.near = self.memory.near(start, stop)
        row = self.rows[l + 1].addmv_(self.rows[start : l + 1].t(), self.near[l - start, : l + 1 - start])
        increment = f * self.memory.factors[l]
        if l + 1 == number:
            return increment.add_(row.view(self.shape))
        row += increment.reshape(-1)
        # on the same memory, but with a version counter of its own: rows that are still to come change no state
        return row.new_empty(0).set_(self.rows.untyped_storage(), (l + 1) * len(row), self.shape, self.strides)


class _Begin(torch.autograd.Function):
    """The node by which y_0 and the weights enter; all steps depend on its output, so that its turn comes last."""

    @staticmethod
    def forward(
        ctx: Any, memory: Memory, saved: tuple[Tensor, ...], anchor: Tensor, first: Tensor | None, *_: Tensor
    ) -> Tensor:
        ctx.memory, ctx.task, ctx.adjoint = memory, None, None
        ctx.learned = any(ctx.needs_input_grad[4:])
        ctx.shape = None if first is None else first.shape
        ctx.save_for_backward(*saved)
        return anchor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        adjoint, ctx.adjoint, ctx.task = ctx.adjoint, None, None
        first = adjoint.first.view(ctx.shape) if ctx.needs_input_grad[3] else None
        weights = (adjoint.factors, *adjoint.gradients()) if ctx.learned else (None,) * len(ctx.needs_input_grad[4:])
        return None, None, None, first, *weights


class _Step(torch.autograd.Function):
    """One layer, y_{l+1} from f, y_l and, by way of the buffer, all earlier states."""

    @staticmethod
    def forward(ctx: Any, recall: Recall, l: int, f: Tensor, y: Tensor, begin: Tensor) -> Tensor:
        ctx.l, ctx.begin, ctx.factor = l, begin.grad_fn, recall.memory.factors[l]
        ctx.save_for_backward(f, y)  # y, which the buffer holds, so that a change in place is noticed
        return recall.advance(l, f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._functorch.is_legacy_batchedtensor(g) or torch._C._functorch.is_batchedtensor(g):
            raise RuntimeError(
                "is_grads_batched must be False for a fractional network of this depth, got True: its states share a "
                "buffer; take torch.func.vjp, or a loop over the cotangents"
            )
        f, y = ctx.saved_tensors
        begin, l = ctx.begin, ctx.l
        task = torch._C._current_graph_task_id()
        if begin.task != task:  # the first layer in this call of backward or grad
            begin.task = task
            begin.adjoint = begin.memory.adjoint(l, begin.learned, *begin.saved_tensors)
        flat = g.reshape(-1)
        if begin.learned:
            begin.adjoint.factors[l] = torch.dot(f.reshape(-1), flat)
        gradient = begin.adjoint.step(l, flat).view(y.shape)
        return None, None, g * ctx.factor if ctx.needs_input_grad[2] else None, gradient, None


def _same(x: Any) -> Any:
    return x
