"""The record of a run, and what callbacks and the reader are told."""

from pathlib import Path

import numpy as np
import pytest
import torch

from taulearn import Pruning, prune
from taulearn.penalties import L1, TimeHorizon
from taulearn.training import EpochEnd, History, StopTraining, evaluate, fit
from training.support import LOSS, assert_same_history, digits, momentum, network, run_fit, sgd


def test_the_record_of_losses_and_epochs() -> None:
    data, held_out = digits(190), digits(60)
    model = network()
    before = evaluate(model, held_out, loss=LOSS)
    history = run_fit(model, data, momentum(model), penalties=[L1(0.1), TimeHorizon(weight=2.0)], validation=held_out)
    columns, epochs = history.iterations, history.epochs
    np.testing.assert_allclose(
        columns["total"], columns["loss"] + columns["penalty.l1"] + columns["penalty.time_horizon"], rtol=1e-6
    )
    np.testing.assert_allclose(columns["penalty.l1"], 0.1 * np.abs(columns["tau"]).sum(1), rtol=1e-6)
    np.testing.assert_allclose(columns["penalty.time_horizon"], (1.0 - columns["tau"].sum(1)) ** 2, atol=1e-7)
    np.testing.assert_array_equal(epochs["iteration"], [0, 5, 10, 15])
    np.testing.assert_array_equal(epochs["layers"], [5] * 4)
    np.testing.assert_array_equal(epochs["parameters"], [sum(p.numel() for p in model.parameters())] * 4)
    assert epochs["seconds"][0] == 0.0
    assert (epochs["seconds"][1:] > 0).all()
    for name in ("loss", "total"):
        assert np.isnan(epochs[f"train.{name}"][0])
        means = columns[name].astype(np.float64).reshape(3, 5).mean(1)
        np.testing.assert_array_equal(epochs[f"train.{name}"][1:], means)
    after = evaluate(model, held_out, loss=LOSS)
    for name in ("loss", "accuracy"):
        assert epochs[f"validation.{name}"][0] == before[name]
        assert epochs[f"validation.{name}"][-1] == after[name]
    with torch.no_grad():
        output = model(held_out[0])
    assert after["accuracy"] == pytest.approx(float((output.argmax(1) == held_out[1]).double().mean()), abs=1e-7)
    assert history.deletions == []
    assert history.num_iterations == 15


def test_the_record_of_deletions(tmp_path: Path) -> None:
    model = network(init=[0.3, 0.05, 0.2, 0.1, 0.35])
    one_layer = 1 + 12 * 12 + 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    penalties = [L1(0.3, proximal=True)]
    history = run_fit(model, digits(), optimizer, penalties=penalties, pruning=Pruning(0.05, every=4), epochs=4)
    tau, deletions = history.iterations["tau"], history.deletions
    assert len(deletions) >= 2
    assert len({d.iteration for d in deletions}) >= 2
    for deletion in deletions:
        assert deletion.iteration % 4 == 0
        assert deletion.epoch == -(-deletion.iteration // 5)
        assert 0 <= deletion.share < 0.05
        assert deletion.parameters == one_layer
        assert np.isfinite(tau[: deletion.iteration, deletion.layer]).all()
        assert np.isnan(tau[deletion.iteration :, deletion.layer]).all()
    kept = [layer for layer in range(5) if layer not in {d.layer for d in deletions}]
    assert list(model.time_steps.origin) == kept
    assert np.isfinite(tau[:, kept]).all()
    layers = [5 - sum(d.epoch <= epoch for d in deletions) for epoch in range(5)]
    np.testing.assert_array_equal(history.epochs["layers"], layers)
    start = history.epochs["parameters"][0]
    np.testing.assert_array_equal(history.epochs["parameters"], [start - (5 - n) * one_layer for n in layers])
    np.testing.assert_allclose(history.iterations["penalty.l1"], 0.3 * np.nansum(np.abs(tau), 1), rtol=1e-5)
    history.save(tmp_path / "history.safetensors")
    assert_same_history(History.load(tmp_path / "history.safetensors"), history)


def test_raw_steps_of_a_bounded_dependent_step_are_recorded() -> None:
    model = network(constraint="dependent", lower_bound=0.19)
    history = run_fit(model, digits(), torch.optim.SGD(model.parameters(), lr=0.5), epochs=4)
    tau, raw = history.iterations["tau"], history.iterations["raw_tau"]
    np.testing.assert_allclose(raw.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(tau[:, :-1], raw[:, :-1])
    np.testing.assert_array_equal(tau[:, -1], np.maximum(raw[:, -1], np.float32(0.19)))
    assert (tau[:, -1] != raw[:, -1]).any()


def test_a_model_that_was_pruned_before_keeps_its_numbers() -> None:
    model = network()
    prune(model, keep=[0, 2, 4])
    history = run_fit(model, digits(), sgd(model))
    tau = history.iterations["tau"]
    assert tau.shape == (15, 5)
    assert np.isfinite(tau[:, [0, 2, 4]]).all()
    assert np.isnan(tau[:, [1, 3]]).all()


def test_callbacks_see_the_end_of_each_epoch() -> None:
    ends: list[EpochEnd] = []
    model = network(init=[0.3, 0.05, 0.2, 0.1, 0.35])
    optimizer = sgd(model)
    penalties = [L1(0.3, proximal=True)]
    history = run_fit(
        model,
        digits(),
        optimizer,
        penalties=penalties,
        pruning=Pruning(0.05),
        callbacks=[ends.append],
        validation=digits(30),
    )
    assert [end.epoch for end in ends] == [1, 2, 3]
    assert [end.iteration for end in ends] == [5, 10, 15]
    for i, end in enumerate(ends):
        assert end.model is model
        assert end.optimizer is optimizer
        assert dict(end.metrics) == {name: column[i + 1] for name, column in history.epochs.items()}
        assert list(end.deletions) == [d for d in history.deletions if d.epoch <= end.epoch]
    assert history.deletions


def test_stopping_early_keeps_all_until_there(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(end: EpochEnd) -> None:
        if end.epoch == 2:
            raise StopTraining

    model = network()
    history = run_fit(
        model,
        digits(),
        sgd(model),
        epochs=5,
        callbacks=[stop, lambda end: seen.append(end.epoch)],
        run=tmp_path / "run",
        checkpoint_every=10,
    )
    assert history.num_iterations == 10
    assert seen == [1, 2]
    assert_same_history(History.load(tmp_path / "run" / "history.safetensors"), history)
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoint").iterdir()) == ["0000000000", "0000000010"]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    model = network(init=[0.3, 0.001, 0.2, 0.1, 0.35])
    fit(
        model,
        digits(),
        loss=LOSS,
        optimizer=sgd(model),
        epochs=2,
        batch_size=40,
        validation=digits(30),
        pruning=Pruning(0.01),
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "deleted layer 1" in lines[0]
    assert lines[1].startswith("epoch 1/2  loss ")
    assert "accuracy" in lines[1]
    assert "4 layers" in lines[2]


def test_a_long_epoch_is_flushed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.training.loop.FLUSH_EVERY", 3)
    ours, theirs = network(), network()
    flushed = run_fit(ours, digits(), sgd(ours), batch_size=7)
    monkeypatch.undo()
    assert_same_history(flushed, run_fit(theirs, digits(), sgd(theirs), batch_size=7))
