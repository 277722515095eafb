"""The report of a pruning."""

import pytest

from small_networks import KEEP, batch, count, deleted, network
from taulearn import prune
from taulearn.nn import fractional_dnn, resnet


def test_the_papers_network() -> None:
    model = resnet(784, 100, 10, 6, init=[0.5, 0.2, 0.001, 0.1, 0.0, 0.2])
    report = prune(model)
    assert (report.layers_before, report.layers_after) == (6, 4)
    assert (report.parameters_before, report.parameters_after) == (130_006, 109_804)
    assert [d.parameters for d in report.deleted] == [10_101, 10_101]
    assert count(model) == 109_804
    assert report.optimizer == "none"
    assert str(report) == ("deleted layers 4, 2 (shares 0, 0.001): 6 -> 4 layers, 130,006 -> 109,804 parameters")


@pytest.mark.parametrize("constraint", ["free", "fixed", "dependent", "simplex"])
def test_the_counts_add_up(constraint: str) -> None:
    """A fixed step is no parameter."""
    model = network(constraint=constraint)
    report = prune(model, keep=KEEP)
    difference = report.parameters_before - report.parameters_after
    assert sum(d.parameters for d in report.deleted) == difference
    assert difference == 2 * (4 * 4 + 4 + (constraint != "fixed"))


def test_layers_have_their_numbers_from_the_start() -> None:
    model = network([0.5, 0.001, 0.5, 0.002, 0.5])
    assert deleted(prune(model, 0.001)) == [1]
    assert deleted(prune(model, 0.01)) == [3]
    assert model.time_steps.origin == (0, 2, 4)


@pytest.mark.parametrize("memory_from", [0, 1])
def test_the_factor_bounds_the_fractional_error(memory_from: int) -> None:
    model = network([0.5, 1e-6, 0.3], builder=fractional_dnn, memory_from=memory_from, lower_bound=1e-9)
    before = model.states(batch())[-1]
    report = prune(model)
    size = report.deleted[0].factor
    assert size == pytest.approx(1e-3 * 0.886227, rel=1e-5)
    error = float((model.states(batch())[-1] - before).detach().abs().max())
    assert 0 < error < 2 * size
    assert f"here {size:.2g} times" in str(report)
