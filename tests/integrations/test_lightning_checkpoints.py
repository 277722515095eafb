"""Checkpoints of Lightning, loaded by its own methods into modules that were built anew."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import taulearn
from integrations.lightning_runs import (
    Built,
    Itself,
    Late,
    ModelCheckpoint,
    Wrapped,
    batches,
    equal,
    loss_of,
    pruning,
    tensors,
    trained,
    trainer,
)
from taulearn import Pruning
from taulearn.integrations.checkpoints import follow_states, mark_, mark_states, models_with_time_steps
from taulearn.integrations.lightning import TimeStepsCallback
from taulearn.nn.pruned_models import ORIGIN

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (Built, "weights_only"),
        (Wrapped, "whole"),
        (Itself, "weights_only"),
        (Late, "whole"),
        (Built, "unpruned"),
        (Wrapped, "unpruned"),
    ],
)
def test_load_from_checkpoint_needs_no_trainer_and_no_line_of_the_users(kind: Any, how: str, tmp_path: Path) -> None:
    file = tmp_path / "it.ckpt"
    callback = TimeStepsCallback() if how == "unpruned" else pruning()
    module = trained(kind(), callback, file, weights_only=how == "weights_only")
    assert module.steps.num_steps == (5 if how == "unpruned" else 2)
    for options in ({}, {"strict": False}, {"weights_only": False}):
        loaded = kind.load_from_checkpoint(file, **options)
        assert loaded.steps.origin == module.steps.origin
        assert equal(loaded, module)
    assert loss_of(kind(), ckpt_path=file) == loss_of(module) == loss_of(loaded)
    assert trainer(pruning()).validate(kind(), batches(), ckpt_path=file, verbose=False)[0]["loss"] == loss_of(module)


def test_a_state_dict_of_the_module_loads_by_hand(tmp_path: Path) -> None:
    module = trained(Wrapped(), pruning(), tmp_path / "it.ckpt")
    fresh, checkpoint = Wrapped(), torch.load(tmp_path / "it.ckpt", weights_only=True)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert equal(fresh, module)
    again = Wrapped()
    again.load_state_dict(module.state_dict())
    assert equal(again, module)
    assert not any("taulearn" in name for name in module.model.state_dict())


def test_a_loaded_module_trains_on_and_its_optimizer_holds_its_steps(tmp_path: Path) -> None:
    trained(Built(), pruning(), tmp_path / "it.ckpt")
    loaded = Built.load_from_checkpoint(tmp_path / "it.ckpt")
    before = loaded.steps.tau.tolist()
    trained(loaded, TimeStepsCallback(), tmp_path / "again.ckpt")
    assert loaded.steps.tau.tolist() != before
    assert equal(Built.load_from_checkpoint(tmp_path / "again.ckpt"), loaded)


def test_a_module_whose_layers_went_refuses_an_older_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss", mode="max", save_top_k=1)  # that of the first epoch
    module, training = Built(), trainer(pruning(), best, enable_checkpointing=True)
    training.fit(module, batches(), batches())
    assert module.steps.num_steps == 2
    with pytest.raises(ValueError, match=r"model must have the layers \[0, 1, 2, 3, 4\].*built anew"):
        training.test(module, batches(), ckpt_path="best", verbose=False)
    loaded = Built.load_from_checkpoint(best.best_model_path)
    assert loaded.steps.num_steps == 5
    assert loss_of(loaded) == pytest.approx(float(best.best_model_score), abs=1e-6)


def test_an_optimizer_from_before_a_checkpoint_was_loaded_is_refused() -> None:
    small, fresh = taulearn.nn.resnet(2, 3, 1, 4), taulearn.nn.resnet(2, 3, 1, 4)
    taulearn.prune(small, keep=[0, 2])
    state = small.state_dict()
    mark_(small, state)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match=r"optimizer must hold the model's time steps"):
        taulearn.prune(fresh, keep=[0, 1], optimizer=optimizer)


def test_averages_in_a_module_lose_the_layers_too(tmp_path: Path) -> None:
    """Torch's AveragedModel, updated by the module itself; compared with the recursion by hand."""

    class Averaging(Wrapped):
        def make(self) -> None:
            super().make()
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
            self.hand: dict[str, torch.Tensor] = {}

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.update_parameters(self.model)
            now = numbered(self.model)
            old = self.hand or now
            self.hand = {name: old[name].lerp(value, 0.2) for name, value in now.items()}

    module = trained(Averaging(), pruning(every=3), tmp_path / "it.ckpt")
    found = numbered(module.average.module)
    assert module.steps.num_steps == 2
    assert found.keys() == numbered(module.model).keys()
    assert all(torch.allclose(found[name], module.hand[name], atol=1e-6) for name in found)
    assert equal(Averaging.load_from_checkpoint(tmp_path / "it.ckpt"), module)


def numbered(model: Any) -> dict[str, torch.Tensor]:
    """Parameters of a wrapped model, by names that deletions do not change."""
    origin = model.time_steps.origin
    found = {f"step {l}": value.clone() for l, value in zip(origin, model.time_steps.tau.detach(), strict=True)}
    for name, value in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "1":
            parts[1] = f"layer {origin[int(parts[1])]}"
        if parts[0] != "time_steps":
            found[".".join(parts)] = value.detach().clone()
    return found


def test_models_of_ones_own_class_load_with_a_line(tmp_path: Path) -> None:
    """Such a model cannot be pruned and needs none, or can be and says that it follows."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_steps, self.linear = taulearn.TimeSteps(3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.time_steps.tau.sum()

    class Only(Built):
        def make(self) -> None:
            self.model = Steps()

    module = trained(Only(), TimeStepsCallback(), tmp_path / "it.ckpt")
    assert equal(Only.load_from_checkpoint(tmp_path / "it.ckpt"), module)

    class Deletes(Steps):
        scheme, fixed_layers = taulearn.nn.Residual(), dict

        @property
        def layers(self) -> Any:
            return [nn.Identity()] * self.time_steps.num_steps

        def keep_layers_(self, indices: Any) -> None:
            self.time_steps.keep_(indices)

    class Following(Built):
        def make(self) -> None:
            self.model = Deletes()
            follow_states(self.model)

    module = trained(Following(), pruning(), tmp_path / "it.ckpt")
    loaded = Following.load_from_checkpoint(tmp_path / "it.ckpt")
    assert loaded.steps.num_steps == 2
    assert equal(loaded, module)


def test_several_models_with_time_steps_are_refused_before_the_first_step() -> None:
    class Two(Built):
        def make(self) -> None:
            self.model, self.other = taulearn.nn.resnet(6, 8, 3, 5), taulearn.nn.resnet(6, 8, 3, 4)

    training = trainer(TimeStepsCallback(pruning=Pruning(0.1)))
    with pytest.raises(TypeError, match=r"must contain one model .*a Two with 2 \('model', 'other'\)"):
        training.fit(Two(), batches())
    assert training.global_step == 0


def test_wrappers_that_hand_the_steps_on_are_not_marked() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        @property
        def time_steps(self) -> Any:
            return self.inner.time_steps

    module = nn.ModuleDict({"compiled": torch.compile(taulearn.nn.resnet(6, 8, 3, 5)), "around": Around(host_of())})
    mark_states(module)
    names = [name for name in module.state_dict() if name.endswith(ORIGIN)]
    assert names == [f"compiled._orig_mod.{ORIGIN}", f"around.inner.{ORIGIN}"]
    module.load_state_dict(module.state_dict())


def test_of_several_that_hold_the_same_steps_it_is_the_one_that_can_be_pruned() -> None:
    """Whether it comes before or after those that only show them."""

    class Shows(nn.Module):
        def __init__(self, steps: nn.Module) -> None:
            super().__init__()
            self.time_steps = steps

    network = taulearn.nn.resnet(6, 8, 3, 5)
    module = nn.ModuleDict({"a": Shows(network.time_steps), "network": network, "z": Shows(network.time_steps)})
    assert models_with_time_steps(module) == {"network": network}


def host_of() -> nn.Module:
    found: nn.Module = Wrapped().model
    assert tensors(found)
    return found
