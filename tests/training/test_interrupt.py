"""Ctrl-C saves the run, wherever it hits, and the run goes on with the same bits."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import Pruning
from taulearn.penalties import L1, Penalty
from taulearn.training import Interrupted, StopTraining
from training.recipes import EPOCHS, UNEVEN, Options, Recipe, adam, loader, pruning, sgd
from training.support import (
    assert_same_history,
    assert_same_weights,
    digits,
    network,
    run_fit,
)


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A shell starts what it puts in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class InterruptingPenalty(Penalty):
    """Sends Ctrl-C in its n-th evaluation and counts nothing."""

    name = "interrupting"

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: nn.Module, *batch: object) -> Tensor:
        self.left -= 1
        if self.left == 0:
            interrupt()
        return torch.zeros(())


@pytest.mark.parametrize("iteration", [1, 5, 7, 13, 24])
def test_ctrl_c_in_an_epoch_saves_and_goes_on(iteration: int, tmp_path: Path) -> None:
    def pruned(at: int) -> Recipe:
        return Recipe(
            "pruned",
            adam,
            lambda model, optimizer: {
                "penalties": [L1(0.3, proximal=True), InterruptingPenalty(at)],
                "pruning": Pruning(0.05, every=3),
            },
            {"init": UNEVEN, "dropout": 0.1},
        )

    model, history, _ = pruned(0).run(tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match="taulearn resume") as caught:
        pruned(iteration).run(folder)
    assert caught.value.run is not None
    assert caught.value.run.path == folder
    newest = sorted(path.stem for path in (folder / "checkpoint").iterdir())[-1]
    assert int(newest) == iteration
    resumed, record, _ = pruned(0).run(folder, resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_ctrl_c_in_the_last_iteration_ends_the_run(tmp_path: Path) -> None:
    recipe = Recipe("", sgd, lambda model, optimizer: {"penalties": [InterruptingPenalty(5 * EPOCHS)]})
    _, history, _ = recipe.run(tmp_path / "a")
    assert history.num_iterations == 5 * EPOCHS
    assert (tmp_path / "a" / "model.safetensors").exists()


def test_ctrl_c_in_a_callback_or_metric_saves_the_epoch(tmp_path: Path) -> None:
    recipe = Recipe("", sgd, network={"dropout": 0.1})
    model, history, _ = recipe.run(tmp_path / "whole", metrics={"zero": lambda output, target: torch.zeros(())})
    calls = iter(range(100))

    def metric(output: Tensor, target: Tensor) -> Tensor:
        if next(calls) == 3:
            interrupt()
        return torch.zeros(())

    with pytest.raises(Interrupted):
        recipe.run(tmp_path / "run", metrics={"zero": metric}, checkpoint_every=10)
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoint").iterdir())[-1] == "0000000015"

    def callback(end: Any) -> None:
        if end.epoch == 4:
            interrupt()

    with pytest.raises(Interrupted):
        recipe.run(
            tmp_path / "run",
            metrics={"zero": lambda output, target: torch.zeros(())},
            callbacks=[callback],
            resume=True,
        )
    resumed, record, _ = recipe.run(
        tmp_path / "run", metrics={"zero": lambda output, target: torch.zeros(())}, resume=True
    )
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


@pytest.mark.parametrize("own", [False, True])
def test_ctrl_c_with_a_loader_goes_on_from_the_last_epoch(own: bool, tmp_path: Path) -> None:
    def with_loader(at: int) -> Recipe:
        return Recipe(
            "loader",
            adam,
            lambda model, optimizer: {
                "train": loader(torch.Generator().manual_seed(3) if own else None),
                "penalties": [InterruptingPenalty(at)],
            },
        )

    model, history, _ = with_loader(0).run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        with_loader(12).run(tmp_path / "run")
    resumed, record, _ = with_loader(0).run(tmp_path / "run", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


@pytest.mark.parametrize("every", [1, 3])
def test_ctrl_c_with_a_loader_says_what_is_lost(every: int, tmp_path: Path) -> None:
    """Up to checkpoint_every epochs were lost without a word."""
    recipe = Recipe(
        "",
        sgd,
        lambda model, optimizer: {"train": loader(None), "penalties": [InterruptingPenalty(12)]},
    )
    last = {1: 10, 3: 0}[every]
    with pytest.raises(
        Interrupted,
        match=rf"interrupted after iteration 12; the last checkpoint is that of iteration {last}, and what came since "
        rf"is lost: a Dataset or a DataLoader cannot start .*\(checkpoint_every={every}\): go on with",
    ):
        recipe.run(tmp_path / "run", checkpoint_every=every)


def test_ctrl_c_that_loses_nothing_says_nothing_of_losses(tmp_path: Path) -> None:
    recipe = Recipe("", sgd, lambda model, optimizer: {"penalties": [InterruptingPenalty(12)]})
    with pytest.raises(Interrupted, match="interrupted after iteration 12: go on with"):
        recipe.run(tmp_path / "run", checkpoint_every=3)


def test_ctrl_c_in_the_first_evaluation_says_how_to_go_on(tmp_path: Path) -> None:
    """A bare KeyboardInterrupt was raised before the first epoch."""
    recipe = Recipe("", sgd)
    model, history, _ = recipe.run(tmp_path / "whole", metrics={"zero": lambda output, target: torch.zeros(())})

    def metric(output: Tensor, target: Tensor) -> Tensor:
        interrupt()
        return torch.zeros(())

    with pytest.raises(Interrupted, match="interrupted before its first iteration: go on with `taulearn resume") as e:
        recipe.run(tmp_path / "run", metrics={"zero": metric})
    assert e.value.run is not None
    resumed, record, _ = recipe.run(
        tmp_path / "run", metrics={"zero": lambda output, target: torch.zeros(())}, resume=True
    )
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_ctrl_c_while_arguments_are_checked_says_so(tmp_path: Path) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        interrupt()
        return nn.functional.cross_entropy(output, target)

    model = network()
    with pytest.raises(Interrupted, match="interrupted before its first iteration: nothing was written"):
        run_fit(model, digits(), sgd(model), loss=loss, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_after_a_callback_stopped_ends_the_run(tmp_path: Path) -> None:
    def callback(end: Any) -> None:
        interrupt()
        raise StopTraining

    _, history, _ = Recipe("", sgd).run(tmp_path / "run", callbacks=[callback])
    assert history.num_iterations == 5
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_ctrl_c_without_a_run_says_that_nothing_is_kept() -> None:
    model = network()
    with pytest.raises(Interrupted, match="nothing was written: pass run="):
        run_fit(model, digits(), sgd(model), penalties=[InterruptingPenalty(4)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once() -> None:
    model = network()

    def twice() -> Iterator[None]:
        interrupt()
        yield
        interrupt()
        yield

    steps = twice()

    class Twice(InterruptingPenalty):
        def __call__(self, model: nn.Module, *batch: object) -> Tensor:
            next(steps)
            next(steps)
            return torch.zeros(())

    with pytest.raises(KeyboardInterrupt) as caught:
        run_fit(model, digits(), sgd(model), penalties=[Twice(0)])
    assert not isinstance(caught.value, Interrupted)


def test_the_same_objects_can_go_on_after_ctrl_c(tmp_path: Path) -> None:
    """As in a notebook: the model that is handed in again is trained and pruned already."""
    init = [0.3, 0.35, 0.2, 0.1, 0.05]
    recipe = Recipe("", sgd, pruning(3), {"init": init})
    model, history, _ = recipe.run(tmp_path / "whole")
    again = network(init=init)
    optimizer = sgd(again)
    penalties = [L1(0.3, proximal=True)]
    options: Options = {
        "epochs": EPOCHS,
        "penalties": penalties,
        "pruning": Pruning(0.05, every=3),
        "validation": digits(60),
        "run": tmp_path / "run",
    }

    def callback(end: Any) -> None:
        if end.epoch == 4:
            interrupt()

    with pytest.raises(Interrupted):
        run_fit(again, digits(), optimizer, **options, callbacks=[callback])
    assert 4 not in again.time_steps.origin
    record = run_fit(again, digits(), optimizer, **options, resume=True)
    assert_same_weights(again, model)
    assert_same_history(record, history)
