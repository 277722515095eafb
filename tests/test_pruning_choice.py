"""Criteria and budgets of pruning."""

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from small_networks import deleted, network
from taulearn import prune, wrap
from taulearn.adaptivity.mark_by_budget import within_latency
from taulearn.nn import Residual, TimeSteps, TimeVariableNetwork, fractional_dnn


def steps() -> TimeVariableNetwork:
    return network([0.5, 0.2, 0.004, 0.1, 0.3])


def fractional() -> TimeVariableNetwork:
    return network([0.5, 0.2, 0.004, 0.1, 0.3], builder=fractional_dnn)


def test_share_and_power_differ_for_the_fractional_scheme() -> None:
    # sqrt(0.004) has a share of 3 %, 0.004 one of 0.4 %
    assert deleted(prune(fractional(), 0.01)) == []
    assert deleted(prune(fractional(), 0.01, criterion="power")) == []
    assert deleted(prune(fractional(), 0.01, criterion="share")) == [2]
    assert deleted(prune(steps(), 0.01, criterion="power")) == deleted(prune(steps(), 0.01, criterion="share")) == [2]


def test_a_criterion_of_ones_own() -> None:
    def by_norm(tau: Tensor, model: nn.Module) -> Tensor:
        assert not tau.requires_grad
        assert tau.tolist() == steps().time_steps.tau.tolist()
        return torch.tensor([5.0, 1.0, 3.0, 0.01, 0.02])

    report = prune(steps(), 0.01, criterion=by_norm)
    assert deleted(report) == [3, 4]
    assert [d.share for d in report.deleted] == pytest.approx([0.01 / 9.03, 0.02 / 9.02])
    assert deleted(prune(steps(), criterion=by_norm, budget=2)) == [3, 4, 1]


@pytest.mark.parametrize(("number", "gone"), [(5, []), (4, [2]), (3, [2, 3]), (1, [2, 3, 1, 4])])
def test_the_best_layers_stay_within_a_number(number: int, gone: list[int]) -> None:
    model = steps()
    assert deleted(prune(model, budget=number)) == gone
    assert model.time_steps.num_steps == number


class Slow(nn.Module):
    """Takes some milliseconds, whatever the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.004)
        return self.weight * x


def slow() -> TimeVariableNetwork:
    return TimeVariableNetwork(
        [Slow() for _ in range(6)],
        nn.Identity(),
        Residual(),
        TimeSteps(6, init=[0.1, 0.6, 0.2, 0.5, 0.3, 0.4], horizon=2.1),
        stem=nn.Identity(),
    )


@pytest.fixture
def four_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass takes 4 ms a layer, whatever else the machine does."""
    monkeypatch.setattr("taulearn._milliseconds.milliseconds", lambda m, _: 4.0 * m.time_steps.num_steps)


def test_as_many_layers_as_a_latency_allows(four_a_layer: None) -> None:
    model, x = slow(), torch.ones(1, 1)
    model.train()
    before = dict(model.named_parameters())
    report = prune(model, budget={"latency_ms": 15.0, "example_inputs": x})
    assert deleted(report) == [0, 2, 4]
    assert "a forward pass takes" in str(report)
    assert "allowed are 15" in str(report)
    assert all(module.training for module in model.modules())
    assert all(
        p is before[f"layers.{model.time_steps.origin[i]}.weight"] for i, p in enumerate(l.weight for l in model.layers)
    )
    assert not prune(slow(), budget={"latency_ms": 1e4, "example_inputs": x})


def test_a_latency_that_nothing_meets_changes_nothing() -> None:
    model = slow()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"must be at least what the smallest model takes, got 0.5: with 1 of 6 layers"
    ):
        prune(model, budget={"latency_ms": 0.5, "example_inputs": torch.ones(1, 1)})
    assert model.time_steps.num_steps == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_largest_number_within_a_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = slow(), [0, 2, 4, 5, 3]
    monkeypatch.setattr("taulearn._milliseconds.milliseconds", lambda m, _: 10.0 * m.time_steps.num_steps)
    for limit, left in [(60.0, 6), (59.9, 5), (30.0, 3), (10.0, 1)]:
        deletions, taken = within_latency(model, order, 6, {"latency_ms": limit, "example_inputs": None})
        assert (6 - deletions, taken) == (left, 10.0 * left)
        assert model.time_steps.num_steps == 6


def test_a_latency_of_a_wrapped_model(four_a_layer: None) -> None:
    model = wrap(
        nn.Sequential(*(nn.Sequential(Slow(), nn.Identity()) for _ in range(4))), "[0123]", init=[1, 0.1, 0.5, 2]
    )
    report = prune(model, budget={"latency_ms": 11.0, "example_inputs": (torch.ones(1, 1),)})
    assert deleted(report) == [1, 2]
    assert len(model) == model.time_steps.num_steps + 1


def test_equal_steps_decide_nothing_but_what_to_ask_for() -> None:
    model = network([0.2] * 5)
    with pytest.raises(ValueError, match=r"criterion must be given where all time steps are equal.*keep="):
        prune(model, budget=3)
    with pytest.raises(ValueError, match="criterion must be given"):
        prune(model, budget=3, criterion="share")
    with pytest.raises(ValueError, match="criterion must be given"):
        prune(network([0.2] * 6), 0.18)
    assert model.time_steps.num_steps == 5
    assert not prune(model, budget=5)
    with torch.no_grad():
        model.time_steps.values.zero_()
    assert len(prune(copy.deepcopy(model), budget=3).deleted) == 2, "each is the identity"
    assert len(prune(copy.deepcopy(model), keep=[0, 3]).deleted) == 3


def test_scores_that_were_measured_are_in_the_report() -> None:
    model = steps()
    assert prune(model, keep=[0, 2, 3, 4]).scores == {}
    report = prune(model, budget=3, criterion=lambda tau, _: torch.tensor([5.0, 0.5, 2.0, 1.25]))
    assert report.scores == {2: 0.5, 3: 2.0, 4: 1.25}, "the first one stays"
    assert str(report).endswith("\nscores of the layers before: 2: 0.5, 3: 2, 4: 1.25")
    assert len({report, report}) == 1
    assert not prune(model, 0.5, criterion=lambda tau, _: torch.zeros(3)), "it says nothing of any layer"
    nothing = prune(model, 1e-6, criterion=lambda tau, _: torch.tensor([5.0, 2.0, 1.25]))
    assert str(nothing).startswith("no layer deleted")
    assert str(nothing).endswith("3: 2, 4: 1.25")


def test_a_budget_that_equal_shares_do_not_decide_is_said() -> None:
    report = prune(network([0.3, 0.2, 0.2, 0.2, 0.3]), budget=3)
    assert deleted(report) == [1, 2]
    assert str(report).endswith("equal shares the first went; criterion=taulearn.contribution(inputs) tells them apart")
    assert "equal" not in str(prune(steps(), budget=3))
    assert "equal" not in str(prune(network([0.3, 0.1, 0.1, 0.3, 0.2]), budget=3))
    assert "equal" in str(prune(network([0.3, 0.1, 0.1, 0.3, 0.2]), budget=4))
