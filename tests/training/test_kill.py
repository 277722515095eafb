"""Runs that are killed at random moments and gone on with end with the same bits as the run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import taulearn
from taulearn.training import History
from training import kill_run
from training.support import assert_same_history

TESTS, SOURCE = Path(__file__).parents[1], Path(taulearn.__file__).parents[1]


def start(folder: Path, kind: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{SOURCE}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "training.kill_run", str(folder), kind],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


SLOW = [pytest.param(kind, marks=pytest.mark.long) for kind in kill_run.POLICIES if kind != "refined"]


@pytest.fixture(scope="module", params=[*SLOW, "refined"])  # the last one deletes, too
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, float]:
    """A run in this process that nothing happened to: its kind, its folder, and how long it trained."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    began = time.perf_counter()
    kill_run.main(folder, request.param)
    return request.param, folder, time.perf_counter() - began


def assert_same_run(folder: Path, expected: Path) -> None:
    for name in ("model.safetensors", "model.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert_same_history(History.load(folder / "history.safetensors"), History.load(expected / "history.safetensors"))


def kill_and_resume(folder: Path, kind: str, kills: int, seconds: float, generator: random.Random) -> int:
    """Kill a run so often, at random moments of importing or of training for so many seconds, and let it end.

    Returns how many of the kills hit it while it was alive.
    """
    hit = 0
    for _ in range(kills):
        process = start(folder, kind)
        if generator.random() < 0.2:
            time.sleep(generator.uniform(0.0, 2.0))
        else:
            ready(process)
            time.sleep(generator.uniform(0.0, seconds))
        hit += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(folder, kind))
    return hit


def test_the_layers_change_at_several_times(undisturbed: tuple[str, Path, float]) -> None:
    kind, folder, _ = undisturbed
    history = History.load(folder / "history.safetensors")
    assert len({d.iteration for d in history.deletions}) >= 3
    assert len({i.iteration for i in history.insertions}) == (4 if kind == "refined" else 0)


def test_killed_once(undisturbed: tuple[str, Path, float], tmp_path: Path) -> None:
    kind, expected, seconds = undisturbed
    generator = random.Random(time.time_ns())
    kill_and_resume(tmp_path / "run", kind, 1, seconds / 2, generator)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.long
def test_killed_thirty_times(undisturbed: tuple[str, Path, float], tmp_path: Path) -> None:
    kind, expected, seconds = undisturbed
    generator = random.Random(0)
    hits = 0
    for i in range(10):
        hits += kill_and_resume(tmp_path / str(i), kind, 3, seconds / 2, generator)
        assert_same_run(tmp_path / str(i), expected)
    assert hits >= 20
