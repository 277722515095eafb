"""Exact memory of a fractional network for training: the states in one buffer, contracted block by block.

With identity skips the scheme y_{l+1} = y_l - sum_{j<l} a_{l,j} (y_{j+1} - y_j) + beta_l f_l(y_l) is a contraction of
states, beta_l = tau_l^gamma Gamma(2-gamma), with the weights of :func:`memory_weights`, whose rows sum to 1:

    y_{l+1} = sum_{j<=l} c_{l,j} y_j + beta_l f_l(y_l),   c_{l,j} = a_{l,j} - a_{l,j-1},   a_{l,l} = 1, a_{l,-1} = 0

At the start of a block of layers one matrix product brings in all states of earlier blocks; the states of the block
itself follow one by one. Backward, with g_{l+1} = dJ/dy_{l+1}, mirrors it:

    dJ/dy_j  ->  + sum_{l>=j} c_{l,j} g_{l+1},     dJ/dc_{l,j} = <g_{l+1}, y_j>,     dJ/dbeta_l = <g_{l+1}, f_l>

one product per block for what later blocks contribute, and one for the gradient of c. Each layer is one node of
autograd's graph that takes y_l, so that all later layers have run when its turn comes; what the layers share lives in
a pass object. The weights enter by a node that all layers depend on, and get their gradient once, at the end.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 5.2.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    weights: Tensor = _MemoryWeights.apply(tau.double(), gamma, memory_from, dtype)
    return weights


class _MemoryWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tau: Tensor, gamma: float, memory_from: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(tau)
        ctx.gamma, ctx.memory_from = gamma, memory_from
        weights = tau.new_zeros(len(tau), len(tau), dtype=dtype)
        for start, rows in row_blocks(tau, gamma):
            forget_(rows, start, memory_from)
            rows[:, 1:] -= rows[:, :-1].clone()
            weights[start : start + len(rows), : rows.shape[1]] = rows.tril_(start)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        (tau,) = ctx.saved_tensors

        def rows(start: int) -> Tensor:
            """The cotangent of a, of which c_{l,j} and c_{l,j+1} are made."""
            block = cotangent[start : start + BLOCK].double()
            block[:, :-1] -= block[:, 1:].tril(start - 1)
            return forget_(block, start, ctx.memory_from, diagonal=0.0)

        blocks = (rows(start) for start in range(0, len(tau), BLOCK))
        return cotangent_of_steps(tau, ctx.gamma, blocks), None, None, None


def forget_(rows: Tensor, start: int, memory_from: int, *, diagonal: float = 1.0) -> Tensor:
    """Set a_{l,j} = 0 for j < memory_from, but for the diagonal; ``rows`` begin at row ``start``."""
    rows[:, :memory_from] = 0.0
    if start < memory_from:
        rows[: memory_from - start].diagonal(start)[:] = diagonal
    return rows


class BlockedMemory(ABC):
    """The states of one forward pass, and the steps that make them; see the module's text.

    Usage: ``memory.begin(y_0, y_1)``, then y_{l+1} = ``memory.step(l, f_l(y_l), y_l)`` for l = 1 .. N-1 in turn. The
    states are views of one buffer, but for the last one.

    Args:
        factors: beta_0 .. beta_{N-1}, (N,).
        coefficients: What the contractions need, of the type of the states.
        block: Layers per block.
    """

    def __init__(self, factors: Tensor, coefficients: tuple[Tensor, ...], block: int) -> None:
        self.num_steps = len(factors)
        self.block = block
        self._inputs = (factors, *coefficients)
        self.factors = factors.detach().unbind()
        self.learned = torch.is_grad_enabled() and any(t.requires_grad for t in self._inputs)

    def begin(self, first: Tensor | None, y: Tensor) -> None:
        """Take up y_0 (None: zero) and y_1, of one shape and type."""
        self.shape, self.rows = y.shape, torch.empty((self.num_steps + 1, y.numel()), dtype=y.dtype, device=y.device)
        self.rows[0] = 0.0 if first is None else first.detach().reshape(-1)
        self.rows[1] = y.detach().reshape(-1)
        self.token: Tensor | None = None
        kept = self.allocate()
        if torch.is_grad_enabled():
            # a leaf that needs a gradient, so that the node exists whatever is trained; its saved tensors are the
            # buffers themselves, which are not full yet: hooks that copy must not see them
            anchor = torch.zeros((), requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
                self.token = _Begin.apply(self, (self.rows, *kept), anchor, first, *self._inputs)

    def fits(self, f: Tensor) -> bool:
        """Whether f can be added to a row of the buffer."""
        return f.shape == self.shape and f.dtype == self.rows.dtype and f.device == self.rows.device

    def step(self, l: int, f: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """y_{l+1} from f = f_l(y_l) and y = y_l."""
        if self.token is None:
            return self.advance(l, f)
        result: Tensor = _Step.apply(self, l, f, y, self.token)
        return result

    def advance(self, l: int, f: Tensor) -> Tensor:
        """The arithmetic of :meth:`step`."""
        start = l - l % self.block
        if l == start or l == 1:
            self.enter(start, min(start + self.block, self.num_steps))
        row = self.rows[l + 1]
        row.addmv_(self.rows[start : l + 1].t(), self.near(start, l))
        if l + 1 == self.num_steps:
            return torch.addcmul(row.view(self.shape), f, self.factors[l])
        row.view(self.shape).addcmul_(f, self.factors[l])
        # a tensor on the same memory, but with a version counter of its own: the rows still to come change no state
        offset = (l + 1) * len(row)
        return row.new_empty(0).set_(self.rows.untyped_storage(), offset, self.shape, f.new_empty(self.shape).stride())

    @abstractmethod
    def allocate(self) -> tuple[Tensor, ...]:
        """Make the buffers for a pass, and say which of them the backward pass needs beside the rows."""

    @abstractmethod
    def enter(self, start: int, stop: int) -> None:
        """Put what earlier blocks contribute into the rows of y_{start+1} .. y_{stop} (y_2 .. at first)."""

    @abstractmethod
    def near(self, start: int, l: int) -> Tensor:
        """Weights of y_start .. y_l in y_{l+1}."""

    @abstractmethod
    def adjoint(self, saved: tuple[Tensor, ...], last: int) -> "Adjoint":
        """A backward pass that begins at layer ``last``."""


class Adjoint(ABC):
    """One backward pass: takes g_{l+1} for l = last, last-1, .., 1, and answers what y_l gets from all l' >= l.

    Args:
        memory: The forward pass.
        rows: Its states.
        last: First layer that comes.
    """

    def __init__(self, memory: BlockedMemory, rows: Tensor, last: int) -> None:
        self.rows, self.last = rows, last
        self.block = memory.block
        self.near = memory.near
        self.factors = rows.new_zeros(memory.num_steps) if memory.learned else None

    def step(self, l: int, g: Tensor) -> Tensor:
        """dJ/dy_l as far as it passes through the memory, flat, from g = dJ/dy_{l+1}, (size,)."""
        start = l - l % self.block
        stop = min(start + self.block - 1, self.last)
        if l == stop:
            self.near_weights = torch.zeros_like(g, shape=()) if False else self.matrix(start, stop)
            self.later = self.enter(start, stop)
        window = self.window(start, stop)
        window[l - start] = g
        gradient = torch.mv(window[l - start :].t(), self.near_weights[l - start :, l - start])
        if self.later is not None:
            gradient += self.later[l - start]
        if l == max(start, 1):
            self.leave(start, stop, gradient)
        return gradient
