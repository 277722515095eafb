"""How many layers a network needs: whole and stage by stage, and the figures behind the decision."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from taulearn import prune, wrap
from taulearn.depth.choose_layers import stages_of
from taulearn.depth.truncate import truncate
from taulearn.diagnostics import choose_layers, depth_profile
from taulearn.nn import densenet, fractional_dnn, resnet, resnet_v2
from taulearn.nn.pruned_models import WRAPPING, wrapping_of
from wrapping.hosts import Block

DOUBLE = torch.float64


def data(number: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(number, 1, 4, 4, dtype=DOUBLE, generator=generator), torch.randint(
        3, (number,), generator=generator
    )


def agreeing(network: Any) -> tuple[Tensor, Tensor]:
    """Data that the network gets right."""
    x, _ = data()
    with torch.no_grad():
        return x, network.eval()(x).argmax(1)


def convolutional(**options: Any) -> Any:
    torch.manual_seed(0)
    network = resnet_v2((2, 3), 3, 1, (3, 4), activation="tanh", dtype=DOUBLE, **options)
    with torch.no_grad():
        network.time_steps.values[:] = torch.tensor([1.0, 1e-7, 0.9, 1e-7, 1e-7])
    return network


def wrapped() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), *(Block(3) for _ in range(3)), nn.Linear(3, 3)).double()
    return wrap(model, example_inputs=data()[0])


NETWORKS = {
    "residual": lambda: resnet(16, 5, 3, 4, dtype=DOUBLE),
    "learned skips": lambda: resnet(16, [5, 4, 6, 6], 3, 4, skips="learned", dtype=DOUBLE),
    "dependent": lambda: resnet(16, 5, 3, 4, constraint="dependent", dtype=DOUBLE),
    "dense": lambda: densenet(16, 5, 3, 4, dtype=DOUBLE),
    "fractional": lambda: fractional_dnn(16, 5, 3, 9, dtype=DOUBLE),
    "convolutional": convolutional,
    "wrapped": wrapped,
}


class TestProfile:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_figures_are_those_of_the_cut_networks(self, name: str) -> None:
        torch.manual_seed(0)
        network, (x, z) = NETWORKS[name](), data()
        profile = depth_profile(network, x, z, cross_entropy, example_inputs=x[:4], batch_size=7)
        number = network.time_steps.num_steps
        assert profile.depths == tuple(range(number + 1))[-len(profile.depths) :]
        assert profile.milliseconds is not None
        assert all(ms > 0 for ms in profile.milliseconds)
        assert profile.accuracy is not None
        for i, k in enumerate(profile.depths):
            if k == 0 or (name == "dependent" and k < number):
                continue
            twin = copy.deepcopy(network).eval()
            truncate(twin, k)
            with torch.no_grad():
                output = twin(x)
            assert profile.loss[i].item() == pytest.approx(cross_entropy(output, z).item(), rel=1e-9)
            assert profile.accuracy[i].item() == pytest.approx((output.argmax(1) == z).double().mean().item())
            assert profile.parameters[i] == sum(p.numel() for p in twin.parameters())

    @pytest.mark.parametrize("name", ["residual", "fractional", "convolutional", "wrapped"])
    def test_contributions(self, name: str) -> None:
        """The part that a layer adds, by taking the layer away."""
        torch.manual_seed(0)
        network, (x, z) = NETWORKS[name](), data()
        network.eval()
        profile = depth_profile(network, x, z, cross_entropy, batch_size=11)
        assert len(profile.contribution) == network.time_steps.num_steps
        if name == "wrapped":
            y = network[1](network[0](x))
            expected = []
            for block in network[2:5]:
                expected.append((block(y) - y).square().sum(1).mean().sqrt().item())
                y = block(y)
        else:
            states = network.states(x, initial=True)
            tau, power = network.time_steps.tau.detach(), network.scheme.step_power
            gain = torch.lgamma(torch.tensor(2.0 - power, dtype=DOUBLE)).exp()
            expected = [
                (gain * tau[l] ** power * layer(states[l])).flatten(1).square().sum(1).mean().sqrt().item()
                for l, layer in enumerate(network.layers)
            ]
        assert profile.contribution.tolist() == pytest.approx(expected, rel=1e-9)

    def test_nothing_is_timed_unasked(self) -> None:
        network, (x, z) = resnet(16, 5, 3, 4, dtype=DOUBLE), data()
        assert depth_profile(network, x, z, cross_entropy).milliseconds is None

    def test_smallest(self) -> None:
        network = convolutional()
        x, z = agreeing(network)
        profile = depth_profile(network, x, z, cross_entropy)
        assert profile.smallest(0.0) == 3
        assert profile.smallest(1.0) == 1


class TestDecision:
    def test_whole(self) -> None:
        network = convolutional()
        x, z = agreeing(network)
        decision = choose_layers(network, x, z, cross_entropy, tolerance=0.0)
        assert decision.keep == (0, 1, 2)
        assert decision.reached == decision.whole
        assert str(decision).startswith("the first 3 layers of 5: accuracy ")
        twin = copy.deepcopy(network).eval()
        decision.apply_(twin)
        assert twin.time_steps.num_steps == 3
        assert (twin(x).argmax(1) == z).double().mean().item() == pytest.approx(decision.reached)
        assert network.time_steps.num_steps == 5

    def test_by_stage(self) -> None:
        """The second block of the first stage does nothing, and goes although a later one does something."""
        network = convolutional()
        x, z = agreeing(network)
        assert stages_of(network) == [range(2), range(2, 5)]
        decision = choose_layers(network, x, z, cross_entropy, tolerance=0.0, by_stage=True)
        assert decision.keep == (0, 2)
        assert str(decision).startswith("layers 0, 2 of 5: accuracy ")
        twin = copy.deepcopy(network).eval()
        decision.apply_(twin)
        assert twin.time_steps.origin == (0, 2)
        assert (twin(x).argmax(1) == z).double().mean().item() == pytest.approx(decision.reached)

    def test_values_go_by_the_loss(self) -> None:
        torch.manual_seed(0)
        network, (x, _) = resnet(16, 5, 1, 4, init=[1.0, 1.0, 1e-9, 1e-9], dtype=DOUBLE), data()
        z = x.sum((1, 2, 3))[:, None]
        decision = choose_layers(network, x, z, mse_loss, tolerance=1e-6)
        assert (decision.figure, len(decision.keep)) == ("loss", 2)
        assert decision.reached == pytest.approx(mse_loss(network(x), z).item())

    def test_wrapped_model(self) -> None:
        model, (x, z) = wrapped(), data()
        with torch.no_grad():
            model.time_steps.values[1:] = 0.0
        decision = choose_layers(model, x, z, cross_entropy, tolerance=0.0)
        assert decision.keep == (0,)
        assert stages_of(model) == [range(3)]
        decision.apply_(model)
        assert model.time_steps.num_steps == 1

    @pytest.mark.parametrize("by_stage", [False, True])
    @pytest.mark.parametrize("tolerance", [0.05, 0.2])
    def test_on_a_simplex_the_steps_that_are_left_are_projected(self, tolerance: float, by_stage: bool) -> None:
        torch.manual_seed(9)
        network = resnet(2, 6, 2, 6, constraint="simplex", init=[0.05, 0.1, 0.15, 0.2, 0.2, 0.3])
        with torch.no_grad():
            for p in [*network.layers.parameters(), *network.head.parameters()]:
                p *= 3.0
        x = torch.randn(500, 2)
        z = network(x).argmax(1)
        decision = choose_layers(network, x, z, cross_entropy, tolerance=tolerance, by_stage=by_stage)
        assert len(decision.keep) < 6
        decision.apply_(network)
        reached = (network(x).argmax(1) == z).double().mean().item()
        assert decision.reached == pytest.approx(reached)
        assert reached >= 1.0 - tolerance - 1e-9

    def test_blocks_that_must_stay(self) -> None:
        """A wrapped model cannot be cut before a block that is needed elsewhere."""
        model, (x, z) = wrapped(), data()
        wrapping = wrapping_of(model)
        assert wrapping is not None
        layers = list(wrapping.present)
        layers[1] = replace(layers[1], keep="the host asks for it")
        vars(model)[WRAPPING] = replace(wrapping, present=tuple(layers))
        decision = choose_layers(model, x, z, cross_entropy, tolerance=1.0)
        assert decision.keep == (0, 1)
        decision.apply_(model)
        assert model.time_steps.num_steps == 2

    def test_a_single_output_goes_by_the_loss(self) -> None:
        """Its largest output is always the first: no classes can be told by it."""
        torch.manual_seed(0)
        network, x = resnet(2, 8, 1, 4), torch.randn(60, 2)
        z = (x[:, 0] * x[:, 1] > 0).long()

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return binary_cross_entropy_with_logits(output[:, 0], target.to(output.dtype))

        decision = choose_layers(network, x, z, loss, tolerance=0.0)
        assert decision.profile.accuracy is None
        assert (decision.figure, decision.whole) == ("loss", pytest.approx(loss(network(x), z).item()))

    def test_after_pruning(self) -> None:
        network = convolutional()
        x, z = agreeing(network)
        prune(network, keep=[0, 2, 4])
        assert choose_layers(network, x, z, cross_entropy, tolerance=0.0).keep == (0, 1)
