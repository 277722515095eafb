"""The Caputo derivative against quadrature, exact solutions and arithmetic of sixty digits."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad
from scipy.special import erfcx
from torch import Tensor

from problems import (
    CaputoProblem,
    caputo_derivative_of_power,
    mittag_leffler,
    oscillation,
    relaxation,
    smooth_growth,
)
from taulearn.caputo import derivative, l1_weights, solve
from taulearn.caputo.weights import plain_left_weights

ORDERS = (0.2, 0.5, 0.8)
GRIDS = {
    "single step": [0.3],
    "equal steps": [0.25] * 5,
    "growing by 1e8": [1e-8, 0.3, 1.0, 0.7, 2.0],
    "shrinking by 1e8": [2.0, 0.7, 1.0, 0.3, 1e-8],
    "short between long": [1.0, 1e-8, 1e-8, 1.0, 1e-4],
    "beyond 1e8": [1e-9, 1e3, 1e-3, 1e-9, 1e2],
}

orders = st.floats(0.01, 0.99)
# Grids drawn entry by entry turn out short and mild, grids drawn by seed are long and rough.
rough = st.builds(lambda n, seed: np.random.default_rng(seed).uniform(-6.0, 1.0, n), st.integers(1, 60), st.integers(0))
grids = st.one_of(st.lists(st.floats(-6.0, 1.0), min_size=1, max_size=60).map(np.array), rough).map(
    lambda logarithms: torch.from_numpy(10.0**logarithms)
)
both_sides = pytest.mark.parametrize("side", ["left", "right"])
all_orders = pytest.mark.parametrize("gamma", ORDERS)
all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def grid_points(tau: Tensor) -> Tensor:
    return torch.cat([tau.new_zeros(1), torch.cumsum(tau, 0)])


def fitted_order(numbers: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(numbers), np.log(errors), 1)[0])


def weights_by_quadrature(tau: np.ndarray, gamma: float) -> np.ndarray:
    """(1-gamma) tau_l^gamma / tau_j times the integral of u^(-gamma) over [S, S + tau_j], in log u."""
    x, w = np.polynomial.legendre.leggauss(48)
    a = np.eye(len(tau))
    for l in range(len(tau)):
        span = np.array([math.fsum(tau[j + 1 : l + 1]) for j in range(l)])
        length = np.log1p(tau[:l] / span)
        integral = length / 2 * (np.exp((1 - gamma) * length[:, None] * (x + 1) / 2) @ w)
        a[l, :l] = (1 - gamma) * (tau[l] / span) ** gamma * span / tau[:l] * integral
    return a


def exact_weight(tau: list[mpmath.mpf], gamma: mpmath.mpf, l: int, j: int) -> mpmath.mpf:
    """The definition, to be used with many digits."""
    if j >= l:
        return mpmath.mpf(j == l)
    span = mpmath.fsum(tau[j + 1 : l + 1])
    return tau[l] ** gamma / tau[j] * ((span + tau[j]) ** (1 - gamma) - span ** (1 - gamma))


class TestWeights:
    @given(grids, orders)
    @settings(max_examples=40, deadline=None)
    def test_quadrature_of_the_defining_integral(self, tau: Tensor, gamma: float) -> None:
        expected = torch.from_numpy(weights_by_quadrature(tau.numpy(), gamma))
        torch.testing.assert_close(l1_weights(tau, gamma), expected, rtol=1e-11, atol=0.0)
        right = l1_weights(tau.flip(0), gamma, "right").flip(0, 1)
        torch.testing.assert_close(right, expected, rtol=1e-11, atol=0.0)

    @given(grids, orders)
    @settings(max_examples=40, deadline=None)
    def test_positive_bounded_and_increasing_towards_the_diagonal(self, tau: Tensor, gamma: float) -> None:
        for a in (l1_weights(tau, gamma), l1_weights(tau, gamma, "right").flip(0, 1)):
            below = torch.ones_like(a).tril(-1).bool()
            assert torch.equal(a, a.tril())
            assert torch.equal(a.diagonal(), torch.ones(len(tau), dtype=a.dtype))
            assert (a[below] > 0).all()
            assert (a[below] <= (1 - gamma) * (1 + 1e-14)).all()
            assert ((a[:, 1:] >= a[:, :-1] * (1 - 1e-14)) | ~below[:, 1:]).all()

    @all_orders
    def test_equal_steps_give_the_closed_form_and_both_sides_agree(self, gamma: float) -> None:
        a = l1_weights(torch.full((40,), 0.7), gamma)
        k = np.arange(40.0)
        closed = torch.from_numpy((k + 1) ** (1 - gamma) - k ** (1 - gamma))
        for l in range(40):
            torch.testing.assert_close(a[l, : l + 1], closed[: l + 1].flip(0), rtol=1e-13, atol=0.0)
        torch.testing.assert_close(l1_weights(torch.full((40,), 0.7), gamma, "right"), a.T, rtol=1e-14, atol=0.0)

    def test_order_one_forgets(self) -> None:
        tau = torch.tensor([0.1, 3.0, 0.2, 1.0], dtype=torch.float64)
        a = l1_weights(tau, 1.0 - 1e-9)
        torch.testing.assert_close(a, torch.eye(4, dtype=torch.float64), rtol=0.0, atol=1e-9)
        expected = 1e-9 * math.log1p(0.1 / 3.2) / (0.1 / 0.2)
        assert a[2, 0].item() == pytest.approx(expected, rel=1e-6)

    def test_float32_steps_give_float64_weights(self) -> None:
        tau = torch.linspace(0.1, 2.0, 5)
        assert torch.equal(l1_weights(tau, 0.5), l1_weights(tau.double(), 0.5))
        assert l1_weights(tau, 0.5).dtype == torch.float64


class TestGradients:
    @all_orders
    @all_grids
    def test_weights_and_their_derivatives_to_twelve_digits(self, grid: list[float], gamma: float) -> None:
        tau = torch.tensor(grid, dtype=torch.float64)
        jacobian = torch.func.jacrev(l1_weights)(tau, gamma)
        value = l1_weights(tau, gamma)
        with mpmath.workdps(100):
            order = mpmath.mpf(gamma)
            exact = [mpmath.mpf(x) for x in grid]
            for l in range(len(grid)):
                for j in range(l):
                    assert value[l, j].item() == pytest.approx(float(exact_weight(exact, order, l, j)), rel=1e-14)
                    for i in range(len(grid)):
                        h = exact[i] * mpmath.mpf(10) ** -30
                        up, down = ([x + s * h * (k == i) for k, x in enumerate(exact)] for s in (1, -1))
                        slope = (exact_weight(up, order, l, j) - exact_weight(down, order, l, j)) / (2 * h)
                        # relative to the entry or, where contributions of S cancel, to the size of those
                        scale = float(exact_weight(exact, order, l, j) / mpmath.fsum(exact[j + 1 : l + 1]))
                        assert jacobian[l, j, i].item() == pytest.approx(float(slope), rel=1e-11, abs=1e-12 * scale)

    @both_sides
    @pytest.mark.parametrize("grid", [GRIDS["single step"], GRIDS["equal steps"], [1e-3, 1.0, 0.2]])
    def test_gradcheck(self, grid: list[float], side: str) -> None:
        tau = torch.tensor(grid, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(0)
        y = torch.rand(len(grid) + 1, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: l1_weights(t, 0.4, side), tau, eps=1e-7)
        assert torch.autograd.gradgradcheck(lambda t: l1_weights(t, 0.4, side), tau, eps=1e-7, rtol=1e-2)
        assert torch.autograd.gradcheck(lambda y, t: derivative(y, t, 0.4, side), (y, tau), eps=1e-7)
        assert torch.autograd.gradcheck(lambda y, t: solve(lambda s, y: s - y**2, y, t, 0.4), (y[0], tau), eps=1e-7)

    @both_sides
    @all_grids
    def test_finite_with_anomaly_detection(self, grid: list[float], side: str) -> None:
        tau = torch.tensor(grid, requires_grad=True)
        with torch.autograd.set_detect_anomaly(True):
            l1_weights(tau, 0.5, side).sum().backward()
        assert tau.grad is not None
        assert tau.grad.dtype == torch.float32
        assert torch.isfinite(tau.grad).all()


def wave_derivative(t: float, gamma: float, side: str, end: float) -> float:
    """The Caputo derivative of cos(3 t) from the definition, by quadrature with an algebraic weight."""
    if side == "left":
        integral = quad(lambda s: -3 * math.sin(3 * s), 0.0, t, weight="alg", wvar=(0.0, -gamma))[0]
    else:
        integral = quad(lambda s: 3 * math.sin(3 * s), t, end, weight="alg", wvar=(-gamma, 0.0))[0]
    return integral / math.gamma(1 - gamma)


class TestDerivative:
    @both_sides
    @all_orders
    def test_order_on_smooth_functions(self, gamma: float, side: str) -> None:
        numbers, errors = [160, 320, 640], []
        for n in numbers:
            tau = torch.full((n,), 2.0 / n, dtype=torch.float64)
            approximate = derivative(torch.cos(3 * grid_points(tau)), tau, gamma, side)
            errors.append(
                max(
                    abs(approximate[k - (side == "left")].item() - wave_derivative(2.0 * k / n, gamma, side, 2.0))
                    for k in (n // 4, n // 2, 3 * n // 4)
                )
            )
        assert fitted_order(numbers, errors) == pytest.approx(2 - gamma, abs=0.1)

    @both_sides
    def test_piecewise_linear_functions_are_exact(self, side: str) -> None:
        tau = torch.tensor([0.3, 1e-3, 2.0, 0.1, 0.5], dtype=torch.float64)
        y = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
        t, slopes, gamma = grid_points(tau).tolist(), (torch.diff(y) / tau).tolist(), 0.6
        for l in range(5):
            here = t[l + 1] if side == "left" else t[l]
            total = 0.0
            for j in range(l + 1) if side == "left" else range(l, 5):
                near, far = sorted((abs(here - t[j]), abs(here - t[j + 1])))
                if near < 1e-12:
                    total += slopes[j] * quad(lambda u: 1.0, 0.0, far, weight="alg", wvar=(-gamma, 0.0))[0]
                else:
                    total += slopes[j] * quad(lambda u: u**-gamma, near, far, epsabs=0.0, epsrel=1e-12)[0]
            expected = (total if side == "left" else -total) / math.gamma(1 - gamma)
            assert derivative(y, tau, gamma, side)[l].item() == pytest.approx(expected, rel=1e-10)

    @all_orders
    @pytest.mark.parametrize("grading", [1.0, 2.0, 5.0])
    def test_graded_grid_and_weak_singularity(self, gamma: float, grading: float) -> None:
        numbers, weighted, plain = [128, 256, 512, 1024], [], []
        for n in numbers:
            t = (torch.arange(n + 1, dtype=torch.float64) / n) ** grading
            exact = caputo_derivative_of_power(gamma, gamma, t[1:])
            error = (derivative(t**gamma, torch.diff(t), gamma) - exact).abs()
            weighted.append((t[1:] ** gamma * error).max().item())
            plain.append(error.max().item())
        assert fitted_order(numbers, weighted) == pytest.approx(min(grading * gamma, 2 - gamma), abs=0.1)
        assert fitted_order(numbers, plain) == pytest.approx(0.0, abs=1e-3)

    def test_order_at_the_end_time_needs_no_grading(self) -> None:
        numbers, errors = [128, 256, 512], []
        for n in numbers:
            tau = torch.full((n,), 1.0 / n, dtype=torch.float64)
            errors.append(abs(derivative(grid_points(tau) ** 0.5, tau, 0.5)[-1].item() - math.gamma(1.5)))
        assert fitted_order(numbers, errors) == pytest.approx(1.5, abs=0.1)


class TestSolver:
    def test_mittag_leffler_in_closed_cases(self) -> None:
        assert mittag_leffler(1.0, -2.0) == pytest.approx(math.exp(-2.0), rel=1e-14)
        assert mittag_leffler(0.5, -3.0) == pytest.approx(erfcx(3.0), rel=1e-14)
        assert mittag_leffler(1.0, 2.0, 2.0) == pytest.approx((math.exp(2.0) - 1.0) / 2.0, rel=1e-14)

    @all_orders
    @pytest.mark.parametrize("problem", [relaxation, oscillation, smooth_growth])
    def test_first_order_at_the_end_time(self, problem: Callable[[float], CaputoProblem], gamma: float) -> None:
        p = problem(gamma)
        exact = p.exact(1.5)
        numbers, errors = [50, 100, 200, 400], []
        for n in numbers:
            y = solve(p.f, p.y0, torch.full((n,), 1.5 / n, dtype=torch.float64), gamma)
            errors.append((y[-1] - exact).abs().max().item())
        assert fitted_order(numbers, errors) == pytest.approx(1.0, abs=0.1)
        assert errors[-1] < 1e-2

    def test_satisfies_the_discrete_equation(self) -> None:
        tau = torch.tensor(GRIDS["growing by 1e8"], dtype=torch.float64)
        y0 = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
        y = solve(lambda t, y: torch.cos(t) - y, y0, tau, 0.3)
        assert y.shape == (6, 2, 2)
        t = grid_points(tau)[:-1, None, None]
        torch.testing.assert_close(derivative(y, tau, 0.3), torch.cos(t) - y[:-1], rtol=1e-12, atol=1e-12)

    def test_order_one_is_explicit_euler(self) -> None:
        tau = torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64)
        y = solve(lambda t, y: -y, torch.tensor(1.0), tau, 1.0 - 1e-9)
        torch.testing.assert_close(y[1:], torch.cumprod(1.0 - tau, 0), rtol=1e-8, atol=0.0)


class TestTransforms:
    def test_compile(self) -> None:
        tau = torch.linspace(0.01, 2.0, 9, dtype=torch.float64).requires_grad_()
        compiled = torch.compile(l1_weights, backend="aot_eager", fullgraph=True)
        # twice: at the first change of a float argument the compiler would make it symbolic
        for gamma in (0.3, 0.5):
            expected, found = l1_weights(tau, gamma), compiled(tau, gamma)
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)
            gradients = [torch.autograd.grad(a.square().sum(), tau)[0] for a in (expected, found)]
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)

    @both_sides
    def test_vmap_of_grad(self, side: str) -> None:
        tau = torch.linspace(0.1, 2.0, 24, dtype=torch.float64).reshape(4, 6)

        def total(tau: Tensor) -> Tensor:
            return l1_weights(tau, 0.4, side, validate=False).square().sum()

        batched = torch.func.vmap(torch.func.grad(total))(tau)
        for row, gradient in zip(tau, batched, strict=True):
            torch.testing.assert_close(torch.func.grad(total)(row), gradient)
        with pytest.raises(RuntimeError, match=r"^validate must"):
            torch.func.vmap(lambda t: l1_weights(t, 0.4))(tau)


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_over_many_orders_of_magnitude_give_numbers_with_gradients(side: str) -> None:
    tau = torch.tensor([1e74, 1e-74, 1.0, 1e-74, 1e70], dtype=torch.float64, requires_grad=True)
    weights = l1_weights(tau, 0.5, side)
    (gradient,) = torch.autograd.grad(weights.sum(), tau)
    assert bool(weights.isfinite().all())
    assert bool(gradient.isfinite().all())
    (plain,) = torch.autograd.grad(plain_left_weights(tau, 0.5).sum(), tau)
    assert bool(plain.isfinite().all())
