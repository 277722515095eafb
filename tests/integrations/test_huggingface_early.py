"""Requests that Trainer could not carry out at its end are refused before its first step; the remedies work."""

from pathlib import Path
from typing import Any

import pytest
import torch

import taulearn
from integrations.huggingface_runs import (
    Items,
    Plain,
    TimeStepsCallback,
    optimizer_of,
    pruning_callback,
    trainer,
    transformers,
    vit,
)
from taulearn import Pruning
from taulearn.integrations.huggingface import load_checkpoint

EVALUATING = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "score"}


def evaluating(model: Any, callback: TimeStepsCallback, folder: Path, *more: Any, **options: Any) -> Any:
    """A Trainer whose first evaluation is the best."""
    calls: list[int] = []

    def worse(_: Any) -> dict[str, float]:
        calls.append(1)
        return {"score": -len(calls)}

    options |= {"greater_is_better": True, "compute_metrics": worse}
    training = trainer(model, callback, folder, **EVALUATING, **options)
    for each in more:
        training.add_callback(each)
    return training


@pytest.mark.parametrize("make", [vit, Plain])
@pytest.mark.parametrize("options", [{"target_blocks": 3}, {"threshold": 0.05}])
def test_the_best_model_at_the_end(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    callback = TimeStepsCallback(pruning=Pruning(**options), progress=False)
    training = evaluating(make(), callback, tmp_path, load_best_model_at_end=True)
    with pytest.raises(ValueError, match="load_best_model_at_end must be False where layers are pruned"):
        training.train()
    assert training.state.global_step == 0


def test_the_best_model_at_the_end_where_no_layers_go(tmp_path: Path) -> None:
    model = vit()
    training = evaluating(model, TimeStepsCallback(), tmp_path, load_best_model_at_end=True, num_train_epochs=2)
    training.train()
    first = vit()
    load_checkpoint(first, tmp_path / "checkpoint-10")
    assert all(torch.equal(first.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [vit, Plain])
def test_the_best_checkpoint_is_loaded_into_a_model_built_anew(make: Any, tmp_path: Path) -> None:
    """Also beside early stopping, of a checkpoint with more layers than the model has at the end."""
    model = make()
    callback = TimeStepsCallback(pruning=Pruning(target_blocks=2, every=1), progress=False)
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    training = evaluating(model, callback, tmp_path, stop, num_train_epochs=4)
    training.train()
    layers = {
        int(i): int(n) for i, n in zip(*(callback.history.epochs[k] for k in ("iteration", "layers")), strict=True)
    }
    assert training.state.global_step == 30
    folder, best = training.state.best_model_checkpoint, make()
    assert Path(folder).name == "checkpoint-10"
    load_checkpoint(best, folder)
    assert getattr(best, "network", best).time_steps.num_steps == layers[10] > layers[30]


def test_folders_that_hold_no_checkpoint_of_this_model(tmp_path: Path) -> None:
    trainer(vit(), pruning_callback(), tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    with pytest.raises(ValueError, match=r"folder must be a checkpoint of Trainer, .*nowhere"):
        load_checkpoint(vit(), tmp_path / "nowhere")
    with pytest.raises((ValueError, RuntimeError), match="model must be built as"):
        load_checkpoint(Plain(), tmp_path / "checkpoint-10")
    taulearn.unwrap(vit(1.0)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="folder must be a checkpoint that was written with this callback"):
        load_checkpoint(vit(), tmp_path / "plain")


def test_deepspeed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    training = trainer(vit(), TimeStepsCallback(), tmp_path)
    training.args.deepspeed = {"zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="deepspeed must be None for this callback"):
        training.callback_handler.on_train_begin(training.args, training.state, training.control)


def test_checkpoints_of_the_model_alone_are_resumed(tmp_path: Path) -> None:
    trainer(Plain(), pruning_callback(), tmp_path, save_strategy="epoch", save_only_model=True).train()
    callback, model = pruning_callback(), Plain()
    trainer(model, callback, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert callback.history.num_iterations == 40
    assert model.network.time_steps.num_steps < 5


def test_models_that_trainer_makes_itself_are_resumed(tmp_path: Path) -> None:
    def run(**resume: Any) -> tuple[Any, TimeStepsCallback]:
        callback = TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)
        arguments = trainer(Plain(), TimeStepsCallback(), tmp_path, save_strategy="epoch", learning_rate=1e-2).args
        training = transformers.Trainer(
            model_init=lambda: Plain(), args=arguments, train_dataset=Items(), callbacks=[callback]
        )
        training.train(**resume)
        return training.model, callback

    model, callback = run()
    again, same = run(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert model.network.time_steps.num_steps == 3
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert same.history.deletions == callback.history.deletions


def test_a_batch_size_that_is_found_begins_anew(tmp_path: Path) -> None:
    class Full(transformers.TrainerCallback):
        full = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.full and state.global_step == 2:
                self.full = False
                raise RuntimeError("CUDA out of memory.")

    model, callback = Plain(), TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)
    optimizer = optimizer_of(model)
    training = trainer(model, callback, tmp_path, optimizer=optimizer, auto_find_batch_size=True)
    training.add_callback(Full())
    training.train()
    assert callback.history.num_iterations == training.state.global_step > 40
    assert model.network.time_steps.num_steps == 3
    assert not optimizer._optimizer_step_post_hooks


def test_trained_twice_with_one_trainer(tmp_path: Path) -> None:
    model, callback = Plain(), pruning_callback()
    training = trainer(model, callback, tmp_path)
    training.train()
    layers = model.network.time_steps.num_steps
    training.train()
    assert callback.history.epochs["layers"][0] == layers < 5
    assert callback.history.num_iterations == 40
