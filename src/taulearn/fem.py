"""Finite elements for the Maxwell problem: the best approximation in H(curl) by lowest order Nedelec elements.

On the unit cube, cut into n^3 cubes of six tetrahedra each, find u_h in N_0 with

    (curl u_h, curl v) + (u_h, v) = (curl u, curl v) + (u, v)        for all v in N_0

for the exact solution u of ``taulearn.data.maxwell``. Both norm(u - u_h)_{L2} and norm(u - u_h)_{H(curl)} are of order
h. The cube reaches beyond the cylinder of the training data: a network that is compared with u_h extrapolates.

The matrix is symmetric and positive definite with a condition of order h^-2; conjugate gradients with the diagonal as
preconditioner beat the direct solvers from the coarsest mesh on, and need no memory to speak of.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 7.
    Nedelec (1980), Mixed finite elements in R3.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ._errors import needs, positive_integer, unknown_name
from .data import maxwell

QUADRATURE_ORDER = 5
"""14 points per tetrahedron: against order 8 the errors change by less than 1e-5 of themselves, on any mesh."""
POINTS_PER_CHUNK = 1 << 16
TOLERANCE = 1e-10
"""Relative residual; the error it leaves is far below that of the finest mesh."""

# Measured, n = 16 .. 40: mesh, local matrices of six tetrahedra and their sparse sum; basis functions of one chunk.
_BYTES_PER_CUBE = 24_000
_BYTES_PER_CHUNK = 100_000_000
_SOLVERS = ("cg", "direct")
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class BestApproximation:
    """The best approximation on one mesh, by its errors.

    Attributes:
        n: Subdivisions per edge of the cube.
        h: Mesh size, the longest edge: sqrt(3)/n.
        dofs: Number of unknowns, one per edge of the mesh.
        l2: norm(u - u_h) in L2((0, 1)^3)^3.
        hcurl: Root of the squares of that and of norm(curl u - curl u_h).
        residual: Relative residual of the linear system.
        seconds: What it took.
    """

    n: int
    h: float
    dofs: int
    l2: float
    hcurl: float
    residual: float
    seconds: float


def best_approximation_error(
    n: int, *, solver: str = "cg", memory: float | None = None, progress: bool = False
) -> BestApproximation:
    """How well lowest order Nedelec elements can represent the solution of the Maxwell problem on the unit cube.

    Args:
        n: Subdivisions per edge of the cube, >= 1.
        solver: "cg", conjugate gradients with diagonal preconditioner, or "direct": pypardiso where it is installed,
            else SuperLU.
        memory: Bytes that may be used. None: what the machine has free.
        progress: Whether to print a line per stage.

    Returns:
        The errors.

    Raises:
        ImportError: If scikit-fem is not installed.
        MemoryError: If the mesh needs more memory than there is; nothing has been allocated.
        RuntimeError: If the linear system was not solved to ``TOLERANCE``.
        ValueError: If n < 1 or the solver is unknown.

    Example:
        >>> coarse, fine = best_approximation_error(4), best_approximation_error(8)
        >>> fine.dofs, f"{np.log2(coarse.hcurl / fine.hcurl):.2f}"
        (4184, '0.98')
    """
    n = positive_integer("n", n)
    if solver not in _SOLVERS:
        raise unknown_name("solver", solver, _SOLVERS)
    skfem = _skfem()
    _check_memory(n, memory)
    began = time.perf_counter()

    def say(what: str) -> None:
        if progress:
            sys.stdout.write(f"n = {n}: {what} ({time.perf_counter() - began:.1f} s)\n")
            sys.stdout.flush()

    basis = skfem.Basis(_mesh(n), skfem.ElementTetN0(), intorder=2, disable_doflocs=True)  # exact for the matrix
    matrix = skfem.BilinearForm(_inner_product).assemble(basis).tocsr()
    load = np.zeros(basis.N)
    linear = skfem.LinearForm(lambda v, w: _inner_product(w, v, w))
    for chunk, exact in _chunks(basis):
        load += linear.assemble(chunk, **exact)
    say(f"{basis.N:,} unknowns assembled")
    coefficients = _solve_direct(matrix, load) if solver == "direct" else _solve_cg(matrix, load)
    residual = float(np.linalg.norm(matrix @ coefficients - load) / np.linalg.norm(load))
    if not residual <= 2 * TOLERANCE:
        raise RuntimeError(
            f"solver {solver!r} must reach a relative residual of {2 * TOLERANCE:g}, got {residual:.2g} for n = {n}: "
            f"try solver={_SOLVERS[solver == 'cg']!r}"
        )
    say(f"solved, relative residual {residual:.1e}")
    squares = np.zeros(2)
    for chunk, exact in _chunks(basis):
        field = chunk.interpolate(coefficients)
        squares += [
            _integral(np.asarray(field) - exact["value"], chunk.dx),
            _integral(field.curl - exact["curl"], chunk.dx),
        ]
    l2, hcurl = math.sqrt(squares[0]), math.sqrt(squares.sum())
    say(f"L2 error {l2:.3e}, H(curl) error {hcurl:.3e}")
    return BestApproximation(n, math.sqrt(3) / n, int(basis.N), l2, hcurl, residual, time.perf_counter() - began)


def l2_error(
    field: Callable[[Float[Tensor, "points 3"]], Float[Tensor, "points 3"]],
    n: int,
    *,
    points_per_chunk: int = POINTS_PER_CHUNK,
) -> float:
    """The L2 error of any field against the exact solution on the unit cube, at the quadrature points of one mesh.

    Memory does not grow with the number of points: the field is evaluated chunk by chunk.

    Args:
        field: Maps points (k, 3), float64, to values (k, 3); no gradients are kept.
        n: Subdivisions per edge of the cube, >= 1.
        points_per_chunk: Most points that ``field`` is called with, >= 14.

    Returns:
        norm(u - field) in L2((0, 1)^3)^3.

    Raises:
        ImportError: If scikit-fem is not installed.
        ValueError: If n < 1, or the field's values have another shape or are not finite.

    Example:
        >>> l2_error(maxwell.solution, 2)
        0.0
        >>> f"{l2_error(torch.zeros_like, 4):.3f}"
        '0.459'
    """
    total = 0.0
    for points, weights in quadrature(n, points_per_chunk=points_per_chunk):
        with torch.no_grad():
            values = field(points)
        if values.shape != points.shape or not bool(values.isfinite().all()):
            shape = tuple(values.shape)
            raise ValueError(f"field must return {tuple(points.shape)} finite values, got shape {shape} or inf, nan")
        total += float((weights.unsqueeze(1) * (values.double() - maxwell.solution(points)).square()).sum())
    return math.sqrt(total)


def quadrature(
    n: int, *, points_per_chunk: int = POINTS_PER_CHUNK
) -> Iterator[tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]]:
    """The quadrature points of a mesh of the unit cube with their weights, chunk by chunk.

    Args:
        n: Subdivisions per edge of the cube, >= 1.
        points_per_chunk: Most points in one chunk, >= 14.

    Yields:
        Points (k, 3) and weights (k,), float64; all weights add up to 1.

    Raises:
        ImportError: If scikit-fem is not installed.
        ValueError: If n < 1 or points_per_chunk < 14.

    Example:
        >>> sum(float(weights.sum()) for _, weights in quadrature(3))
        1.0
        >>> sum(len(points) for points, _ in quadrature(3))
        2268
    """
    n = positive_integer("n", n)
    skfem = _skfem()
    corners, weights = skfem.quadrature.get_quadrature(skfem.refdom.RefTet, QUADRATURE_ORDER)
    if points_per_chunk < len(weights):
        raise ValueError(f"points_per_chunk must be >= {len(weights)}, a tetrahedron's, got {points_per_chunk}")
    mesh = _mesh(n)
    for elements in _element_chunks(mesh.nelements, points_per_chunk // len(weights)):
        x = mesh.mapping().F(corners, elements)  # (3, elements, points)
        dx = np.abs(mesh.mapping().detDF(corners, elements)) * weights
        yield torch.from_numpy(x.reshape(3, -1).T.copy()), torch.from_numpy(dx.reshape(-1).copy())


def estimated_memory(n: int) -> int:
    """Bytes that :func:`best_approximation_error` needs at most with ``n`` subdivisions, beside the libraries.

    Args:
        n: Subdivisions per edge of the cube, >= 1.

    Example:
        >>> f"{estimated_memory(31) / 1e9:.1f} GB"
        '0.8 GB'
    """
    return _BYTES_PER_CHUNK + _BYTES_PER_CUBE * positive_integer("n", n) ** 3


def _skfem() -> Any:
    with needs("fem", "finite elements"):
        import skfem
    return skfem


def _mesh(n: int) -> Any:
    grid = np.linspace(0.0, 1.0, n + 1)
    return _skfem().MeshTet.init_tensor(grid, grid, grid)


def _check_memory(n: int, memory: float | None) -> None:
    free, needed = _free_memory() if memory is None else memory, estimated_memory(n)
    if needed > free:
        largest = math.floor((max(0.0, free - _BYTES_PER_CHUNK) / _BYTES_PER_CUBE) ** (1 / 3))
        raise MemoryError(
            f"n must be at most {largest} with {free / 1e9:.2f} GB of memory free, got {n}: "
            f"that mesh needs about {needed / 1e9:.1f} GB"
        )


def _free_memory() -> float:
    """Bytes that can be allocated without swapping, where the system tells."""
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _element_chunks(elements: int, size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, elements, size):
        yield np.arange(start, min(start + size, elements))


def _chunks(basis: Any) -> Iterator[tuple[Any, dict[str, _Array]]]:
    """The basis functions at the points of the error's quadrature, a few elements at a time, and u, curl u there."""
    skfem = _skfem()
    rule = skfem.quadrature.get_quadrature(skfem.refdom.RefTet, QUADRATURE_ORDER)
    for elements in _element_chunks(basis.mesh.nelements, POINTS_PER_CHUNK // len(rule[1])):
        chunk = skfem.Basis(
            basis.mesh, basis.elem, quadrature=rule, elements=elements, dofs=basis.dofs, disable_doflocs=True
        )
        points = torch.from_numpy(np.moveaxis(np.asarray(chunk.global_coordinates()), 0, -1).copy())
        exact = {"value": maxwell.solution(points), "curl": maxwell.curl(points)}
        yield chunk, {name: np.moveaxis(value.numpy(), -1, 0) for name, value in exact.items()}


def _inner_product(u: Any, v: Any, _: Any) -> _Array:
    """The integrand of the H(curl) inner product, curl u . curl v + u . v."""
    value, curl = (u["value"], u["curl"]) if isinstance(u, dict) else (np.asarray(u), u.curl)
    product: _Array = np.einsum("i...,i...->...", curl, v.curl) + np.einsum("i...,i...->...", value, np.asarray(v))
    return product


def _integral(field: _Array, dx: _Array) -> float:
    """The integral of abs(field)^2."""
    return float(np.einsum("ikl,ikl,kl->", field, field, dx))


def _solve_cg(matrix: Any, load: _Array) -> _Array:
    from scipy.sparse.linalg import LinearOperator, cg

    diagonal = matrix.diagonal()
    precondition = LinearOperator(matrix.shape, matvec=lambda r: r / diagonal)
    solution: _Array = cg(matrix, load, rtol=TOLERANCE, atol=0.0, M=precondition)[0]
    return solution


def _solve_direct(matrix: Any, load: _Array) -> _Array:
    solution: _Array
    try:
        import pypardiso
    except ImportError:
        from scipy.sparse.linalg import splu

        options = {"SymmetricMode": True}  # positive definite: no pivoting, a fill-reducing order of A + A^T
        factors = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        solution = factors.solve(load)
    else:
        solution = pypardiso.spsolve(matrix, load)
    return solution
