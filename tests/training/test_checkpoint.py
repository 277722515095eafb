"""Checkpoints: whole or absent at any moment, damage is noticed and survived, a full disk costs nothing."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taulearn import Pruning, load_model, wrap
from taulearn.files import read_tensors
from taulearn.penalties import L1
from taulearn.training import EpochEnd, History, Run
from taulearn.wrapping import anneal_to_one
from training.support import Crash, assert_same_history, assert_same_weights, crash_after, digits, network, run_fit
from wrapping.hosts import Block

EPOCHS = 3


def train(folder: Path, **options: Any) -> tuple[nn.Module, History]:
    """A run of 15 iterations in which layers go."""
    model = network(dropout=0.1, init=[0.3, 0.05, 0.2, 0.1, 0.35])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(3)
    defaults: dict[str, Any] = {
        "penalties": [L1(0.3, proximal=True)],
        "pruning": Pruning(0.05, every=4),
        "validation": digits(40),
        "epochs": EPOCHS,
        "run": folder,
    }
    return model, run_fit(model, digits(), optimizer, **defaults | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, History]:
    """The run that nothing happens to."""
    model, history = train(tmp_path_factory.mktemp("whole") / "run")
    assert len({d.iteration for d in history.deletions}) >= 2
    return model, history


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A run that ended in its last epoch: its checkpoints are those of iterations 5 and 10."""
    with pytest.raises(Crash):
        train(tmp_path / "run", callbacks=[crash_after(EPOCHS)])
    assert names(tmp_path / "run") == ["0000000005.safetensors", "0000000010.safetensors"]
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoint").iterdir())


def parts(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if path.name.endswith(".part")]


class PowerCut(BaseException):
    """The error of a simulated death of the process, in every later file operation too."""


class Supply:
    """Lets so many file operations happen; then the process is dead, and nothing reaches the disk any more.

    What was written but not synced is lost by half.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operations: int) -> None:
        self.left = operations
        self.written: list[Path] = []
        for place, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (Path, "open")):
            monkeypatch.setattr(place, name, self.limited(name, getattr(place, name)))

    def limited(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*arguments: Any, **options: Any) -> Any:
            if self.left <= 0:
                for path in self.written:
                    os.truncate(path, path.stat().st_size // 2)
                self.written.clear()
                raise PowerCut
            self.left -= 1
            result = operation(*arguments, **options)
            if name == "open" and "w" in arguments[1]:
                self.written.append(arguments[0])
            elif name == "fsync":
                self.written.clear()
            return result

        return limited


def test_death_at_any_file_operation_leaves_no_trace(whole: tuple[nn.Module, History], tmp_path: Path) -> None:
    model, history = whole
    for operations in itertools.count():
        folder = tmp_path / str(operations)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Supply(monkeypatch, operations)
            try:
                train(folder)
            except PowerCut:
                dead = True
            else:
                dead = False
        if not dead:
            break
        resumed, record = train(folder, resume=(folder / "run.toml").exists())
        assert_same_weights(resumed, model)
        assert_same_history(record, history)
        assert_same_weights(load_model(folder, host=network(dropout=0.1)), model)
        assert not parts(folder)
        shutil.rmtree(folder)
    assert operations > 60


def test_a_run_whose_overwriting_was_cut_short_can_be_overwritten(tmp_path: Path) -> None:
    train(tmp_path / "finished")
    for operations in itertools.count():
        folder = tmp_path / str(operations)
        shutil.copytree(tmp_path / "finished", folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Supply(monkeypatch, operations)
            try:
                Run.create(folder, {}, overwrite=True)
            except PowerCut:
                dead = True
            else:
                dead = False
        Run.create(folder, {}, overwrite=True)
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["run.toml"]
        if not dead:
            break
    assert operations > 8


def damage_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = [damage_flip, damage_truncate, damage_empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    damage: Callable[[Path], None], whole: tuple[nn.Module, History], crashed: Path
) -> None:
    model, history = whole
    newest = crashed / "checkpoint" / names(crashed)[-1]
    damage(newest)
    with pytest.warns(UserWarning, match="damaged") as caught:
        resumed, record = train(crashed, resume=True)
    assert [str(newest) in str(warning.message) for warning in caught] == [True]
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_all_checkpoints_are_damaged_it_is_said(damage: Callable[[Path], None], crashed: Path) -> None:
    for name in names(crashed):
        damage(crashed / "checkpoint" / name)
    before = {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read") as caught:
        train(crashed, resume=True)
    assert all(name in str(caught.value) for name in names(crashed))
    assert {path: path.read_bytes() for path in crashed.rglob("*") if path.is_file()} == before


def test_any_flipped_byte_is_noticed(whole: tuple[nn.Module, History], crashed: Path) -> None:
    model, history = whole
    newest = crashed / "checkpoint" / names(crashed)[-1]
    content = newest.read_bytes()
    header = int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    places = [*range(8), *generator.integers(8, 8 + header, 20), *generator.integers(8 + header, len(content), 10)]
    for place in map(int, places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        newest.write_bytes(damaged)
        folder = crashed.parent / f"copy{place}"
        shutil.copytree(crashed, folder)
        with pytest.warns(UserWarning, match="damaged checkpoint"):
            resumed, record = train(folder, resume=True)
        assert_same_weights(resumed, model)
        assert_same_history(record, history)
        shutil.rmtree(folder)


def test_a_checkpoint_of_another_format_is_not_taken(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.training.checkpoint.FORMAT", 2)
    with pytest.raises(ValueError, match="format 2"):
        train(crashed, resume=True)


def test_nothing_in_a_checkpoint_is_pickled(crashed: Path) -> None:
    tensors, metadata = read_tensors(crashed / "checkpoint" / names(crashed)[-1])
    assert {"format", "state", "digest"} == metadata.keys()
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


def full_disk(monkeypatch: pytest.MonkeyPatch, operation: str, after: int) -> None:
    """Let ``operation`` fail for lack of space from its n-th call in a checkpoint folder on."""
    calls = itertools.count()

    if operation == "fsync":
        fsync = os.fsync

        def failing(descriptor: int) -> None:
            if "checkpoint" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) and next(calls) >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        return
    opened = Path.open

    class Full:
        """A file to which nothing can be written."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing_open(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = opened(self, mode, *arguments, **options)
        if "w" in mode and self.parent.name == "checkpoint" and next(calls) >= after:
            return Full(file)
        return file

    monkeypatch.setattr(Path, "open", failing_open)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(("operation", "after"), [("fsync", 4), ("write", 2)])
def test_a_full_disk_is_said_and_costs_nothing(
    operation: str, after: int, whole: tuple[nn.Module, History], tmp_path: Path
) -> None:
    model, history = whole
    with pytest.MonkeyPatch.context() as monkeypatch:
        full_disk(monkeypatch, operation, after)
        with pytest.raises(OSError, match="No space left") as caught:
            train(tmp_path / "run")
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert "0000000010.safetensors could not be written" in message
    assert "the previous one (0000000005.safetensors) stands" in message
    assert f"taulearn resume {tmp_path / 'run'}" in message
    assert names(tmp_path / "run") == ["0000000000.safetensors", "0000000005.safetensors"]
    assert not parts(tmp_path / "run")
    resumed, record = train(tmp_path / "run", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_a_disk_that_is_full_from_the_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, "write", 0)
    with pytest.raises(OSError, match=r"0000000000\.safetensors could not be written .*; there is no earlier one"):
        train(tmp_path / "run")


def test_an_optimizer_with_parameters_of_others_is_refused_before_training(tmp_path: Path) -> None:
    model, weight = network(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), weight], lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model alone where run is given"):
        run_fit(model, digits(), optimizer, run=tmp_path / "run")
    run_fit(model, digits(), optimizer)


def test_a_scheduler_that_cannot_be_kept_is_refused_before_training(tmp_path: Path) -> None:
    class Odd(torch.optim.lr_scheduler.StepLR):
        odd = None

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.odd = object()

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="scheduler/odd holds a object"):
        run_fit(model, digits(), optimizer, scheduler=Odd(optimizer, 1), run=tmp_path / "run")


@pytest.mark.parametrize("given", [False, True], ids=["follows", "given"])
def test_a_run_that_folds_units_on_its_way_can_be_resumed(given: bool, tmp_path: Path) -> None:
    """The averaged weights follow, whether the callback knows them or not."""

    def anneal(averaged: Any, last: int) -> Any:
        def callback(end: EpochEnd) -> None:
            if end.epoch >= 2:
                anneal_to_one(end.model, {2: 0.5, 3: 1.0}[end.epoch], averaged=averaged if given else None)
            if end.epoch == last:
                raise Crash

        return callback

    def run(folder: Path, last: int = 9, **options: Any) -> tuple[nn.Module, Any, History]:
        torch.manual_seed(0)
        blocks = [Block(12) for _ in range(3)]
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *blocks, nn.Linear(12, 10))
        model = wrap(model, ["2", "3", "4"], init=[0.5, 1.0, 1.5], units="displacement")
        averaged = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options |= {"averaged": averaged, "callbacks": [anneal(averaged, last)], "run": folder}
        return model, averaged, run_fit(model, digits(), optimizer, **options)

    model, averaged, history = run(tmp_path / "whole")
    assert model.time_steps.tau.tolist() == [1.0] * 3
    assert not [name for name in averaged.state_dict() if "units" in name]
    assert bool((averaged.module.time_steps.tau == 1.0).all()) == given
    for last in (2, 3):
        with pytest.raises(Crash):
            run(tmp_path / str(last), last)
        resumed, resumed_average, record = run(tmp_path / str(last), resume=True)
        assert_same_weights(resumed, model)
        assert_same_weights(resumed_average, averaged)
        assert_same_history(record, history)
