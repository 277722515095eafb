"""Training that ends before a target of pruning is reached says so, however it ends."""

import os
import re
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from taulearn import Pruning, parameter_groups, prune
from taulearn.app.command_line import main
from taulearn.training import Diverged, EpochEnd, Interrupted, Run, StopTraining
from training.support import Crash, crash_after, digits, network, run_fit

BLOCKS = Pruning(target_blocks=2)
LATENCY = Pruning(target_latency_ms=2.0)
POLICIES = {"blocks": (BLOCKS, r"[567] blocks are left, target_blocks=2"), "milliseconds": (LATENCY, r"ms are left")}


def trained(policy: Pruning, *, model: Any = None, epochs: int = 10, lr: float = 0.05, **options: Any) -> Any:
    model = network(8) if model is None else model
    optimizer = torch.optim.SGD(parameter_groups(model, lr=lr))
    return run_fit(model, digits(80), optimizer, pruning=policy, epochs=epochs, **options)


@pytest.fixture(autouse=True)
def one_millisecond_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.adaptivity.target.layer_milliseconds", lambda model, layers, _: ((1.0,) * 8, 9.0))


@pytest.fixture(autouse=True)
def listening() -> Any:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at(epoch: int, act: Callable[[EpochEnd], None]) -> Callable[[EpochEnd], None]:
    def callback(end: EpochEnd) -> None:
        if end.epoch == epoch:
            act(end)

    return callback


def stop(_: EpochEnd) -> None:
    raise StopTraining


def interrupt(_: EpochEnd) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def spoil(end: EpochEnd) -> None:
    with torch.no_grad():
        end.model.head.weight.fill_(float("nan"))


def second_try(_: EpochEnd) -> None:
    raise KeyboardInterrupt


ENDS: dict[str, tuple[Callable[[EpochEnd], None], Any]] = {
    "a callback stops": (stop, None),
    "Ctrl-C": (interrupt, Interrupted),
    "the loss is no number": (spoil, Diverged),
}


@pytest.mark.parametrize("kept", [False, True], ids=["without a folder", "in a folder"])
@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("end", ENDS)
def test_however_training_ends_early(end: str, kind: str, kept: bool, tmp_path: Path) -> None:
    act, error = ENDS[end]
    policy, left = POLICIES[kind]
    options: dict[str, Any] = {"callbacks": [at(3, act)]} | ({"run": tmp_path / "run"} if kept else {})
    with warnings.catch_warnings(record=True) as said, pytest.raises(error) if error else nullcontext():
        warnings.simplefilter("always")
        trained(policy, **options)
    assert len(said) == 1
    assert re.search(rf"target of pruning is not reached: .*{left}.*train longer", str(said[0].message))
    assert said[0].filename == run_fit.__code__.co_filename, "it points at who called fit"


@pytest.mark.parametrize("act", [second_try, lambda _: None], ids=["at once", "an error of one's own"])
def test_other_errors_are_not_talked_over(act: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((Crash, KeyboardInterrupt)):
            trained(BLOCKS, callbacks=[at(3, act), crash_after(3)])


@pytest.mark.parametrize("kind", POLICIES)
def test_the_run_records_it_until_it_is_gone_on_with(kind: str, tmp_path: Path) -> None:
    policy, left = replace(POLICIES[kind][0], by=6), POLICIES[kind][1]
    with pytest.warns(UserWarning, match="target of pruning is not reached"):
        trained(policy, run=tmp_path / "run", callbacks=[at(3, stop)])
    assert re.search(left, Run.open(tmp_path / "run").decisions["target reached"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(policy, epochs=11, run=tmp_path / "run", resume=True)
    assert Run.open(tmp_path / "run").decisions["target reached"] == "yes"


def test_layers_of_which_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last epoch ends, and layers are still there."""
    monkeypatch.setattr("taulearn.adaptivity.controller.Pruner.prune", lambda *_: None)
    with pytest.warns(UserWarning, match="8 blocks are left, target_blocks=2 asked for: the other layers must stay"):
        trained(BLOCKS, epochs=2)


@pytest.mark.parametrize("kind", POLICIES)
def test_nothing_is_said_where_the_target_is_reached(kind: str) -> None:
    policy, _ = POLICIES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(policy)
        trained(policy, callbacks=[at(8, stop)])
        with pytest.raises(Interrupted):
            trained(policy, callbacks=[at(8, interrupt)])


@pytest.mark.parametrize("kind", POLICIES)
def test_layers_that_the_user_deleted_count(kind: str) -> None:
    def by_hand(end: EpochEnd) -> None:
        prune(end.model, keep=[0], optimizer=end.optimizer)
        raise StopTraining

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = trained(POLICIES[kind][0], callbacks=[at(1, by_hand)])
    assert history.num_iterations == 2  # the first epoch


@pytest.mark.filterwarnings("always:the target of pruning")
def test_the_command_line_says_it(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.adaptivity.controller.Pruner.prune", lambda *_: None)
    small = ["--hidden-layers", "4", "--width", "4", "--epochs", "1", "--batch-size", "800"]
    code = main(["train", *small, "--prune-blocks", "2", "--run", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "taulearn: warning: the target of pruning is not reached: 4 blocks are left" in captured.err
