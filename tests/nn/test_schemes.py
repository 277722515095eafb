"""The four schemes against NumPy, exact solutions and limits; the maps between states; the network's own checks."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contract import gradients
from reference import array, network_output, network_states
from taulearn import prune
from taulearn.nn import (
    ComposedSkips,
    Dense,
    Feedforward,
    Fractional,
    FullyConnected,
    IdentitySkips,
    PadSkips,
    Residual,
    Scheme,
    Skips,
    TimeSteps,
    TimeVariableNetwork,
    learned_skips,
    resnet,
)
from taulearn.nn.schemes import SCHEMES

DOUBLE = torch.float64
ALL = [Feedforward(), Residual(), Dense(), Fractional(0.4), Fractional(0.7, memory_from=0)]
all_schemes = pytest.mark.parametrize("scheme", ALL, ids=repr)


def network(
    scheme: Scheme,
    widths: list[int],
    *,
    activation: str = "tanh",
    skips: Skips | None = None,
    stem: nn.Module | None = None,
    init: list[float] | None = None,
    seed: int = 0,
) -> TimeVariableNetwork:
    torch.manual_seed(seed)
    layers = [FullyConnected(n, m, activation, dtype=DOUBLE) for n, m in pairwise(widths)]
    head = nn.Linear(widths[-1], 2, bias=False, dtype=DOUBLE)
    if init is None:
        init = [0.05 + 0.4 * ((3 * l + 1) % 5) / 5 for l in range(len(layers))]
    steps = TimeSteps(len(layers), init=init, dtype=DOUBLE)
    return TimeVariableNetwork(layers, head, scheme, steps, skips, stem=stem)


def batch(features: int) -> Tensor:
    return torch.randn(4, features, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def assert_reference(model: TimeVariableNetwork, x: Tensor) -> None:
    expected = network_states(model, x)[1:]
    found = model.states(x)
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        np.testing.assert_allclose(array(y), z, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(array(model(x)), network_output(model, x), rtol=1e-12, atol=1e-12)


@all_schemes
class TestReference:
    @pytest.mark.parametrize("activation", ["relu", "smooth_relu", "sigmoid", "softplus"])
    def test_activations(self, scheme: Scheme, activation: str) -> None:
        assert_reference(network(scheme, [3, 4, 4, 4], activation=activation), batch(3))

    @pytest.mark.parametrize("depth", [1, 2, 9])
    def test_depths(self, scheme: Scheme, depth: int) -> None:
        assert_reference(network(scheme, [3, *[4] * depth]), batch(3))

    @pytest.mark.parametrize("from_input", [False, True])
    def test_padding(self, scheme: Scheme, from_input: bool) -> None:
        widths = [3, 5, 2, 2, 6, 4]
        model = network(scheme, widths, skips=PadSkips(widths, from_input=from_input), stem=nn.Identity())
        assert_reference(model, batch(3))

    @pytest.mark.parametrize("from_input", [False, True])
    def test_learned_maps(self, scheme: Scheme, from_input: bool) -> None:
        widths = [3, 5, 5, 2, 6]
        maps = [None if n == m else nn.Linear(n, m, bias=False, dtype=DOUBLE) for n, m in pairwise(widths)]
        model = network(scheme, widths, skips=ComposedSkips(maps, from_input=from_input))
        assert_reference(model, batch(3))

    def test_identities_past_every_layer(self, scheme: Scheme) -> None:
        model = network(scheme, [3, 3, 3, 3], stem=nn.Identity())
        assert model.skips.from_input
        assert_reference(model, batch(3))

    def test_without_a_stem_the_first_skip_is_zero(self, scheme: Scheme) -> None:
        model, x = network(scheme, [3, 3, 3]), batch(3)
        assert not model.skips.from_input
        tau = model.time_steps.tau[0]
        factor = tau**scheme.step_power * math.gamma(2 - scheme.step_power)
        torch.testing.assert_close(model.states(x)[0], factor * model.layers[0](x), rtol=1e-14, atol=1e-14)

    def test_forward_is_the_head_on_the_last_state(self, scheme: Scheme) -> None:
        model, x = network(scheme, [3, 4, 4]), batch(3)
        assert torch.equal(model(x), model.head(model.states(x)[-1]))


class TestNegativeSteps:
    @pytest.mark.parametrize("scheme", ALL[:3], ids=repr)
    def test_schemes_without_powers_take_them(self, scheme: Scheme) -> None:
        assert_reference(network(scheme, [3, 4, 4, 4], init=[0.4, -0.3, 0.2]), batch(3))


class Constant(nn.Module):
    """A layer function that is the same everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, y: Tensor) -> Tensor:
        return torch.full_like(y, self.value)


class TestFractional:
    @pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
    def test_linear_growth_is_solved_exactly(self, gamma: float) -> None:
        """The L1 scheme is exact for y = t, whose derivative of order gamma is t^(1-gamma) / Gamma(2-gamma)."""
        tau = [0.3, 0.05, 0.4, 0.1, 0.15]
        t = np.cumsum(tau)
        layers = [Constant(time ** (1 - gamma) / math.gamma(2 - gamma)) for time in t]
        steps = TimeSteps(5, init=tau, dtype=DOUBLE)
        model = TimeVariableNetwork(layers, nn.Identity(), Fractional(gamma, 0), steps, stem=nn.Identity())
        states = model.states(torch.zeros(1, 1, dtype=DOUBLE))
        np.testing.assert_allclose([float(y.detach()) for y in states], t, rtol=1e-13)

    @pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize("memory_from", [0, 1])
    def test_equal_steps_give_the_classical_weights(self, gamma: float, memory_from: int) -> None:
        """With a_k = (k+1)^(1-gamma) - k^(1-gamma) in place of a_{l,l-k}."""
        model, x = network(Fractional(gamma, memory_from), [3, 3, 3, 3, 3, 3], init=[0.25] * 5), batch(3)
        y = [np.zeros((4, 3))]
        u = array(x)
        for l, layer in enumerate(model.layers):
            f = array(layer(torch.from_numpy(u if l == 0 else y[l])))
            new = y[l] + 0.25**gamma * math.gamma(2 - gamma) * f
            for j in range(memory_from, l):
                new = new - ((l + 1 - j) ** (1 - gamma) - (l - j) ** (1 - gamma)) * (y[j + 1] - y[j])
            y.append(new)
        np.testing.assert_allclose(array(model.states(x)[-1]), y[-1], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("memory_from", [0, 1])
    def test_gamma_to_one_is_the_residual_scheme(self, memory_from: int) -> None:
        x, distances, gaps = batch(3), [], [1e-2, 1e-4, 1e-6]
        residual = network(Residual(), [3, 4, 4, 4, 4])
        for gap in gaps:
            fractional = network(Fractional(1 - gap, memory_from), [3, 4, 4, 4, 4])
            distances.append(float((fractional(x) - residual(x)).detach().abs().max()))
        assert distances[-1] < 1e-5
        assert np.polyfit(np.log(gaps), np.log(distances), 1)[0] == pytest.approx(1.0, abs=0.05)

    def test_gradients_tend_to_the_residual_ones(self) -> None:
        x = batch(3)
        expected = gradients(network(Residual(), [3, 4, 4, 4]), x)
        found = gradients(network(Fractional(1 - 1e-8), [3, 4, 4, 4]), x)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)

    def test_the_memory_conventions_differ(self) -> None:
        x = batch(3)
        outputs = [network(Fractional(0.5, first), [3, 4, 4, 4])(x) for first in (0, 1)]
        assert float((outputs[0] - outputs[1]).detach().abs().max()) > 1e-3

    def test_float32_is_as_accurate_as_its_type(self) -> None:
        """The weights are computed in float64: steps of very different size do not cancel."""
        tau = [0.3, 1e-4, 0.2, 1e-4, 0.3]
        exact, x = network(Fractional(0.5), [3, 4, 4, 4, 4, 4], init=tau), batch(3)
        single = copy.deepcopy(exact).float()
        torch.testing.assert_close(single(x.float()).double(), exact(x), rtol=2e-6, atol=2e-6)


class TestCompiled:
    def test_inductor_computes_the_same(self) -> None:
        """The fractional scheme, which has the most to get wrong; forward and gradients."""
        torch._dynamo.reset()
        model, x = network(Fractional(0.5), [3, 4, 4]), batch(3)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
        expected = gradients(model, x)
        compiled(x).square().sum().div(2).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-12)


class TestSkips:
    @pytest.mark.parametrize(
        "make",
        [
            lambda from_input: IdentitySkips(4, from_input=from_input),
            lambda from_input: PadSkips([3, 3, 3, 3, 3], from_input=from_input),
            lambda from_input: ComposedSkips([None] * 4, from_input=from_input),
        ],
        ids=["identity", "pad", "composed"],
    )
    @pytest.mark.parametrize("from_input", [False, True])
    def test_equal_widths(self, make: Callable[[bool], Skips], from_input: bool) -> None:
        skips, y = make(from_input), batch(3)
        assert skips.num_steps == 4
        assert skips.is_identity(0) == from_input
        assert all(skips.is_identity(layer) for layer in (1, 2, 3))
        first = skips(y, 0, 3)
        assert (first is None) == (not from_input)
        carried = skips(y, 1, 3)
        assert carried is not None
        assert torch.equal(carried, y)
        skips.keep_([0, 2])
        assert skips.num_steps == 2

    def test_padding(self) -> None:
        skips, y = PadSkips([5, 3, 2, 4]), batch(3)
        longer, shorter = skips(y, 1, 3), skips(y, 1, 2)
        assert longer is not None
        assert shorter is not None
        assert torch.equal(longer, torch.cat([y, torch.zeros(4, 1, dtype=DOUBLE)], 1))
        assert torch.equal(shorter, y[:, :2])
        assert [skips.is_identity(layer) for layer in range(3)] == [False, False, False]

    def test_narrow_layers_between_do_not_cut_what_is_carried_past_them(self) -> None:
        y = batch(4)
        carried = PadSkips([7, 4, 1, 4])(y, 1, 3)
        assert carried is not None
        assert torch.equal(carried, y)

    def test_padding_after_a_deletion(self) -> None:
        skips, y = PadSkips([5, 3, 3, 2, 2]), batch(3)
        skips.keep_([0, 2])
        assert skips.widths == (5, 3, 2)
        carried = skips(y, 1, 2)
        assert carried is not None
        assert torch.equal(carried, y[:, :2])

    def test_learned_maps_are_where_the_width_changes(self) -> None:
        skips = learned_skips([9, 4, 4, 2, 3], dtype=DOUBLE)
        assert [isinstance(m, nn.Linear) for m in skips.maps] == [False, False, True, True]
        assert [skips.is_identity(layer) for layer in range(4)] == [False, True, False, False]
        assert all(p.dtype == DOUBLE for p in skips.parameters())
        y = batch(4)
        carried = skips(y, 1, 4)
        assert carried is not None
        torch.testing.assert_close(carried, skips.maps[3](skips.maps[2](y)))


class TestNetwork:
    def test_layers_that_must_stay(self) -> None:
        widths = [3, 4, 4, 2, 2]
        assert network(Residual(), widths, skips=PadSkips(widths)).fixed_layers() == {
            0: "the skip past it is zero",
            2: "the skip past it is not the identity",
        }
        dependent = resnet(3, 4, 2, 3, constraint="dependent")
        assert list(dependent.fixed_layers()) == [0, 2]
        assert "the dependent one" in dependent.fixed_layers()[2]
        assert network(Residual(), [3, 3, 3], stem=nn.Identity()).fixed_layers() == {}

    def test_the_first_layer_stays_where_the_memory_starts_after_it(self) -> None:
        """Deleting it would take the next layer out of the memory, an error that does not vanish with tau."""
        assert list(network(Fractional(0.5), [3, 3, 3], stem=nn.Identity()).fixed_layers()) == [0]
        assert network(Fractional(0.5, 0), [3, 3, 3], stem=nn.Identity()).fixed_layers() == {}

    def test_keeping_refuses_to_lose_such_a_layer(self) -> None:
        model = resnet(3, 4, 2, 4)
        model.keep_layers_([0, 2, 3])
        with pytest.raises(ValueError, match=r"indices must .*got positions \[1\]"):
            model.keep_layers_([1])
        assert model.time_steps.origin == (0, 2, 3)
        assert len(model.layers) == 3

    def test_schemes_by_name(self) -> None:
        assert set(SCHEMES) == {"feedforward", "residual", "dense", "fractional"}
        assert {scheme.name for scheme in ALL if scheme.deletes_exactly} == {"residual", "fractional"}


def test_a_scheme_of_second_order_is_pruned_by_its_own_power():
    class Squared(Residual):
        name = "squared"
        step_power = 2.0

        def prepare(self, tau):
            return tau.square().unbind()

    layers = [nn.Linear(3, 3) for _ in range(3)]
    steps = TimeSteps(3, init=[0.5, 0.01, 0.5])
    network = TimeVariableNetwork(layers, nn.Linear(3, 1), Squared(), steps, stem=nn.Linear(2, 3))
    (gone,) = prune(network, 0.01).deleted
    assert (gone.layer, gone.factor) == (1, pytest.approx(1e-4))
