"""Fast memory: t^(-gamma) as a sum of exponentials, and the recurrence that it gives.

    t^(-gamma) ~ sum_i w_i exp(-s_i t)   on [tau_min, horizon]
    memory_l = sum_{j<l} a_{l,j} d_j ~ (1-gamma) tau_l^gamma sum_i w_i exp(-s_i tau_l) H_i
    H_i <- exp(-s_i tau_l) H_i + (1 - exp(-s_i tau_l)) / (s_i tau_l) d_l,   H_i = 0 before the first step

since a_{l,j} = (1-gamma) tau_l^gamma / tau_j times the integral of (t_{l+1} - s)^(-gamma) over s in [t_j, t_{j+1}].
A relative error eps of the kernel is a relative error of at most eps in every a_{l,j}, j < l.

References:
    Beylkin, Monzon (2010), Approximation by exponential sums revisited.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from ._arguments import check_order, check_steps, to_double


class ExponentialKernel:
    """Sum of exponentials t^(-gamma) ~ sum_i w_i exp(-s_i t) on [tau_min, horizon], for the memory of long networks.

    One node is 0, the others are spaced logarithmically between a slow and a fast end that are scanned; the weights
    solve the least squares problem min sum_t (t^gamma sum_i w_i exp(-s_i t) - 1)^2. The number of nodes is the
    smallest that bisection finds to meet the tolerance. A relative error eps of the kernel gives a relative error of
    at most eps in every weight a_{l,j}, j < l, of a grid with steps >= tau_min and total time <= horizon.

    Args:
        gamma: Order of the derivative, 0 < gamma < 1.
        tau_min: Smallest step size, > 0.
        horizon: Largest total time, >= tau_min.
        tolerance: Largest relative error allowed, > 0; rounding stops it near 1e-12.
        max_nodes: Largest number of exponentials allowed, >= 1; each is one more state in :func:`exponential_memory`.

    Attributes:
        nodes: s_i >= 0, float64 (K,), ascending; constants, without gradient.
        weights: w_i, float64 (K,); some may be negative.
        error: Largest relative error on [tau_min, horizon] that was found, <= tolerance.

    Raises:
        ValueError: If an argument lies outside its range, or max_nodes exponentials do not meet the tolerance.

    References:
        Beylkin, Monzon (2010), Approximation by exponential sums revisited.

    Example:
        >>> kernel = ExponentialKernel(0.5, 1e-2, 1.0, 1e-6)
        >>> len(kernel.nodes) <= 16, kernel.error <= 1e-6
        (True, True)
    """

    def __init__(self, gamma: float, tau_min: float, horizon: float, tolerance: float, *, max_nodes: int = 64) -> None:
        self.gamma = check_order(gamma)
        if not 0.0 < tau_min < math.inf:
            raise ValueError(f"tau_min must be positive and finite, got {tau_min!r}: it is the smallest step size")
        if not tau_min <= horizon < math.inf:
            raise ValueError(
                f"horizon must be finite and at least tau_min = {tau_min!r}, got {horizon!r}: "
                "it is the sum of the steps"
            )
        if not tolerance > 0.0:
            raise ValueError(f"tolerance must be positive, got {tolerance!r}: it is a relative error, such as 1e-6")
        if max_nodes < 1:
            raise ValueError(
                f"max_nodes must be at least 1, got {max_nodes!r}: it is the number of exponentials allowed"
            )
        self.tau_min = float(tau_min)
        self.horizon = float(horizon)
        self.tolerance = float(tolerance)
        nodes, weights, self.error = self._search(max_nodes)
        self.nodes = torch.from_numpy(nodes / self.horizon)
        self.weights = torch.from_numpy(weights / self.horizon**self.gamma)

    def __call__(self, t: Float[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """The approximation of t^(-gamma), float64, shaped like ``t``; t in [tau_min, horizon]."""
        return torch.exp(-t.double()[..., None] * self.nodes.to(t.device)) @ self.weights.to(t.device)

    def __repr__(self) -> str:
        return (
            f"ExponentialKernel(gamma={self.gamma:g}, tau_min={self.tau_min:g}, horizon={self.horizon:g}, "
            f"nodes={len(self.nodes)}, error={self.error:.1e})"
        )

    def _search(self, max_nodes: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Nodes and weights in units of the horizon, and their error.

        The number of nodes is doubled until it suffices, then bisected.
        """
        ratio = self.horizon / self.tau_min
        too_few, enough = 0, 1
        best = fit = _fit_exponentials(self.gamma, ratio, enough)
        while fit[2] > self.tolerance:
            if enough == max_nodes:
                raise ValueError(
                    f"tolerance must be one that max_nodes = {max_nodes} exponentials can meet on "
                    f"[{self.tau_min:g}, {self.horizon:g}], at least {best[2]:.1e}, got {self.tolerance:g}: "
                    "allow more nodes or a larger tolerance, or raise tau_min"
                )
            too_few, enough = enough, min(2 * enough, max_nodes)
            fit = _fit_exponentials(self.gamma, ratio, enough)
            best = min(best, fit, key=lambda candidate: candidate[2])
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            trial = _fit_exponentials(self.gamma, ratio, middle)
            if trial[2] <= self.tolerance:
                enough, fit = middle, trial
            else:
                too_few = middle
        return fit


def exponential_memory(
    differences: Float[Tensor, " layers *shape"],
    tau: Float[Tensor, " layers"],
    kernel: ExponentialKernel,
    *,
    validate: bool = True,
) -> Float64[Tensor, " layers *shape"]:
    """The memory sum_{j<l} a_{l,j} d_j of every step by a recurrence over K exponentials.

    It takes O(N K) operations instead of O(N^2):

        memory_l = (1-gamma) tau_l^gamma sum_i w_i exp(-s_i tau_l) H_i
        H_i <- exp(-s_i tau_l) H_i + (1 - exp(-s_i tau_l)) / (s_i tau_l) d_l,   H_i = 0 before the first step

    The plain form, for reference: under autograd it stores K states a step.

    Args:
        differences: d_l = y_{l+1} - y_l, shape (N, ...).
        tau: Step sizes, shape (N,); every step >= kernel.tau_min and their sum <= kernel.horizon.
        kernel: The sum of exponentials.
        validate: Whether the values of tau are checked, as in :func:`l1_weights`.

    Returns:
        float64 (N, ...): row l is the memory of step l, row 0 is zero. Differentiable in differences and tau.

    Raises:
        ValueError: If tau is not admissible or leaves the range of the kernel, or differences does not have N rows.

    Example:
        >>> kernel = ExponentialKernel(0.5, 0.5, 1.5, 1e-8)
        >>> exponential_memory(torch.ones(3), torch.full((3,), 0.5), kernel)
        tensor([0.0000, 0.4142, 0.7321], dtype=torch.float64)
    """
    check_steps(tau, validate=validate)
    if validate and not torch.compiler.is_compiling():
        _check_range(tau, kernel)
    if differences.ndim == 0 or differences.shape[0] != tau.shape[0]:
        raise ValueError(
            f"differences must have one row per step, {tau.shape[0]}, got shape {tuple(differences.shape)}: "
            "give y_1 - y_0 .. y_N - y_(N-1)"
        )
    d = to_double(differences)
    nodes, weights = kernel.nodes.to(d.device), kernel.weights.to(d.device)
    history = torch.zeros((len(nodes), *d.shape[1:]), dtype=d.dtype, device=d.device)
    memory = []
    for step, difference in zip(tau.double().unbind(), d.unbind(), strict=True):
        decay = torch.exp(-nodes * step)
        coefficients = (1.0 - kernel.gamma) * step**kernel.gamma * weights * decay
        memory.append(torch.tensordot(coefficients.to(d.dtype), history, dims=1))
        column = (-1,) + (1,) * difference.ndim
        history = decay.reshape(column) * history + mean_decay(nodes * step).reshape(column) * difference
    return torch.stack(memory)


def mean_decay(x: Tensor) -> Tensor:
    """(1 - exp(-x)) / x, 1 at x = 0."""
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return torch.where(x == 0, torch.ones_like(x), -torch.expm1(-safe) / safe)


def _fit_exponentials(gamma: float, ratio: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The best nodes and weights of ``count`` exponentials on [1/ratio, 1], and their largest relative error."""
    t = np.geomspace(1.0 / ratio, 1.0, max(200, 20 * count))
    best: tuple[NDArray[np.float64], NDArray[np.float64], float] | None = None
    for slow in np.geomspace(0.2, 2.0, 6):
        for fast in np.geomspace(1.0, 16.0, 7):
            nodes = np.concatenate([[0.0], np.geomspace(slow, max(fast * ratio, slow), count - 1)])
            scales = np.maximum(nodes, 1.0) ** gamma  # columns of comparable size
            matrix = t[:, None] ** gamma * np.exp(-t[:, None] * nodes) * scales
            solution = np.linalg.lstsq(matrix, np.ones_like(t), rcond=None)[0]
            error = float(np.abs(matrix @ solution - 1.0).max())
            if best is None or error < best[2]:
                best = nodes, scales * solution, error
    assert best is not None
    return best[0], best[1], _largest_error(gamma, ratio, best[0], best[1])


def _largest_error(gamma: float, ratio: float, nodes: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Largest relative error on [1/ratio, 1]: a grid ten times finer than that of the fit, refined at its maximum."""

    def error(t: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.abs(t**gamma * (np.exp(-t[:, None] * nodes) @ weights) - 1.0)

    t = np.geomspace(1.0 / ratio, 1.0, max(2000, 200 * len(nodes)))
    peak = int(np.argmax(error(t)))
    return float(error(np.geomspace(t[max(peak - 1, 0)], t[min(peak + 1, len(t) - 1)], 201)).max())


def _check_range(tau: Tensor, kernel: ExponentialKernel) -> None:
    smallest, total = float(tau.detach().double().min()), float(tau.detach().double().sum())
    slack = 1e-12
    if smallest < kernel.tau_min * (1.0 - slack) or total > kernel.horizon * (1.0 + slack):
        raise ValueError(
            f"tau must have steps >= {kernel.tau_min:g} and a sum <= {kernel.horizon:g}, the range of the kernel, "
            f"got smallest step {smallest:g} and sum {total:g}: build a new ExponentialKernel for this range"
        )
