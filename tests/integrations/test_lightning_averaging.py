"""Lightning's averages of weights beside pruning, against the recursions by hand on the layers that are left."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import taulearn
from integrations.lightning_runs import (
    EPOCHS,
    Built,
    ModelCheckpoint,
    Wrapped,
    batches,
    equal,
    lightning,
    loss_of,
    pruning,
    trainer,
)
from taulearn.adaptivity import adaptation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

pytestmark = pytest.mark.filterwarnings("ignore")
SWA_START = 2


def numbered(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers, by names that deletions do not change."""
    origin = module.steps.origin
    found = {f"step {l}": value.clone() for l, value in zip(origin, module.steps.tau.detach(), strict=True)}
    for name, value in module.state_dict().items():
        parts = name.split(".")
        if parts[1] in ("1", "layers"):  # where the layers lie
            parts[2] = f"layer {origin[int(parts[2])]}"
        if "time_steps" not in parts and "taulearn" not in name:
            found[".".join(parts)] = value.clone()
    return found


class ByHand(lightning.Callback):
    """The average by a recursion of its own, of the values after each step, or at the start of epochs."""

    def __init__(self, kind: str) -> None:
        self.kind, self.number = kind, 0
        self.average: dict[str, Tensor] = {}

    def update(self, module: Any) -> None:
        now = numbered(module)
        for name, value in now.items():
            old = self.average.get(name, value)
            if not value.is_floating_point() or self.number == 0:
                self.average[name] = value
            elif self.kind == "ema":
                self.average[name] = 0.8 * old + (1 - 0.8) * value
            else:
                self.average[name] = old + (value - old) / (self.number + 1)
        self.number += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.kind != "swa":
            self.update(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.kind == "swa" and SWA_START - 1 <= trainer.current_epoch < EPOCHS:
            self.update(pl_module)


def averaging(kind: str) -> Any:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.8)
    if kind == "mean":
        return WeightAveraging()
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=SWA_START)


@pytest.mark.parametrize("first", [True, False], ids=["pruning first", "averaging first"])
@pytest.mark.parametrize("kind", ["ema", "mean", "swa"])
def test_averages_follow_deletions(kind: str, first: bool) -> None:
    """In the middle of epochs and beside validation, for which the weights are swapped."""
    module, hand, average = Built(), ByHand(kind), averaging(kind)
    callback = pruning(every=3, target_blocks=2)
    both = [callback, average] if first else [average, callback]
    trainer(*both, hand).fit(module, batches(), batches())
    assert module.steps.num_steps == 2
    assert len({d.iteration for d in callback.history.deletions}) > 1
    found = numbered(module)
    assert found.keys() <= hand.average.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, hand.average[name], rtol=1e-5, atol=1e-6)


def test_averaged_buffers_follow_deletions_too() -> None:
    module, hand = Wrapped(), ByHand("ema")
    trainer(pruning(), averaging("ema"), hand).fit(module, batches())
    found = numbered(module)
    assert any("running_mean" in name for name in found)
    assert module.steps.num_steps == 2
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, hand.average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["pruning first", "averaging first"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_training_with_averages_is_resumed_after_a_deletion(kind: str, first: bool, tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[Any, Any]:
        module, average = Built(), averaging(kind)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        both = [pruning(), average] if first else [average, pruning()]
        trainer(*both, saving, enable_checkpointing=True).fit(module, batches(), **options)
        return module, average._average_model

    module, average = run()
    again, same = run(ckpt_path=tmp_path / "epoch=2.ckpt")
    assert module.steps.num_steps == 2
    assert equal(again, module)
    assert equal(same, average)
    middle = Built.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
    assert middle.steps.num_steps < 5
    assert loss_of(middle) == loss_of(Built(), ckpt_path=tmp_path / "epoch=2.ckpt")


def test_an_average_of_another_model_is_refused_before_the_first_step() -> None:
    class Holds(lightning.Callback):
        def __init__(self) -> None:
            self.average = AveragedModel(taulearn.nn.resnet(6, 8, 3, 7))

    training = trainer(pruning(), Holds())
    with pytest.raises(ValueError, match="averaged models must be copies of the model"):
        training.fit(Built(), batches())
    assert training.global_step == 0


def test_a_deletion_happens_in_the_average_as_well_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptation, "prune", fails)
    module, average = Built(), averaging("ema")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(pruning(every=3), average).fit(module, batches())
    assert module.steps.num_steps == average._average_model.module.steps.num_steps == 5


class Normalised(Wrapped):
    """With batch normalisation, whose statistics the average takes an epoch of its own for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)


@pytest.mark.parametrize("first", [True, False], ids=["callback first", "average first"])
def test_nothing_acts_in_an_epoch_for_the_statistics_of_an_average(first: bool) -> None:
    """No proximal step, no penalty, no deletion, no line of the record; what Lightning itself does there is its own."""
    hooks = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            hooks.append(len(trainer.optimizers[0]._optimizer_step_post_hooks))

    module, callback = Normalised(), pruning()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=SWA_START)
    callbacks = [callback, average] if first else [average, callback]
    trainer(*callbacks, Watch()).fit(module, batches())
    number = callback.history.num_iterations
    assert number == EPOCHS * len(batches())
    assert len(callback.history.epochs["layers"]) == EPOCHS + 1
    assert all(hooks[:number])
    assert hooks[number:] == [0] * len(batches())
