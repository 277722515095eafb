"""Products with the derivatives of y_N by reverse passes, and what norms and singular values they give."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of the derivatives that are held at a time.
_ENTRIES = 2**24
# Share of the norm below which a new Lanczos vector is rounding noise.
_BREAKDOWN = 1e-10

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """One recorded forward pass."""

    states: list[Tensor]  # y_1 .. y_N
    weights: list[list[Tensor]]  # the matrices and kernels of each layer
    biases: list[list[Tensor]]  # the vectors of each layer
    tau: Tensor  # the leaf with the steps, (N,)

    def transposed(self, rows: Tensor) -> tuple[list[Tensor], dict[Tensor, Tensor]]:
        """(d y_N / d y_l)^T w for all states, and the same for all parameters and tau, for rows w, (count, n)."""
        sources = [*{p for group in (*self.weights, *self.biases) for p in group}, self.tau]
        last = self.states[-1]
        found = torch.autograd.grad(
            last,
            [*self.states, *sources],
            rows.to(last.dtype).view(len(rows), *last.shape),
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        states, others = found[: len(self.states)], found[len(self.states) :]
        for l, gradient in enumerate(states):
            if gradient is None:
                raise ValueError(
                    f"states of network must be the tensors that later layers are computed from, got a y_{l + 1} that "
                    f"y_{len(self.states)} does not depend on: return them without detaching or copying"
                )
        zero = last.new_zeros(len(rows))
        return [g.flatten(1).double() for g in states], {
            p: zero if g is None else g for p, g in zip(sources, others, strict=True)
        }

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows in portions whose derivatives fit into memory."""
        entries = sum(t.numel() for group in (self.states, *self.weights, *self.biases) for t in group)
        yield from rows.split(max(1, _ENTRIES // max(1, entries)))


def squares(graph: Graph, states: list[Tensor], others: dict[Tensor, Tensor]) -> Tensor:
    """Sums of squares of one portion: states, weights, biases, steps by rows, layers by columns, (4, N)."""

    def total(group: list[Tensor]) -> Tensor:
        return sum((others[p].double().square().sum() for p in group), start=zero)

    zero = torch.zeros((), dtype=torch.float64, device=graph.tau.device)
    tau = others[graph.tau].double().square()
    return torch.stack(
        [
            torch.stack([g.square().sum() for g in states]),
            torch.stack([total(group) for group in graph.weights]),
            torch.stack([total(group) for group in graph.biases]),
            tau.sum(0) if tau.ndim == 2 else tau.new_zeros(len(graph.tau)),
        ]
    )


def by_matrices(graph: Graph) -> Tensor:
    """largest, smallest, state, weight, bias, step by rows, layers by columns, (6, N): all Jacobians are built."""
    last = graph.states[-1]
    sums, parts = [], []
    for rows in graph.chunks(torch.eye(last.numel(), dtype=last.dtype, device=last.device)):
        states, others = graph.transposed(rows)
        sums.append(squares(graph, states, others))
        parts.append(states)
    ends = torch.stack([_extremes(torch.cat(rows)) for rows in zip(*parts, strict=True)], dim=1)
    return torch.cat([ends, torch.stack(sums).sum(0).sqrt()])


def _extremes(jacobian: Tensor) -> Tensor:
    if not bool(torch.isfinite(jacobian).all()):
        return jacobian.new_full((2,), torch.nan)
    return torch.linalg.svdvals(jacobian)[[0, -1]]


def by_products(graph: Graph, steps: int, probes: int, generator: torch.Generator) -> Tensor:
    """The same from products with random vectors, (6, N)."""
    last = graph.states[-1]
    signs = torch.randint(2, (probes, last.numel()), generator=generator) * 2.0 - 1.0
    sums = [squares(graph, *graph.transposed(rows)) for rows in graph.chunks(signs.to(last))]
    norms = (torch.stack(sums).sum(0) / probes).sqrt()
    by_step, _ = _products(last, graph.tau)
    norms[3] = torch.stack([by_step(e).norm() for e in torch.eye(len(graph.tau), device=last.device)])
    start = torch.randn(last.numel(), generator=generator, dtype=torch.float64).to(last.device)
    ends = [
        _lanczos(*_products(last, y), start, min(steps, y.numel(), last.numel()), generator) for y in graph.states[:-1]
    ]
    ends.append(norms.new_ones(2))
    return torch.cat([torch.stack(ends, dim=1), norms])


def _products(last: Tensor, y: Tensor) -> tuple[Product, Product]:
    """v -> J v and u -> J^T u for J = d last / d y; J v is the derivative of u -> J^T u, which is linear."""
    u = torch.zeros_like(last, requires_grad=True)
    (transposed,) = torch.autograd.grad(last, y, u, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(transposed, u, v.to(y.dtype).view_as(y), retain_graph=True)
        return found.flatten().double()

    def transposed_product(u: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(last, y, u.to(last.dtype).view_as(last), retain_graph=True)
        return found.flatten().double()

    return product, transposed_product


def _lanczos(product: Product, transposed: Product, start: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Largest and smallest singular value of J on the space of ``steps`` Golub-Kahan vectors, (2,).

    They lie between the true ones and are exact when the steps exhaust the smaller dimension.
    """
    left = [start / start.norm()]
    right: list[Tensor] = []
    bidiagonal = start.new_zeros(steps + 1, steps)
    for k in range(steps):
        bidiagonal[k, k], v = _next(transposed(left[-1]), right, bidiagonal.max(), generator)
        right.append(v)
        bidiagonal[k + 1, k], u = _next(product(v), left, bidiagonal.max(), generator)
        left.append(u)
        if not bool(torch.isfinite(bidiagonal).all()):
            return start.new_full((2,), torch.nan)
    return torch.linalg.svdvals(bidiagonal)[[0, -1]]


def _next(x: Tensor, basis: list[Tensor], scale: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Length and direction of x off the basis; where it lies in the basis, 0 and a random direction off it."""
    x = _orthogonal(x, basis)
    size = x.norm()
    if not bool(size <= _BREAKDOWN * scale):
        return size, x / size
    fresh = torch.randn(x.numel(), generator=generator, dtype=x.dtype).to(x.device)
    fresh = _orthogonal(fresh, basis)
    return torch.zeros_like(size), fresh / fresh.norm()


def _orthogonal(x: Tensor, basis: list[Tensor]) -> Tensor:
    """x without its components along the basis; twice is enough."""
    if basis:
        Q = torch.stack(basis)
        for _ in range(2):
            x = x - Q.T @ (Q @ x)
    return x
