"""The callback in Lightning's Trainer: what it does against a loop by hand, resumed runs, and what it refuses."""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import taulearn
from taulearn import Pruning, Refinement
from taulearn.penalties import L1, ElasticNet
from taulearn.training import History

pytest.importorskip("lightning", reason="pip install 'taulearn[lightning]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

from taulearn.integrations.lightning import TimeStepsCallback

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = 20


def digits(number: int = 200) -> tuple[Tensor, Tensor]:
    inputs, targets = taulearn.data.load("digits")
    return inputs[:number], targets[:number]


class Module(lightning.LightningModule):
    """A network somewhere inside a module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        steps = {"init": [0.5, 0.1, 0.3, 0.1, 0.2], "horizon": 1.2} | options
        self.parts = nn.ModuleDict({"network": taulearn.nn.resnet(64, 12, 10, 5, activation="tanh", **steps)})

    @property
    def network(self) -> Any:
        return self.parts["network"]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(taulearn.parameter_groups(self.network, lr=3e-3, tau_lr=1e-3))


def fit(module: Any, callback: TimeStepsCallback, folder: Path | None = None, **options: Any) -> Any:
    resume = {"ckpt_path": options.pop("ckpt_path", None)}
    callbacks = [callback]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    defaults: dict[str, Any] = {
        "max_epochs": 5,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": folder is not None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(callbacks=callbacks, **defaults | options)
    trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=BATCH), **resume)
    return trainer


def test_layers_go_and_the_optimizer_follows(capsys: pytest.CaptureFixture[str]) -> None:
    module, callback = Module(), TimeStepsCallback([L1(2.0, proximal=True)], Pruning(0.06))
    trainer = fit(module, callback)
    (optimizer,), model, history = trainer.optimizers, module.network, callback.history
    layers = history.epochs["layers"]
    assert layers[0] == 5 > layers[-1] == model.time_steps.num_steps
    assert {d.layer for d in history.deletions} | set(model.time_steps.origin) == set(range(5))
    assert all(d.iteration % 10 == 0 for d in history.deletions)
    assert set(optimizer.state) == set(model.parameters())
    assert all(state["step"] == 50 for state in optimizer.state.values())
    assert not optimizer._optimizer_step_post_hooks
    assert "deleted layer" in capsys.readouterr().out


@pytest.mark.parametrize("penalty", [ElasticNet(0.5), L1(0.5, proximal=True)], ids=["gradient", "proximal"])
def test_penalties_act_as_in_a_loop_by_hand(penalty: Any) -> None:
    module, twin = Module(constraint="simplex", horizon=1.2), Module(constraint="simplex", horizon=1.2)
    callback = TimeStepsCallback([penalty])
    fit(module, callback, max_epochs=1)
    model, optimizer = twin.network, twin.configure_optimizers()
    taulearn.optim.register_projection(optimizer, model, [penalty])
    inputs, targets = digits()
    rows = []
    for index in torch.arange(200).split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[index]), targets[index])
        value = penalty(model)
        total = loss + value if penalty.differentiated else loss
        rows.append([v.item() for v in (loss, total, value, *model.time_steps.tau)])
        total.backward()
        optimizer.step()
    columns = callback.history.iterations
    found = np.column_stack([columns["loss"], columns["total"], columns[f"penalty.{penalty.name}"], columns["tau"]])
    np.testing.assert_allclose(found, rows, rtol=0, atol=1e-6)


def test_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    """From a checkpoint before and from one after the deletion, with modules that were built anew."""

    def run(folder: Path | None = None, **options: Any) -> tuple[Any, History]:
        module = Module()
        callback = TimeStepsCallback([L1(2.0, proximal=True)], Pruning(0.06), progress=False)
        fit(module, callback, folder, **options)
        return module, callback.history

    expected, record = run(tmp_path)
    first = min(d.epoch for d in record.deletions)
    assert 1 < first < 5
    for epoch in (0, first - 1):
        module, history = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        state = module.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
        assert history.deletions == record.deletions
        for name, column in record.iterations.items():
            np.testing.assert_array_equal(history.iterations[name], column)


def test_accumulated_gradients_and_counted_iterations() -> None:
    callback = TimeStepsCallback([L1(2.0, proximal=True)], Pruning(0.06, every=3), progress=False)
    fit(Module(), callback, accumulate_grad_batches=2, max_epochs=8)
    assert callback.history.num_iterations == 40
    assert callback.history.deletions
    assert all(d.iteration % 3 == 0 for d in callback.history.deletions)


def test_contributions_are_measured_while_gradients_accumulate() -> None:
    """One measurement is open at a time, and none when a layer goes."""

    class Count(lightning.Callback):
        def __init__(self) -> None:
            self.hooks: list[int] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.hooks.append(sum(len(part._forward_hooks) for part in module.network.modules()))

    module, count = Module(), Count()
    callback = TimeStepsCallback(pruning=Pruning(0.12, criterion="contribution"), progress=False)
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        callbacks=[callback, count],
        accumulate_grad_batches=4,
        max_epochs=4,
        accelerator="cpu",
        enable_model_summary=False,
        **defaults,
    )
    trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=BATCH))
    assert module.network.time_steps.num_steps < 5
    assert max(count.hooks) <= 5
    assert not any(part._forward_hooks for part in module.network.modules())


def test_a_compiled_network_beside_itself_is_one() -> None:
    class Compiled(Module):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(self.network)

    callback = TimeStepsCallback()
    fit(Compiled(), callback, max_epochs=1)
    assert callback.history.num_iterations == 10


def test_weight_decay_on_the_time_steps_is_said() -> None:
    class Decaying(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)

    with pytest.warns(UserWarning, match=r"shrinks the time steps by weight decay, 0\.1: let configure_optimizers"):
        fit(Decaying(), TimeStepsCallback(), max_epochs=1)


def test_a_callback_that_was_resumed_begins_anew(tmp_path: Path) -> None:
    def callback() -> TimeStepsCallback:
        return TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)

    fit(Module(), callback(), tmp_path, max_epochs=6)
    again, module = callback(), Module()
    fit(Module(), again, max_epochs=8, ckpt_path=tmp_path / "epoch=4.ckpt")
    assert again.history.num_iterations == 80
    fit(module, again, max_epochs=8)
    assert again.history.num_iterations == 80
    assert module.network.time_steps.num_steps == 3


def test_a_target_is_reached() -> None:
    module, callback = Module(), TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)
    fit(module, callback, max_epochs=8)
    assert module.network.time_steps.num_steps == 3
    assert len({d.iteration for d in callback.history.deletions}) == 2


def test_layers_come_and_training_resumes_with_the_same_bits(tmp_path: Path, capsys: Any) -> None:
    def run(folder: Path | None = None, **options: Any) -> tuple[Any, History]:
        module = Module()
        refinement = Refinement(7, until=0.6, rest=1, data=digits(), loss=nn.functional.cross_entropy)
        callback = TimeStepsCallback(pruning=Pruning(target_blocks=4, by=0.9), refinement=refinement)
        fit(module, callback, folder, **options)
        return module, callback.history

    expected, record = run(tmp_path)
    assert [each.iteration for each in record.insertions] == [15, 30]
    assert expected.network.time_steps.num_steps == 4
    assert "split layer" in capsys.readouterr().out
    for epoch in (0, 1, 3):
        module, history = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        state = module.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
        assert (history.insertions, history.deletions) == (record.insertions, record.deletions)
        np.testing.assert_array_equal(history.iterations["tau"], record.iterations["tau"])


def test_bad_input() -> None:
    class ByHand(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    class Without(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.network.head.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="data must be given with indicator 'dual-weighted' in this trainer"):
        TimeStepsCallback(refinement=Refinement(7))
    with pytest.raises(ValueError, match="automatic_optimization must be True for this callback"):
        fit(ByHand(), TimeStepsCallback())

    class Searching(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.network.parameters())

    with pytest.raises(ValueError, match="must return an optimiser that takes one gradient a step, got LBFGS"):
        fit(Searching(), TimeStepsCallback())
    with pytest.raises(ValueError, match="must return one optimiser that holds the time steps, got 0"):
        fit(Without(), TimeStepsCallback())


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"^lightning must be installed .*pip install 'taulearn\[lightning\]'$"):
        importlib.reload(sys.modules["taulearn.integrations.lightning"])
