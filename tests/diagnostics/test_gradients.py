"""Norms and singular values of the derivatives of y_N."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from taulearn.diagnostics import GradientPropagation, gradient_propagation, plot_propagation, propagation_figure
from taulearn.nn import Residual, TimeSteps, TimeVariableNetwork, densenet, feedforward, fractional_dnn, resnet

DOUBLE = torch.float64
BUILDERS = {"feedforward": feedforward, "residual": resnet, "dense": densenet, "fractional": fractional_dnn}
FIELDS = ("largest", "smallest", "state", "weight", "bias", "step")
all_schemes = pytest.mark.parametrize("scheme", BUILDERS)


def make(scheme: str, depth: int = 4, width: Any = 5, **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(1)
    return BUILDERS[scheme](3, width, 2, depth, activation="tanh", horizon=2.0, dtype=DOUBLE, **options)


def batch(samples: int = 3, features: int = 3) -> Tensor:
    return torch.randn(samples, features, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def by_shifts(network: TimeVariableNetwork, x: Tensor, l: int) -> Tensor:
    """d y_N / d y_{l+1} for one sample: an increment of f_l, divided by s_l, is one of y_{l+1}."""
    power = network.scheme.step_power
    s = network.time_steps.tau[l].detach() ** power * math.gamma(2 - power)
    width = network.states(x)[l].shape[1]

    def last(shift: Tensor) -> Tensor:
        hook = network.layers[l].register_forward_hook(lambda module, arguments, f: f + shift / s)
        try:
            return network.states(x)[-1][0]
        finally:
            hook.remove()

    return jacrev(last)(torch.zeros(width, dtype=DOUBLE)).detach()


class _Last(nn.Module):
    def __init__(self, network: TimeVariableNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.states(x)[-1][0]


def parameter_norm(network: TimeVariableNetwork, x: Tensor, name: str) -> Tensor:
    """Norm of d y_N / d parameter; for the steps one per entry."""
    parameter = network.get_parameter(name).detach()
    last = _Last(network)
    jacobian = jacrev(lambda p: functional_call(last, {f"network.{name}": p}, (x,)))(parameter).detach()
    return jacobian.norm(dim=0) if name == "time_steps.values" else jacobian.norm()


class TestExact:
    @pytest.mark.parametrize("width", [5, [4, 6, 3, 3]], ids=str)
    @all_schemes
    def test_states_and_parameters(self, scheme: str, width: Any) -> None:
        network, x = make(scheme, width=width), batch()
        found = gradient_propagation(network, x)
        assert found.method == "exact"
        for s in range(3):
            one = x[s : s + 1]
            for l in range(4):
                J = by_shifts(network, one, l)
                values = torch.linalg.svdvals(J)
                expected = {"largest": values[0], "smallest": values[-1], "state": J.norm()}
                expected["weight"] = parameter_norm(network, one, f"layers.{l}.linear.weight")
                expected["bias"] = parameter_norm(network, one, f"layers.{l}.linear.bias")
                expected["step"] = parameter_norm(network, one, "time_steps.values")[l]
                for name, value in expected.items():
                    torch.testing.assert_close(getattr(found, name)[l, s], value, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("constraint", ["fixed", "dependent", "simplex"])
    def test_steps_are_the_effective_ones_under_every_constraint(self, constraint: str) -> None:
        expected = gradient_propagation(make("fractional"), batch())
        found = gradient_propagation(make("fractional", constraint=constraint), batch())
        for name in FIELDS:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))

    def test_portions_of_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = gradient_propagation(make("residual"), batch())
        monkeypatch.setattr("taulearn.diagnostics.jacobian_products._ENTRIES", 1)
        found = gradient_propagation(make("residual"), batch())
        for name in FIELDS:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))

    def test_dense_growth_is_structural(self) -> None:
        network = make("dense", depth=9, init=0.0)
        found = gradient_propagation(network, batch(1))
        torch.testing.assert_close(found.largest[:, 0], found.structural_growth)
        assert found.structural_growth.tolist() == [128, 64, 32, 16, 8, 4, 2, 1, 1]
        assert gradient_propagation(make("residual"), batch(1)).structural_growth.tolist() == [1, 1, 1, 1]

    def test_overflow_is_no_error(self) -> None:
        network = make("dense", depth=160, width=3).float()
        found = gradient_propagation(network, batch(1).float())
        assert bool(found.largest[0].isnan().all())
        assert float(found.largest[-1]) == 1.0


class TestProducts:
    @pytest.mark.parametrize("width", [5, [4, 6, 3, 5]], ids=str)
    @all_schemes
    def test_as_many_steps_as_values_are_exact(self, scheme: str, width: Any) -> None:
        network, x = make(scheme, width=width), batch()
        exact = gradient_propagation(network, x)
        found = gradient_propagation(network, x, method="products", steps=6, probes=400)
        assert found.method == "products"
        for name in ("largest", "smallest", "step"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-9, atol=1e-12)
        for name in ("state", "weight", "bias"):
            torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0.1, atol=0)

    def test_few_steps_bound_the_singular_values(self) -> None:
        network, x = make("residual", width=40, depth=6), batch(2)
        exact = gradient_propagation(network, x)
        few = gradient_propagation(network, x, method="products", steps=10)
        assert bool((few.largest <= exact.largest * (1 + 1e-12)).all())
        assert bool((few.smallest >= exact.smallest * (1 - 1e-12)).all())
        assert bool((few.largest >= 0.97 * exact.largest).all())

    def test_wide_states_are_not_built(self) -> None:
        network = make("residual", width=130, depth=2)
        found = gradient_propagation(network, batch(1))
        assert found.method == "products"
        assert "upper bound" in str(found)
        again = gradient_propagation(network, batch(1))
        assert torch.equal(found.state, again.state)

    def test_jacobian_of_low_rank(self) -> None:
        network = make("residual", width=[6, 2, 6, 6])
        exact = gradient_propagation(network, batch(1))
        found = gradient_propagation(network, batch(1), method="products", steps=6)
        torch.testing.assert_close(found.largest, exact.largest, rtol=1e-9, atol=1e-12)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True, dtype=DOUBLE)

    def forward(self, y: Tensor) -> Tensor:
        return self.block(y) - y


class TestOtherModels:
    @pytest.mark.parametrize("method", ["exact", "products"])
    def test_attention(self, method: str) -> None:
        torch.manual_seed(0)
        steps = TimeSteps(3, horizon=3.0, dtype=DOUBLE)
        network = TimeVariableNetwork(
            [_Attention() for _ in range(3)], nn.Identity(), Residual(), steps, stem=nn.Identity()
        )
        x = torch.randn(2, 3, 4, dtype=DOUBLE)
        found = gradient_propagation(network, x, method=method, steps=12, probes=8)
        network.eval()
        y = network.states(x[:1])[1].detach()
        J = torch.autograd.functional.jacobian(lambda y: network.layers[2](y) + y, y).reshape(12, 12)
        values = torch.linalg.svdvals(J)
        torch.testing.assert_close(found.largest[1, 0], values[0].detach())
        torch.testing.assert_close(found.smallest[1, 0], values[-1].detach(), rtol=1e-7, atol=1e-9)

    def test_convolutions(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(3)]
        network = TimeVariableNetwork(layers, nn.Flatten(), Residual(), TimeSteps(3), stem=nn.Identity())
        found = gradient_propagation(network, torch.randn(2, 2, 4, 4))
        assert found.largest.shape == (3, 2)
        assert float(found.weight.min()) > 0


class TestModelComesBack:
    @pytest.mark.parametrize("constraint", ["free", "fixed", "dependent", "simplex"])
    def test_nothing_changes(self, constraint: str) -> None:
        network = make("fractional", constraint=constraint)
        network.layers[1].requires_grad_(False)
        network.train()
        network.layers[0].eval()
        before = copy.deepcopy(network.state_dict())
        values, names = network.time_steps.values, [n for n, _ in network.named_parameters()]
        flags = [p.requires_grad for p in network.parameters()]
        modes = [m.training for m in network.modules()]
        gradient_propagation(network, batch(1))
        with pytest.raises(ValueError, match="inputs must have shape"):
            gradient_propagation(network, batch(1, 7))
        assert network.time_steps.values is values
        assert network.time_steps.constraint == constraint
        assert [n for n, _ in network.named_parameters()] == names
        assert [p.requires_grad for p in network.parameters()] == flags
        assert [m.training for m in network.modules()] == modes
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())

    def test_under_no_grad(self) -> None:
        with torch.no_grad():
            found = gradient_propagation(make("residual"), batch(1))
        assert not found.largest.requires_grad


def test_table() -> None:
    network = make("residual")
    network.keep_layers_([0, 2, 3])
    lines = str(gradient_propagation(network, batch())).splitlines()
    assert lines[0] == "residual: derivatives of y_N, medians over 3 samples"
    assert lines[1].split() == ["layer", "tau", "s_max", "s_min", "norm", "norm", "W", "norm", "b", "norm", "tau"]
    assert [line.split()[0] for line in lines[3:]] == ["0", "2", "3"]
    assert lines[-1].split()[1:4] == ["0.5000", "1.0000", "1.0000"]


class TestFigure:
    @staticmethod
    def result(depth: int, scheme: str = "residual") -> GradientPropagation:
        return gradient_propagation(make(scheme, depth=depth, width=2), batch(2))

    def test_curves_are_the_medians(self) -> None:
        result = self.result(6)
        line = plot_propagation({"fixed": [result, self.result(3)]}, part="weight").lines[2]
        assert list(line.get_xdata()) == [5, 4, 3, 2, 1, 0]
        assert list(line.get_ydata()) == result.weight.median(dim=1).values.tolist()

    def test_relative_to_the_structural_growth(self) -> None:
        result = self.result(6, "dense")
        line = plot_propagation(result, relative=True).lines[0]
        expected = result.largest.median(dim=1).values / result.structural_growth
        assert list(line.get_ydata()) == expected.tolist()

    def test_grid_has_one_legend_and_one_colour_per_label(self) -> None:
        a, b = self.result(3), self.result(5)
        panels = {
            "before": {"residual": {"fixed": a, "learned": [a, b]}, "dense": {"learned": b}},
            "after": {"residual": {"fixed": b}},
        }
        figure = propagation_figure(panels)
        assert [ax.get_title() for ax in figure.axes[:2]] == ["residual, before", "dense, before"]
        colours = {line.get_color() for ax in figure.axes for line in ax.lines if line.get_label() == "learned"}
        assert len(colours) == 1
        assert [text.get_text() for text in figure.legends[0].texts] == ["fixed", "learned"]
        figure.canvas.draw()
