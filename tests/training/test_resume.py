"""A run that is interrupted and gone on with ends with the same bits, whatever it consists of."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from taulearn import Pruning, parameter_groups
from taulearn.penalties import L1, Penalty
from taulearn.training import History, Interrupted, Run
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

EPOCHS = 5
Options = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a run is put together, from nothing, each time it is started.

    Attributes:
        name: In the test's id.
        optimizer: From the model.
        options: From the model and its optimiser, further arguments of fit.
        network: Arguments of the network.
    """

    name: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    options: Callable[[nn.Module, torch.optim.Optimizer], Options] = lambda model, optimizer: {}
    network: Options | None = None

    def __str__(self) -> str:
        return self.name

    def run(self, folder: Path, **more: Any) -> tuple[nn.Module, History, Options]:
        """Start the run, or go on with it, after having spoilt every generator."""
        model = network(**self.network or {})
        optimizer = self.optimizer(model)
        options = {"train": digits(), "epochs": EPOCHS, "validation": digits(60)} | self.options(model, optimizer)
        torch.manual_seed(7)
        history = run_fit(model, options.pop("train"), optimizer, **{"run": folder} | options | more)
        return model, history, options


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(model, lr=0.01, tau_lr=0.005))


def loader(generator: torch.Generator | None) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*digits()), batch_size=40, shuffle=True, generator=generator)


def pruning(every: str | int) -> Callable[[nn.Module, torch.optim.Optimizer], Options]:
    return lambda model, optimizer: {"penalties": [L1(0.3, proximal=True)], "pruning": Pruning(0.05, every=every)}


def scheduled(
    kind: Callable[..., lr_scheduler.LRScheduler], *arguments: Any, **options: Any
) -> Callable[[nn.Module, torch.optim.Optimizer], Options]:
    return lambda model, optimizer: {"scheduler": kind(optimizer, *arguments, **options)}


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, total_iters=2),
        lr_scheduler.ExponentialLR(optimizer, 0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


UNEVEN = [0.3, 0.05, 0.2, 0.1, 0.35]
RECIPES = [
    Recipe("sgd", sgd),
    Recipe("plain sgd", lambda model: torch.optim.SGD(model.parameters(), lr=0.1)),
    Recipe("adam", adam),
    Recipe("adamw amsgrad", lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)),
    Recipe("named parameters", lambda model: torch.optim.Adam(model.named_parameters(), lr=0.01)),
    Recipe("rmsprop", lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5, centered=True)),
    Recipe("lbfgs", lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)),
    Recipe("tensor lr", lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))),
    Recipe("pruning per epoch", sgd, pruning("epoch"), {"init": UNEVEN}),
    Recipe("pruning per iteration", sgd, pruning(3), {"init": UNEVEN}),
    Recipe("dropout", sgd, network={"dropout": 0.2}),
    Recipe("dependent", sgd, network={"constraint": "dependent", "lower_bound": 0.05}),
    Recipe("simplex", adam, network={"constraint": "simplex"}),
    Recipe("fixed", adam, network={"constraint": "fixed"}),
    Recipe("step", sgd, scheduled(lr_scheduler.StepLR, 2, 0.5)),
    Recipe("multi-step", sgd, scheduled(lr_scheduler.MultiStepLR, [2, 4], 0.5)),
    Recipe("lambda", sgd, scheduled(lr_scheduler.LambdaLR, lambda epoch: 1.0 / (1.0 + epoch))),
    Recipe("cosine", adam, scheduled(lr_scheduler.CosineAnnealingLR, EPOCHS)),
    Recipe("warm restarts", adam, scheduled(lr_scheduler.CosineAnnealingWarmRestarts, 2)),
    Recipe("plateau", sgd, scheduled(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)),
    Recipe("sequential", sgd, lambda model, optimizer: {"scheduler": sequential(optimizer)}),
    Recipe("one cycle", sgd, scheduled(lr_scheduler.OneCycleLR, 0.2, total_steps=5 * EPOCHS)),
    Recipe("cyclic", adam, scheduled(lr_scheduler.CyclicLR, 1e-3, 1e-2, step_size_up=7, cycle_momentum=False)),
    Recipe("averaged", adam, lambda model, optimizer: {"averaged": AveragedModel(model)}),
    Recipe(
        "averaged and pruned",
        sgd,
        lambda model, optimizer: (
            pruning("epoch")(model, optimizer)
            | {"averaged": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))}
        ),
        {"init": UNEVEN},
    ),
    Recipe("loader", sgd, lambda model, optimizer: {"train": loader(None)}),
    Recipe(
        "loader with generator",
        sgd,
        lambda model, optimizer: {"train": loader(torch.Generator().manual_seed(3))},
        {"dropout": 0.2},
    ),
    Recipe("accumulated and clipped", adam, lambda model, optimizer: {"accumulate": 3, "clip_norm": 0.5}),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_crash_in_any_epoch_leaves_no_trace(recipe: Recipe, tmp_path: Path) -> None:
    model, history, options = recipe.run(tmp_path / "whole")
    assert len(history.epochs["iteration"]) == EPOCHS + 1
    for epoch in range(1, EPOCHS + 1):
        folder = tmp_path / str(epoch)
        with pytest.raises(Crash):
            recipe.run(folder, callbacks=[crash_after(epoch)])
        resumed, record, resumed_options = recipe.run(folder, resume=True)
        assert_same_weights(resumed, model)
        assert_same_history(record, history)
        assert_same_history(History.load(folder / "history.safetensors"), history)
        if "averaged" in options:
            assert_same_weights(resumed_options["averaged"], options["averaged"])


def test_the_pruned_recipes_prune_at_different_times(tmp_path: Path) -> None:
    for recipe in RECIPES:
        if "prun" in recipe.name:
            _, history, _ = recipe.run(tmp_path / recipe.name)
            assert len({d.epoch for d in history.deletions}) >= 2, recipe


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


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    recipe = Recipe("", adam)
    model, history, _ = recipe.run(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    resumed, record, _ = recipe.run(tmp_path / "run", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_run_goes_on_for_more_epochs_than_it_was_started_with(tmp_path: Path) -> None:
    recipe = Recipe("", adam)
    model, history, _ = recipe.run(tmp_path / "whole")
    recipe.run(tmp_path / "run", epochs=2)
    resumed, record, _ = recipe.run(tmp_path / "run", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_checkpoints_every_few_epochs(tmp_path: Path) -> None:
    recipe = Recipe("", sgd)
    model, history, _ = recipe.run(tmp_path / "whole")
    with pytest.raises(Crash):
        recipe.run(tmp_path / "run", checkpoint_every=2, callbacks=[crash_after(4)])
    assert sorted(int(path.stem) for path in (tmp_path / "run" / "checkpoint").iterdir()) == [0, 10]
    resumed, record, _ = recipe.run(tmp_path / "run", resume=True, checkpoint_every=2)
    assert sorted(int(path.stem) for path in (tmp_path / "run" / "checkpoint").iterdir()) == [20, 25]
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_a_run_object_can_be_handed_over(tmp_path: Path) -> None:
    recipe = Recipe("", sgd)
    model, history, _ = recipe.run(tmp_path / "whole")
    with pytest.raises(Crash):
        recipe.run(tmp_path / "unused", run=Run.create(tmp_path / "run", {}), callbacks=[crash_after(3)])
    resumed, record, _ = recipe.run(tmp_path / "unused", run=Run.open(tmp_path / "run"), resume=True)
    assert not (tmp_path / "unused").exists()
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_training_again_without_resume_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    Recipe("", sgd).run(tmp_path / "run")
    with pytest.raises(FileExistsError, match="resume"):
        Recipe("", sgd).run(tmp_path / "run", run=Run.open(tmp_path / "run"))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    Recipe("", adam).run(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="optimizer must have 2 parameter groups as in the checkpoint, got 1"):
        Recipe("", sgd).run(tmp_path / "run", resume=True)


def test_another_network_is_refused(tmp_path: Path) -> None:
    Recipe("", sgd).run(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="model must"):
        Recipe("", sgd, network={"hidden_layers": 4}).run(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="model must"):
        Recipe("", sgd, network={"constraint": "dependent"}).run(tmp_path / "run", resume=True)


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(ValueError, match="run must name the run's folder when resume=True"):
        run_fit(model, digits(), sgd(model), loss=LOSS, resume=True)
    with pytest.raises(FileNotFoundError, match=r"there is none in it"):
        run_fit(model, digits(), sgd(model), run=tmp_path / "nothing", resume=True)
