"""Early exit: answers of the first confident intermediate output, for fewer and fewer samples."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import prune
from taulearn.diagnostics import depth_statistics, early_exit
from taulearn.nn import (
    Scheme,
    Skips,
    TimeSteps,
    TimeVariableNetwork,
    densenet,
    feedforward,
    fractional_dnn,
    resnet,
    resnet_v2,
)

DOUBLE = torch.float64
BUILDERS: dict[str, Callable[[], TimeVariableNetwork]] = {
    "feedforward": lambda: feedforward(9, 6, 3, 5, init=1.5, dtype=DOUBLE),
    "residual": lambda: resnet(9, 6, 3, 5, init=1.0, dtype=DOUBLE),
    "pad": lambda: resnet(9, [6, 3, 5, 5], 3, 4, init=1.0, dtype=DOUBLE),
    "dense": lambda: densenet(9, 6, 3, 5, init=1.0, dtype=DOUBLE),
    "fractional": lambda: fractional_dnn(9, 6, 3, 10, init=1.0, dtype=DOUBLE),
    "fractional from 0": lambda: fractional_dnn(9, [6, 6, 4], 3, 3, memory_from=0, init=1.0, dtype=DOUBLE),
    "convolutional": lambda: resnet_v2((2, 2), 3, 1, (4, 6), dtype=DOUBLE),
}
SCALES = {"feedforward": 20.0, "pad": 12.0}
every_network = pytest.mark.parametrize("name", BUILDERS)


def make(name: str) -> TimeVariableNetwork:
    torch.manual_seed(0)
    network = BUILDERS[name]()
    with torch.no_grad():
        for p in network.head.parameters():
            p *= SCALES.get(name, 8.0)
    return network


def inputs(number: int = 40) -> Tensor:
    return torch.randn(number, 1, 3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def reference(network: TimeVariableNetwork, x: Tensor, confidence: float, looks: Any) -> tuple[Tensor, list[int]]:
    """Sample by sample, from the outputs at all depths."""
    network.eval()
    with torch.no_grad():
        outputs = network.intermediate_outputs(x)
    last, rows, depths = max(outputs), [], []
    for i in range(len(x)):
        stops = [k for k in sorted(looks) if k < last and outputs[k][i].softmax(0).max() >= confidence]
        depths.append(min(stops, default=last))
        rows.append(outputs[depths[-1]][i])
    return torch.stack(rows), depths


@every_network
@pytest.mark.parametrize("confidence", [0.4, 0.7, 0.9, 0.999])
def test_is_the_first_confident_output(name: str, confidence: float) -> None:
    network, x = make(name), inputs()
    expected, depths = reference(network, x, confidence, network.intermediate_outputs(x))
    network.train()
    found = network.predict(x, confidence)
    torch.testing.assert_close(found.outputs, expected, rtol=1e-10, atol=1e-10)
    assert found.depths.tolist() == depths
    assert found.classes.tolist() == expected.argmax(1).tolist()
    assert network.training


def test_the_cases_tell_something() -> None:
    depths = {name: len(set(make(name).predict(inputs(), 0.9).depths.tolist())) for name in BUILDERS}
    assert min(depths.values()) >= 2, depths


@pytest.mark.parametrize("name", ["residual", "dense", "fractional", "convolutional"])
def test_samples_that_are_done_leave_the_batch(name: str) -> None:
    network, x = make(name), inputs()
    sizes: list[int] = []
    for layer in network.layers:
        layer.register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    depths = network.predict(x, 0.9).depths
    expected = [int((depths > l).sum()) for l in range(len(network.layers))]
    assert sizes == [size for size in expected if size > 0]
    sizes.clear()
    early = depths <= 2
    network.predict(x[early], 0.9)
    assert len(sizes) == int(depths[early].max())


@pytest.mark.parametrize("looks", [(2,), (1, 3), (4, 2), (), (5,)], ids=str)
def test_chosen_depths(looks: tuple[int, ...]) -> None:
    network, x = make("residual"), inputs()
    expected, depths = reference(network, x, 0.8, looks)
    calls: list[int] = []
    network.head.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    found = network.predict(x, 0.8, depths=looks)
    assert found.depths.tolist() == depths
    torch.testing.assert_close(found.outputs, expected, rtol=1e-10, atol=1e-10)
    assert len(calls) == len({*looks, 5})


def test_confidence_one_is_the_whole_network() -> None:
    network, x = make("residual"), 100 * inputs()
    found = network.predict(x, 1.0)
    assert found.depths.tolist() == [5] * len(x)
    assert torch.equal(found.outputs, network(x))


@pytest.mark.parametrize("number", [0, 1])
def test_small_batches(number: int) -> None:
    found = make("convolutional").predict(inputs(number), 0.9)
    assert found.outputs.shape == (number, 3)
    assert found.depths.shape == (number,)


@every_network
def test_thresholds_tell_what_predict_answers(name: str) -> None:
    network, x = make(name), inputs()
    z = torch.arange(len(x)) % 3
    thresholds = (0.4, 0.7, 0.9, 1.0)
    table = early_exit(network, x, z, thresholds, batch_size=16)
    for i, threshold in enumerate(thresholds):
        found = network.predict(x, threshold)
        assert table.accuracy[i].item() == pytest.approx((found.classes == z).double().mean().item())
        assert table.depth[i].item() == pytest.approx(found.depths.double().mean().item())
    assert table.shares.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert str(table).splitlines()[0].split() == ["confidence", "accuracy", "mean", "depth", "whole", "depth"]


def test_chosen_depths_of_any_kind() -> None:
    network, x = make("residual"), inputs()
    expected = network.predict(x, 0.6, depths=[2, 3]).depths.tolist()
    assert len(set(expected)) > 1
    assert network.predict(x, 0.6, depths=torch.tensor([2, 3])).depths.tolist() == expected
    assert network.predict(x, 0.6, depths=(k for k in (2, 3))).depths.tolist() == expected


def test_a_part_in_training_mode_keeps_its_mode_and_statistics() -> None:
    network, x = make("convolutional").eval(), inputs()
    expected = network.predict(x, 0.6)
    network.head.train()
    before = copy.deepcopy(network.state_dict())
    found = network.predict(x, 0.6)
    assert torch.equal(found.outputs, expected.outputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert (network.training, network.head.training, network.head.norm.training) == (False, True, True)


class TestStatistics:
    """Those of another network, or of this one as it was, would be taken for nothing, or for other depths."""

    def test_of_this_network(self) -> None:
        network, x = make("convolutional"), inputs()
        with torch.no_grad():
            network.head.norm.running_mean += 1.0
        plain = network.predict(x, 0.6)
        own = network.predict(x, 0.6, statistics=depth_statistics(network, x))
        assert not torch.equal(plain.outputs, own.outputs)

    def test_of_a_copy(self) -> None:
        network, x = make("convolutional"), inputs()
        found = depth_statistics(network, x)
        with pytest.raises(
            ValueError, match=r"statistics must be those of normalisations of this network .*copy of the"
        ):
            copy.deepcopy(network).predict(x, 0.6, statistics=found)

    def test_from_before_a_deletion(self) -> None:
        network, x = resnet_v2(4, 3, 1, 4, dtype=DOUBLE), inputs()
        found = depth_statistics(network, x)
        prune(network, keep=[0, 2, 3])
        with pytest.raises(
            ValueError,
            match=r"of this network as it is now, with 3 layers, got some for 4 layers: call .*depth_statist",
        ):
            network.predict(x, 0.6, statistics=found)


class Shared(Scheme):
    """A scheme that carries something which all samples share."""

    name = "shared"

    def __init__(self, carry: Any) -> None:
        super().__init__()
        self.carry = carry

    def init(self, y_0: Tensor) -> Any:
        return self.carry

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> Any:
        return y + coefficients[l] * f(y), carry


@pytest.mark.parametrize(
    ("carry", "found"),
    [
        (torch.linspace(0, 1, 6), r"one of shape \(6,\)"),
        ((torch.zeros(5, 6), {"sum": torch.zeros(())}), r"one of shape \(\)"),
        ((torch.zeros(5, 6), 0.5), "a float"),
    ],
)
def test_a_carry_that_is_not_batch_first_is_refused(carry: Any, found: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)]
    network = TimeVariableNetwork(layers, nn.Linear(6, 3), Shared(carry), TimeSteps(5), stem=nn.Linear(4, 6))
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=rf"the carry of Shared must hold tensors .* \(5, \.\.\.\), got {found}"):
        network.predict(x, 0.4)
    assert torch.equal(network.predict(x, 1.0).outputs, network(x))


def test_a_step_that_forgets_the_carry_says_what_it_must_return() -> None:
    class Forgets(Shared):
        def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> Any:
            return y + coefficients[l] * f(y)

    layers = [nn.Linear(6, 6) for _ in range(2)]
    network = TimeVariableNetwork(layers, nn.Linear(6, 3), Forgets(None), TimeSteps(2), stem=nn.Linear(4, 6))
    for number in (2, 5):  # two samples would pass for state and carry
        for call in (network, network.predict):
            with pytest.raises(TypeError, match=r"Forgets.step must return .*\(y, carry\), got a Tensor"):
                call(torch.randn(number, 4))
