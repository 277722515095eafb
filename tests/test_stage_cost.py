"""The stage cost: its value and gradient against sums written out, in training and in the record."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from taulearn import Pruning, fit, prune
from taulearn.depth.truncate import truncate
from taulearn.nn import TimeVariableNetwork, densenet, fractional_dnn, resnet, resnet_v2
from taulearn.penalties import L1, StageCost
from training.support import assert_same_history, assert_same_weights

DOUBLE = torch.float64
BUILDERS: dict[str, Callable[[], TimeVariableNetwork]] = {
    "residual": lambda: resnet(9, 4, 3, 4, activation="tanh", dtype=DOUBLE),
    "learned skips": lambda: resnet(9, [4, 5, 3], 3, 3, skips="learned", activation="tanh", dtype=DOUBLE),
    "dense": lambda: densenet(9, 4, 3, 4, activation="tanh", dtype=DOUBLE),
    "fractional": lambda: fractional_dnn(9, 4, 3, 10, activation="tanh", dtype=DOUBLE),
    "convolutional": lambda: resnet_v2((1, 2), 3, 1, (2, 3), activation="tanh", dtype=DOUBLE),
}
every_network = pytest.mark.parametrize("name", BUILDERS)


def make(name: str) -> TimeVariableNetwork:
    torch.manual_seed(0)
    return BUILDERS[name]()


def batch(number: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 1, 3, 3, dtype=DOUBLE, generator=generator)
    return x, torch.randint(3, (number,), generator=generator)


def cut(network: TimeVariableNetwork, k: int) -> TimeVariableNetwork:
    """A twin with zero steps from the k-th on."""
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.time_steps.values[k:] = 0.0
    return twin


def gradients(network: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(network.parameters()), allow_unused=True, materialize_grads=True))


class TestValue:
    @pytest.mark.parametrize("name", ["residual", "learned skips", "convolutional"])
    def test_is_the_sum_over_cut_networks(self, name: str) -> None:
        """By networks with zero steps, one forward pass each; value and gradient."""
        network, (x, z) = make(name), batch()
        first, number = int(not network.skips.from_input), network.time_steps.num_steps
        found = StageCost(0.3, cross_entropy)(network, x, z)
        expected = [torch.zeros_like(p) for p in network.parameters()]
        value, names = torch.zeros((), dtype=DOUBLE), [name for name, _ in network.named_parameters()]
        for k in range(first, number):
            twin = cut(network, k)
            term = 0.3 * cross_entropy(twin(x), z)
            value += term.detach()
            for i, (name, gradient) in enumerate(zip(names, gradients(twin, term), strict=True)):
                zeroed = name == "time_steps.values"  # those that are zero are no variables
                expected[i] += gradient * (torch.arange(number) < k) if zeroed else gradient
        torch.testing.assert_close(found.detach(), value, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients(network, found), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    @every_network
    def test_is_the_sum_over_carried_states(self, name: str) -> None:
        network, (x, z) = make(name), batch()
        skips, number = network.skips, network.time_steps.num_steps
        states = network.states(x, initial=True)
        value = 0.0
        for k in range(int(not skips.from_input), number):
            y = states[k]
            for l in range(k, number):
                y = skips.carry(y, l, l + 1)
            value += cross_entropy(network.head(y), z).item()
        assert StageCost(2.0, cross_entropy)(network, x, z).item() == pytest.approx(2.0 * value, rel=1e-10)

    def test_factors_follow_the_numbers_at_the_start(self) -> None:
        network, (x, z) = make("residual"), batch()
        cost = StageCost(1.0, cross_entropy, factors={1: 0.5, 3: 0.0})
        losses = {k: cross_entropy(y, z) for k, y in network.intermediate_outputs(x).items()}
        torch.testing.assert_close(cost(network, x, z), 0.5 * losses[1] + losses[2])
        prune(network, keep=[0, 2, 3])
        losses = {k: cross_entropy(y, z) for k, y in network.intermediate_outputs(x).items()}
        torch.testing.assert_close(cost(network, x, z), 0.5 * losses[1])

    def test_factors_under_autocast_are_not_rounded(self) -> None:
        network, (x, z) = make("residual").float(), batch()
        factors = {1: 0.3, 2: 0.7, 3: 1.3}
        with torch.autocast("cpu", torch.bfloat16):
            cost = StageCost(1.0, cross_entropy, factors=factors)
            found, columns = cost.measured(network, x.float(), z)
        losses = columns["stage_loss"]
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(float(losses.double() @ torch.tensor([0.3, 0.7, 1.3]).double()), rel=1e-6)

    def test_a_loss_of_shape_one(self) -> None:
        network, (x, z) = make("residual"), batch()

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(output, target).reshape(1)

        for factors in (None, {1: 0.5}):
            expected = StageCost(1.0, cross_entropy, factors=factors)(network, x, z)
            torch.testing.assert_close(StageCost(1.0, loss, factors=factors)(network, x, z), expected)

    def test_factors_after_the_last_layers_have_gone(self) -> None:
        """In training they may go; a resumed run begins without them."""
        network, (x, z) = make("residual"), batch()
        cost = StageCost(1.0, cross_entropy, factors={1: 0.5, 3: 2.0})
        cost(network, x, z)
        truncate(network, 2)
        cost(network, x, z)
        resumed = StageCost(1.0, cross_entropy, factors={1: 0.5, 3: 2.0})
        resumed.start_epoch(3, 4)
        torch.testing.assert_close(resumed(network, x, z), cost(network, x, z))

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            ("constant", [1.0, 1.0, 1.0, 1.0]),
            ("rising", [0.125, 0.375, 0.625, 0.875]),
            ("falling", [0.875, 0.625, 0.375, 0.125]),
            (lambda progress: 4 * progress**2, [0.0625, 0.5625, 1.5625, 3.0625]),
        ],
    )
    def test_schedule(self, schedule: Any, expected: list[float]) -> None:
        network, (x, z) = make("residual"), batch()
        whole = StageCost(1.0, cross_entropy)(network, x, z).item()
        cost = StageCost(1.0, cross_entropy, schedule=schedule)
        found = []
        for epoch in range(4):
            cost.start_epoch(epoch, 4)
            found.append(cost(network, x, z).item() / whole)
        assert found == pytest.approx(expected, rel=1e-6)

    def test_of_a_single_layer_there_is_none(self) -> None:
        network, (x, z) = resnet(9, 4, 3, 1, dtype=DOUBLE), batch()
        assert StageCost(1.0, cross_entropy)(network, x, z).item() == 0.0


def trained(name: str, penalties: Any, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    network = make(name)
    optimizer = options.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5))(network.parameters())
    defaults = {"loss": cross_entropy, "epochs": 3, "batch_size": 10, "progress": False, "compile": "never"}
    history = fit(network, batch(60), optimizer=optimizer, penalties=penalties, **defaults | options)
    return network, history


class TestTraining:
    @every_network
    def test_record(self, name: str) -> None:
        """Each row holds the losses of the networks cut at each depth, before the step."""
        _, history = trained(name, [StageCost(0.2, cross_entropy)], epochs=1, batch_size=60)
        twin, (x, z) = make(name), batch(60)
        order = history.iterations["stage_loss"][0]
        first, number = int(not twin.skips.from_input), twin.time_steps.num_steps
        assert order.shape == (number + 1,)
        outputs = twin.intermediate_outputs(x)
        for k in range(number + 1):
            if k < first:
                assert np.isnan(order[k])
            else:
                assert order[k] == pytest.approx(cross_entropy(outputs[k], z).item(), rel=1e-9)
        assert history.iterations["loss"][0] == pytest.approx(order[-1], rel=1e-12)
        assert history.iterations["penalty.stage_cost"][0] == pytest.approx(0.2 * np.nansum(order[:-1]), rel=1e-9)
        assert history.iterations["total"][0] == pytest.approx(order[-1] + 0.2 * np.nansum(order[:-1]), rel=1e-9)

    @every_network
    def test_terminal_only_is_ordinary_training(self, name: str) -> None:
        network, history = trained(name, [StageCost(0.5, cross_entropy, terminal_only=True)])
        plain, without = trained(name, [])
        assert_same_weights(network, plain)
        assert np.array_equal(history.iterations["total"], without.iterations["total"])
        assert not history.iterations["penalty.stage_cost"].any()
        assert np.isfinite(history.iterations["stage_loss"][:, -2]).all()

    def test_makes_the_first_layers_sufficient(self) -> None:
        with_cost, without = (
            trained("residual", [StageCost(w, cross_entropy, terminal_only=w == 0.0)], epochs=30)[1] for w in (1.0, 0.0)
        )
        ours, theirs = (h.iterations["stage_loss"][-6:].mean(0) for h in (with_cost, without))
        assert ours[2] < theirs[2] - 0.1

    def test_with_l1_and_pruning_in_one_run(self) -> None:
        network, history = trained(
            "residual",
            [StageCost(0.5, cross_entropy), L1(0.5, proximal=True)],
            pruning=Pruning(0.05, every=1),
            epochs=20,
        )
        assert 1 <= len(history.deletions) <= 3
        losses = history.iterations["stage_loss"]
        for d in history.deletions:
            assert np.isfinite(losses[: d.iteration, d.layer + 1]).all()
            assert np.isnan(losses[d.iteration :, d.layer + 1]).all()
        kept = [layer + 1 for layer in network.time_steps.origin]
        assert np.isfinite(losses[-1, kept]).all()
        assert history.iterations["loss"][-1] == losses[-1, kept[-1]]

    def test_a_schedule_shows_in_the_record(self) -> None:
        _, history = trained("residual", [StageCost(0.5, cross_entropy, schedule="rising")], epochs=2)
        losses = history.iterations["stage_loss"]
        factor = history.iterations["penalty.stage_cost"] / np.nansum(losses[:, :-1], axis=1)
        assert factor == pytest.approx([0.125] * 6 + [0.375] * 6, rel=1e-6)

    def test_resumed(self, tmp_path: Any) -> None:
        penalties = [StageCost(0.5, cross_entropy, schedule="falling")]
        whole, history = trained("residual", penalties, epochs=4, run=tmp_path / "whole")

        class Stop(Exception):
            pass

        def stop(end: Any) -> None:
            if end.epoch == 2:
                raise Stop

        with pytest.raises(Stop):
            trained("residual", penalties, epochs=4, run=tmp_path / "run", callbacks=[stop])
        resumed, record = trained("residual", penalties, epochs=4, run=tmp_path / "run", resume=True)
        assert_same_weights(resumed, whole)
        assert_same_history(record, history)

    @pytest.mark.long
    @pytest.mark.parametrize("name", ["residual", "learned skips", "fractional"])
    def test_fused_steps(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        monkeypatch.setattr("taulearn.training.step.UNROLL", 2)
        self.compare(name, "fused", tmp_path, schedule="rising")

    @pytest.mark.long
    @pytest.mark.parametrize("name", ["convolutional", "dense"])
    def test_compiled_objective(self, name: str, tmp_path: Any) -> None:
        self.compare(name, "compiled objective", tmp_path, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))

    def compare(self, name: str, kind: str, folder: Any, schedule: str = "constant", **options: Any) -> None:
        from taulearn.training import Run

        def penalties() -> list[Any]:
            return [StageCost(0.5, cross_entropy, schedule=schedule), L1(0.01)]

        eager = trained(name, penalties(), **options)
        compiled = trained(name, penalties(), compile="always", run=folder / "run", **options)
        assert kind in Run.open(folder / "run").decisions["step"]
        for column in ("loss", "total", "stage_loss", "tau"):
            ours, theirs = compiled[1].iterations[column], eager[1].iterations[column]
            np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=1e-8, err_msg=column)


class TestBadInput:
    @pytest.mark.parametrize("layer", [0, 4, 99])
    def test_factors_without_effect(self, layer: int) -> None:
        """There is no output before the first layer here, and the last one is the data loss."""
        network, (x, z) = make("residual"), batch()
        cost = StageCost(1.0, cross_entropy, factors={1: 0.5, layer: 2.0})
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"intermediate outputs, 1 \.\. 3 here, got \[{layer}\]: leave those out"
            ):
                cost(network, x, z)
