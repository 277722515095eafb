"""The explicit adjoint systems: one is autograd's gradient, the other is what section 5.2 prints."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from taulearn import adjoint
from taulearn.functional import half_mse_loss
from taulearn.nn import (
    ComposedSkips,
    Fractional,
    FullyConnected,
    PadSkips,
    Residual,
    TimeSteps,
    TimeVariableNetwork,
    activation_names,
    fractional_dnn,
    learned_skips,
    resnet,
)

DOUBLE = torch.float64
OTHER = "optimize-then-discretize"


def draw_batch(features: int, outputs: int, samples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, features, dtype=DOUBLE, generator=generator)
    return x, torch.randn(samples, outputs, dtype=DOUBLE, generator=generator)


def autograd(network: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters())
    found = torch.autograd.grad(loss(network(inputs), targets), list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_autograd(network: nn.Module, inputs: Tensor, targets: Tensor, loss: Any = mse_loss) -> None:
    explicit = adjoint.gradients(network, inputs, targets, loss)
    expected = autograd(network, inputs, targets, loss)
    assert list(explicit) == list(expected)
    # a gradient that cancels over the batch has the rounding errors of its terms
    whole = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert explicit[name].shape == gradient.shape
        error = float((explicit[name] - gradient).norm())
        assert error <= 1e-12 * (float(gradient.norm()) + 1e-3 * whole), (name, error, float(gradient.norm()), whole)


def random_steps(logarithms: list[float]) -> list[float]:
    return [10.0**x for x in logarithms]


@st.composite
def networks(draw: st.DrawFn) -> TimeVariableNetwork:
    depth = draw(st.integers(1, 8))
    width: int | list[int] = draw(
        st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=depth, max_size=depth))
    )
    constraint = draw(st.sampled_from(["free", "fixed", "dependent", "simplex"]))
    steps = random_steps(draw(st.lists(st.floats(-3, 0.5), min_size=depth, max_size=depth)))
    options: dict[str, Any] = {
        "activation": draw(st.sampled_from(["tanh", "softplus", "smooth_relu", "relu", "gelu", "identity"])),
        "constraint": constraint,
        "horizon": sum(steps),
        "init": steps,
        "skips": draw(st.sampled_from(["pad", "learned"])),
        "dtype": DOUBLE,
    }
    torch.manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        return resnet(3, width, 2, depth, **options)
    gamma, memory_from = draw(st.floats(0.05, 0.95)), draw(st.sampled_from([0, 1]))
    options["lower_bound"] = 1e-4
    return fractional_dnn(3, width, 2, depth, gamma=gamma, memory_from=memory_from, **options)


class TestGradient:
    @settings(max_examples=60, deadline=None)
    @given(network=networks())
    def test_discretize_then_optimize_is_autograd(self, network: TimeVariableNetwork) -> None:
        assert_autograd(network, *draw_batch(3, 2))

    @pytest.mark.parametrize("skips", ["pad", "composed"])
    @pytest.mark.parametrize("scheme", [Residual(), Fractional(0.4), Fractional(0.6, memory_from=0)], ids=repr)
    def test_input_carried_by_the_skips(self, scheme: nn.Module, skips: str) -> None:
        widths = [3, 4, 4, 2, 3]
        torch.manual_seed(0)
        maps: Any = [nn.Linear(n, m, bias=False, dtype=DOUBLE) if n != m else None for n, m in pairwise(widths)]
        carry = PadSkips(widths, from_input=True) if skips == "pad" else ComposedSkips(maps, from_input=True)
        layers = [FullyConnected(n, m, "tanh", dtype=DOUBLE) for n, m in pairwise(widths)]
        steps = TimeSteps(4, init=[0.4, 0.1, 0.7, 0.2], dtype=DOUBLE)
        head = nn.Linear(3, 2, dtype=DOUBLE)
        network = TimeVariableNetwork(layers, head, scheme, steps, carry, stem=nn.Identity())
        assert_autograd(network, *draw_batch(3, 2))

    def test_sixty_layers_with_steps_from_1e_minus_6_to_10(self) -> None:
        generator = torch.Generator().manual_seed(0)
        steps = 10.0 ** (7.0 * torch.rand(60, generator=generator, dtype=DOUBLE) - 6.0)
        for gamma, memory_from in [(0.1, 0), (0.5, 1), (0.9, 0)]:
            torch.manual_seed(0)
            network = fractional_dnn(
                3,
                4,
                2,
                60,
                gamma=gamma,
                memory_from=memory_from,
                init=steps,
                lower_bound=1e-7,
                activation="tanh",
                dtype=DOUBLE,
            )
            assert_autograd(network, *draw_batch(3, 2))

    @pytest.mark.parametrize("constraint", ["free", "dependent"])
    def test_steps_that_are_held_get_none(self, constraint: str) -> None:
        torch.manual_seed(0)
        network = resnet(3, 4, 2, 4, activation="tanh", constraint=constraint, dtype=DOUBLE)
        network.time_steps.held = frozenset({0, 2})
        assert_autograd(network, *draw_batch(3, 2))
        gradient = adjoint.gradients(network, *draw_batch(3, 2), mse_loss)["time_steps.values"]
        assert (gradient == 0).tolist()[:3] == [True, False, True]

    def test_cross_entropy_and_the_papers_loss(self) -> None:
        network = fractional_dnn(3, 4, 2, 4, dtype=DOUBLE)
        x, y = draw_batch(3, 2)
        assert_autograd(network, x, (y[:, 0] > 0).long(), cross_entropy)
        assert_autograd(network, x, y, half_mse_loss)

    def test_inputs_with_more_dimensions(self) -> None:
        network = resnet(4, 3, 2, 3, dtype=DOUBLE)
        assert_autograd(network, torch.randn(5, 2, 2, dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE))
        network.stem = nn.Identity()
        assert_autograd(network, torch.randn(5, 7, 4, dtype=DOUBLE), torch.randn(5, 7, 2, dtype=DOUBLE))

    def test_dependent_step_at_its_bound(self) -> None:
        network = fractional_dnn(3, 4, 2, 3, constraint="dependent", lower_bound=0.1, activation="tanh", dtype=DOUBLE)
        with torch.no_grad():
            network.time_steps.values.fill_(0.6)
        assert network.time_steps.tau[-1] == 0.1
        assert_autograd(network, *draw_batch(3, 2))

    def test_one_layer_in_two_places(self) -> None:
        network = resnet(3, 4, 2, 4, activation="tanh", dtype=DOUBLE)
        network.layers[2] = network.layers[1]
        assert_autograd(network, *draw_batch(3, 2))

    def test_pruned_network(self) -> None:
        network = resnet(3, 4, 2, 5, activation="tanh", dtype=DOUBLE)
        network.keep_layers_([0, 2, 4])
        assert_autograd(network, *draw_batch(3, 2))

    @pytest.mark.parametrize("activation", sorted(set(activation_names()) - {"prelu", "rrelu"}))
    def test_every_activation(self, activation: str) -> None:
        torch.manual_seed(0)
        assert_autograd(fractional_dnn(3, 4, 2, 3, activation=activation, dtype=DOUBLE), *draw_batch(3, 2))

    def test_activation_in_place(self) -> None:
        assert_autograd(resnet(3, 4, 2, 3, activation=nn.ReLU(inplace=True), dtype=DOUBLE), *draw_batch(3, 2))

    def test_float32(self) -> None:
        network = fractional_dnn(3, 4, 2, 4, activation="tanh")
        x, y = (t.float() for t in draw_batch(3, 2))
        explicit, expected = adjoint.gradients(network, x, y, mse_loss), autograd(network, x, y, mse_loss)
        for name, gradient in expected.items():
            assert explicit[name].dtype == torch.float32
            torch.testing.assert_close(explicit[name], gradient, rtol=1e-4, atol=1e-6)

    def test_leaves_the_network_as_it_was(self) -> None:
        network = fractional_dnn(3, 4, 2, 3, dtype=DOUBLE)
        before = copy.deepcopy(network.state_dict())
        found = adjoint.gradients(network, *draw_batch(3, 2), mse_loss)
        assert all(p.grad is None for p in network.parameters())
        assert not any(g.requires_grad for g in found.values())
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def printed_adjoint(network: TimeVariableNetwork, x: Tensor, y: Tensor, loss: Any) -> dict[int, Tensor]:
    """(5.8) with the weights as printed, in loops, for tanh and equal widths."""
    scheme, tau = network.scheme, network.time_steps.tau.detach().numpy()
    assert isinstance(scheme, Fractional)
    gamma, N = scheme.gamma, len(tau)

    def b(j: int, l: int) -> float:
        powers = sum(tau[l : j + 1]) ** (1 - gamma) - sum(tau[l:j]) ** (1 - gamma)
        return float(tau[l] ** gamma / tau[j] * powers)

    states = [x, *(s.detach() for s in network.states(x))]
    output = network.head(states[-1]).detach().requires_grad_()
    (phi_out,) = torch.autograd.grad(loss(output, y), output)
    phi = {N: phi_out @ network.head.weight.detach()}
    for l in range(N - 1, 0, -1):
        W, bias = network.layers[l].linear.weight.detach(), network.layers[l].linear.bias.detach()
        slope = 1 - torch.tanh(states[l] @ W.T + bias) ** 2
        phi[l] = phi[l + 1] + tau[l] ** gamma * math.gamma(2 - gamma) * (phi[l + 1] * slope) @ W
        for j in range(l + 1, N):
            phi[l] = phi[l] + b(j, l) * (phi[j + 1] - phi[j])
    return phi


class TestOptimizeThenDiscretize:
    @pytest.mark.parametrize("memory_from", [0, 1])
    def test_is_the_printed_system(self, memory_from: int) -> None:
        torch.manual_seed(0)
        init = [0.1, 0.4, 0.2, 0.3, 0.15]
        network = fractional_dnn(
            3, 4, 2, 5, gamma=0.4, memory_from=memory_from, init=init, activation="tanh", dtype=DOUBLE
        )
        x, y = draw_batch(3, 2)
        found = adjoint.gradients(network, x, y, mse_loss, OTHER)
        states, phi = [x, *network.states(x)], printed_adjoint(network, x, y, mse_loss)
        for l, layer in enumerate(network.layers):
            slope = 1 - layer(states[l]) ** 2
            delta = init[l] ** 0.4 * math.gamma(1.6) * phi[l + 1] * slope
            torch.testing.assert_close(found[f"layers.{l}.linear.weight"], delta.T @ states[l], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(found[f"layers.{l}.linear.bias"], delta.sum(0), rtol=1e-12, atol=1e-15)

    def test_is_no_gradient_for_the_fractional_scheme(self) -> None:
        torch.manual_seed(0)
        network = fractional_dnn(3, 8, 2, 7, activation="tanh", dtype=DOUBLE)
        found = adjoint.deviation(network, *draw_batch(3, 2), mse_loss)
        assert float(found.ratio[-1]) == pytest.approx(1.0, abs=1e-12)
        assert float(found.angle[-1]) == pytest.approx(0.0, abs=1e-6)
        assert bool((found.ratio[1:-1] > 1.3).all())
        assert bool((found.angle[1:-1] > 1.0).all())

    def test_agrees_for_the_residual_scheme(self) -> None:
        network, (x, y) = resnet(3, [4, 2, 3], 2, 3, activation="tanh", dtype=DOUBLE), draw_batch(3, 2)
        both = [adjoint.gradients(network, x, y, mse_loss, method) for method in adjoint.METHODS]
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])

    def test_approaches_the_gradient_as_gamma_goes_to_1(self) -> None:
        off = []
        for gamma in (0.9, 0.99, 0.999):
            torch.manual_seed(0)
            network = fractional_dnn(3, 8, 2, 6, gamma=gamma, activation="tanh", dtype=DOUBLE)
            off.append(float((adjoint.deviation(network, *draw_batch(3, 2), mse_loss).ratio - 1).abs().max()))
        assert off[1] < 0.2 * off[0]
        assert off[2] < 0.2 * off[1]

    def test_deviation_is_that_of_the_gradients(self) -> None:
        torch.manual_seed(0)
        network = fractional_dnn(3, 4, 2, 4, activation="tanh", dtype=DOUBLE)
        x, y = draw_batch(3, 2)
        exact, other = (adjoint.gradients(network, x, y, mse_loss, method) for method in adjoint.METHODS)
        found = adjoint.deviation(network, x, y, mse_loss)
        for l in range(4):
            names = [f"layers.{l}.linear.weight", f"layers.{l}.linear.bias"]
            g, d = (torch.cat([each[name].flatten() for name in names]) for each in (exact, other))
            cosine = float(g @ d / g.norm() / d.norm())
            assert float(found.ratio[l]) == pytest.approx(float(d.norm() / g.norm()), rel=1e-12)
            assert float(found.angle[l]) == pytest.approx(math.degrees(math.acos(min(1.0, cosine))), abs=1e-5)
        ratio = other["time_steps.values"] / exact["time_steps.values"]
        torch.testing.assert_close(found.tau_ratio, ratio)
        lines = str(found).splitlines()
        assert lines[0].split() == ["layer", "norm", "ratio", "angle", "dtau", "ratio"]
        assert len(lines) == 2 + 4 + 1

    def test_deviation_of_fixed_steps(self) -> None:
        network = fractional_dnn(3, 4, 2, 4, constraint="fixed", activation="tanh", dtype=DOUBLE)
        assert adjoint.deviation(network, *draw_batch(3, 2), mse_loss).tau_ratio.shape == (4,)


def test_a_skip_past_the_first_layer_counts_only_with_the_input() -> None:
    network = resnet(3, 4, 2, 2, activation="tanh", dtype=DOUBLE)
    maps = learned_skips([3, 4, 4], dtype=DOUBLE)
    maps.maps[0] = nn.Linear(3, 4, bias=False, dtype=DOUBLE)
    network.skips = maps
    assert_autograd(network, *draw_batch(3, 2))
