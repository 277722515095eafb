"""The recursions of section 6 against autograd, and its examples."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from taulearn import caputo
from taulearn.nn import TimeVariableNetwork, densenet, feedforward, fractional_dnn, resnet
from taulearn_papers.antil2022.recursions import (
    dense_gradients,
    feedforward_gradients,
    fractional_gradients,
    memory_terms,
    residual_gradients,
)

DOUBLE = torch.float64
BUILDERS = {
    "feedforward": (feedforward, feedforward_gradients),
    "residual": (resnet, residual_gradients),
    "dense": (densenet, dense_gradients),
    "fractional 0": (fractional_dnn, fractional_gradients),
    "fractional 1": (fractional_dnn, fractional_gradients),
}
GAMMA = 0.4


def options(scheme: str) -> dict[str, Any]:
    return {"gamma": GAMMA, "memory_from": int(scheme[-1])} if scheme.startswith("fractional") else {}


def make(scheme: str, depth: int, width: int = 3, features: int = 2) -> TimeVariableNetwork:
    torch.manual_seed(depth)
    init = (0.1 + torch.rand(depth)).tolist()
    return BUILDERS[scheme][0](features, width, 1, depth, activation="tanh", init=init, dtype=DOUBLE, **options(scheme))


def flat_jacobian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return jacrev(f)(at).reshape(-1, at.numel()).detach()


def start(network: TimeVariableNetwork, states: list[Tensor], j: int, name: str) -> Tensor:
    """d(s_j f_j)/d theta_j at fixed states."""
    power, layer = network.scheme.step_power, network.layers[j]
    tau = network.time_steps.tau.detach()[j]
    if name == "tau":
        return flat_jacobian(lambda t: t**power * math.gamma(2 - power) * layer(states[j]), tau)
    parameter = layer.get_parameter(f"linear.{name}").detach()
    factor = tau**power * math.gamma(2 - power)
    return flat_jacobian(lambda p: factor * functional_call(layer, {f"linear.{name}": p}, (states[j],)), parameter)


def recursion(network: TimeVariableNetwork, x: Tensor, scheme: str, j: int, name: str) -> dict[int, Tensor]:
    states = [x, *(y.detach() for y in network.states(x))]
    jacobians = [flat_jacobian(layer, y) for layer, y in zip(network.layers, states[:-1], strict=True)]
    tau = network.time_steps.tau.detach()
    more: dict[str, Any] = options(scheme)
    if name == "tau" and more:
        carried = [torch.zeros_like(states[1]), *states[1:]]
        more["memory"] = memory_terms([y[0] for y in carried], tau, j, **more)
    return BUILDERS[scheme][1](start(network, states, j, name), jacobians, tau, j, **more)


def autograd(network: TimeVariableNetwork, x: Tensor, j: int, name: str) -> list[Tensor]:
    """d y_i / d theta_j for i = 1 .. N."""
    full = "time_steps.values" if name == "tau" else f"layers.{j}.linear.{name}"
    parameter = network.get_parameter(full).detach()
    states = jacrev(lambda p: functional_call(_States(network), {f"network.{full}": p}, (x,)))(parameter)
    found = [s.reshape(-1, parameter.numel()).detach() for s in states]
    return [s[:, j : j + 1] for s in found] if name == "tau" else found


class _States(torch.nn.Module):
    def __init__(self, network: TimeVariableNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network.states(x)


@pytest.mark.parametrize("name", ["weight", "bias", "tau"])
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("scheme", BUILDERS)
def test_recursion_is_autograd(scheme: str, depth: int, name: str) -> None:
    network, x = make(scheme, depth), torch.tensor([[0.3, -0.7]], dtype=DOUBLE)
    for j in range(depth):
        G, expected = recursion(network, x, scheme, j, name), autograd(network, x, j, name)
        assert list(G) == list(range(j + 1, depth + 1))
        for i, found in G.items():
            torch.testing.assert_close(found, expected[i - 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", ["fractional 0", "fractional 1"])
def test_the_printed_recursion_is_off_for_tau(scheme: str) -> None:
    """Theorem 6.6 leaves out what a step does through the weights of the memory."""
    network, x = make(scheme, 5), torch.tensor([[0.3, -0.7]], dtype=DOUBLE)
    states = [x, *(y.detach() for y in network.states(x))]
    jacobians = [flat_jacobian(layer, y) for layer, y in zip(network.layers, states[:-1], strict=True)]
    tau, first = network.time_steps.tau.detach(), start(network, states, 2, "tau")
    printed = fractional_gradients(first, jacobians, tau, 2, **options(scheme))[5]
    exact = autograd(network, x, 2, "tau")[4]
    assert float((printed - exact).norm()) > 0.05 * float(exact.norm())


def test_batches_of_jacobians() -> None:
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(4, 6, 3, 3, dtype=DOUBLE, generator=generator)
    G, tau = torch.randn(6, 3, 2, dtype=DOUBLE, generator=generator), torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=DOUBLE)
    for function in (feedforward_gradients, residual_gradients, dense_gradients, fractional_gradients):
        together = function(G, list(D), tau, 1)
        for s in range(6):
            alone = function(G[s], list(D[:, s]), tau, 1)
            torch.testing.assert_close(together[4][s], alone[4])


class TestExample63:
    """One node per layer, two layers, residual scheme."""

    @staticmethod
    def derivatives(tau_1: float, slope: float) -> tuple[Tensor, Tensor]:
        """d y_2 / d theta_0 and d y_2 / d theta_1 for theta = (W, b, tau), f_1 = 2 with df_1/dy = slope, y_1 = 3."""
        tau = torch.tensor([0.5, tau_1], dtype=DOUBLE)
        D = [torch.full((1, 1), d, dtype=DOUBLE) for d in (0.0, slope)]
        theta_0 = torch.tensor([[0.5 * 1.0, 0.5, 2.0]], dtype=DOUBLE)
        theta_1 = torch.tensor([[tau_1 * 3.0, tau_1, 2.0]], dtype=DOUBLE)
        return residual_gradients(theta_0, D, tau, 0)[2], residual_gradients(theta_1, D, tau, 1)[2]

    def test_factor(self) -> None:
        far, near = self.derivatives(1.0, 99.0)
        assert far.tolist() == [[50.0, 50.0, 200.0]]
        assert near.tolist() == [[3.0, 1.0, 2.0]]

    def test_a_small_step_cures_one_gradient_and_shrinks_the_other_but_for_its_tau_part(self) -> None:
        far, near = self.derivatives(0.01, 99.0)
        assert far[0].tolist() == pytest.approx([0.995, 0.995, 3.98])
        assert near[0].tolist() == pytest.approx([0.03, 0.01, 2.0])


class TestExample68:
    """d y_3 / d theta_0 of the four schemes, with a_{l-1,k} where the paper prints a_{l,k}."""

    generator = torch.Generator().manual_seed(0)
    D = torch.randn(3, 2, 2, dtype=DOUBLE, generator=generator)
    start = torch.randn(2, 7, dtype=DOUBLE, generator=generator)
    tau = torch.tensor([0.3, 0.2, 0.7], dtype=DOUBLE)
    I = torch.eye(2, dtype=DOUBLE)

    def test_feedforward(self) -> None:
        _, t1, t2 = self.tau
        expected = t2 * self.D[2] @ (t1 * self.D[1]) @ self.start
        torch.testing.assert_close(feedforward_gradients(self.start, list(self.D), self.tau, 0)[3], expected)

    def test_residual_and_dense(self) -> None:
        _, t1, t2 = self.tau
        both = t1 * self.D[1] + t2 * self.D[2] + t1 * t2 * self.D[2] @ self.D[1]
        residual = residual_gradients(self.start, list(self.D), self.tau, 0)[3]
        torch.testing.assert_close(residual, (self.I + both) @ self.start)
        dense = dense_gradients(self.start, list(self.D), self.tau, 0)[3]
        torch.testing.assert_close(dense, (2 * self.I + both) @ self.start)

    @pytest.mark.parametrize("memory_from", [0, 1])
    def test_fractional(self, memory_from: int) -> None:
        a = caputo.l1_weights(self.tau, GAMMA)
        if memory_from == 1:
            a[1:, 0] = 0.0
        _, s1, s2 = self.tau**GAMMA * math.gamma(2 - GAMMA)
        matrix = (1 - a[1, 0] - a[2, 0] + a[1, 0] * a[2, 1]) * self.I
        matrix = matrix + (1 - a[2, 1]) * s1 * self.D[1] + (1 - a[1, 0]) * s2 * self.D[2]
        matrix = matrix + s1 * s2 * self.D[2] @ self.D[1]
        found = fractional_gradients(self.start, list(self.D), self.tau, 0, gamma=GAMMA, memory_from=memory_from)[3]
        torch.testing.assert_close(found, matrix @ self.start)


def test_dense_growth_without_steps() -> None:
    G = dense_gradients(torch.ones(1, 1), [torch.zeros(1, 1)] * 6, torch.zeros(6), 1)
    assert [float(G[i]) for i in range(2, 7)] == [1, 1, 2, 4, 8]


ONES, D = torch.ones(3), [torch.eye(2)] * 3


@pytest.mark.parametrize(
    ("function", "given", "named"),
    [
        (residual_gradients, (torch.ones(2, 1), D[:2], ONES, 0), "jacobians.*D_2.*2"),
        (dense_gradients, (torch.ones(2, 1), D, ONES, 3), "layer.*0 .. 2.*3"),
        (memory_terms, ([torch.ones(2)] * 3, ONES, 0), "states.*y_3"),
        (residual_gradients, (torch.ones(2), D, ONES, 0), r"start.*\(2,\)"),
        (feedforward_gradients, (torch.ones(3, 1), D, ONES, 0), "jacobians.*3 by 3"),
        (feedforward_gradients, (torch.ones(2, 1), D, torch.ones(3, 1), 0), "tau"),
        (partial(fractional_gradients, gamma=1), (torch.ones(2, 1), D, ONES, 0), "gamma.*1"),
        (partial(fractional_gradients, memory_from=2), (torch.ones(2, 1), D, ONES, 0), "memory_from.*2"),
        (fractional_gradients, (torch.ones(2, 1), D, torch.tensor([1.0, 0.0, 1.0]), 0), r"tau\[1\] = 0"),
    ],
)
def test_what_does_not_fit_is_refused(function: Callable[..., Any], given: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        function(*given)
