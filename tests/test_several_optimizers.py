"""Several optimisers of one model, such as Muon for the matrices and AdamW for the rest: pruned together or refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from small_networks import KEEP, assert_same_bits, loss_of, network
from taulearn import prune, wrap
from taulearn.nn import TimeVariableNetwork
from taulearn.optim import constrain_, register_projection
from taulearn.penalties import L1


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01),
    ]


def one_a_kind(model: Any) -> list[torch.optim.Optimizer]:
    """One for the even layers, one for the odd ones, one for the head, one for the steps."""
    even = [p for layer in list(model.layers)[::2] for p in layer.parameters()]
    odd = [p for layer in list(model.layers)[1::2] for p in layer.parameters()]
    return [
        torch.optim.RMSprop(even, lr=0.01),
        torch.optim.SGD(odd, lr=0.01, momentum=0.5),
        torch.optim.Adagrad(model.head.parameters(), lr=0.01),
        torch.optim.Adam([model.time_steps.values], lr=0.01),
    ]


def step(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], times: int = 3) -> None:
    for _ in range(times):
        for each in optimizers:
            each.zero_grad()
        loss_of(model).backward()
        for each in optimizers:
            each.step()


kinds = pytest.mark.parametrize("make", [muon_and_adamw, one_a_kind])


class TestTogether:
    @kinds
    @pytest.mark.parametrize("as_given", [list, tuple, lambda found: found[::-1]], ids=["list", "tuple", "reversed"])
    def test_they_go_on_as_if_the_layers_had_never_been(self, make: Any, as_given: Any) -> None:
        """Gradients are those of a network without the layers; each state is that of its own optimiser, bit by bit."""
        model, small = network([0.3, 0.1, 0.2, 0.15, 0.25]), network([0.3, 0.2, 0.25])
        pairs = [(model.time_steps.values, small.time_steps.values)]
        for own, its in [(model.head, small.head), *((model.layers[k], small.layers[i]) for i, k in enumerate(KEEP))]:
            pairs += zip(own.parameters(), its.parameters(), strict=True)
        torch.manual_seed(1)
        optimizers, references = make(model), muon_and_adamw(small) if make is muon_and_adamw else None
        if references is None:  # the same layers to the same optimisers: all three that stay are even ones
            references = [
                torch.optim.RMSprop(small.layers.parameters(), lr=0.01),
                torch.optim.Adagrad(small.head.parameters(), lr=0.01),
                torch.optim.Adam([small.time_steps.values], lr=0.01),
            ]
        with torch.no_grad():
            for p, q in pairs[1:]:
                q.copy_(p)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            for p, q in pairs:
                assert p.grad is not None
                q.grad = p.grad[list(KEEP)] if p is model.time_steps.values else p.grad.clone()
            for each in (*optimizers, *references):
                each.step()
        report = prune(model, keep=KEEP, optimizer=as_given(optimizers))
        assert report.optimizer == "exact"
        step(model, optimizers)
        step(small, references)
        assert_same_bits(model.state_dict(), small.state_dict())
        optimizers = [each for each in optimizers if each.param_groups[0]["params"]]
        for each, reference in zip(optimizers, references, strict=True):
            assert_same_bits(each.state_dict(), reference.state_dict())

    @kinds
    def test_steps_move_after_each_of_two_deletions(self, make: Any) -> None:
        model = network()
        optimizers = make(model)
        for keep in ([0, 2, 3, 4], [0, 2]):
            step(model, optimizers)
            assert prune(model, keep=keep, optimizer=optimizers).optimizer == "exact"
            before = model.time_steps.tau.detach().clone()
            step(model, optimizers)
            assert bool((model.time_steps.tau.detach() != before).all())
            held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
            assert held == {id(p) for p in model.parameters()}
            assert {id(p) for each in optimizers for p in each.state} <= held

    def test_a_wrapped_model(self) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
        model = wrap(nn.Sequential(*blocks, nn.Linear(4, 2)), ["0", "1", "2"], example_inputs=torch.randn(2, 4))
        optimizers = muon_and_adamw(model)
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
            for each in optimizers:
                each.step()
        assert prune(model, keep=[0, 2], optimizer=optimizers).optimizer == "exact"
        assert model.time_steps.values in optimizers[1].state
        assert len(optimizers[0].state) == 3

    def test_the_same_parameter_in_two(self) -> None:
        model = network()
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(model.parameters())]
        step(model, optimizers)
        assert prune(model, keep=KEEP, optimizer=optimizers).optimizer == "exact"
        for each in optimizers:
            assert each.state[model.time_steps.values].keys() - {"step"}
            assert any(p is model.time_steps.values for p in each.param_groups[0]["params"])

    def test_parameters_that_none_of_them_holds(self) -> None:
        model = network()
        optimizers = [torch.optim.SGD(model.head.parameters(), lr=0.1), torch.optim.SGD([model.time_steps.values], 0.1)]
        assert prune(model, keep=KEEP, optimizer=optimizers).optimizer == "exact"
        before = model.time_steps.tau.detach().clone()
        step(model, optimizers)
        assert not torch.equal(model.time_steps.tau.detach(), before)

    def test_one_twice_is_one(self) -> None:
        model = network()
        optimizer = torch.optim.Adam(model.named_parameters())
        step(model, [optimizer])
        assert prune(model, keep=KEEP, optimizer=[optimizer, optimizer]).optimizer == "exact"
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]

    def test_if_one_cannot_follow_all_are_as_before(self) -> None:
        model = network()
        optimizers = muon_and_adamw(model)
        step(model, optimizers)
        vars(optimizers[1])["flat"] = torch.zeros(20)
        states = copy.deepcopy([each.state_dict() for each in (model, *optimizers)])
        with pytest.raises(ValueError, match=r"optimizer must keep its state by parameter.*'flat'"):
            prune(model, keep=KEEP, optimizer=optimizers)
        assert_same_bits([each.state_dict() for each in (model, *optimizers)], states)
        vars(optimizers[1]).pop("flat")
        assert prune(model, keep=KEEP, optimizer=optimizers).optimizer == "exact"


class TestRefusals:
    @pytest.mark.parametrize("which", [[0], [0, 1, 2], [2]])
    def test_optimisers_that_lack_the_steps(self, which: list[int]) -> None:
        model = network()
        optimizers = one_a_kind(model)
        with pytest.raises(ValueError, match=r"optimizer must hold the model's time steps.*optimizer=\[muon, adamw\]"):
            prune(model, keep=KEEP, optimizer=[optimizers[i] for i in which])
        assert model.time_steps.num_steps == 5
        assert prune(model, keep=KEEP, optimizer=optimizers)

    def test_optimisers_that_lack_frozen_steps(self) -> None:
        model = network()
        model.time_steps.values.requires_grad_(False)
        optimizers = one_a_kind(model)[:3]
        assert prune(model, keep=KEEP, optimizer=optimizers).optimizer == "exact"

    @pytest.mark.parametrize("handed", [[], [1], [0, 1]])
    def test_one_that_was_forgotten_is_refused_at_the_next_deletion(self, handed: list[int]) -> None:
        """Whoever still holds steps that are gone is told, however the first deletion was called."""
        model = network()
        optimizers = [*muon_and_adamw(model), torch.optim.SGD([model.time_steps.values], lr=0.1)]
        given = [optimizers[i] for i in handed]
        prune(model, keep=KEEP, optimizer=given or None)
        for forgotten in (optimizers[2], [optimizers[2]], [*optimizers[:2], optimizers[2]]):
            with pytest.raises(ValueError, match="before layers came or went without it"):
                prune(model, keep=[0, 1], optimizer=forgotten)
        with pytest.raises(ValueError, match="before layers came or went without it"):
            register_projection(optimizers[2], model)
        assert model.time_steps.num_steps == 3

    def test_frozen_steps_that_are_thawed_after_a_deletion(self) -> None:
        model = network()
        muon, adamw = muon_and_adamw(model)
        model.time_steps.values.requires_grad_(False)
        prune(model, keep=KEEP, optimizer=muon)
        model.time_steps.values.requires_grad_(True)
        with pytest.raises(ValueError, match="before layers came or went without it"):
            prune(model, keep=[0, 1], optimizer=[muon, adamw])

    def test_a_failed_deletion_leaves_no_mark(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = network()
        optimizers = muon_and_adamw(model)
        with monkeypatch.context() as context:
            context.setattr("taulearn.adaptivity.transaction.follow", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                prune(model, keep=KEEP, optimizer=optimizers)
        assert prune(model, keep=KEEP, optimizer=optimizers).optimizer == "exact"


class TestProjection:
    def test_on_the_one_that_holds_the_steps(self) -> None:
        model = network(constraint="simplex")
        optimizers = muon_and_adamw(model)
        register_projection(optimizers[1], model)
        step(model, optimizers)
        prune(model, keep=KEEP, optimizer=optimizers)
        step(model, optimizers)
        assert float(model.time_steps.tau.detach().sum()) == pytest.approx(1.0, abs=1e-12)

    def test_it_notices_a_deletion_without_its_optimiser(self) -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        register_projection(optimizer, model, L1(0.1, proximal=True))
        prune(model, keep=KEEP)
        with pytest.raises(ValueError, match="before layers came or went without it"):
            step(model, [optimizer])
        constrain_(model, torch.optim.SGD(model.head.parameters(), lr=0.1))


def test_a_loop_by_hand_with_two_optimisers_prunes_like_one_with_groups() -> None:
    """SGD with momentum in two optimisers is SGD with momentum in two groups, through two deletions, bit by bit."""
    models: list[TimeVariableNetwork] = []
    for split in (False, True):
        model = network()
        weights = [p for p in model.parameters() if p is not model.time_steps.values]
        groups: list[dict[str, Any]] = [{"params": weights, "lr": 0.05}, {"params": [model.time_steps.values]}]
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        optimizers = (
            [torch.optim.SGD([g], **options) for g in groups] if split else [torch.optim.SGD(groups, **options)]
        )
        register_projection(optimizers[-1], model, L1(0.05, proximal=True))
        for keep in ([0, 1, 3, 4], [0, 1, 3]):
            step(model, optimizers)
            prune(model, keep=keep, optimizer=optimizers)
        step(model, optimizers)
        models.append(model)
    assert_same_bits(models[0].state_dict(), models[1].state_dict())
