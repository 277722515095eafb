"""The sum of exponentials for t^(-gamma), and the fast memory against the exact weights."""

import pytest
import torch

from taulearn.caputo import ExponentialKernel, exponential_memory, l1_weights


class TestKernel:
    @pytest.mark.parametrize(("gamma", "ratio", "tolerance"), [(0.5, 1e3, 1e-6), (0.1, 1e5, 1e-9), (0.9, 1e2, 1e-3)])
    def test_error_is_met_between_the_nodes_of_the_fit(self, gamma: float, ratio: float, tolerance: float) -> None:
        kernel = ExponentialKernel(gamma, 3.0 / ratio, 3.0, tolerance)
        torch.manual_seed(0)
        t = 3.0 * ratio ** -torch.rand(20_000, dtype=torch.float64)
        found = (t**gamma * kernel(t) - 1).abs().max().item()
        assert found <= kernel.error * (1 + 1e-6) <= tolerance * (1 + 1e-6)
        assert found > 0.5 * kernel.error

    def test_one_step_needs_one_node(self) -> None:
        assert len(ExponentialKernel(0.5, 2.0, 2.0, 1e-12).nodes) == 1


class TestMemory:
    def test_error_of_the_weights_is_at_most_that_of_the_kernel(self) -> None:
        torch.manual_seed(0)
        tau = 10.0 ** (2 * torch.rand(50, dtype=torch.float64) - 2)
        for gamma in (0.2, 0.5, 0.8):
            kernel = ExponentialKernel(gamma, tau.min().item(), tau.sum().item(), 1e-4)
            fast = exponential_memory(torch.eye(50, dtype=torch.float64), tau, kernel)
            exact = l1_weights(tau, gamma).tril(-1)
            assert ((fast - exact).abs() <= kernel.error * exact * (1 + 1e-6) + 1e-15).all()

    def test_fast_memory_and_its_gradient(self) -> None:
        torch.manual_seed(0)
        tau = (torch.rand(30, dtype=torch.float64) + 0.01).requires_grad_()
        d = torch.randn(30, 3, dtype=torch.float64)
        kernel = ExponentialKernel(0.5, 0.01, 40.0, 1e-10)
        exact = torch.tensordot(l1_weights(tau, 0.5).tril(-1), d, dims=1)
        fast = exponential_memory(d, tau, kernel)
        torch.testing.assert_close(fast, exact, rtol=0.0, atol=1e-8)
        gradients = [torch.autograd.grad(m.square().sum(), tau)[0] for m in (exact, fast)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
