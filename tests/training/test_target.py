"""A target instead of a penalty weight: fit reaches it, or it is refused."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from taulearn import Pruning, fit, parameter_groups, wrap
from taulearn.adaptivity.controller import Pruner
from taulearn.adaptivity.target import SteeredL1, window
from taulearn.nn import fractional_dnn
from taulearn.penalties import L1, ElasticNet
from training.support import (
    LOSS,
    Crash,
    assert_same_history,
    assert_same_weights,
    crash_after,
    digits,
    network,
    run_fit,
)
from wrapping.hosts import Block


def test_the_window() -> None:
    assert window(0.6, None, 10, 100) == (60, 600, 6)
    assert window(1.0, "epoch", 4, 30) == (12, 120, 30)
    assert window(2, 7, 3, 20) == (4, 35, 7)
    with pytest.raises(ValueError, match=r"by must .*got 4"):
        window(4, None, 3, 20)
    with pytest.raises(ValueError, match=r"by must leave room for one look .*got 1, which is 20 iterations.*every 50"):
        window(1, 50, 3, 20)


def test_the_penalty_acts_on_chosen_steps() -> None:
    model = network(init=[0.5, -0.3, 0.2, -0.05, 0.4])
    penalty = SteeredL1(model.time_steps.values)
    assert float(penalty(model)[0].detach()) == 0.0
    penalty.set(0.5, [1, 3])
    value, columns = penalty(model)
    assert float(value.detach()) == pytest.approx(0.5 * 0.35)
    assert {name: float(column) for name, column in columns.items()} == {"weight.l1": 0.5}
    found = penalty.proximal(model.time_steps.values.detach(), 0.2)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.2, 0.2, 0.0, 0.4]))


def blocks(number: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *(Block(12) for _ in range(number)), nn.Linear(12, 10))


def wrapped(**options: Any) -> Any:
    return wrap(blocks(), example_inputs=digits(2)[0], **options)


def trained(model: Any, pruning: Pruning, epochs: int = 5, **options: Any) -> Any:
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05), momentum=0.9)
    torch.manual_seed(7)
    return run_fit(model, digits(400), optimizer, pruning=pruning, epochs=epochs, **options)


MODELS = {
    "network": lambda: network(8),
    "fractional": lambda: _fractional(),
    "dependent": lambda: network(8, constraint="dependent"),
    "wrapped": wrapped,
    "displacement": lambda: wrapped(units="displacement"),
}


def _fractional() -> Any:
    torch.manual_seed(0)
    return fractional_dnn(64, 12, 10, 8, activation="tanh")


def own(tau: Any, model: nn.Module) -> Any:
    return tau.abs() ** 2


ALL = list(itertools.product(MODELS, (None, "share", own), ("next", "all", "none")))
QUICK = {("network", criterion, each) for _, criterion, each in ALL} | {(name, None, "next") for name in MODELS}


@pytest.mark.parametrize(
    ("name", "criterion", "penalised"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in ALL],
)
def test_fit_reaches_the_target_by_the_epoch_and_not_below(name: str, criterion: Any, penalised: str) -> None:
    model = MODELS[name]()
    start = model.time_steps.num_steps
    history = trained(model, Pruning(target_blocks=4, by=3, criterion=criterion, penalised=penalised))
    layers = history.epochs["layers"].tolist()
    assert layers == sorted(layers, reverse=True)
    assert layers[3:] == [4, 4, 4]
    assert model.time_steps.num_steps == 4
    iterations = [d.iteration for d in history.deletions]
    number, deadline = start - 4, 30
    for k, iteration in enumerate(iterations):
        assert iteration >= 3 + round(k * (deadline - 3) / number), "rate-limited"
    assert iterations[-1] <= deadline
    if penalised != "none":
        alpha = history.iterations["weight.l1"]
        assert alpha[:3].tolist() == [0.0] * 3
        assert alpha.max() > 0.0
        assert not alpha[deadline:].any(), "the rest of the training recovers without a penalty"
    else:
        assert "weight.l1" not in history.iterations


def test_the_step_of_a_layer_is_small_when_it_goes() -> None:
    history = trained(wrapped(), Pruning(target_blocks=3, by=8), epochs=12)
    tau = history.iterations["tau"]
    for d in history.deletions:
        assert abs(tau[d.iteration - 1, d.layer]) < 0.3 * np.nanmean(np.abs(tau[d.iteration - 1]))
    assert len(history.deletions) == 3


def test_a_latency_from_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measured(model: nn.Module, layers: Any, inputs: Any) -> Any:
        seen.append((len(layers), tuple(inputs.shape)))
        return (0.5, 1.0, 1.0, 0.5, 2.0, 0.25), 6.0

    monkeypatch.setattr("taulearn.adaptivity.target.layer_milliseconds", measured)
    model = wrapped()
    history = trained(model, Pruning(target_latency_ms=3.4, by=3, penalised="none", criterion="share"))
    assert seen == [(6, (1, 1, 8, 8))]
    assert history.deletions[0].layer == 4, "equal shares: the slowest goes first"
    gone = sum((0.5, 1.0, 1.0, 0.5, 2.0, 0.25)[d.layer] for d in history.deletions)
    assert 2.6 <= gone <= 3.6
    for limit, message in ((7.0, "must be less than the 6 ms"), (0.7, "must be at least 1, what a forward pass takes")):
        with pytest.raises(ValueError, match=f"target_latency_ms {message}"):
            trained(wrapped(), Pruning(target_latency_ms=limit))
    x = digits(3)[0]
    trained(wrapped(), Pruning(target_latency_ms=3.4, example_inputs=x))
    assert seen[-1][1] == (3, 1, 8, 8)


def test_a_target_that_is_missed_is_said() -> None:
    model = wrapped()
    policy = Pruning(target_blocks=3, by=1, penalised="none", criterion="share")
    pruner = Pruner(policy, model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, per_epoch=10)
    pruner.begin(digits(1)[0])
    assert pruner.target is not None
    pruner.target.excess = 9.0
    with pytest.warns(UserWarning, match="target of pruning is not reached at its time, iteration 10: 5 of 9 went"):
        pruner.prune(10)
    assert model.time_steps.num_steps == 1


def test_a_real_latency_is_measured() -> None:
    model = wrapped()
    history = trained(model, Pruning(target_latency_ms=1e-9 + _half(model)), epochs=3)
    assert 1 <= len(history.deletions) < 6


def _half(model: nn.Module) -> float:
    from taulearn._milliseconds import layer_milliseconds
    from taulearn.wrapping import wrapping_of

    wrapping = wrapping_of(model)
    assert wrapping is not None
    times, whole = layer_milliseconds(model.eval(), wrapping.layers, digits(1)[0])
    return whole - 0.5 * sum(times)


POLICIES: dict[str, Any] = {
    "next": Pruning(target_blocks=3, by=4),
    "all": Pruning(target_blocks=3, by=0.8, penalised="all", criterion="share", every=3),
    "latency": Pruning(target_latency_ms=2.0, by=4),
    "contribution": Pruning(0.15, criterion="contribution"),
}


@pytest.mark.parametrize(
    ("name", "units"),
    [("next", "displacement"), ("all", "steps"), ("latency", "displacement"), ("contribution", "steps")],
)
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, units: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([((0.5, 1.0, 1.0, 0.5, 2.0, 0.25), 6.0), *[((1.0, 0.1, 1.0, 0.5, 0.1, 3.0), 7.0)] * 9])
    monkeypatch.setattr("taulearn.adaptivity.target.layer_milliseconds", lambda *_: next(times))
    model = wrapped(units=units)
    history = trained(model, POLICIES[name], run=tmp_path / "whole")
    assert len({d.epoch for d in history.deletions}) >= 2 or name == "contribution"
    assert history.deletions
    decisions = (tmp_path / "whole" / "run.toml").read_text()
    assert ("costs=[0.5, 1.0" in decisions) == (name == "latency")
    for epoch in (1, 3) if name == "all" else (3,):
        monkeypatch.setattr(
            "taulearn.adaptivity.target.layer_milliseconds", lambda *_: ((0.5, 1.0, 1.0, 0.5, 2.0, 0.25), 6.0)
        )
        folder = tmp_path / str(epoch)
        with pytest.raises(Crash):
            trained(wrapped(units=units), POLICIES[name], run=folder, callbacks=[crash_after(epoch)])
        monkeypatch.setattr("taulearn.adaptivity.target.layer_milliseconds", lambda *_: next(times))
        resumed = wrapped(units=units)
        record = trained(resumed, POLICIES[name], run=folder, resume=True)
        assert_same_weights(resumed, model)
        assert_same_history(record, history)


def test_another_policy_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    trained(wrapped(), Pruning(target_blocks=3), run=tmp_path / "run", epochs=2)
    with pytest.raises(ValueError, match=r"pruning must be .*as at the start of the run"):
        trained(wrapped(), Pruning(0.01), run=tmp_path / "run", resume=True)


def test_a_run_for_more_epochs_keeps_its_schedule(tmp_path: Path) -> None:
    policy = Pruning(target_blocks=3, by=2)
    trained(wrapped(), policy, epochs=2, run=tmp_path / "run", callbacks=[])
    model = wrapped()
    history = trained(model, policy, epochs=4, run=tmp_path / "run", resume=True)
    assert history.epochs["layers"].tolist()[2:] == [3, 3, 3]
    for epoch in (1, 2):
        folder = tmp_path / str(epoch)
        with pytest.raises(Crash):
            trained(wrapped(), policy, epochs=2, run=folder, callbacks=[crash_after(epoch)])
        resumed = wrapped()
        trained(resumed, policy, epochs=4, run=folder, resume=True)
        assert_same_weights(resumed, model)


@pytest.mark.long
def test_compiled_steps_see_alpha_change() -> None:
    """With SGD on a network without buffers all but the measured steps are fused."""
    found = []
    for mode in ("never", "always"):
        history = trained(network(6), Pruning(target_blocks=4, by=3, every=5, criterion="share"), compile=mode)
        found.append(history)
    eager, compiled = found
    assert [d.layer for d in compiled.deletions] == [d.layer for d in eager.deletions]
    for column in ("weight.l1", "penalty.l1", "tau"):
        np.testing.assert_allclose(compiled.iterations[column], eager.iterations[column], rtol=2e-3, atol=2e-4)
    assert eager.iterations["weight.l1"].max() > 0


def test_averaged_weights_and_loaders_go_along() -> None:
    model = wrapped()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits(400)), batch_size=40)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=0.005))
    run_fit(model, data, optimizer, pruning=Pruning(target_blocks=2), averaged=averaged, accumulate=2)
    assert model.time_steps.num_steps == averaged.module.time_steps.num_steps == 2


def test_fit_that_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="penalties must not contain L1 where pruning has a target"):
        trained(wrapped(), Pruning(target_blocks=3), penalties=[L1(0.1)])
    trained(wrapped(), Pruning(target_blocks=3), penalties=[ElasticNet(0.1)], epochs=2)
    trained(wrapped(), Pruning(target_blocks=3, penalised="none"), penalties=[L1(0.1)], epochs=2)
    model = wrapped()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not model.time_steps.values], lr=0.1)
    with pytest.raises(
        ValueError, match=r"optimizer must hold the model's time steps, .*parameter_groups\(model, lr\)"
    ):
        fit(model, digits(), loss=LOSS, optimizer=optimizer, epochs=1, pruning=Pruning(target_blocks=3))
    fixed = wrapped(constraint="fixed")
    trained(fixed, Pruning(target_blocks=3, penalised="none"), epochs=3)
    assert fixed.time_steps.num_steps == 3
