"""The drawing of a network: one line per weight, one dot per neuron, the steps above; what cannot be drawn is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from torch import nn

import taulearn
from taulearn.nn import Residual, TimeVariableNetwork, fractional_dnn, resnet
from taulearn_papers.antil2022 import network_drawing as drawing


def collections(ax, kind) -> list:
    return [each for each in ax.collections if isinstance(each, kind)]


def test_one_line_per_weight_and_one_dot_per_neuron(tmp_path: Path) -> None:
    network = resnet(7, 10, 3, 5, init=[0.9, 0.1, 0.2, 0.3, 0.4])
    ax = drawing.network(network)
    lines, dots = collections(ax, LineCollection), collections(ax, PathCollection)
    assert [len(each.get_segments()) for each in lines] == [70, 100, 100, 100, 100, 30]
    assert [len(each.get_offsets()) for each in dots] == [7, 10, 10, 10, 10, 10, 3]
    assert [text.get_text() for text in ax.texts][:3] == ["input", "layer 0\n$\\tau$ = 0.90", "layer 1\n$\\tau$ = 0.10"]
    ax.figure.savefig(tmp_path / "network.png")


def test_lines_join_the_neurons_of_their_weight_and_carry_its_magnitude() -> None:
    network = resnet(2, 3, 1, 1)
    with torch.no_grad():
        network.layers[0].linear.weight.copy_(torch.tensor([[0.1, -5.0], [0.2, 0.3], [0.4, 0.6]]))
        network.layers[0].linear.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    ax = drawing.network(network, colour_bars=False)
    lines = collections(ax, LineCollection)[0]
    assert lines.get_array()[-1] == 5.0  # the largest is drawn last
    np.testing.assert_allclose(lines.get_segments()[-1], [[0.0, 0.0], [1.0, 1.0]])  # second input, first neuron
    np.testing.assert_allclose(collections(ax, PathCollection)[1].get_array(), [-1.0, 0.0, 2.0])
    assert len(ax.figure.axes) == 1


def test_a_pruned_network_keeps_the_numbers_of_its_layers() -> None:
    network = resnet(7, 10, 3, 5)
    taulearn.prune(network, keep=[0, 2])
    names = [text.get_text().split("\n")[0] for text in drawing.network(network).texts]
    assert names == ["input", "layer 0", "layer 2", "output"]


def test_of_wide_layers_the_largest_weights_are_drawn() -> None:
    ax = drawing.network(fractional_dnn(7, 60, 3, 2))
    assert [len(each.get_segments()) for each in collections(ax, LineCollection)] == [420, 2500, 180]


@pytest.mark.parametrize("name", ["Linear", "TimeVariableNetwork"])
def test_other_networks_are_refused(name: str) -> None:
    convolutional = TimeVariableNetwork([nn.Conv1d(1, 1, 1)], nn.Linear(1, 1), Residual(), taulearn.TimeSteps(1))
    with pytest.raises(TypeError, match=f"model must be .* got {name}"):
        drawing.network(nn.Linear(1, 1) if name == "Linear" else convolutional)
