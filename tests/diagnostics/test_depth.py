"""Networks cut after each layer."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from taulearn import prune, wrap
from taulearn.diagnostics import depth_profile, depth_statistics, early_exit
from taulearn.nn import (
    ComposedSkips,
    FullyConnected,
    PadSkips,
    Residual,
    TimeSteps,
    TimeVariableNetwork,
    densenet,
    feedforward,
    fractional_dnn,
    resnet,
)

DOUBLE = torch.float64


def batch(features: int = 3) -> Tensor:
    return torch.randn(6, features, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def cut(network: TimeVariableNetwork, k: int) -> TimeVariableNetwork:
    with torch.no_grad():
        network.time_steps.values[k:] = 0.0
    return network


class TestIntermediateOutputs:
    @pytest.mark.parametrize("skips", ["pad", "learned"])
    @pytest.mark.parametrize("width", [4, [4, 2, 5, 3]], ids=str)
    def test_residual_network_with_zero_steps(self, width: Any, skips: str) -> None:
        torch.manual_seed(0)
        network, x = resnet(3, width, 2, 4, skips=skips, dtype=DOUBLE), batch()
        found = network.intermediate_outputs(x)
        assert list(found) == [1, 2, 3, 4]
        assert torch.equal(found[4], network(x))
        for k in (3, 2, 1):
            torch.testing.assert_close(found[k], cut(network, k)(x))

    def test_padding_goes_layer_by_layer(self) -> None:
        """As the state does when the steps are zero: by way of the narrow layer it loses half its entries."""
        network, x = resnet(3, [4, 2, 4], 2, 3, dtype=DOUBLE), batch()
        first = network.states(x)[0] * torch.tensor([1, 1, 0, 0])
        torch.testing.assert_close(network.intermediate_outputs(x)[1], network.head(first))

    @pytest.mark.parametrize("builder", [resnet, fractional_dnn])
    def test_pruned_network(self, builder: Any) -> None:
        network, x = builder(3, 4, 2, 4, activation="tanh", dtype=DOUBLE), batch()
        found = network.intermediate_outputs(x)
        for k in (3, 2, 1):
            prune(network, keep=range(k))
            torch.testing.assert_close(found[k], network(x))

    @pytest.mark.parametrize("builder", [feedforward, densenet])
    def test_other_schemes_carry_the_state(self, builder: Any) -> None:
        network, x = builder(3, 4, 2, 3, dtype=DOUBLE), batch()
        found = network.intermediate_outputs(x)
        assert all(torch.equal(found[k + 1], network.head(y)) for k, y in enumerate(network.states(x)))

    @pytest.mark.parametrize("kind", ["pad", "composed"])
    def test_input_counts_where_it_is_carried(self, kind: str) -> None:
        widths = [3, 4, 4]
        maps = ComposedSkips([nn.Linear(3, 4, bias=False, dtype=DOUBLE), None], from_input=True)
        carry = PadSkips(widths, from_input=True) if kind == "pad" else maps
        layers = [FullyConnected(n, 4, dtype=DOUBLE) for n in (3, 4)]
        head = nn.Linear(4, 2, dtype=DOUBLE)
        stem = nn.Linear(5, 3, dtype=DOUBLE)
        network = TimeVariableNetwork(layers, head, Residual(), TimeSteps(2, dtype=DOUBLE), carry, stem=stem)
        found = network.intermediate_outputs(batch(5))
        assert list(found) == [0, 1, 2]
        torch.testing.assert_close(found[0], cut(network, 0)(batch(5)))

    def test_states_of_a_forward_pass(self) -> None:
        network, x = resnet(3, 4, 2, 3, dtype=DOUBLE), batch()
        states = network.states(x)
        found = network.intermediate_outputs(x, states=states)
        assert torch.equal(found[2], network.head(states[1]))


class TestDepthProfile:
    def test_rows_are_the_cut_networks(self) -> None:
        torch.manual_seed(0)
        network, x = resnet(3, 4, 3, 4, activation="tanh", dtype=DOUBLE), batch()
        targets = torch.tensor([0, 1, 2, 0, 1, 2])
        found = depth_profile(network, x, targets, cross_entropy)
        assert found.depths == (1, 2, 3, 4)
        assert found.accuracy is not None
        for k in (4, 3, 2, 1):
            output = cut(network, k)(x).detach() if k < 4 else network(x).detach()
            assert float(found.loss[k - 1]) == pytest.approx(float(cross_entropy(output, targets)), rel=1e-12)
            assert float(found.accuracy[k - 1]) == float((output.argmax(1) == targets).double().mean())

    def test_contributions(self) -> None:
        torch.manual_seed(0)
        network, x = fractional_dnn(3, 4, 1, 3, gamma=0.3, activation="tanh", dtype=DOUBLE), batch()
        found = depth_profile(network, x, torch.zeros(6, 1, dtype=DOUBLE), mse_loss)
        assert found.accuracy is None
        y = [z.detach() for z in network.states(x)]
        assert float(found.contribution[0]) == pytest.approx(float(y[0].square().sum(1).mean().sqrt()), rel=1e-12)
        assert float(found.contribution[1]) == pytest.approx(float((y[1] - y[0]).square().sum(1).mean().sqrt()))
        ratio = found.contribution[2] / y[2].square().sum(1).mean().sqrt()
        torch.testing.assert_close(found.relative[2], ratio)

    def test_distances_to_the_final_state(self) -> None:
        """Against NumPy: a network that starts at once, and one whose state is wider from the third layer on."""
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(3, 3, dtype=DOUBLE), nn.Tanh()) for _ in range(4)]
        steps = TimeSteps(4, init=[0.5, 0.3, 0.0, 0.2], dtype=DOUBLE)
        plain = TimeVariableNetwork(layers, nn.Linear(3, 2, dtype=DOUBLE), Residual(), steps, stem=nn.Identity())
        wider = resnet(3, [4, 4, 5, 5, 5], 2, 5, activation="tanh", dtype=DOUBLE)
        still = resnet(3, 4, 2, 3, init=[0.5, 0.0, 0.0], dtype=DOUBLE)
        for network, first in ((plain, 0), (wider, 2), (still, 0)):
            x = batch()
            states = [y.detach().numpy() for y in network.states(x, initial=network is plain)]
            apart = [np.linalg.norm(y - states[-1]) for y in states[first:]]
            found = depth_profile(network, x, torch.zeros(6, dtype=torch.long), cross_entropy, batch_size=4)
            expected = np.full(len(states), np.nan)
            expected[first:] = np.divide(apart, apart[0]) if network is not still else 0.0
            np.testing.assert_allclose(found.distance.numpy(), expected, rtol=1e-12, atol=0)
        assert str(found).count("nan") == 0

    def test_distances_of_a_wrapped_model(self) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(4)]
        model = wrap(nn.Sequential(*blocks), example_inputs=batch(), form="whole", init=[0.9, 0.5, 0.2, 0.1])
        y, states = batch(), [batch().numpy()]
        for block, tau in zip(blocks, model.time_steps.tau.tolist(), strict=True):
            y = y + tau * (torch.tanh(nn.functional.linear(y, block[0].weight, block[0].bias)) - y)
            states.append(y.detach().numpy())
        found = depth_profile(model, batch(), torch.zeros(6, 3, dtype=DOUBLE), mse_loss)
        apart = [np.linalg.norm(states[k] - states[-1]) for k in found.depths]
        np.testing.assert_allclose(found.distance.numpy(), np.divide(apart, apart[0]), rtol=1e-10)

    def test_contribution_of_a_negative_step_is_a_norm(self) -> None:
        network = resnet(3, 4, 1, 2, init=[0.5, -0.5], dtype=DOUBLE)
        assert float(depth_profile(network, batch(), torch.zeros(6, 1), mse_loss).contribution.min()) > 0

    def test_layers_that_share_a_module(self) -> None:
        """Each place in the network has a contribution of its own."""
        torch.manual_seed(0)
        shared = nn.Sequential(nn.Linear(3, 3, dtype=DOUBLE), nn.Tanh())
        other = nn.Sequential(shared, nn.Tanh())
        layers = [shared, other, shared, shared]
        stem, head = nn.Linear(3, 3, dtype=DOUBLE), nn.Linear(3, 2, dtype=DOUBLE)
        network = TimeVariableNetwork(layers, head, Residual(), TimeSteps(4, init=0.3, dtype=DOUBLE), stem=stem)
        states = network.states(batch(), initial=True)
        expected = [(z - y).detach().square().sum(1).mean().sqrt().item() for y, z in pairwise(states)]
        found = depth_profile(network, batch(), torch.zeros(6, dtype=torch.long), cross_entropy)
        assert found.contribution.tolist() == pytest.approx(expected, rel=1e-12)

    def test_normalisation_behind_some_states_only(self) -> None:
        """Statistics of the map past the first layer are none of the later states'."""
        torch.manual_seed(0)
        past = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
        layers = [FullyConnected(3, 4), FullyConnected(4, 4)]
        maps = ComposedSkips([past, None], from_input=True)
        steps = TimeSteps(2, init=[20.0, 1.0])
        network = TimeVariableNetwork(layers, nn.Linear(4, 2), Residual(), steps, maps, stem=nn.Linear(3, 3))
        x, z = batch().float(), torch.tensor([0, 1, 0, 1, 0, 1])
        assert depth_profile(network, x, z, cross_entropy, calibration=x).depths == (0, 1, 2)
        thresholds = (0.6, 0.8, 0.9, 0.95)
        table = early_exit(network, x, z, thresholds, calibration=x)
        own = depth_statistics(network, x)
        found = [network.predict(x, threshold, statistics=own).depths for threshold in thresholds]
        assert table.depth.tolist() == pytest.approx([depths.double().mean().item() for depths in found])
        assert table.shares[:, 1].max() > 0

    def test_table(self) -> None:
        layers = [nn.Linear(3, 3, dtype=DOUBLE) for _ in range(2)]
        network = TimeVariableNetwork(layers, nn.Identity(), Residual(), TimeSteps(2, dtype=DOUBLE), stem=nn.Identity())
        found = depth_profile(network, batch(), torch.zeros(6, dtype=torch.long), cross_entropy)
        lines = [line.split() for line in str(found).splitlines()]
        named = ["depth", "loss", "accuracy", "parameters", "distance", "last", "layer", "contribution", "relative"]
        assert lines[0] == named
        assert [len(line) for line in lines[2:]] == [5, 8, 8]

    def test_modes_come_back_and_dropout_is_off(self) -> None:
        layers = [nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)) for _ in range(2)]
        network = TimeVariableNetwork(layers, nn.Identity(), Residual(), TimeSteps(2), stem=nn.Identity())
        x = batch().float()
        losses = [depth_profile(network, x, x, mse_loss).loss for _ in range(2)]
        assert torch.equal(*losses)
        assert network.training
        assert not any(module._forward_hooks for module in network.modules())
