"""Checkpoints of the real Trainer that hold the record of the time steps, and trainings that go on from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from integrations.huggingface_runs import (
    Items,
    Plain,
    TimeStepsCallback,
    optimizer_of,
    pruning_callback,
    stopping,
    trainer,
    transformers,
    vit,
)
from taulearn import Pruning, Refinement
from taulearn.files import read_tensors
from taulearn.integrations.checkpoints import RECORD, follow_states
from taulearn.penalties import L1
from taulearn.training import History

PRUNING = Pruning(target_blocks=4, by=0.9)


@pytest.mark.parametrize("make", [vit, pytest.param(Plain, marks=pytest.mark.long)])
def test_resumed_training_ends_with_the_same_bits(make: Any, tmp_path: Path) -> None:
    """From a checkpoint before and from one after the deletion, with models that were built anew."""

    def run(**resume: Any) -> tuple[Any, History]:
        model, callback = make(), TimeStepsCallback([L1(0.5, proximal=True)], Pruning(0.08), progress=False)
        trainer(model, callback, tmp_path, num_train_epochs=4, save_strategy="epoch").train(**resume)
        return model, callback.history

    expected, record = run()
    gone = [d.iteration for d in record.deletions]
    assert gone
    assert gone[0] < 40
    for iteration in (10, max(gone)):
        folder = tmp_path / f"checkpoint-{iteration}"
        model, history = run(resume_from_checkpoint=str(folder))
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
        assert history.deletions == record.deletions
        for name in ("tau", "penalty.l1", "loss"):
            np.testing.assert_array_equal(history.iterations[name], record.iterations[name])


def test_layers_come_and_training_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def run(**resume: Any) -> tuple[Any, History]:
        items = Items(40)
        data = items.inputs, items.targets
        refinement = Refinement(7, until=0.5, data=data, loss=torch.nn.functional.cross_entropy)
        model, callback = Plain(), TimeStepsCallback(pruning=PRUNING, refinement=refinement, progress=False)
        trainer(model, callback, tmp_path, num_train_epochs=4, save_strategy="epoch").train(**resume)
        return model, callback.history

    expected, record = run()
    assert [each.iteration for each in record.insertions] == [10, 20]
    assert len(record.deletions) == 3
    for iteration in (10, 20):
        model, history = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{iteration}"))
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())
        assert (history.insertions, history.deletions) == (record.insertions, record.deletions)
        np.testing.assert_array_equal(history.iterations["tau"], record.iterations["tau"])


def test_checkpoints_hold_the_record_and_are_not_taken_for_models(tmp_path: Path) -> None:
    model, callback = vit(), pruning_callback()
    trainer(model, callback, tmp_path, save_strategy="epoch").train()
    folder = tmp_path / "checkpoint-40"
    tensors, _ = read_tensors(folder / "model.safetensors")
    record = History.from_tensors(safetensors.torch.load(tensors[RECORD].numpy().tobytes()))
    np.testing.assert_array_equal(record.iterations["tau"], callback.history.iterations["tau"])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.ViTForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "model")  # folded
    transformers.ViTForImageClassification.from_pretrained(tmp_path / "model")
    assert (tensors["time_steps.values"].reshape(-1) != 1).any()


@pytest.mark.parametrize("make", [pytest.param(vit, marks=pytest.mark.long), Plain])
def test_a_checkpoint_is_resumed_from_anywhere_and_saved_at_anybodys_wish(make: Any, tmp_path: Path) -> None:
    """The record and the state of the target come from a folder that is not Trainer's own."""
    callback = TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)
    first = trainer(make(), callback, tmp_path / "first", num_train_epochs=6)
    first.add_callback(stopping(35, save=True))  # after this callback
    first.train()
    assert callback.history.deletions
    folder = (tmp_path / "first" / "checkpoint-35").rename(tmp_path / "elsewhere")
    model, again = make(), TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)
    trainer(model, again, tmp_path / "second", num_train_epochs=6).train(resume_from_checkpoint=str(folder))
    assert again.history.num_iterations == 60
    np.testing.assert_array_equal(again.history.iterations["tau"][:35], callback.history.iterations["tau"])
    assert again.history.deletions[: len(callback.history.deletions)] == callback.history.deletions
    assert getattr(model, "network", model).time_steps.num_steps == 3
    other = make()  # the same callback begins anew with another model
    trainer(other, again, tmp_path / "third", num_train_epochs=6).train()
    assert again.history.num_iterations == 60
    assert [int(each) for each in again.history.epochs["layers"]][::6] == [5, 3]


def test_a_checkpoint_without_the_record_is_refused(tmp_path: Path) -> None:
    model = Plain()
    training = trainer(model, TimeStepsCallback(), tmp_path, num_train_epochs=1, save_strategy="epoch")
    training.callback_handler.callbacks = [c for c in training.callback_handler.callbacks if type(c).__name__[0] != "T"]
    training.train()
    with pytest.raises(ValueError, match="resume_from_checkpoint must be a checkpoint with the record of the time"):
        trainer(Plain(), TimeStepsCallback(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_callback_that_trainer_did_not_have_from_the_start(tmp_path: Path) -> None:
    """It is refused where checkpoints are written, unless the model follows them."""

    arguments = trainer(Plain(), TimeStepsCallback(), tmp_path, num_train_epochs=4, save_strategy="epoch").args

    def late(callback: TimeStepsCallback, *, follow: bool) -> Any:
        model = Plain()
        optimizer = optimizer_of(model)
        if follow:
            follow_states(model.network, optimizer)
        training = transformers.Trainer(model, arguments, train_dataset=Items(), optimizers=(optimizer, None))
        training.add_callback(callback)
        return training

    training = late(pruning_callback(), follow=False)
    with pytest.raises(ValueError, match=r"callbacks must hold this callback when Trainer is made, .*follow_states"):
        training.train()
    training = late(pruning_callback(), follow=True)
    training.train()
    assert training.model.network.time_steps.num_steps < 5
    callback = pruning_callback()
    late(callback, follow=True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    assert callback.history.num_iterations == 40
