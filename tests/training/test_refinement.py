"""The policy of refinement in fit and attach: when layers come, which, and what rests; alone and with pruning."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from taulearn import Criterion, Pruning, Refinement, attach, parameter_groups, refine
from taulearn.adaptivity.adaptation import Adaptation
from taulearn.adaptivity.indicators import indicators
from taulearn.adaptivity.refiner import Rounds, rounds_for
from taulearn.penalties import L1, L2
from taulearn.training import History, StopTraining
from training.support import (
    LOSS,
    Crash,
    assert_same_history,
    assert_same_weights,
    crash_after,
    digits,
    momentum,
    network,
    run_fit,
    sgd,
)
from training.test_fit import orders

EPOCHS = 4  # of 5 iterations


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(model, 0.01, tau_lr=0.005))


def trained(policy: Refinement | None, make: Any = adam, model: Any = None, **options: Any) -> tuple[Any, History]:
    model = network() if model is None else model
    torch.manual_seed(7)
    return model, run_fit(model, digits(), make(model), refinement=policy, **{"epochs": EPOCHS} | options)


def births(history: History) -> list[int]:
    return [each.iteration for each in history.insertions]


def test_the_rounds() -> None:
    for missing in range(1, 9):
        for every in (None, 1, 3, 7):
            for number in (None, 1, 2):
                try:
                    found = rounds_for(missing, 20, every, number)
                except ValueError:
                    assert number is not None
                    assert every is not None
                    assert number * (20 // every) < missing
                    continue
                times = [i for i in range(50) if found.left(i)]
                assert [found.left(i) for i in times] == [*range(len(times), 0, -1)]
                assert {b - a for a, b in itertools.pairwise(times)} <= {every or found.every}
                assert times[-1] == (20 if every is None else 20 // every * every)
                assert len(times) == (20 // every if every else -(-missing // (number or 1)))
                walked, at = [], 0
                while (at_next := found.next(at)) is not None:
                    walked.append(at := at_next)
                assert walked == times
    assert Rounds(0, 1, 0).next(0) is None


@pytest.mark.parametrize(
    ("policy", "times"),
    [
        (Refinement(9), [4, 6, 8, 10]),
        (Refinement(9, until=3), [6, 9, 12, 15]),
        (Refinement(9, every=3), [3, 3, 6, 9]),
        (Refinement(9, number=2, until=0.8), [8, 8, 16, 16]),
        (Refinement(9, every="epoch", until=0.8), [5, 5, 10, 15]),
        (Refinement(9, every=4, number=4), [4] * 4),
        (Refinement(7, by="insert", until=0.3), [3, 6]),
    ],
)
def test_the_target_is_reached_at_its_time(policy: Refinement, times: list[int]) -> None:
    model, history = trained(policy)
    assert model.time_steps.num_steps == policy.target_blocks
    assert births(history) == times
    assert np.isfinite(history.iterations["loss"]).all()
    born = {each.layer: each.iteration for each in history.insertions}
    for layer, at in born.items():
        assert np.isfinite(history.iterations["tau"][:, layer]).tolist() == [i >= at for i in range(20)]


@pytest.mark.parametrize("make", [adam, momentum, sgd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("by", ["split", "insert"])
def test_the_loop_is_fit_to_the_bit(make: Any, by: str) -> None:
    policy, data = Refinement(8, by=by, until=0.8, loss=LOSS), digits(200)
    ours, theirs = network(), network()
    optimizer = make(ours)
    session = attach(ours, optimizer, refinement=policy, iterations=15, iterations_per_epoch=5)
    ours.train()
    for order in orders(data, 3):
        for index in order.split(40):
            optimizer.zero_grad()
            x, z = data[0][index], data[1][index]
            session.loss(LOSS(ours(x), z), inputs=x, targets=z).backward()
            optimizer.step()
    session.detach()
    fitted = run_fit(theirs, data, make(theirs), refinement=Refinement(8, by=by, until=0.8))
    assert_same_weights(ours, theirs)
    assert births(fitted) == [4, 8, 12]
    assert session.history.insertions == fitted.insertions
    np.testing.assert_array_equal(np.float32(session.history.iterations["tau"]), fitted.iterations["tau"])


def test_the_layers_with_the_largest_indicators_on_the_batch_of_the_iteration() -> None:
    """A run that stops behind the round has the same weights, on which the indicators are computed here."""
    before = network()
    torch.manual_seed(7)
    run_fit(before, digits(), adam(before), epochs=1)
    batch = [each[orders(digits(200), 1)[0][-40:]] for each in digits(200)]
    eta = indicators(before, "dual-weighted", tuple(batch), LOSS).abs().nan_to_num()
    _, history = trained(Refinement(7, every="epoch", number=2, until=1), epochs=2)
    assert sorted(each.parent for each in history.insertions) == sorted(eta.topk(2).indices.tolist())
    assert births(history) == [5, 5]


def test_dorflers_set_goes_no_further_than_the_target() -> None:
    _, few = trained(Refinement(9, bulk=1e-9))
    assert births(few) == [4, 6, 8, 10]
    _, many = trained(Refinement(8, bulk=1.0))
    assert births(many) == [4, 4, 4] or births(many)[:2] == [4, 4]
    _, one = trained(Refinement(8, bulk=1.0, every=9))
    assert births(one) == [9, 9, 9]


def test_indicators_of_ones_own_and_data() -> None:
    seen = []

    def last(model: Any, batch: Any) -> torch.Tensor:
        seen.append(len(batch[1]))
        return torch.arange(model.time_steps.num_steps).double()

    model, _ = trained(Refinement(7, indicator=last, data=[digits(30), digits(10)]))
    assert seen == [30, 10, 30, 10]
    assert model.time_steps.origin == (0, 1, 2, 3, 4, 5, 6)
    assert model.time_steps.parent == {5: 4, 6: 5}
    model, _ = trained(Refinement(7, indicator=lambda tau, _: -tau.cumsum(0)))
    assert model.time_steps.parent == {5: 4, 6: 5}


def test_what_is_inserted() -> None:
    def silent(neighbour: nn.Module) -> nn.Module:
        made = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        nn.init.zeros_(made[0].weight)
        nn.init.zeros_(made[0].bias)
        return made

    model = network()
    averaged = AveragedModel(model)
    policy = Refinement(6, by="insert", layer=silent, until=1.0)
    _, history = trained(policy, sgd, model, averaged=averaged)
    assert births(history) == [20]
    assert model.time_steps.origin == averaged.module.time_steps.origin
    place = model.time_steps.origin.index(5)
    for each in (model, averaged.module):
        assert each.time_steps.tau[place] == 0
        assert not any(bool(p.any()) for p in each.layers[place].parameters())
    assert model.layers[place] is not averaged.module.layers[place]


@pytest.mark.parametrize("make", [adam, sgd], ids=lambda f: f.__name__)
def test_a_policy_that_never_fires_changes_nothing(make: Any) -> None:
    def stop(end: Any) -> None:
        if end.epoch == 2:
            raise StopTraining

    with pytest.warns(UserWarning, match="the target of refinement is not reached: 5 layers, target_blocks=6 asked"):
        model, history = trained(Refinement(6, until=0.8), make, callbacks=[stop])
    plain, record = trained(None, make, callbacks=[stop])
    assert_same_weights(model, plain)
    assert_same_history(history, record)


@pytest.mark.parametrize("penalty", [L1(100.0, proximal=True), L1(0.5), L2(5.0)], ids=["proximal", "l1", "l2"])
def test_a_new_layer_is_not_penalised_before_it_has_had_its_rest(penalty: Any) -> None:
    """Under the proximal penalty all other steps are 0 at once, and a new one as soon as its rest is over."""
    policy = Refinement(6, by="insert", until=0.4, rest=6)
    model, history = trained(policy, sgd, penalties=penalty)
    tau = history.iterations["tau"][:, 5]
    assert births(history) == [8]
    assert tau[8] == 0
    if penalty.differentiated:
        assert model.time_steps.resting == frozenset()
        assert np.abs(np.diff(tau[8:14])).max() < np.abs(np.diff(tau[14:])).max()
        return
    assert (tau[9:15] != 0).all()
    assert not tau[15:].any()
    assert not history.iterations["tau"][1:, :5].any()


def test_a_new_layer_is_not_deleted_before_it_has_had_its_rest() -> None:
    policy = Refinement(7, by="insert", until=0.5, rest=7, number=2)
    model, history = trained(policy, sgd, pruning=Pruning(0.01, every=1))
    born = {each.layer: each.iteration for each in history.insertions}
    assert set(born.values()) == {10}
    gone = {each.layer: each.iteration for each in history.deletions}
    assert gone == dict.fromkeys(born, 17)
    assert model.time_steps.origin == (0, 1, 2, 3, 4)


def test_cycles_with_a_threshold_go_back_to_the_target() -> None:
    policy = Refinement(7, by="insert", every=4, rest=2, until=0.8)
    _, history = trained(policy, sgd, pruning=Pruning(0.01, every=1))
    layers = np.isfinite(history.iterations["tau"]).sum(1).tolist()
    assert max(layers) == 7
    assert layers[15] < 7
    assert history.deletions
    assert len(births(history)) > 2
    born = {each.layer: each.iteration for each in history.insertions}
    assert all(each.iteration >= born[each.layer] + 2 for each in history.deletions if each.layer in born)


@pytest.mark.parametrize("criterion", ["contribution", "share", "sensitivity"])
def test_the_depth_rises_and_falls_to_the_final_one(criterion: str) -> None:
    refinement = Refinement(8, until=0.4, rest=2)
    pruning = Pruning(target_blocks=4, by=0.8, criterion=criterion)
    model, history = trained(refinement, pruning=pruning, epochs=8)
    layers = np.isfinite(history.iterations["tau"]).sum(1)
    peak = births(history)[-1]
    assert peak == 16
    assert layers[peak] == 8
    assert (np.diff(layers[: peak + 1]) >= 0).all()
    assert (np.diff(layers[peak:]) <= 0).all()
    assert min(each.iteration for each in history.deletions) > 18
    assert model.time_steps.num_steps == 4
    assert layers[32:].tolist() == [4] * 8
    assert not history.iterations["weight.l1"][:18].any()


def test_running_scores_of_a_new_layer_begin_with_its_birth() -> None:
    model = network()
    policies = adaptation(model, Refinement(6, every=1, until=1.0), Pruning(0.01, criterion="contribution", every=4))
    pruner = policies.pruner
    for _ in range(3):
        with pruner.measuring(0):
            model(digits(20)[0])
    old = pruner.criterion.values.clone()
    (change,) = policies.change(1, policies.due(1, epoch_ends=False), [], lambda: digits(20))
    (l,) = change.positions
    assert pruner.criterion.values.tolist() == [*old[: l + 1].tolist(), 0.0, *old[l + 1 :].tolist()]
    assert pruner.criterion.counts.tolist() == [*[3] * (l + 1), 0, *[3] * (4 - l)]
    assert (pruner.criterion.unseen, pruner.criterion.number) == ([l + 1], 0)


def adaptation(model: Any, refinement: Refinement, pruning: Pruning | None = None) -> Any:
    policies = Adaptation(pruning, refinement, model, sgd(model), 1, 10, loss=LOSS)
    policies.begin(None)
    return policies


@pytest.mark.parametrize("pruning", [None, Pruning(target_blocks=4, by=0.9), Pruning(0.01, every=1)])
def test_a_crash_in_any_epoch_leaves_no_trace(pruning: Pruning | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pruning": pruning, "epochs": 6}

    def run(folder: Path, *callbacks: Any, **more: Any) -> tuple[Any, History, Any]:
        model = network(dropout=0.2)
        averaged = AveragedModel(model)
        by = "split" if pruning is None or pruning.targeted else "insert"  # what would go at once without its rest
        policy = Refinement(7, until=0.6, rest=3, by=by)
        _, history = trained(policy, adam, model, run=folder, averaged=averaged, callbacks=callbacks, **options, **more)
        return model, history, averaged

    model, history, averaged = run(tmp_path / "whole")
    assert births(history)[:2] == [9, 18]
    assert bool(history.deletions) == (pruning is not None)
    for epoch in range(1, 7):
        folder = tmp_path / str(epoch)
        with pytest.raises(Crash):
            run(folder, crash_after(epoch))
        resumed, record, theirs = run(folder, resume=True)
        assert_same_weights(resumed, model)
        assert_same_weights(theirs, averaged)
        assert_same_history(record, history)


def test_decisions_are_written_down(tmp_path: Path) -> None:
    trained(Refinement(7), run=tmp_path / "run")
    text = (tmp_path / "run" / "run.toml").read_text()
    assert "7 layers, Rounds(end=10, every=5, number=2)" in text
    assert "target reached" in text


def test_another_policy_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    trained(Refinement(7), run=tmp_path / "run", epochs=2)
    with pytest.raises(ValueError, match="refinement must be"):
        trained(Refinement(8), run=tmp_path / "run", epochs=2, resume=True)
    with pytest.raises(ValueError, match="over which refinement is laid out"):
        trained(Refinement(7), run=tmp_path / "run", epochs=3, resume=True)


def test_callbacks_may_refine_beside_a_target() -> None:
    """The layers that they made count: the target is a number of layers."""

    def callback(end: Any) -> None:
        if end.epoch == 2:
            refine(end.model, [2, 3], optimizer=end.optimizer)

    model, history = trained(None, pruning=Pruning(target_blocks=3, by=0.9), callbacks=[callback], epochs=6)
    assert model.time_steps.num_steps == 3
    assert len(history.deletions) == 4


@pytest.mark.long
def test_compiled_steps_are_those_of_eager_ones() -> None:
    found = []
    for mode in ("never", "always"):
        policy = Refinement(7, by="insert", until=0.5, rest=3)
        model = network(dtype=torch.float64)
        data = digits(200, torch.float64)
        optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05), momentum=0.9)
        penalty = L1(0.3, proximal=True)
        found.append(run_fit(model, data, optimizer, refinement=policy, penalties=penalty, compile=mode, batch_size=10))
    eager, compiled = found
    assert births(eager) == births(compiled) == [15, 30]
    np.testing.assert_allclose(compiled.iterations["tau"], eager.iterations["tau"], rtol=1e-9, atol=1e-11)


def test_a_round_on_a_batch_that_is_not_finite_is_left_out() -> None:
    """As a loop sees it that skips a batch with a NaN: layers come in the rounds that are left."""
    model = network()
    optimizer, (x, z) = sgd(model), digits(20)
    session = attach(model, optimizer, refinement=Refinement(9, every=2, until=1.0, loss=LOSS), iterations=8)

    def iterate(first: int, last: int, told: torch.Tensor) -> None:
        for _ in range(first, last + 1):
            optimizer.zero_grad()
            session.loss(LOSS(model(x), z), inputs=told, targets=z).backward()
            optimizer.step()

    iterate(1, 3, x)
    with pytest.warns(UserWarning, match="no layer comes after iteration 4") as said:
        iterate(4, 4, x * math.nan)
    iterate(5, 8, x)
    session.detach()
    assert births(session.history) == [2, 6, 6, 8]
    assert len(said) == 1


def test_what_attach_lacks() -> None:
    model = network()
    optimizer = sgd(model)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "iterations must be given where refinement has a target"),
        ({"iterations": 9, "until": 1}, "iterations_per_epoch must be given with until=1"),
        ({"iterations": 9, "every": "epoch"}, "iterations_per_epoch must be given with every='epoch'"),
    ]
    for options, message in refused:
        lengths = {name: options.pop(name) for name in ("iterations",) if name in options}
        with pytest.raises(ValueError, match=message):
            attach(model, optimizer, refinement=Refinement(7, **options), **lengths)
    session = attach(model, optimizer, refinement=Refinement(7, loss=LOSS), iterations=9)
    x, z = digits(20)
    session.loss(LOSS(model(x), z)).backward()
    with pytest.raises(ValueError, match=r"data must be given .* session\.loss"):
        optimizer.step()


@pytest.mark.parametrize(("constraint", "most"), [("dependent", 9), ("simplex", 10)])
def test_no_more_steps_come_than_have_room(constraint: str, most: int) -> None:
    """The horizon is 1, and no step may be below .1."""
    with pytest.raises(ValueError, match=r"target_blocks must leave .* got 11"):
        trained(Refinement(11, by="insert"), sgd, network(constraint=constraint, lower_bound=0.1))
    model = network(constraint=constraint, lower_bound=0.1, init=[0.1] * 4 + [0.6])
    with torch.no_grad():
        model.time_steps.values.requires_grad_(False)  # so that the room is known
    policy = Refinement(10, by="insert", until=1.0, every=5, indicator=lambda tau, model: torch.ones(len(tau)))
    if most < 10:
        with pytest.warns(UserWarning, match=f"{most} layers, target_blocks=10 asked for"):
            trained(policy, lambda m: sgd(m, 0.0), model)
    else:
        trained(policy, lambda m: sgd(m, 0.0), model)
    assert model.time_steps.num_steps == most
    assert float(model.time_steps.tau.sum()) == pytest.approx(1.0)
    assert float(model.time_steps.tau.min()) >= 0.1 - 1e-6


def test_a_layer_whose_half_an_average_does_not_allow_is_not_split() -> None:
    model = network(3, init=[0.4, 0.25, 0.35], lower_bound=0.1)
    averaged = AveragedModel(model)
    with torch.no_grad():
        averaged.module.time_steps.values[1] = 0.15
    averaged.n_averaged.fill_(10**6)  # so that it stays there
    policy = Refinement(4, until=0.25, indicator=lambda tau, model: torch.tensor([0.0, 9.0, 1.0]))
    _, history = trained(policy, sgd, model, averaged=averaged)
    assert [each.parent for each in history.insertions] == [2]
    assert averaged.module.time_steps.num_steps == 4


class Ages(Criterion):
    """So many rounds since a layer came."""

    def __init__(self, number: int) -> None:
        self.ages = torch.ones(number)

    def scores(self, model: nn.Module) -> torch.Tensor:
        return self.ages

    def keep_(self, indices: Any) -> None:
        self.ages = self.ages[list(indices)]

    def grow_(self, sources: Any, new: Any) -> None:
        self.ages = self.ages[list(sources)] + 1.0
        self.ages[list(new)] = 0.0

    def state(self) -> dict[str, Any]:
        return {"ages": self.ages}

    def load_state(self, state: Any) -> None:
        self.ages = state["ages"]


@pytest.mark.parametrize("pruned", [False, True])
def test_an_indicator_that_is_an_object_follows_the_grid(pruned: bool, tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: Any, **options: Any) -> tuple[Any, History]:
        ages = Ages(5)
        pruning = Pruning(1e-9, criterion=ages) if pruned else None
        policy = Refinement(8, indicator=ages, until=1.0)
        return trained(policy, sgd, run=folder, pruning=pruning, callbacks=callbacks, **options)

    model, history = run(tmp_path / "whole")
    assert model.time_steps.num_steps == 8
    assert all(each.parent < 5 for each in history.insertions), "the youngest have the smallest indicators"
    with pytest.raises(Crash):
        run(tmp_path / "broken", crash_after(3))
    again, goes_on = run(tmp_path / "broken", resume=True)
    assert_same_history(goes_on, history)
    assert_same_weights(again, model)
