"""The formulas against NumPy, closed forms and optimisers that know nothing of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from reference import array, smooth_relu as smooth_relu_reference
from taulearn.functional import (
    feedforward_step,
    fractional_step,
    half_mse_loss,
    project_simplex,
    residual_step,
    smooth_relu,
    soft_threshold,
)

numbers = st.floats(-100.0, 100.0, allow_subnormal=False)
vectors = st.lists(numbers, min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))
positive = st.floats(1e-3, 50.0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class TestSteps:
    def test_feedforward(self) -> None:
        f, tau = draw(3, 2), torch.tensor(-0.3, dtype=torch.float64)
        assert torch.equal(feedforward_step(f, tau), -0.3 * f)

    def test_residual(self) -> None:
        y, f, tau = draw(3, 2), draw(3, 2), torch.tensor(0.7, dtype=torch.float64)
        torch.testing.assert_close(residual_step(y, f, tau), y + 0.7 * f, rtol=1e-15, atol=1e-15)
        assert torch.equal(residual_step(None, f, tau), 0.7 * f)

    def test_a_zero_residual_step_is_the_identity_bit_by_bit(self) -> None:
        y = draw(5, 4)
        assert torch.equal(residual_step(y, draw(5, 4), torch.tensor(0.0)), y)

    @pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("has_skip", [False, True])
    @pytest.mark.parametrize("has_memory", [False, True])
    def test_fractional(self, gamma: float, has_skip: bool, has_memory: bool) -> None:
        y, memory, f, tau = draw(3, 2), draw(3, 2), draw(3, 2), torch.tensor(0.7, dtype=torch.float64)
        expected = 0.7**gamma * math.gamma(2 - gamma) * array(f)
        expected = expected + array(y) * has_skip - array(memory) * has_memory
        found = fractional_step(y if has_skip else None, memory if has_memory else None, f, tau, gamma)
        np.testing.assert_allclose(array(found), expected, rtol=1e-14, atol=1e-14)

    def test_the_fractional_step_tends_to_the_residual_one(self) -> None:
        y, f, tau = draw(3, 2), draw(3, 2), torch.tensor(0.4, dtype=torch.float64)
        distances = [
            float((fractional_step(y, None, f, tau, 1 - eps) - residual_step(y, f, tau)).abs().max())
            for eps in (1e-2, 1e-4, 1e-6)
        ]
        assert np.polyfit(np.log([1e-2, 1e-4, 1e-6]), np.log(distances), 1)[0] == pytest.approx(1.0, abs=0.02)


class TestSmoothReLU:
    @given(vectors, st.floats(1e-4, 2.0))
    def test_values(self, y: Tensor, eta: float) -> None:
        np.testing.assert_allclose(array(smooth_relu(y, eta)), smooth_relu_reference(array(y), eta), rtol=1e-13)

    @pytest.mark.parametrize("y", [-2.0, -0.5, -0.499, 0.0, 0.3, 0.499, 0.5, 2.0])
    def test_gradient(self, y: float) -> None:
        point = torch.tensor(y, dtype=torch.float64, requires_grad=True)
        smooth_relu(point, 0.5).backward()
        expected = min(max(y / (2 * 0.5) + 0.5, 0.0), 1.0)
        assert point.grad is not None
        assert point.grad.item() == pytest.approx(expected, abs=1e-14)

    def test_gradcheck_across_the_joints(self) -> None:
        y = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda y: smooth_relu(y, 0.5), (y,), atol=2e-6)

    def test_no_overflow_far_from_zero(self) -> None:
        y = torch.tensor([-1e30, 1e30], requires_grad=True)
        value = smooth_relu(y)
        value.sum().backward()
        assert value.tolist() == pytest.approx([0.0, 1e30])
        assert y.grad is not None
        assert y.grad.tolist() == [0.0, 1.0]


class TestSoftThreshold:
    @given(vectors, st.floats(0.0, 100.0))
    def test_properties(self, x: Tensor, amount: float) -> None:
        z = soft_threshold(x, amount)
        assert bool((z[x.abs() <= amount] == 0.0).all())
        assert bool((z * x >= 0).all())
        torch.testing.assert_close((x - z).abs(), x.abs().clamp(max=amount), rtol=0.0, atol=1e-13)
        assert torch.equal(soft_threshold(x, torch.tensor(amount, dtype=torch.float64)), z)

    @pytest.mark.parametrize("x", [-3.0, -0.2, 0.0, 0.4, 0.6, 7.0])
    def test_it_is_the_proximal_map(self, x: float) -> None:
        result = minimize_scalar(lambda z: 0.5 * (z - x) ** 2 + 0.5 * abs(z), bounds=(-10, 10), options={"xatol": 1e-9})
        found = soft_threshold(torch.tensor(x, dtype=torch.float64), 0.5).item()
        assert found == pytest.approx(result.x, abs=1e-7)


class TestSimplexProjection:
    @given(vectors, positive, st.floats(0.0, 1.0))
    def test_feasible_idempotent_nearest(self, x: Tensor, total: float, fraction: float) -> None:
        n = x.numel()
        lower = fraction * total / n
        scale = float(x.abs().max()) + total
        z = project_simplex(x, total, lower=lower)
        assert float(z.min()) >= lower
        assert float(z.sum()) == pytest.approx(total, abs=1e-13 * n * scale)
        torch.testing.assert_close(project_simplex(z, total, lower=lower), z, rtol=0.0, atol=1e-13 * n * scale)
        # The nearest point of a polytope: no corner lies on the side of x.
        corners = lower + (total - n * lower) * torch.eye(n, dtype=torch.float64)
        assert float(((corners - z) @ (x - z)).max()) <= 1e-12 * n * scale**2

    @given(vectors, positive)
    def test_order_is_kept_and_equal_entries_stay_equal(self, x: Tensor, total: float) -> None:
        order = torch.argsort(x)
        z = project_simplex(x, total)
        assert bool((torch.diff(z[order]) >= 0).all())
        assert torch.equal(project_simplex(x[order], total), z[order])

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=15, deadline=None)
    def test_a_general_optimiser_finds_the_same_point(self, seed: int) -> None:
        x = np.random.default_rng(seed).normal(size=5)
        result = minimize(
            lambda z: 0.5 * np.sum((z - x) ** 2),
            np.full(5, 0.3),
            jac=lambda z: z - x,
            bounds=[(0.05, None)] * 5,
            constraints={"type": "eq", "fun": lambda z: z.sum() - 1.5},
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(array(project_simplex(torch.from_numpy(x), 1.5, lower=0.05)), result.x, atol=1e-6)

    def test_exact_zeros(self) -> None:
        z = project_simplex(torch.tensor([2.0, 1.9, -0.5, 0.3, -1e9]), 1.0)
        assert z[2:].tolist() == [0.0, 0.0, 0.0]
        assert float(z.sum()) == pytest.approx(1.0, abs=1e-6)

    def test_the_only_point(self) -> None:
        assert project_simplex(torch.tensor([5.0, -3.0]), 1.0, lower=0.5).tolist() == [0.5, 0.5]
        assert project_simplex(torch.tensor([-7.0]), 2.0).tolist() == [2.0]


class TestHalfMSELoss:
    def test_half_of_the_mean_squared_norm(self) -> None:
        output, target = draw(6, 3), draw(6, 3)
        expected = sum(np.sum((a - b) ** 2) for a, b in zip(array(output), array(target), strict=True)) / (2 * 6)
        assert half_mse_loss(output, target).item() == pytest.approx(expected, rel=1e-14)
        mean = torch.nn.functional.mse_loss(output, target).item()
        assert half_mse_loss(output, target).item() == pytest.approx(mean * 3 / 2, rel=1e-14)

    def test_gradient(self) -> None:
        output, target = draw(6, 3).requires_grad_(), draw(6, 3)
        half_mse_loss(output, target).backward()
        torch.testing.assert_close(output.grad, (output.detach() - target) / 6, rtol=1e-14, atol=1e-15)


def test_a_simplex_far_from_its_entries() -> None:
    """The largest one takes all, however large; single precision has no room for both."""
    assert project_simplex(torch.tensor([1e8, 0.0, 0.0]), 1.0).tolist() == [1.0, 0.0, 0.0]
    assert project_simplex(torch.tensor([-1e8, -1e8, 0.0]), 1.0, lower=0.25).tolist() == [0.25, 0.25, 0.5]
