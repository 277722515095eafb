"""Pruning and the optimiser: the survivors' state bit by bit, groups, schedulers, averaged weights."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from small_networks import DOUBLE, KEEP, assert_same_bits, batch, loss_of, network, train
from taulearn import prune
from taulearn.nn import (
    TimeVariableNetwork,
    resnet,
)
from taulearn.optim import parameter_groups, register_projection

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

# Every optimiser of torch.optim for dense parameters of any shape that treats each entry by itself.
ELEMENTWISE: dict[str, MakeOptimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, t0=2),
}
elementwise = pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())


def survivors(
    model: TimeVariableNetwork, small: TimeVariableNetwork, keep: Iterable[int]
) -> list[tuple[Tensor, Tensor]]:
    """Parameters of the deep network with those of one that has only the layers ``keep``; tau is left out."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for i, layer in zip(keep, small.layers, strict=True):
        pairs += zip(model.layers[i].parameters(), layer.parameters(), strict=True)
    return [*pairs, *zip(model.head.parameters(), small.head.parameters(), strict=True)]


def twins(make: MakeOptimizer, **options: Any) -> tuple[Any, Any, Any, Any]:
    """A deep network, the same without layers 1 and 3, and their optimisers, fed the same gradients for three steps."""
    torch.manual_seed(0)
    model = resnet(3, 4, 2, 5, init=[0.3, 0.1, 0.2, 0.15, 0.25], dtype=DOUBLE, **options)
    small = resnet(3, 4, 2, 3, init=[0.3, 0.2, 0.25], dtype=DOUBLE, **options)
    pairs = survivors(model, small, KEEP)
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p)
    optimizer, reference = make(parameter_groups(model, 0.05)), make(parameter_groups(small, 0.05))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p, q in pairs:
            assert p.grad is not None
            q.grad = p.grad.clone()
        assert model.time_steps.values.grad is not None
        small.time_steps.values.grad = model.time_steps.values.grad[list(KEEP)]
        optimizer.step()
        reference.step()
    return model, optimizer, small, reference


class TestOptimizer:
    @elementwise
    def test_it_goes_on_as_if_the_layers_had_never_been(self, make: MakeOptimizer) -> None:
        model, optimizer, small, reference = twins(make)
        state = {id(p): dict(s) for p, s in optimizer.state.items()}
        old = model.time_steps.values
        report = prune(model, keep=KEEP, optimizer=optimizer)
        assert report.optimizer == "exact"
        assert_same_bits(optimizer.state_dict(), reference.state_dict())
        assert_same_bits(model.state_dict(), small.state_dict())
        for p in model.parameters():
            if p is not model.time_steps.values:
                for key, value in optimizer.state.get(p, {}).items():
                    assert value is state[id(p)][key], "state of an untouched parameter is kept, not copied"
        assert all(p is not old for p in optimizer.state)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        assert {id(p) for p in optimizer.state} <= held
        for _ in range(3):
            for net, opt in ((model, optimizer), (small, reference)):
                opt.zero_grad()
                loss_of(net).backward()
                opt.step()
        assert_same_bits(model.state_dict(), small.state_dict())
        assert_same_bits(optimizer.state_dict(), reference.state_dict())

    @elementwise
    @pytest.mark.parametrize("constraint", ["simplex", "dependent"])
    def test_constrained_steps_keep_their_state(self, make: MakeOptimizer, constraint: str) -> None:
        model = network(constraint=constraint)
        optimizer = make(model.parameters())
        register_projection(optimizer, model)
        train(model, optimizer)
        own = [0, 2] if constraint == "dependent" else list(KEEP)
        values = model.time_steps.values
        before = copy.deepcopy(dict(optimizer.state[values]))
        prune(model, keep=KEEP, optimizer=optimizer)
        after = dict(optimizer.state[model.time_steps.values])
        expected = {
            key: value[own] if isinstance(value, Tensor) and value.ndim else value for key, value in before.items()
        }
        assert_same_bits(after, expected)
        train(model, optimizer)
        assert float(model.time_steps.tau.detach().sum()) == pytest.approx(1.0, abs=1e-12)

    def test_adafactor(self) -> None:
        """It scales by the norm of the whole vector of steps, so that only its state can be compared."""
        model = network()
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.05)
        train(model, optimizer)
        values = model.time_steps.values
        before = {id(p): copy.deepcopy(dict(state)) for p, state in optimizer.state.items() if p is not values}
        variance = optimizer.state[values]["variance"].clone()
        prune(model, keep=KEEP, optimizer=optimizer)
        for p in model.parameters():
            if p is not model.time_steps.values:
                assert_same_bits(dict(optimizer.state[p]), before[id(p)])
        assert torch.equal(optimizer.state[model.time_steps.values]["variance"], variance[list(KEEP)])
        train(model, optimizer)

    def test_muon_of_the_matrices_beside_frozen_steps(self) -> None:
        model = network()
        model.time_steps.values.requires_grad_(False)
        optimizer = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.05)
        train(model, optimizer)
        before = {id(p): copy.deepcopy(dict(state)) for p, state in optimizer.state.items()}
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        assert len(optimizer.state) == 4
        for p, state in optimizer.state.items():
            assert_same_bits(dict(state), before[id(p)])
        train(model, optimizer)

    def test_lbfgs_is_reset_and_the_report_says_so(self) -> None:
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            def closure() -> float:
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                return loss.item()

            optimizer.step(closure)

        step(model, optimizer)
        report = prune(model, keep=KEEP, optimizer=optimizer)
        assert report.optimizer == "reset"
        assert "the optimiser keeps no state per parameter and was reset" in str(report)
        assert len(optimizer.state) == 0
        twin = copy.deepcopy(model)
        fresh = torch.optim.LBFGS(twin.parameters(), lr=0.1, max_iter=4)
        for _ in range(3):
            step(model, optimizer)
            step(twin, fresh)
        assert_same_bits(model.state_dict(), twin.state_dict())
        assert not torch.equal(model.time_steps.tau.detach(), torch.full((3,), 0.2, dtype=DOUBLE))

    def test_lbfgs_is_left_alone_where_nothing_is_deleted(self) -> None:
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
        optimizer.step(lambda: loss_of(model).item())
        assert prune(model, optimizer=optimizer).optimizer == "unchanged"
        assert len(optimizer.state) == 1

    def test_groups_and_their_options(self) -> None:
        model = network()
        groups: list[dict[str, Any]] = [
            {"params": list(layer.parameters()), "lr": 0.01 * (i + 1), "name": f"layer {i}"}
            for i, layer in enumerate(model.layers)
        ]
        groups.append({"params": list(model.head.parameters()), "weight_decay": 0.5, "name": "head"})
        groups.append({"params": [model.time_steps.values], "lr": 0.001, "betas": (0.5, 0.6), "name": "tau"})
        optimizer = torch.optim.Adam(groups, lr=0.1)
        train(model, optimizer)
        options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        identities = [id(g) for g in optimizer.param_groups]
        prune(model, keep=KEEP, optimizer=optimizer)
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == options
        assert [id(g) for g in optimizer.param_groups] == identities
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 0, 2, 0, 2, 1, 1]
        assert optimizer.param_groups[6]["params"][0] is model.time_steps.values
        before = model.time_steps.tau.detach().clone()
        train(model, optimizer)
        assert not torch.equal(model.time_steps.tau.detach(), before)
        torch.optim.Adam(optimizer.param_groups).load_state_dict(optimizer.state_dict())

    @elementwise
    def test_a_group_emptied_by_the_deletion_does_not_break_the_step(self, make: MakeOptimizer) -> None:
        model = network()
        gone = {id(p) for i in (1, 3) for p in model.layers[i].parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) in gone]},
            {"params": [p for p in model.parameters() if id(p) not in gone]},
        ]
        optimizer = make(groups)
        train(model, optimizer)
        prune(model, keep=KEEP, optimizer=optimizer)
        assert optimizer.param_groups[0]["params"] == []
        before = loss_of(model).item()
        train(model, optimizer)
        assert loss_of(model).item() != before

    def test_names_of_parameters_follow_their_layers(self) -> None:
        """Names once stayed as they were, more than there were parameters."""
        model = network()
        foreign = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
        optimizer = torch.optim.Adam([("other", foreign), *model.named_parameters()], lr=0.1)
        train(model, optimizer)
        prune(model, keep=KEEP, optimizer=optimizer)
        group = optimizer.param_groups[0]
        assert group["param_names"] == ["other", *dict(model.named_parameters())]
        assert [id(p) for p in group["params"]] == [id(foreign), *map(id, model.parameters())]
        fresh = torch.optim.Adam([("other", foreign), *model.named_parameters()], lr=0.1)
        fresh.load_state_dict(optimizer.state_dict())

    def test_parameters_of_another_model_survive(self) -> None:
        model, other = network(), nn.Linear(3, 2).double()
        optimizer = torch.optim.Adam([*other.parameters(), *model.parameters()], lr=0.1)
        (loss_of(model) + other(batch()).square().sum()).backward()
        optimizer.step()
        before = copy.deepcopy([dict(optimizer.state[p]) for p in other.parameters()])
        prune(model, keep=KEEP, optimizer=optimizer)
        assert_same_bits([dict(optimizer.state[p]) for p in other.parameters()], before)
        assert [id(p) for p in optimizer.param_groups[0]["params"][:2]] == [id(p) for p in other.parameters()]

    @pytest.mark.parametrize("constraint", ["free", "dependent", "simplex"])
    def test_gradients_of_the_survivors_are_kept(self, constraint: str) -> None:
        model = network(constraint=constraint)
        loss_of(model).backward()
        values = model.time_steps.values.grad
        kept = [copy.deepcopy([p.grad for p in model.layers[i].parameters()]) for i in KEEP]
        prune(model, keep=KEEP)
        assert values is not None
        own = [0, 2] if constraint == "dependent" else list(KEEP)
        assert_same_bits(model.time_steps.values.grad, values[own])
        assert_same_bits([[p.grad for p in layer.parameters()] for layer in model.layers], kept)

    def test_a_step_that_has_not_been_taken(self) -> None:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        prune(model, keep=KEEP, optimizer=optimizer)
        assert len(optimizer.state) == 0
        train(model, optimizer)

    def test_steps_that_are_frozen_stay_frozen(self) -> None:
        model = network()
        model.time_steps.values.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        train(model, optimizer)
        assert prune(model, keep=KEEP, optimizer=optimizer).optimizer == "exact"
        assert not model.time_steps.values.requires_grad
        train(model, optimizer)

    def test_fixed_steps(self) -> None:
        model = network(constraint="fixed")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        train(model, optimizer)
        prune(model, keep=KEEP, optimizer=optimizer)
        train(model, optimizer)
        assert model.time_steps.tau.tolist() == [0.2, 0.2, 0.2]
        assert len(optimizer.state) == len(list(model.parameters())) == 7


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


class TestSchedulers:
    @pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
    def test_they_go_on(self, make: Callable[[Any], Any]) -> None:
        rates: list[list[list[float]]] = []
        for pruned in (False, True):
            model = network()
            optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, tau_lr=0.01), lr=0.1, momentum=0.9)
            scheduler = make(optimizer)
            rates.append([])
            for iteration in range(8):
                train(model, optimizer, 1)
                scheduler.step()
                if pruned and iteration == 3:
                    prune(model, keep=KEEP, optimizer=optimizer)
                rates[-1].append([group["lr"] for group in optimizer.param_groups])
        assert rates[0] == rates[1]
        assert len({tuple(r) for r in rates[0]}) > 2

    def test_reduce_on_plateau(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        scheduler.step(1.0)
        prune(model, keep=KEEP, optimizer=optimizer)
        scheduler.step(2.0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


class TestAveraged:
    @pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "exponential"])
    def test_it_is_pruned_alike_and_goes_on(self, average: Any) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averaged: Any = AveragedModel(model, multi_avg_fn=average)
        for _ in range(2):
            train(model, optimizer, 1)
            averaged.update_parameters(model)
        expected = copy.deepcopy(averaged.module)
        expected.keep_layers_(list(KEEP))
        prune(model, keep=KEEP, optimizer=optimizer, averaged=averaged)
        assert_same_bits(averaged.module.state_dict(), expected.state_dict())
        assert averaged.module.time_steps.origin == model.time_steps.origin == KEEP
        before = averaged(batch())
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        assert int(averaged.n_averaged) == 3
        assert averaged(batch()).shape == before.shape
        assert not torch.equal(averaged(batch()), before)
