"""Files on schemes, constraints and modules of one's own, and what makes a network its builder's no more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn import load_model, save_model
from taulearn.nn import Fractional, IdentitySkips, Residual, Scheme, TimeSteps, TimeVariableNetwork, resnet
from taulearn.nn.constraints import Constraint

X = torch.linspace(-1.0, 1.0, 8).view(4, 2)


class Weighted(Scheme):
    """A residual scheme with a factor."""

    name = "weighted"
    deletes_exactly = True

    def __init__(self, factor: Any = 1.0, stages: Any = (1, 2)) -> None:
        super().__init__()
        self.factor, self.stages, self._calls = factor, stages, 0
        self.table, self.function = torch.ones(2), abs

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Any, coefficients: Any) -> tuple[Tensor, Any]:
        self._calls += 1
        return y + self.factor * coefficients[l] * f(y), carry


class AtMost(Constraint):
    """Steps up to a cap."""

    name = "at-most"

    def __init__(self, cap: float = 1.0) -> None:
        self.cap, self.used = cap, [1, {"a": 2}]

    def projected(self, values: Tensor) -> Tensor:
        return values.clamp(max=self.cap)


class MyFractional(Fractional):
    """The package's scheme under another name."""


def own(
    scheme: Scheme | None = None, cap: float = 1.0, activation: type[nn.Module] = nn.Tanh, layers: int = 3
) -> TimeVariableNetwork:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(2, 2), activation()) for _ in range(layers)]
    steps = TimeSteps(layers, constraint=AtMost(cap))
    scheme = Weighted() if scheme is None else scheme
    return TimeVariableNetwork(blocks, nn.Linear(2, 1), scheme, steps, IdentitySkips(layers, from_input=True))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (lambda: own(Weighted(2.0)), r"scheme.factor must be 1.0, got 2.0"),
        (lambda: own(Weighted(float("inf"))), r"scheme.factor must be 1.0, got 'Infinity'"),
        (lambda: own(Weighted(stages=(1, 3))), r"scheme.stages must be \[1, 2\], got \[1, 3\]"),
        (lambda: own(Residual()), r"scheme.name must be 'Weighted', got 'residual'"),
        (lambda: own(cap=0.5), r"constraint.cap must be 1.0, got 0.5"),
        (lambda: own(activation=nn.Sigmoid), r"layers.0.1 must be 'Tanh', got 'Sigmoid'"),
    ],
)
def test_a_host_with_other_options_or_modules_is_refused(
    host: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    model = own()
    model(X)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, host=host())
    assert torch.equal(load_model(tmp_path, host=own())(X), model(X))


def test_numbers_of_numpy_are_numbers_in_options(tmp_path: Path) -> None:
    save_model(own(Weighted(np.float32(0.5), (np.int64(1), 2))), tmp_path)
    assert torch.equal(load_model(tmp_path, host=own(Weighted(0.5)))(X), own(Weighted(0.5))(X))


def test_an_own_fractional_scheme_is_not_refused_for_what_its_last_pass_left(tmp_path: Path) -> None:
    model = own(MyFractional(memory="fast"), layers=9)
    model(X)
    save_model(model, tmp_path)
    assert load_model(tmp_path, host=own(MyFractional(memory="fast"), layers=9)).layers
    with pytest.raises(ValueError, match=r"scheme.gamma must be 0.5, got 0.4"):
        load_model(tmp_path, host=own(MyFractional(0.4, memory="fast"), layers=9))


def test_a_file_without_options_and_modules_is_loaded_as_before(tmp_path: Path) -> None:
    save_model(own(), tmp_path)
    manifest = json.loads((tmp_path / "model.json").read_text())
    del manifest["model"]["modules"], manifest["time_steps"]["options"]
    manifest["scheme"]["options"] = {}
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    assert torch.equal(load_model(tmp_path, host=own())(X), own()(X))


def test_a_wrapped_host_with_other_modules_is_refused(tmp_path: Path) -> None:
    def host(activation: type[nn.Module]) -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), activation()) for _ in range(3)))

    model = taulearn.wrap(host(nn.Tanh), example_inputs=X, units="displacement")
    taulearn.prune(model, keep=[0, 2])
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"0.1 must be 'Tanh', got 'Sigmoid'"):
        load_model(tmp_path, host=host(nn.Sigmoid))
    torch.testing.assert_close(load_model(tmp_path, host=host(nn.Tanh))(X), model(X))


def hooked(network: TimeVariableNetwork) -> None:
    network.layers[1].register_forward_hook(lambda _module, _inputs, output: 2.0 * output)


def before_it(network: TimeVariableNetwork) -> None:
    network.register_forward_pre_hook(lambda _module, inputs: (2.0 * inputs[0],))


def other_forward(network: TimeVariableNetwork) -> None:
    network.layers[1].forward = lambda y: 0.0 * y  # type: ignore[method-assign]


def other_step(network: TimeVariableNetwork) -> None:
    network.scheme.step = lambda l, f, y, carry, *_: (f(y), carry)  # type: ignore[method-assign]


def tied(network: TimeVariableNetwork) -> None:
    network.layers[2].linear.weight = network.layers[1].linear.weight


def with_buffer(network: TimeVariableNetwork) -> None:
    network.layers[1].register_buffer("mask", torch.ones(3), persistent=False)


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (hooked, "a hook of layers.1 is unexpected"),
        (before_it, "a hook of the model is unexpected"),
        (other_forward, "layers.1.forward of its own is unexpected"),
        (other_step, "scheme.step of its own is unexpected"),
        (tied, "layers.2.linear.weight, tied to layers.1.linear.weight, is unexpected"),
        (with_buffer, "layers.1.mask, outside the state dict, is unexpected"),
    ],
)
def test_a_network_that_does_more_than_its_builders_needs_a_host(
    change: Callable[[TimeVariableNetwork], None], because: str, tmp_path: Path
) -> None:
    network, host = resnet(2, 3, 1, 3), resnet(2, 3, 1, 3)
    for each in (network, host):
        change(each)
    save_model(network, tmp_path)
    with pytest.raises(ValueError, match=f"host must be given .*{because}"):
        load_model(tmp_path)
    assert torch.equal(load_model(tmp_path, host=host)(X), network(X))


def test_a_network_in_training_is_still_its_builders(tmp_path: Path) -> None:
    network = resnet(2, 3, 1, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruning = taulearn.Pruning(1e-9, criterion="contribution")
    session = taulearn.attach(network, optimizer, pruning=pruning, iterations=10, iterations_per_epoch=2)
    network(X).sum().backward()
    optimizer.step()
    assert "states" in vars(network.scheme), "it is measured"
    save_model(network, tmp_path)
    session.detach()
    assert torch.equal(load_model(tmp_path)(X), network(X))


def test_numbers_of_numpy_are_numbers_in_recipes(tmp_path: Path) -> None:
    for slope in (np.float64(0.5), np.float32(0.5)):
        network = resnet(np.int64(2), [np.int64(3)] * 3, 1, np.int32(3), activation=nn.LeakyReLU(slope))
        save_model(network, tmp_path)
        loaded = load_model(tmp_path)
        assert torch.equal(loaded(X), network(X))
        assert json.loads((tmp_path / "model.json").read_text())["model"]["builder"] == "resnet"
