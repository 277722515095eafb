"""The summary of a model."""

import time

import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn import prune, summary
from taulearn._table import format_table
from taulearn.nn import Residual, TimeSteps, TimeVariableNetwork, fractional_dnn, resnet


def test_papers_network() -> None:
    found = summary(resnet(784, 100, 10, 6))
    assert found.total_parameters == 130_006
    assert found.parameters == (78_500, 10_100, 10_100, 10_100, 10_100, 10_100)
    assert found.milliseconds is None
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[-1] == ["6", "1.0000", "130,006", "residual", "network"]
    assert lines[-3] == ["1,006", "all", "else"]


def test_shares_are_those_of_pruning() -> None:
    steps = [0.5, 0.2, 0.001, 0.1]
    found = summary(fractional_dnn(3, 4, 2, 4, init=steps, gamma=0.5))
    roots = [step**0.5 for step in steps]
    assert found.shares == pytest.approx([root / sum(roots) for root in roots], rel=1e-6)
    network = resnet(3, 4, 2, 4, init=[0.5, -0.2, 0.001, 0.1])
    assert summary(network).shares[1] == pytest.approx(0.2 / 0.801, rel=1e-6)


def test_layers_keep_their_numbers_through_pruning() -> None:
    network = resnet(3, 4, 2, 5)
    prune(network, keep=[0, 2, 4])
    found = summary(network)
    assert found.layers == (0, 2, 4)
    assert len(found.tau) == 3


class _Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, y: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return y


def test_milliseconds_are_measured_layer_by_layer() -> None:
    layers = [_Slow(seconds) for seconds in (0.001, 0.008)]
    network = TimeVariableNetwork(layers, nn.Identity(), Residual(), TimeSteps(2), stem=nn.Identity())
    found = summary(network, torch.ones(1, 2))
    assert found.milliseconds is not None
    assert found.total_milliseconds is not None
    assert 1 <= found.milliseconds[0] < 8 <= found.milliseconds[1]
    assert found.total_milliseconds >= 9
    assert network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert "ms" in str(found).splitlines()[0]


def test_shared_layer_counts_once() -> None:
    network = resnet(3, 4, 2, 3)
    network.layers[2] = network.layers[1]
    found = summary(network)
    assert found.parameters == (16, 20, 0)
    assert found.total_parameters == 16 + 20 + 8 + 3


def test_public_name() -> None:
    assert taulearn.summary is taulearn.diagnostics.summary


def test_table_aligns() -> None:
    table = format_table({"a": [1, 10_000], "name": ["x", "long"], "b": [None, 1e-9]})
    assert table.splitlines() == [
        "     a  name          b",
        "-----------------------",
        "     1  x",
        "10,000  long  1.000e-09",
    ]


def test_names_in_a_table_are_text_and_wide_letters_keep_their_column() -> None:
    table = format_table({"name": ["[red]x[/red] [/b] :smile:", "層"], "n": [1, 2]})
    assert table.splitlines()[2:] == ["[red]x[/red] [/b] :smile:  1", "層" + " " * 25 + "2"]


def test_a_layer_that_stands_in_two_places_is_timed_in_both() -> None:
    network = resnet(4, 4, 1, 3)
    network.layers[2] = network.layers[1]
    found = summary(network, torch.ones(1, 4)).milliseconds
    assert found is not None
    assert len(found) == 3
