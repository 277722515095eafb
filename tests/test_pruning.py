"""Pruning: the rule, what must stay and what is refused."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

import taulearn
from small_networks import DOUBLE, KEEP, batch, count, deleted, network
from taulearn import Pruning, prune
from taulearn.adaptivity.coarsen import PruneReport, check_prunable
from taulearn.adaptivity.estimate import shares
from taulearn.adaptivity.mark import plan
from taulearn.adaptivity.transaction import Prunable
from taulearn.nn import (
    Fractional,
    PadSkips,
    Residual,
    TimeSteps,
    TimeVariableNetwork,
    densenet,
    feedforward,
    fractional_dnn,
    resnet,
)


class TestRule:
    def test_shares_are_of_magnitudes(self) -> None:
        """A large negative step is not the smallest one."""
        model = network([0.5, -0.9, 0.001, 0.4], horizon=1.0)
        assert deleted(prune(model)) == [2]
        assert model.time_steps.origin == (0, 1, 3)

    def test_small_negative_steps_go(self) -> None:
        assert deleted(prune(network([0.5, -0.001, 0.3, 0.4]))) == [1]

    def test_the_smallest_share_goes_first(self) -> None:
        assert deleted(prune(network([1.0, 0.003, -0.001, 0.002, 1.0]))) == [2, 3, 1]

    def test_shares_are_computed_anew(self) -> None:
        """0.0098 of 1.0 is below the threshold, of the 0.975 that remain it is not."""
        model = network([0.9652, 0.0098, 0.0090, 0.0080, 0.0080], horizon=1.0)
        report = prune(model)
        remaining, expected = dict(enumerate([0.9652, 0.0098, 0.0090, 0.0080, 0.0080])), []
        while True:
            total = sum(remaining.values())
            layer = min((l for l in remaining if l > 0), key=lambda l: remaining[l])
            if remaining[layer] / total >= 0.01:
                break
            expected.append((layer, remaining.pop(layer) / total))
        assert [layer for layer, _ in expected] == deleted(report) == [3, 4, 2]
        assert [d.share for d in report.deleted] == pytest.approx([share for _, share in expected], rel=1e-12)

    def test_a_share_of_the_threshold_stays(self) -> None:
        assert not prune(network([0.75, 0.25, 0.75, 0.25]), 0.125)
        assert deleted(prune(network([0.75, 0.25, 0.75, 0.25]), 0.1250001)) == [1]

    def test_a_larger_threshold_deletes_more(self) -> None:
        model = network([0.4, 0.05, 0.3, 0.1, 0.15])
        assert deleted(prune(copy.deepcopy(model), 0.07)) == [1]
        assert deleted(prune(copy.deepcopy(model), 0.12)) == [1, 3]

    @pytest.mark.parametrize("gamma", [0.3, 0.5, 0.8])
    def test_fractional_shares_are_of_powers(self, gamma: float) -> None:
        tau = [0.5, 0.3, 0.0005, 0.2]
        model = network(tau, builder=fractional_dnn, gamma=gamma)
        expected = [t**gamma / sum(s**gamma for s in tau) for t in tau]
        assert shares(model.time_steps, gamma).tolist() == pytest.approx(expected, rel=1e-12)
        assert not prune(copy.deepcopy(model), 0.99 * expected[2])
        report = prune(model, 1.01 * expected[2])
        assert deleted(report) == [2]
        assert report.deleted[0].share == pytest.approx(expected[2], rel=1e-12)
        assert "error of the order tau^" in report.note

    def test_nothing_to_delete(self) -> None:
        model = network()
        before = {name: id(p) for name, p in model.named_parameters()}
        report = prune(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        assert not report
        assert report.optimizer == "unchanged"
        assert report.kept == (0, 1, 2, 3, 4)
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert str(report) == f"no layer deleted: 5 layers, {count(model)} parameters"

    @given(st.lists(st.integers(-999, 999), min_size=1, max_size=8), st.floats(0.001, 0.9), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_the_plan_is_brute_force(self, tau: list[int], threshold: float, first_stays: bool) -> None:
        steps = TimeSteps(len(tau), init=tau, dtype=DOUBLE)
        remaining, expected = dict(enumerate(tau)), []
        while len(remaining) > 1:
            total = sum(abs(t) for t in remaining.values())
            free = [l for l in remaining if not (first_stays and l == 0)]
            smallest = min(free, key=lambda l: abs(remaining[l]))
            share = abs(remaining[smallest]) / total if total else 0.0
            if abs(share - threshold) < 1e-12:
                return
            if share > threshold:
                break
            expected.append(smallest)
            del remaining[smallest]
        found = plan(steps, threshold, fixed=[0] if first_stays else [])
        assert [layer for layer, _ in found] == expected
        assert steps.num_steps == len(tau)

    @given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8), st.floats(0.001, 0.5))
    @settings(max_examples=40, deadline=None)
    def test_pruning_twice_deletes_nothing_more(self, tau: list[float], threshold: float) -> None:
        assume(max(tau) > 1.001 * min(tau))  # equal ones say nothing
        model = network([1.0, *tau])
        prune(model, threshold)
        if model.time_steps.num_steps > 1:
            assert not prune(model, threshold)


class TestWhatStays:
    def test_the_first_layer(self) -> None:
        model = network([0.0, 0.5, 0.5, 0.0])
        assert deleted(prune(model)) == [3]
        assert model.time_steps.origin == (0, 1, 2)

    def test_layers_whose_width_changes(self) -> None:
        torch.manual_seed(0)
        model = resnet(3, [4, 4, 2, 2, 5], 1, 5, init=[1.0, 0.0, 0.0, 0.0, 0.0], dtype=DOUBLE)
        before = model(batch())
        assert deleted(prune(model)) == [1, 3]
        assert torch.equal(model(batch()), before)
        assert isinstance(model.skips, PadSkips)
        assert model.skips.widths == (3, 4, 2, 5)

    def test_layers_with_a_learned_skip(self) -> None:
        torch.manual_seed(0)
        model = resnet(3, [4, 4, 2, 2], 1, 4, init=[1.0, 0.0, 0.0, 0.0], dtype=DOUBLE, skips="learned")
        before = model(batch())
        assert deleted(prune(model)) == [1, 3]
        assert torch.equal(model(batch()), before)

    def test_the_dependent_last_step_which_takes_up_the_others(self) -> None:
        model = network([0.9, 0.004, 0.096, 0.0], constraint="dependent", horizon=1.0)
        assert deleted(prune(model)) == [1]
        torch.testing.assert_close(
            model.time_steps.tau.detach(), torch.tensor([0.9, 0.096, 0.004], dtype=DOUBLE), rtol=0, atol=1e-15
        )
        assert model.time_steps.origin == (0, 2, 3)

    def test_the_simplex_is_projected_upon_again(self) -> None:
        model = network([0.5, 0.005, 0.495], constraint="simplex")
        assert deleted(prune(model)) == [1]
        torch.testing.assert_close(
            model.time_steps.tau.detach(), torch.tensor([0.5025, 0.4975], dtype=DOUBLE), rtol=1e-14, atol=0
        )

    @pytest.mark.parametrize("value", [0.0, [1.0, 1.1, 1.2, 1.3]])
    def test_at_least_one_layer(self, value: float | list[float]) -> None:
        layers = [nn.Linear(3, 3) for _ in range(4)]
        model = TimeVariableNetwork(layers, nn.Identity(), Residual(), TimeSteps(4, init=value), stem=nn.Identity())
        report = prune(model, 0.99)
        assert model.time_steps.num_steps == len(model.layers) == 1
        assert len(report.deleted) == 3

    def test_a_wrapped_first_layer_may_go(self) -> None:
        layers = [nn.Linear(3, 3) for _ in range(3)]
        steps = TimeSteps(3, init=[0.0, 1.0, 1.0])
        model = TimeVariableNetwork(layers, nn.Identity(), Residual(), steps, stem=nn.Identity())
        x = torch.randn(2, 3)
        before = model(x)
        assert deleted(prune(model)) == [0]
        assert torch.equal(model(x), before)

    def test_the_first_layer_where_the_memory_starts_after_it(self) -> None:
        """Its deletion changed the output by a constant, however small its step."""
        for memory_from, expected in ((1, []), (0, [0])):
            layers = [nn.Linear(3, 3).double() for _ in range(3)]
            steps = TimeSteps(3, init=[1e-16, 1.0, 1.0], dtype=DOUBLE)
            scheme = Fractional(0.5, memory_from)
            model = TimeVariableNetwork(layers, nn.Identity(), scheme, steps, stem=nn.Identity())
            before = model(batch())
            assert deleted(prune(model)) == expected
            torch.testing.assert_close(model(batch()), before, rtol=1e-6, atol=1e-6)


class TestKeep:
    def test_positions_are_kept(self) -> None:
        model = network()
        report = prune(model, keep=(4, 0, 2))
        assert report.kept == KEEP
        assert model.time_steps.origin == KEEP
        assert deleted(report) == [1, 3]
        assert [d.share for d in report.deleted] == pytest.approx([0.2, 0.2])
        report = prune(model, keep=[0, 2])
        assert deleted(report) == [2]
        assert list(model.time_steps.origin) == [0, 4]

    def test_all(self) -> None:
        assert not prune(network(), keep=range(5))

    @pytest.mark.parametrize(
        "keep", [torch.tensor([0, 3]), {0, 3}, (i for i in (3, 0))], ids=["tensor", "set", "iterator"]
    )
    def test_any_iterable_of_integers(self, keep: Iterable[int]) -> None:
        model = network()
        prune(model, keep=keep)
        assert model.time_steps.origin == (0, 3)


class TestPolicy:
    def test_every_epoch(self) -> None:
        due = [Pruning().due(iteration=i, epoch_ends=i % 4 == 0) for i in range(1, 9)]
        assert due == [False, False, False, True] * 2

    def test_every_few_iterations(self) -> None:
        due = [Pruning(every=3).due(iteration=i, epoch_ends=i % 4 == 0) for i in range(1, 7)]
        assert due == [False, False, True] * 2

    def test_public_names(self) -> None:
        assert (taulearn.prune, taulearn.Pruning, taulearn.PruneReport) == (prune, Pruning, PruneReport)


class TestCompiled:
    def test_a_compiled_network_is_pruned_and_compiled_anew(self) -> None:
        torch._dynamo.reset()
        model = network([0.5, 0.0, 0.3, 0.0, 0.2])
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        before = compiled(batch())
        assert deleted(prune(compiled)) == [1, 3]
        assert torch.equal(compiled(batch()), before)
        assert model.time_steps.num_steps == 3

    def test_prunable_models_are_not_told_by_a_runtime_protocol(self) -> None:
        """From Python 3.12 on isinstance with a protocol does not see the submodules of a torch module."""
        assert not getattr(Prunable, "_is_runtime_protocol", False)
        model = network()
        assert check_prunable(model) is model


class TestRefusals:
    """Those that the support matrix of the README refers to; the others stand in tests/refusals.py."""

    @pytest.mark.parametrize("builder", [densenet, feedforward])
    def test_schemes_in_which_zero_is_not_the_identity(self, builder: Callable[..., TimeVariableNetwork]) -> None:
        model = builder(3, 4, 2, 5)
        for keep in (None, [0]):
            with pytest.raises(ValueError, match=r"model .*tau = 0.* residual or fractional"):
                prune(model, keep=keep)
        assert model.time_steps.num_steps == 5
