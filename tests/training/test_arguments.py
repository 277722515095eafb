"""Arguments of fit that are of the wrong kind: a sentence that names them, and nothing trained or written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from taulearn import prune
from taulearn.optim import register_projection
from taulearn.penalties import L1
from training.support import assert_same_history, assert_same_weights, digits, network, run_fit, sgd

X, Z = digits()


def test_a_single_penalty_needs_no_list() -> None:
    model, other = network(), network()
    history = run_fit(model, (X, Z), sgd(model), penalties=L1(0.1), epochs=1)
    assert_same_history(history, run_fit(other, (X, Z), sgd(other), penalties=[L1(0.1)], epochs=1))


def test_an_optimizer_from_before_a_deletion_is_refused(tmp_path: Path) -> None:
    """It stopped training tau without a word."""
    model = network(init=[0.5, 0.5, 0.001, 0.5, 0.5])
    optimizer = sgd(model)
    model(X[:4]).sum().backward()
    report = prune(model, 0.01)
    assert "an optimiser made before this no longer trains tau: hand it over" in str(report)
    with pytest.raises(ValueError, match=r"optimizer must .*got one that holds those from"):
        run_fit(model, (X, Z), optimizer, run=tmp_path / "run")
    with pytest.raises(ValueError, match="optimizer must hold the model's time steps"):
        prune(model, 0.3, optimizer=optimizer)
    run_fit(model, (X, Z), sgd(model), epochs=1)


def test_an_optimizer_that_was_told_of_a_deletion_goes_on() -> None:
    model = network(init=[0.5, 0.5, 0.001, 0.5, 0.5])
    optimizer = sgd(model)
    model(X[:4]).sum().backward()
    assert "no longer" not in str(prune(model, 0.01, optimizer=optimizer))
    before = model.time_steps.tau.tolist()
    run_fit(model, (X, Z), optimizer, epochs=1)
    assert model.time_steps.tau.tolist() != before


def test_a_model_that_is_not_trained_is_pruned_without_a_warning() -> None:
    assert "no longer" not in str(prune(network(), keep=[0, 2]))


@pytest.mark.parametrize("optimizer", [sgd, lambda model: torch.optim.LBFGS(model.parameters(), max_iter=2)])
def test_a_registered_projection_is_not_done_twice(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """fit took the proximal step, and the hook took it again."""
    model, other = network(init=0.3), network(init=0.3)
    penalty, own = L1(0.5, proximal=True), optimizer(model)
    handle = register_projection(own, model, [penalty])
    history = run_fit(model, (X, Z), own, penalties=[penalty], epochs=2)
    expected = run_fit(other, (X, Z), optimizer(other), penalties=[L1(0.5, proximal=True)], epochs=2)
    assert_same_history(history, expected)
    assert_same_weights(model, other)
    assert len(own._optimizer_step_post_hooks) == 1, "the hook is back"
    handle.remove()
    assert not own._optimizer_step_post_hooks


def rates(optimizer: torch.optim.Optimizer, seen: list[float]) -> None:
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))


def test_a_schedule_of_iterations_inside_another_steps_each_iteration() -> None:
    """OneCycleLR in a SequentialLR took a step an epoch."""
    model, seen = network(), list[float]()
    optimizer = sgd(model)
    cycle = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=11, cycle_momentum=False)
    warm = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm, cycle], milestones=[4])
    rates(optimizer, seen)
    run_fit(model, (X, Z), optimizer, scheduler=scheduler, epochs=3)
    other = sgd(network())
    cycle = lr_scheduler.OneCycleLR(other, 0.1, total_steps=11, cycle_momentum=False)
    warm = lr_scheduler.ConstantLR(other, 0.5, total_iters=4)
    scheduler, expected = lr_scheduler.SequentialLR(other, [warm, cycle], milestones=[4]), []
    for _ in range(15):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
    assert seen == expected
