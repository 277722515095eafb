"""The builders of the papers' networks, and activations by name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reference import linear_layers
from taulearn.nn import (
    SmoothReLU,
    TimeVariableNetwork,
    activation_names,
    densenet,
    feedforward,
    fractional_dnn,
    make_activation,
    resnet,
)
from taulearn.nn.builders import BUILDERS

Builder = Callable[..., TimeVariableNetwork]
all_builders = pytest.mark.parametrize("builder", [feedforward, resnet, densenet, fractional_dnn])

# The elementwise activations of torch's manual that need no arguments: class, and name in torch.nn.functional.
ACTIVATIONS = {
    "ELU": "elu",
    "Hardshrink": "hardshrink",
    "Hardsigmoid": "hardsigmoid",
    "Hardtanh": "hardtanh",
    "Hardswish": "hardswish",
    "LeakyReLU": "leaky_relu",
    "LogSigmoid": "logsigmoid",
    "PReLU": "prelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "RReLU": "rrelu",
    "SELU": "selu",
    "CELU": "celu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
    "Mish": "mish",
    "Softplus": "softplus",
    "Softshrink": "softshrink",
    "Softsign": "softsign",
    "Tanh": "tanh",
    "Tanhshrink": "tanhshrink",
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class TestCounts:
    @all_builders
    @pytest.mark.parametrize("constraint", ["free", "simplex", "dependent", "fixed"])
    def test_the_papers_network(self, builder: Builder, constraint: str) -> None:
        network = builder(784, 100, 10, 6, constraint=constraint)
        steps = {"dependent": 5, "fixed": 0}.get(constraint, 6)
        assert count(network) == 130_000 + steps
        assert count(network.time_steps) == steps
        assert len(network.time_steps.tau) == 6

    def test_a_hidden_layer_with_its_step(self) -> None:
        assert count(resnet(784, 100, 10, 6)) - count(resnet(784, 100, 10, 5)) == 10_101

    @all_builders
    def test_learned_skips_count_only_where_they_are_used(self, builder: Builder) -> None:
        learned = count(builder(8, [16, 4], 2, 2, skips="learned"))
        padded = count(builder(8, [16, 4], 2, 2, skips="pad"))
        assert learned - padded == (0 if builder is feedforward else 16 * 4)

    @all_builders
    def test_every_parameter_gets_a_gradient(self, builder: Builder) -> None:
        network = builder(8, [6, 6, 4], 2, 3, skips="learned", activation="tanh")
        network(torch.randn(5, 8)).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []

    def test_builders_by_name(self) -> None:
        assert {name: build(2, 3, 1, 2).scheme.name for name, build in BUILDERS.items()} == {
            "feedforward": "feedforward",
            "resnet": "residual",
            "densenet": "dense",
            "fractional": "fractional",
        }


class TestConstruction:
    @all_builders
    def test_widths(self, builder: Builder) -> None:
        network = builder(7, [5, 3, 3], 2, 3)
        shapes = [tuple(linear.weight.shape) for linear in linear_layers(network)]
        assert shapes == [(5, 7), (3, 5), (3, 3)]
        assert isinstance(network.head, nn.Linear)
        assert network.head.bias is None
        assert [tuple(y.shape) for y in network.states(torch.zeros(2, 7))] == [(2, 5), (2, 3), (2, 3)]

    @all_builders
    def test_options_reach_the_steps(self, builder: Builder) -> None:
        init = [0.5, 1.0, 0.5]
        network = builder(7, 5, 2, 3, horizon=2.0, constraint="simplex", lower_bound=0.25, init=init)
        steps = network.time_steps
        assert (steps.horizon, steps.constraint, steps.lower_bound) == (2.0, "simplex", 0.25)
        assert steps.tau.tolist() == init

    @all_builders
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtype(self, builder: Builder, dtype: torch.dtype) -> None:
        network = builder(4, [3, 2], 2, 2, dtype=dtype, skips="learned", activation="prelu")
        assert {value.dtype for value in network.state_dict().values()} == {dtype}
        assert network(torch.zeros(1, 4, dtype=dtype)).dtype == dtype

    @all_builders
    def test_device(self, builder: Builder) -> None:
        network = builder(4, [3, 2], 2, 2, device="meta", skips="learned", activation="prelu")
        assert {value.device.type for value in network.state_dict().values()} == {"meta"}

    @all_builders
    def test_layers_start_as_linear_layers_do(self, builder: Builder) -> None:
        torch.manual_seed(3)
        network = builder(4, 3, 2, 1)
        torch.manual_seed(3)
        hidden, head = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)
        state = network.state_dict()
        assert torch.equal(state["layers.0.linear.weight"], hidden.weight)
        assert torch.equal(state["layers.0.linear.bias"], hidden.bias)
        assert torch.equal(state["head.weight"], head.weight)

    def test_layers_start_differently(self) -> None:
        _, second, third = linear_layers(resnet(4, 4, 2, 3))
        assert not torch.equal(second.weight, third.weight)

    def test_fractional_networks_start_with_the_published_bound(self) -> None:
        network = fractional_dnn(4, 4, 2, 3)
        assert network.time_steps.lower_bound == 1e-4
        assert repr(network.scheme) == "Fractional(gamma=0.5, memory_from=1)"

    def test_print(self) -> None:
        text = repr(resnet(4, 3, 2, 2, constraint="dependent"))
        assert "TimeSteps(2, constraint='dependent', horizon=1)" in text
        assert "Residual()" in text


class TestInputs:
    @all_builders
    def test_samples_are_flattened(self, builder: Builder) -> None:
        network, x = builder(12, 3, 2, 2), torch.randn(5, 3, 2, 2)
        assert torch.equal(network(x), network(x.reshape(5, 12)))

    @all_builders
    def test_autocast_mixes_types(self, builder: Builder) -> None:
        network, x = builder(2, 3, 1, 3), torch.randn(4, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for inputs in (x, x.bfloat16()):
                output = network(inputs)
                assert bool(torch.isfinite(output).all())
                torch.testing.assert_close(output.float(), network.float()(x).float(), rtol=0.05, atol=0.05)

    @all_builders
    def test_an_empty_batch(self, builder: Builder) -> None:
        assert builder(2, 3, 1, 3)(torch.zeros(0, 2)).shape == (0, 1)


class TestActivations:
    @pytest.mark.parametrize(("cls", "name"), ACTIVATIONS.items())
    def test_by_either_name(self, cls: str, name: str) -> None:
        for spelling in (cls, name, name.upper()):
            assert type(make_activation(spelling)) is getattr(nn, cls)
        assert name in activation_names()

    def test_names_are_exactly_these(self) -> None:
        """In-place twins such as relu_ were once listed in place of relu."""
        assert activation_names() == sorted([*ACTIVATIONS.values(), "identity", "smooth_relu"])

    @all_builders
    @pytest.mark.parametrize("name", activation_names())
    def test_every_network_runs_with_it(self, builder: Builder, name: str) -> None:
        network = builder(3, 4, 2, 2, activation=name).eval()
        x = torch.randn(2, 3)
        layer = network.layers[1]
        assert bool(torch.isfinite(network(x)).all())
        y = torch.randn(2, 4)
        torch.testing.assert_close(layer(y), make_activation(name).eval()(linear_layers(network)[1](y)))

    def test_smooth_relu_by_name(self) -> None:
        activation = make_activation("smooth_relu")
        assert isinstance(activation, SmoothReLU)
        assert activation.eta == 1e-4
        assert repr(SmoothReLU(0.5)) == "SmoothReLU(eta=0.5)"

    def test_a_module_is_copied_for_each_layer(self) -> None:
        module = nn.PReLU(4)
        network = resnet(3, 4, 2, 3, activation=module)
        weights = [p for name, p in network.named_parameters() if "activation" in name]
        assert len({id(w) for w in [*weights, module.weight]}) == 4

    def test_any_module_will_do(self) -> None:
        class Sine(nn.Module):
            def forward(self, y: Tensor) -> Tensor:
                return torch.sin(y)

        assert resnet(3, 4, 2, 3, activation=Sine())(torch.zeros(1, 3)).shape == (1, 2)

    @pytest.mark.parametrize("name", ["relu_6", "leakyrelu"])
    def test_spellings(self, name: str) -> None:
        assert isinstance(make_activation(name), nn.Module)
