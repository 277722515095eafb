"""Many members: skipped, resumed, failed, and run again when their process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from suite_members import die, die_once, fail, threads
from taulearn.app.member_progress import Watch, duration
from taulearn.app.members import Event, Member, locked, run_member
from taulearn.app.results import NotMeasured, Results
from taulearn.app.run_members import run_members
from taulearn.experiments import TrainConfig
from taulearn.training import History
from taulearn.training.thinned_records import numbers


def member(setting="a", seed=0, measure=None, **settings):
    config = TrainConfig(**{"width": 8, "hidden_layers": 2, "epochs": 1, "seed": seed, **settings})
    return Member(setting, seed, config, measure)


def weights(out, name):
    return (out / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize("engine", ["serial", pytest.param("processes", marks=pytest.mark.long)])
def test_members_are_trained_measured_and_skipped_the_next_time(tmp_path, engine):
    members = [member("a"), member("a", 1), Member("b", 0, None, threads)]
    events = []
    outcome = run_members(
        members, tmp_path, engine=engine, workers=None if engine == "serial" else 2, on_event=events.append
    )
    assert set(outcome.finished) == {"a/seed-0", "a/seed-1", "b/seed-0"}
    assert not outcome.failed
    results = Results(tmp_path)
    assert results.settings == ["a", "b"]
    assert results.seeds("a") == [0, 1]
    assert results.measurements("b", 0)["threads"] == 1
    assert results.config("a", 1).seed == 1
    assert not (tmp_path / "a/seed-0/checkpoint").exists()
    assert [event.kind for event in events if event.member == "a/seed-0"] == ["started", "epoch", "finished"]
    before = (tmp_path / "a/seed-0/done.json").stat().st_mtime_ns
    assert run_members(members, tmp_path, engine=engine).skipped == ["a/seed-0", "a/seed-1", "b/seed-0"]
    assert (tmp_path / "a/seed-0/done.json").stat().st_mtime_ns == before


@pytest.mark.long
def test_processes_train_what_one_process_trains(tmp_path):
    members = [member("a", seed) for seed in (0, 1, 2)]
    run_members(members, tmp_path / "one", engine="serial")
    run_members(members, tmp_path / "two", engine="processes", workers=2)
    for seed in (0, 1, 2):
        assert weights(tmp_path / "one", f"a/seed-{seed}") == weights(tmp_path / "two", f"a/seed-{seed}")


@pytest.mark.parametrize("engine", ["serial", pytest.param("processes", marks=pytest.mark.long)])
def test_failure_of_one_member_is_reported_and_does_not_end_the_others(tmp_path, engine):
    diverging = member("diverges", lr=1e30)
    outcome = run_members([diverging, Member("b", 0, None, fail), member("a")], tmp_path, engine=engine)
    assert outcome.finished == ["a/seed-0"]
    assert "nothing can be measured here" in outcome.failed["b/seed-0"]
    assert "not finite" in outcome.failed["diverges/seed-0"]
    assert run_members([member("a")], tmp_path, engine=engine).skipped == ["a/seed-0"]


def test_member_whose_process_dies_is_run_again(tmp_path):
    members = [member("dies", measure=die_once), member("a")]
    events = []
    outcome = run_members(members, tmp_path, workers=1, on_event=events.append)
    assert sorted(outcome.finished) == sorted(each.name for each in members)
    assert [event.member for event in events if event.kind == "died"] == ["dies/seed-0"]
    assert Results(tmp_path).measurements("dies", 0) == {"attempt": 2}


@pytest.mark.long
def test_member_that_kills_every_process_fails_in_the_end(tmp_path):
    outcome = run_members([member("dies", measure=die), member("a")], tmp_path, workers=1)
    assert outcome.finished == ["a/seed-0"]
    assert "ended 3 times, the last with code -9" in outcome.failed["dies/seed-0"]
    assert (tmp_path / "dies/seed-0/attempts").read_text() == "xxx"


def test_finished_member_with_other_settings_is_not_taken_for_this_one(tmp_path):
    run_members([member()], tmp_path, engine="serial")
    with pytest.raises(ValueError, match="other settings or of another version"):
        run_members([member(l1=0.1)], tmp_path, engine="serial")


def test_training_under_way_with_other_settings_is_not_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupt_after(tmp_path, member(epochs=3), 1)
    outcome = run_members([member(epochs=3, l1=0.1)], tmp_path, engine="serial")
    assert "training with other settings" in outcome.failed["a/seed-0"]


def test_interrupted_member_goes_on_to_the_same_result(tmp_path):
    whole = member(epochs=4, l1=0.01)
    run_member(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _interrupt_after(tmp_path / "halved", whole, 2)
    assert not (tmp_path / "halved/a/seed-0/done.json").exists()
    seen = []
    run_member(whole, tmp_path / "halved", seen.append)
    assert [event.epoch for event in seen if event.kind == "epoch"] == [3, 4]
    assert weights(tmp_path / "whole", "a/seed-0") == weights(tmp_path / "halved", "a/seed-0")


def _interrupt_after(out, some, epochs):
    """Ctrl-C while epoch ``epochs`` + 1 is under way."""

    def report(event):
        if event.kind == "epoch" and event.epoch == epochs:
            os.kill(os.getpid(), signal.SIGINT)

    run_member(some, out, report)


def test_member_that_another_process_trains_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    with locked(member(), tmp_path):
        outcome = run_members([member(), member("b")], tmp_path, engine="serial")
    assert outcome.elsewhere == ["a/seed-0"]
    assert outcome.finished == ["b/seed-0"]
    assert run_members([member()], tmp_path, engine="serial").finished == ["a/seed-0"]


def test_names_must_differ(tmp_path):
    with pytest.raises(ValueError, match="a/seed-0 more than once"):
        run_members([member(), member()], tmp_path)


def test_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'processes'"):
        run_members([member()], tmp_path, engine="process")


def test_thinned_record_is_small_and_holds_the_first_and_the_last_iteration(tmp_path):
    settings = {"data": "digits", "batch_size": 2, "epochs": 4, "l1": 0.01}
    run_members([member("all", **settings), member("thinned", trace="thinned", **settings)], tmp_path, engine="serial")
    whole, small = (History.load(tmp_path / name / "seed-0/history.safetensors") for name in ("all", "thinned"))
    assert whole.num_iterations == 4 * 721
    assert small.num_iterations < 2300
    kept = numbers(small)
    assert (kept[0], kept[-1]) == (1, whole.num_iterations)
    np.testing.assert_array_equal(small.iterations["tau"], whole.iterations["tau"][kept - 1])
    np.testing.assert_array_equal(small.epochs["validation.loss"], whole.epochs["validation.loss"])


def test_results_of_another_version_are_not_measured(tmp_path):
    run_members([member()], tmp_path, engine="serial")
    file = tmp_path / "a/seed-0/done.json"
    note = json.loads(file.read_text())
    file.write_text(json.dumps(note | {"format": 99}))
    for look in (Results(tmp_path).config, Results(tmp_path).history):
        with pytest.raises(NotMeasured, match="must have format 1, got 99"):
            look("a", 0)
    file.write_text(json.dumps(note))
    (tmp_path / "a/seed-0/history.safetensors").write_bytes(b"damaged")
    with pytest.raises(NotMeasured, match="damaged"):
        Results(tmp_path).history("a", 0)


def test_watch_tells_the_time_left_by_the_pace_of_the_same_kind(tmp_path, capsys):
    members = [member("a", epochs=11), member("b", epochs=5), member("c", epochs=10, hidden_layers=4)]
    watch = Watch(members, tmp_path)
    for kind, epoch, seconds in [("started", 0, 0.0), ("epoch", 1, 30.0), ("epoch", 2, 32.0), ("finished", 11, 50.0)]:
        watch(Event(kind, "a/seed-0", epoch, seconds, "done"))
    out = capsys.readouterr().out
    assert (
        "[1/3] a/seed-0: done, 50 s; about 30 s left" in out
    )  # 15 epochs of 2 s; the first, with its start, counts not


def test_durations_are_words():
    assert duration(3 * 3600) == "3 h 0 min"


@pytest.mark.long
def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(tmp_path):
    spec = tmp_path / "spec.toml"
    spec.write_text("seeds = 2\n[base]\nepochs = 60\nwidth = 16\n[grid]\nhidden_layers = [2, 3]\n")
    command = [sys.executable, "-m", "taulearn", "sweep", str(spec), "--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out/hidden_layers=2/seed-0"
    _wait_for(lambda: len(list(folder.glob("checkpoint/*.safetensors"))) == 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: the same command goes on from here" in out
    assert "Traceback" not in err
    assert not (folder / "done.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "4 trained" in done.stdout
    history = History.load(folder / "history.safetensors")
    assert len(history.epochs["train.loss"]) == 61
    assert not _children_left(str(tmp_path))


def _wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def _children_left(word):
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [file] if word.encode() in file.read_bytes() else []
        except OSError:
            continue
    return found
