"""Parameter groups, and the projection after every step of any optimiser."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import taulearn
from taulearn.nn import TimeVariableNetwork, fractional_dnn, resnet
from taulearn.optim import constrain_, group_of, parameter_groups, register_projection
from taulearn.penalties import L1

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.5),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}


def network(constraint: str = "free", **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(0)
    return resnet(2, 4, 1, 4, constraint=constraint, dtype=torch.float64, activation="tanh", **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, iterations: int = 5) -> None:
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(x) - 3.0).square().mean()
        loss.backward()
        return loss.item()

    for _ in range(iterations):
        optimizer.step(closure)


class TestParameterGroups:
    def test_steps_are_apart(self) -> None:
        model = network()
        weights, tau = parameter_groups(model, lr=0.1, tau_lr=0.01, weight_decay=1e-3)
        assert (weights["name"], weights["lr"], weights["weight_decay"]) == ("weights", 0.1, 1e-3)
        assert (tau["name"], tau["lr"], tau["weight_decay"]) == ("tau", 0.01, 0.0)
        assert len(tau["params"]) == 1
        assert tau["params"][0] is model.time_steps.values
        assert {id(p) for p in [*weights["params"], *tau["params"]]} == {id(p) for p in model.parameters()}
        assert len(weights["params"]) + 1 == len(list(model.parameters()))

    def test_one_learning_rate_by_default(self) -> None:
        weights, tau = parameter_groups(network("simplex"), lr=0.1)
        assert weights["lr"] == tau["lr"] == 0.1

    def test_a_learning_rate_of_zero_is_not_the_default(self) -> None:
        assert parameter_groups(network(), lr=0.1, tau_lr=0.0)[1]["lr"] == 0.0

    def test_steps_that_do_not_train_have_no_group(self) -> None:
        assert [group["name"] for group in parameter_groups(network("fixed"), lr=0.1)] == ["weights"]
        frozen = network()
        frozen.time_steps.values.requires_grad_(False)
        assert [group["name"] for group in parameter_groups(frozen, lr=0.1)] == ["weights"]

    def test_frozen_weights_are_left_out(self) -> None:
        model = network()
        model.head.requires_grad_(False)
        weights = parameter_groups(model, lr=0.1)[0]["params"]
        assert all(p is not next(model.head.parameters()) for p in weights)

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
    def test_weight_decay_leaves_steps_alone(self, make: Any) -> None:
        model = network()
        optimizer = make(parameter_groups(model, lr=0.1, weight_decay=0.5))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name == "time_steps.values")

    def test_public_name(self) -> None:
        assert taulearn.parameter_groups is parameter_groups


class TestGroupOf:
    def test_by_identity_not_by_value(self) -> None:
        a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
        optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
        found = group_of(optimizer, b)
        assert found is optimizer.param_groups[1]
        assert group_of(optimizer, c) is None


class TestProjection:
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    @pytest.mark.parametrize("lower_bound", [None, 0.05])
    def test_simplex(self, make: Callable[[Any], torch.optim.Optimizer], lower_bound: float | None) -> None:
        model = network("simplex", lower_bound=lower_bound)
        optimizer = make(model.parameters())
        register_projection(optimizer, model)
        before = model.time_steps.tau.detach().clone()
        for _ in range(5):
            train(model, optimizer, 1)
            tau = model.time_steps.tau.detach()
            assert float(tau.sum()) == pytest.approx(1.0, abs=1e-12)
            assert float(tau.min()) >= (lower_bound or 0.0)
        assert not torch.equal(tau, before)

    @pytest.mark.parametrize("constraint", ["free", "dependent"])
    def test_lower_bound(self, constraint: str) -> None:
        torch.manual_seed(0)
        model = fractional_dnn(2, 4, 1, 4, constraint=constraint, dtype=torch.float64, lower_bound=0.05)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        register_projection(optimizer, model)
        with torch.no_grad():
            model.time_steps.values.fill_(-1.0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert float(model.time_steps.tau.detach().min()) == 0.05
        train(model, optimizer)
        assert float(model.time_steps.tau.detach().min()) >= 0.05
        assert bool(torch.isfinite(model(torch.ones(1, 2, dtype=torch.float64))).all())

    def test_it_goes_on_after_a_deletion(self) -> None:
        model = network("simplex")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        register_projection(optimizer, model)
        train(model, optimizer)
        taulearn.prune(model, keep=[0, 2], optimizer=optimizer)
        train(model, optimizer)
        assert float(model.time_steps.tau.detach().sum()) == pytest.approx(1.0, abs=1e-12)
        assert model.time_steps.num_steps == 2

    def test_it_can_be_removed(self) -> None:
        model = network("simplex")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        register_projection(optimizer, model).remove()
        train(model, optimizer)
        assert float(model.time_steps.tau.detach().sum()) != pytest.approx(1.0, abs=1e-6)

    def test_an_optimiser_of_other_parameters_does_not_touch_the_steps(self) -> None:
        model = network("simplex")
        with torch.no_grad():
            model.time_steps.values.fill_(1.0)
        constrain_(model, torch.optim.SGD(model.head.parameters(), lr=0.1), [L1(1.0, proximal=True)])
        assert model.time_steps.tau.tolist() == [1.0] * 4

    def test_the_proximal_step_follows_the_optimisers(self) -> None:
        """tau <- shrink(tau - lr g, lr alpha), the proximal gradient step."""
        model, lr, alpha = network(), 0.125, 0.5
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        register_projection(optimizer, model, [L1(alpha, proximal=True)])
        before = model.time_steps.tau.detach().clone()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.time_steps.values.grad = torch.tensor([0.0, 1.0, 1.5, -1.0], dtype=torch.float64)
        optimizer.step()
        moved = before - lr * torch.tensor([0.0, 1.0, 1.5, -1.0], dtype=torch.float64)
        expected = moved.sign() * (moved.abs() - lr * alpha).clamp(min=0.0)
        assert torch.equal(model.time_steps.tau.detach(), expected)
        assert model.time_steps.tau.tolist() == [0.1875, 0.0625, 0.0, 0.3125]


def test_a_single_penalty_of_a_projection_needs_no_list() -> None:
    model = resnet(2, 3, 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    register_projection(optimizer, model, L1(0.25, proximal=True))
    model(torch.zeros(1, 2)).sum().backward()
    model.time_steps.values.grad.zero_()
    optimizer.step()
    assert model.time_steps.tau.tolist() == [0.0] * 4
