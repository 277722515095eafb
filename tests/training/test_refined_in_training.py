"""Networks that callbacks of fit refine: the record, and runs that are interrupted and gone on with."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from taulearn import Pruning, Refinement, load_model, parameter_groups, prune, refine
from taulearn.nn import resnet_v2
from taulearn.optim import SteepestDescent
from taulearn.penalties import L1, Distillation, StageCost
from taulearn.training import EpochEnd, History
from taulearn.training.thinned_records import thinned
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

EPOCHS = 6
WEIGHTS = 12 * 12 + 12


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.named_parameters(), lr=0.01, amsgrad=True)


def changing(averaged: AveragedModel | None = None, *, told: bool = True) -> Callable[[EpochEnd], None]:
    """A split after epoch 1, two insertions after 3, deletions after 4, of an original layer and a new one."""

    def callback(end: EpochEnd) -> None:
        both: dict[str, Any] = {"optimizer": end.optimizer if told else None, "averaged": averaged}
        steps: Any = end.model.time_steps
        if end.epoch == 1:
            refine(end.model, [2], **both)
        if end.epoch == 3:
            refine(end.model, [1, 3], by="insert", **both)
        if end.epoch == 4:
            prune(end.model, keep=[l for l, n in enumerate(steps.origin) if n not in (2, 6)], **both)

    return callback


def run(
    folder: Path | None = None,
    make: Callable[[Any], torch.optim.Optimizer] = adam,
    *more: Callable[[EpochEnd], None],
    average: bool = False,
    **options: Any,
) -> tuple[Any, History, AveragedModel | None]:
    model = network(dropout=0.2, constraint=options.pop("constraint", "free"))
    averaged = AveragedModel(model) if average else None
    options = {"epochs": EPOCHS, "run": folder, "averaged": averaged} | options
    torch.manual_seed(7)
    history = run_fit(model, digits(), make(model), callbacks=[changing(averaged), *more], **options)
    return model, history, averaged


@pytest.mark.parametrize("compiled", ["never", pytest.param("always", marks=pytest.mark.long)])
def test_the_record(compiled: str, tmp_path: Path) -> None:
    penalties = [L1(0.01, proximal=True), StageCost(0.1, LOSS)]
    model, history, _ = run(tmp_path, sgd, penalties=penalties, compile=compiled)
    assert (model.time_steps.origin, model.time_steps.parent) == ((0, 1, 5, 7, 3, 4), {5: 2, 6: 1, 7: 5})
    tau = history.iterations["tau"]
    assert tau.shape == (30, 8)
    born, gone = {5: 5, 6: 15, 7: 15}, {2: 20, 6: 20}
    for layer in range(8):
        there = np.zeros(30, dtype=bool)
        there[born.get(layer, 0) : gone.get(layer, 30)] = True
        assert np.array_equal(np.isfinite(tau[:, layer]), there)
        assert np.array_equal(np.isfinite(history.iterations["stage_loss"][:, layer + 1]), there)
    assert [(i.iteration, i.epoch, i.layer, i.parent) for i in history.insertions] == [
        (5, 1, 5, 2),
        (15, 3, 6, 1),
        (15, 3, 7, 5),
    ]
    assert [i.parameters for i in history.insertions] == [WEIGHTS + 1] * 3
    assert [i.step == 0 for i in history.insertions] == [False, True, True]
    assert history.insertions[0].step == pytest.approx(float(tau[5, 5]), rel=1e-6)
    assert tau[5, 2] == tau[5, 5] == pytest.approx(tau[4, 2] / 2, rel=0.1)
    assert history.epochs["layers"].tolist() == [5, 5, 6, 6, 8, 6, 6]
    kept = History.load(tmp_path / "history.safetensors")
    assert_same_history(kept, history)
    assert "insertions: 3" in repr(kept)
    small = thinned(history, coarse=True)
    assert small.insertions == history.insertions
    loaded = load_model(tmp_path, host=network(dropout=0.2))
    assert loaded.time_steps.grid == model.time_steps.grid
    assert_same_weights(loaded, model)


def test_a_long_record_is_thinned_around_births() -> None:
    tau = np.full((9000, 3), 0.5)
    tau[:4321, 1], tau[6543:, 2] = np.nan, np.nan
    small = thinned(History({"loss": np.zeros(9000), "tau": tau}), coarse=True)
    assert {4321, 4322, 6543, 6544} <= set(small.iterations["iteration"].tolist())


@pytest.mark.parametrize("make", [adam, momentum, sgd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("average", [False, True])
def test_a_crash_in_any_epoch_leaves_no_trace(make: Any, average: bool, tmp_path: Path) -> None:
    model, history, averaged = run(tmp_path / "whole", make, average=average)
    for epoch in range(1, EPOCHS + 1) if make is adam else (2, 5):
        folder = tmp_path / str(epoch)
        with pytest.raises(Crash):
            run(folder, make, crash_after(epoch), average=average)
        resumed, record, theirs = run(folder, make, average=average, resume=True)
        assert resumed.time_steps.grid == model.time_steps.grid
        assert_same_weights(resumed, model)
        assert_same_history(record, history)
        assert_same_history(History.load(folder / "history.safetensors"), history)
        if averaged is not None and theirs is not None:
            assert_same_weights(theirs, averaged)


@pytest.mark.parametrize("constraint", ["simplex", "dependent"])
def test_constrained_steps_go_on(constraint: str, tmp_path: Path) -> None:
    model, history, _ = run(tmp_path / "whole", constraint=constraint)
    with pytest.raises(Crash):
        run(tmp_path / "run", adam, crash_after(5), constraint=constraint)
    resumed, record, _ = run(tmp_path / "run", constraint=constraint, resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_a_model_that_was_refined_before_has_no_births_in_the_record() -> None:
    model = network()
    refine(model, [1])
    history = run_fit(model, digits(), sgd(model), epochs=1)
    assert (history.insertions, history.iterations["tau"].shape) == ([], (5, 6))


def test_a_model_that_a_callback_refined_without_the_optimizer_is_noticed() -> None:
    model = network()
    with pytest.raises(ValueError, match="optimizer must hold the model's time steps"):
        run_fit(model, digits(), sgd(model), callbacks=[changing(told=False)])


def test_a_teacher_that_has_not_the_new_layers() -> None:
    """Halves together are the teacher's layer: the state behind the second one is compared with its state."""
    model = network()
    teacher = copy.deepcopy(model)
    penalty, (x, z) = Distillation(teacher, 0.0, hidden=1.0), digits(20)

    def value() -> float:
        return float(penalty(model, x, z, outputs=model(x)).detach())

    assert value() == 0.0
    refine(model, [1, 3], by="insert")
    assert value() == 0.0
    refine(model, [1, 5])
    assert model.time_steps.origin == (0, 1, 7, 5, 2, 3, 6, 8, 4)
    with torch.no_grad():
        mine, theirs = model.states(x), teacher.states(x)
    behind = [model.time_steps.origin.index(last) for last in (0, 5, 2, 8, 4)]
    squares = [float((mine[l] - y).square().mean()) for l, y in zip(behind, theirs, strict=True)]
    assert value() == pytest.approx(sum(squares) / 5, rel=1e-5)
    assert value() > 0


def test_only_what_is_new_trains_in_a_run_that_is_resumed_too(tmp_path: Path) -> None:
    def callback(end: EpochEnd) -> None:
        if end.epoch == 2:
            refine(end.model, [2], by="insert", optimizer=end.optimizer, train="new")

    def go_on(folder: str, *more: Callable[[EpochEnd], None], **options: Any) -> Any:
        model = network()
        options = {"epochs": 4, "run": tmp_path / folder, "callbacks": [callback, *more]} | options
        run_fit(model, digits(), adam(model), **options)
        return model

    whole = go_on("whole")
    with pytest.raises(Crash):
        go_on("halved", crash_after(3))
    resumed = go_on("halved", resume=True)
    assert_same_weights(resumed, whole)
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in whole.parameters()]
    assert resumed.time_steps.held == whole.time_steps.held != frozenset()
    loaded: Any = load_model(tmp_path / "whole")
    assert all(p.requires_grad for p in loaded.parameters())
    assert not loaded.time_steps.held


@pytest.mark.parametrize(("layers", "target"), [(6, 2), (7, 4)])
def test_a_target_counts_what_a_callback_deletes(layers: int, target: int) -> None:
    model = network(layers)
    optimizer, before = sgd(model), dict[int, float]()

    def callback(end: EpochEnd) -> None:
        if end.epoch == 2:
            tau = model.time_steps.tau.detach()
            before.update(zip(model.time_steps.origin, (tau.abs() / tau.abs().sum()).tolist(), strict=True))
            prune(model, keep=range(model.time_steps.num_steps - 2), optimizer=optimizer)

    history = run_fit(model, digits(), optimizer, epochs=8, pruning=Pruning(target_blocks=target), callbacks=[callback])
    assert model.time_steps.num_steps == target
    assert sorted(d.layer for d in history.deletions) == sorted(set(range(layers)) - set(model.time_steps.origin))
    by_callback = [d for d in history.deletions if (d.iteration, d.epoch) == (10, 2) and d.layer >= layers - 2]
    assert [d.layer for d in by_callback] == [layers - 2, layers - 1]
    assert [d.share for d in by_callback] == pytest.approx([before[d.layer] for d in by_callback], rel=1e-6)
    assert [d.parameters for d in by_callback] == [WEIGHTS + 1] * 2


def test_a_callback_that_leaves_the_average_behind_is_told() -> None:
    model = network()
    optimizer = sgd(model)

    def callback(end: EpochEnd) -> None:
        prune(model, keep=[0, 1, 2], optimizer=optimizer)

    with pytest.raises(ValueError, match="averaged must average this model"):
        run_fit(model, digits(), optimizer, averaged=AveragedModel(model), callbacks=[callback])


def test_one_layer_with_a_dependent_step_goes_on_with_what_it_became(tmp_path: Path) -> None:
    images, classes = digits(40)

    def run(epochs: int, *, resume: bool) -> tuple[Any, History]:
        torch.manual_seed(0)
        model = resnet_v2(1, 10, 1, 4, constraint="dependent")
        policy = Refinement(2, until=1)
        options = {"epochs": epochs, "refinement": policy, "run": tmp_path, "resume": resume}
        return model, run_fit(model, (images, classes), sgd(model), **options)

    refined = run(2, resume=False)[0].time_steps
    model, history = run(3, resume=True)
    assert model.time_steps.grid == refined.grid
    assert history.epochs["layers"].tolist() == [1, 2, 2, 2]
    assert float(model.time_steps.tau.detach().sum()) == pytest.approx(1.0)


def test_compiled_values_are_those_of_the_layers_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line search whose objective would be compiled, within an epoch; nothing is compiled here."""
    monkeypatch.setattr("taulearn.training.fast.line_search.compile_once", lambda function, **_: function)
    histories = []
    for compiled in ("never", "always"):
        model = network(init=[0.3, 0.3, 0.0005, 0.3, 0.3])
        pruning = Pruning(0.01, every=2, criterion="share")
        optimizer = SteepestDescent(parameter_groups(model, 0.05))
        histories.append(run_fit(model, digits(), optimizer, pruning=pruning, compile=compiled, epochs=2))
        assert model.time_steps.origin == (0, 1, 3, 4)
    eager, fast = (history.iterations["total"] for history in histories)
    np.testing.assert_allclose(fast, eager, rtol=1e-6)
