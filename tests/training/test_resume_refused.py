"""Resuming with other settings, refused or allowed: nothing is trained over, and no mixture goes on silently."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from taulearn import Pruning
from taulearn.nn import fractional_dnn
from taulearn.penalties import L1, ElasticNet, StageCost
from taulearn.training import EpochEnd, History, Run, StopTraining
from training.support import LOSS, assert_same_history, assert_same_weights, digits, network, run_fit

X, Z = digits()


def start(folder: Path, model: Any = None, **options: Any) -> tuple[nn.Module, History]:
    """A run of 5 iterations an epoch, or its continuation."""
    model = network() if model is None else model
    made = options.pop("optimizer", lambda model: torch.optim.Adam(model.parameters(), lr=0.01))(model)
    if "scheduler" in options:
        options["scheduler"] = options["scheduler"](made)
    if "averaged" in options:
        options["averaged"] = options["averaged"](model)
    return model, run_fit(model, options.pop("train", (X, Z)), made, **{"run": folder, "epochs": 2} | options)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["model.safetensors", "history.safetensors"])
def test_a_run_whose_checkpoints_were_removed_is_not_trained_over(left: str, tmp_path: Path) -> None:
    """It silently trained over the finished model."""
    start(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    for name in {"model.safetensors", "model.json", "history.safetensors"} - {left}:
        (tmp_path / "run" / name).unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=rf"run must .*got .* with {left} but"):
        start(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_a_run_that_had_not_begun_begins(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", {"epochs": 2})
    assert start(tmp_path / "run", resume=True)[1].num_iterations == 10


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)}, "optimizer must be 'Adam'.*'SGD'"),
    "accumulate": ({"accumulate": 2}, "accumulate must be 1 as at the start of the run, got 2"),
    "clip_norm": ({"clip_norm": 0.5}, "clip_norm must be None as at the start of the run, got 0.5"),
    "precision": ({"precision": "bf16"}, "precision must be 'float32' as at the start of the run, got 'bf16'"),
    "penalties": ({"penalties": [L1(0.1)]}, r"penalties must be \[\] as at the start of the run, got \['l1'\]"),
    "pruning": ({"pruning": Pruning(0.1)}, "pruning must be None as at the start of the run"),
    "scheduler": (
        {"scheduler": lambda optimizer: lr_scheduler.StepLR(optimizer, 1)},
        "scheduler must be None as at the start of the run, got 'StepLR'",
    ),
    "averaged": ({"averaged": AveragedModel}, "averaged must be False as at the start of the run, got True"),
    "data": ({"train": digits(120)}, "batches must be 5 as at the start of the run, got 3"),
    "model": ({"model": network(constraint="simplex")}, "model must be .*constraint='free'.* got .*'simplex'"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_is_not_resumed_with_other_arguments(case: str, tmp_path: Path) -> None:
    """It went on with a mixture."""
    changes, message = CHANGES[case]
    start(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run", resume=True, **{"epochs": 3} | changes)
    assert contents(tmp_path / "run") == before


def test_another_order_of_the_derivative_is_refused(tmp_path: Path) -> None:
    def made(gamma: float) -> nn.Module:
        return fractional_dnn(64, 12, 10, 3, gamma=gamma)

    start(tmp_path / "run", model=made(0.5))
    with pytest.raises(ValueError, match=r"model must be .Fractional\(gamma=0.5.* got .Fractional\(gamma=0.7"):
        start(tmp_path / "run", model=made(0.7), resume=True)


def test_two_changes_are_both_named(tmp_path: Path) -> None:
    start(tmp_path / "run", penalties=[ElasticNet(0.1)])
    with pytest.raises(ValueError, match=r"accumulate must be 1 .*; penalties must be .*"):
        start(tmp_path / "run", resume=True, accumulate=2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 2),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
            "scheduler must have T_max = 2 as at the start of the run, got 4",
        ),
        (
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
            "scheduler must have total_steps = 10 as at the start of the run, got 20",
        ),
        (
            lambda optimizer: lr_scheduler.StepLR(optimizer, 1),
            lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
            "scheduler must have step_size = 1 as at the start of the run, got 2",
        ),
    ],
)
def test_a_schedule_of_another_shape_is_refused(before: Any, after: Any, message: str, tmp_path: Path) -> None:
    start(tmp_path / "run", scheduler=before)
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "run", scheduler=after, epochs=4, resume=True)
    _, history = start(tmp_path / "run", scheduler=before, resume=True)
    assert history.num_iterations == 10


def test_more_epochs_are_recorded(tmp_path: Path) -> None:
    start(tmp_path / "run")
    assert start(tmp_path / "run", epochs=4, resume=True)[1].num_iterations == 20
    assert Run.open(tmp_path / "run").config["epochs"] == 4


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"epochs must .*got 1"):
        start(tmp_path / "run", epochs=1, resume=True)


def test_epochs_do_not_grow_where_a_target_counts_in_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pruning": Pruning(target_blocks=3, by=0.5, penalised="none", criterion="share")}
    start(tmp_path / "run", epochs=4, **options)
    with pytest.raises(ValueError, match=r"epochs must .*got 8"):
        start(tmp_path / "run", epochs=8, resume=True, **options)


def test_epochs_do_not_grow_where_a_penalty_counts_in_them(tmp_path: Path) -> None:
    start(tmp_path / "run", penalties=[StageCost(0.1, LOSS, schedule="falling")])
    with pytest.raises(ValueError, match=r"epochs must .*got 4"):
        start(tmp_path / "run", epochs=4, resume=True, penalties=[StageCost(0.1, LOSS, schedule="falling")])
    start(tmp_path / "constant", penalties=[StageCost(0.1, LOSS)])
    assert start(tmp_path / "constant", epochs=3, resume=True, penalties=[StageCost(0.1, LOSS)])[1].num_iterations == 15


def stop_after(epoch: int) -> Any:
    def callback(end: EpochEnd) -> None:
        if end.epoch == epoch:
            raise StopTraining

    return callback


def test_a_run_that_a_callback_stopped_is_finished(tmp_path: Path) -> None:
    """It trained on when it was resumed."""
    model, history = start(tmp_path / "run", epochs=6, callbacks=[stop_after(3)])
    assert history.num_iterations == 15
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    resumed, record = start(tmp_path / "run", epochs=6, resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_run_that_a_callback_stopped_goes_on_for_more_epochs(tmp_path: Path) -> None:
    start(tmp_path / "run", epochs=4, callbacks=[stop_after(3)])
    assert start(tmp_path / "run", epochs=5, resume=True)[1].num_iterations == 25
    assert start(tmp_path / "run", epochs=5, resume=True)[1].num_iterations == 25
