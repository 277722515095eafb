"""fit computes what the loop computes that anyone would write, bit by bit, and records what it did."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from taulearn import Pruning
from taulearn.nn import fractional_dnn
from taulearn.optim import register_projection
from taulearn.penalties import L1, BiasOrdering, ElasticNet, Penalty, TimeHorizon, WeightElasticNet
from taulearn.training.batches import make_batches
from training.support import (
    LOSS,
    assert_same_history,
    assert_same_weights,
    digits,
    momentum,
    network,
    plain_loop,
    run_fit,
    sgd,
)

CPU = torch.device("cpu")
EPOCHS = 3


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def void(_: object) -> None:
    """Nothing, which is what a hook must return."""


def orders(data: Any, epochs: int = EPOCHS, *, batch_size: int = 40, seed: int = 0) -> list[Tensor]:
    """The orders that fit uses."""
    batches: Any = make_batches(data, batch_size, seed, CPU)
    return [batches.order(epoch) for epoch in range(epochs)]


CASES: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], list[Penalty], dict[str, Any]]] = {
    "sgd": (sgd, [], {}),
    "momentum": (momentum, [], {}),
    "adam": (adam, [], {}),
    "l1": (sgd, [L1(0.05)], {}),
    "proximal": (momentum, [L1(0.4, proximal=True)], {}),
    "time horizon": (momentum, [TimeHorizon(0.7, weight=0.5)], {}),
    "many": (adam, [L1(0.1), ElasticNet(0.01), WeightElasticNet(1e-3), BiasOrdering()], {}),
    "dependent": (momentum, [L1(0.1)], {"constraint": "dependent"}),
    "dependent, bounded": (sgd, [], {"constraint": "dependent", "lower_bound": 0.19}),
    "simplex": (adam, [L1(0.1)], {"constraint": "simplex", "lower_bound": 0.05}),
    "bounded": (momentum, [L1(2.0)], {"lower_bound": 0.15}),
    "fixed": (momentum, [], {"constraint": "fixed"}),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_is_the_plain_loop(case: str) -> None:
    make, penalties, options = CASES[case]
    data = digits(190)
    ours, theirs = network(**options), network(**options)
    history = run_fit(ours, data, make(ours), penalties=penalties)
    optimizer = make(theirs)
    handle = register_projection(optimizer, theirs, penalties)
    rows = np.array(plain_loop(theirs, data, optimizer, orders(data), penalties=penalties))
    handle.remove()
    assert_same_weights(ours, theirs)
    columns, scalars = history.iterations, 2 + len(penalties)
    names = ["loss", "total", *(f"penalty.{penalty.name}" for penalty in penalties)]
    assert list(columns)[:scalars] == names
    np.testing.assert_array_equal(np.stack([columns[name] for name in names], 1), np.float32(rows[:, :scalars]))
    np.testing.assert_array_equal(columns["tau"], np.float32(rows[:, scalars:]))
    assert ("raw_tau" in columns) == (case == "dependent, bounded")


def test_the_constraints_are_kept_by_hand_alone() -> None:
    """The same without taulearn.optim: proximal step and projection written out."""
    data, alpha = digits(), 0.3
    ours, theirs = network(lower_bound=0.1), network(lower_bound=0.1)
    run_fit(ours, data, sgd(ours), penalties=[L1(alpha, proximal=True)])
    tau = theirs.time_steps.values

    def after_step() -> None:
        with torch.no_grad():
            tau.copy_((tau.sign() * (tau.abs() - 0.05 * alpha).clamp(min=0.0)).clamp(min=0.1))

    plain_loop(theirs, data, sgd(theirs), orders(data), after_step=after_step)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0.0, atol=1e-6)


def test_a_fractional_network_trains_alike() -> None:
    data = digits()
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(fractional_dnn(64, 12, 10, 4, gamma=0.6))
    run_fit(made[0], data, adam(made[0]))
    optimizer = adam(made[1])
    register_projection(optimizer, made[1])
    plain_loop(made[1], data, optimizer, orders(data))
    assert_same_weights(*made)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    results = []
    for seed in (1, 1, 2):
        model = network(dropout=0.1)
        results.append((model, run_fit(model, digits(), adam(model), seed=seed)))
    assert_same_weights(results[0][0], results[1][0])
    assert_same_history(results[0][1], results[1][1])
    assert not np.array_equal(results[0][1].iterations["loss"], results[2][1].iterations["loss"])


def test_fixed_steps_do_not_train() -> None:
    model = network(constraint="fixed", init=[0.1, 0.2, 0.3, 0.2, 0.2])
    history = run_fit(model, digits(), momentum(model), penalties=[L1(1.0, proximal=True)])
    np.testing.assert_array_equal(history.iterations["tau"], [np.float32([0.1, 0.2, 0.3, 0.2, 0.2])] * 15)
    assert model.time_steps.tau.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.2])


def test_a_scheduler_steps_each_epoch() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rates: list[float] = []
    run_fit(
        model,
        digits(),
        optimizer,
        scheduler=lr_scheduler.StepLR(optimizer, 1, 0.1),
        callbacks=[lambda end: rates.append(end.optimizer.param_groups[0]["lr"])],
    )
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_one_cycle_steps_each_iteration() -> None:
    data = digits()
    ours, theirs = network(), network()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    run_fit(ours, data, optimizer, scheduler=lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=15))
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(plain, 0.2, total_steps=15)
    plain_loop(theirs, data, plain, orders(data), after_step=scheduler.step)
    assert_same_weights(ours, theirs)


def test_plateau_follows_the_validation_loss() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    history = run_fit(model, digits(), optimizer, scheduler=scheduler, validation=digits(50))
    assert scheduler.best == min(history.epochs["validation.loss"][1:])


@pytest.mark.parametrize("parts", [2, 3, 7, 40])
def test_accumulation_is_the_step_of_the_whole_batch(parts: int) -> None:
    data = digits(190, torch.float64)
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    penalties = [L1(0.1), WeightElasticNet(1e-3)]
    split = run_fit(ours, data, momentum(ours), penalties=penalties, accumulate=parts)
    whole = run_fit(theirs, data, momentum(theirs), penalties=penalties)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0.0, atol=1e-12)
    for name in whole.iterations:
        np.testing.assert_allclose(split.iterations[name], whole.iterations[name], rtol=0.0, atol=1e-12)


def test_clipping_bounds_the_gradient() -> None:
    data = digits()
    ours, theirs = network(), network()
    run_fit(ours, data, sgd(ours), clip_norm=0.01)
    optimizer = sgd(theirs)
    optimizer.register_step_pre_hook(lambda *_: void(nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)))
    plain_loop(theirs, data, optimizer, orders(data))
    assert_same_weights(ours, theirs)
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    run_fit(model, data, sgd(model), clip_norm=0.01, epochs=1, batch_size=200)
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), start, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_float32() -> None:
    seen: set[torch.dtype] = set()
    model = network()
    model.layers[1].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    history = run_fit(model, digits(400), adam(model), precision="bf16", epochs=8)
    assert torch.bfloat16 in seen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.iterations["tau"].dtype == np.float32
    reference = network()
    expected = run_fit(reference, digits(400), adam(reference), epochs=8)
    assert history.epochs["train.loss"][-1] == pytest.approx(expected.epochs["train.loss"][-1], rel=0.02)
    assert history.epochs["train.loss"][-1] < 0.8 * history.epochs["train.loss"][1]


def test_lbfgs() -> None:
    data = digits()
    ours, theirs = network(), network()
    history = run_fit(ours, data, torch.optim.LBFGS(ours.parameters(), max_iter=4), batch_size=200)
    optimizer = torch.optim.LBFGS(theirs.parameters(), max_iter=4)
    losses = []
    for order in orders(data, batch_size=200):

        def closure(order: Tensor = order) -> Any:
            optimizer.zero_grad()
            loss = LOSS(theirs(data[0][order]), data[1][order])
            loss.backward()
            return loss

        losses.append(float(torch.as_tensor(optimizer.step(closure)).detach()))
    assert_same_weights(ours, theirs)
    np.testing.assert_array_equal(history.iterations["loss"], np.float32(losses))


def test_averaged_weights_follow_the_iterations() -> None:
    data = digits()
    ours, theirs = network(), network()
    average, expected = AveragedModel(ours), AveragedModel(theirs)
    run_fit(ours, data, sgd(ours), averaged=average)
    plain_loop(theirs, data, sgd(theirs), orders(data), after_step=lambda: expected.update_parameters(theirs))
    assert_same_weights(average, expected)


def test_no_hook_is_left_behind() -> None:
    model = network(lower_bound=0.1)
    optimizer = sgd(model)
    run_fit(model, digits(), optimizer)
    with torch.no_grad():
        model.time_steps.values.fill_(0.0)
    optimizer.step()
    assert (model.time_steps.values < 0.05).all()


def test_a_threshold_that_deleted_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    run_fit(model, digits(), sgd(model), epochs=1, pruning=Pruning(0.001), progress=True)
    assert "no layer was deleted: the smallest share was 0." in capsys.readouterr().out
