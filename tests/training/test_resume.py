"""A run that is interrupted and gone on with ends with the same bits, whatever it consists of."""

from pathlib import Path

import pytest
import torch

from taulearn.training import History, Run
from training.recipes import EPOCHS, RECIPES, Recipe, adam, sgd
from training.support import (
    Crash,
    assert_same_history,
    assert_same_weights,
    crash_after,
)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_crash_in_any_epoch_leaves_no_trace(recipe: Recipe, tmp_path: Path) -> None:
    model, history, options = recipe.run(tmp_path / "whole")
    assert len(history.epochs["iteration"]) == EPOCHS + 1
    for epoch in range(1, EPOCHS + 1) if recipe is RECIPES[0] else (3,):
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
    with pytest.raises(ValueError, match=r"optimizer must .*got 'SGD'"):
        Recipe("", sgd).run(tmp_path / "run", resume=True)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    Recipe("", adam).run(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"optimizer must .*got 1"):
        Recipe("", lambda model: torch.optim.Adam(model.parameters())).run(tmp_path / "run", resume=True)


def test_another_network_is_refused(tmp_path: Path) -> None:
    Recipe("", sgd).run(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="model must"):
        Recipe("", sgd, network={"hidden_layers": 4}).run(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="model must"):
        Recipe("", sgd, network={"constraint": "dependent"}).run(tmp_path / "run", resume=True)
