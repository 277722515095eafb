"""The callback in the real Trainer: what it does against a loop by hand, resumed runs, and what it refuses."""

import copy
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taulearn
from integrations.huggingface_runs import (
    BATCH,
    Plain,
    TimeStepsCallback,
    digits,
    optimizer_of,
    pruning_callback,
    stopping,
    trainer,
    vit,
)
from taulearn import Pruning
from taulearn.penalties import L1, ElasticNet, Penalty


def test_layers_go_and_the_optimizer_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    optimizer = optimizer_of(model)
    callback = TimeStepsCallback([L1(0.5, proximal=True)], Pruning(0.08))
    training = trainer(model, callback, tmp_path, optimizer=optimizer, num_train_epochs=6)
    training.train()
    history = callback.history
    layers = history.epochs["layers"]
    assert layers[0] == 5 > layers[-1] == model.time_steps.num_steps == model.config.num_hidden_layers
    assert {d.layer for d in history.deletions} | set(model.time_steps.origin) == set(range(5))
    assert all(d.iteration % 10 == 0 for d in history.deletions)
    assert set(optimizer.state) == set(model.parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(state["step"] == 60 for state in optimizer.state.values())
    assert history.iterations["tau"].shape == (60, 5)
    assert not np.isnan(history.iterations["loss"]).any()
    assert "deleted layer" in capsys.readouterr().out


def by_hand(model: Any, order: Tensor, penalty: Any, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """The same training in a loop of one's own."""
    inputs, targets = digits()
    handle = taulearn.optim.register_projection(optimizer, model, [penalty])
    steps = []
    model.train()
    for index in order.split(BATCH):
        optimizer.zero_grad()
        steps.append(model.time_steps.tau.tolist())
        loss = nn.functional.cross_entropy(model(inputs[index]).logits, targets[index])
        total = loss + penalty(model) if penalty.differentiated else loss
        total.backward()
        optimizer.step()
    handle.remove()
    return steps


@pytest.mark.parametrize("penalty", [ElasticNet(0.5), L1(0.5, proximal=True)], ids=["gradient", "proximal"])
def test_penalties_act_as_in_a_loop_by_hand(penalty: Any, tmp_path: Path) -> None:
    """Without clipping and with a constant learning rate, in the order of the samples."""
    model, twin = vit(1.0, constraint="simplex"), vit(1.0, constraint="simplex")
    callback = TimeStepsCallback([penalty])
    training = trainer(
        model, callback, tmp_path, num_train_epochs=1, max_grad_norm=0.0, lr_scheduler_type="constant", seed=1
    )
    seen: list[Tensor] = []
    collate = training.data_collator

    def collated(items: list[dict[str, Tensor]]) -> Any:
        seen.extend(item["pixel_values"] for item in items)
        return collate(items)

    training.data_collator = collated
    training.train()
    inputs, _ = digits()
    order = torch.tensor([next(i for i, x in enumerate(inputs) if torch.equal(x, image)) for image in seen])
    steps = by_hand(twin, order, penalty, optimizer_of(twin))
    np.testing.assert_allclose(callback.history.iterations["tau"], steps, rtol=0, atol=1e-6)
    assert model.time_steps.tau.sum().item() == pytest.approx(5.0, abs=1e-5)
    recorded = callback.history.iterations[f"penalty.{penalty.name}"]
    expected = [float(penalty.of(torch.tensor(row), model.time_steps)) for row in steps]
    np.testing.assert_allclose(recorded, expected, rtol=1e-5)


def test_after_ctrl_c_the_model_and_the_optimizer_are_the_users(tmp_path: Path) -> None:
    model = vit()
    optimizer = optimizer_of(model)
    training = trainer(model, pruning_callback(), tmp_path, optimizer=optimizer, num_train_epochs=1)
    training.add_callback(stopping(3, error=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.train()
    model.save_pretrained(tmp_path / "model")  # folded
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "save_pretrained" not in vars(taulearn.unwrap(model, discard_steps=True))


def test_nothing_stays_behind(tmp_path: Path) -> None:
    model = vit()
    optimizer = optimizer_of(model)
    guard = vars(model)["save_pretrained"]
    trainer(model, pruning_callback(), tmp_path, optimizer=optimizer, num_train_epochs=1).train()
    assert vars(model)["save_pretrained"] is guard
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_accumulated_gradients_and_counted_iterations(tmp_path: Path) -> None:
    """An iteration is a step of the optimiser, of two batches here."""
    callback = pruning_callback(every=3)
    trainer(vit(), callback, tmp_path, gradient_accumulation_steps=2, num_train_epochs=8).train()
    assert callback.history.num_iterations == 40
    assert callback.history.deletions
    assert all(d.iteration % 3 == 0 for d in callback.history.deletions)


def test_a_target_is_reached(tmp_path: Path) -> None:
    model = vit()
    callback = TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)
    trainer(model, callback, tmp_path, num_train_epochs=8).train()
    assert model.time_steps.num_steps == 3
    assert len({d.iteration for d in callback.history.deletions}) == 2


class Squares(Penalty):
    """sum_l tau_l^2, with its terms for the record."""

    name = "squares"
    columns: Mapping[str, str] = {"square": "layers"}

    def __call__(self, model: Any, inputs: Any = None, targets: Any = None, states: Any = None) -> Any:
        squares = model.time_steps.tau.square()
        return squares.sum(), {"square": squares}


def test_columns_of_a_penalty_are_recorded(tmp_path: Path) -> None:
    model = vit()
    callback = TimeStepsCallback([Squares()], Pruning(target_blocks=3), progress=False)
    trainer(model, callback, tmp_path, num_train_epochs=8).train()
    found = callback.history.iterations
    np.testing.assert_allclose(found["square"], found["tau"] ** 2, rtol=1e-6)
    np.testing.assert_allclose(found["penalty.squares"], np.nansum(found["square"], 1), rtol=1e-5)
    assert np.isnan(found["square"][-1]).sum() == 2
    assert found["weight.l1"].max() > 0.0


def test_prune_takes_the_optimizer_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Plain().network
    optimizer = optimizer_of(model)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    model(digits()[0]).sum().backward()
    wrapped.step()
    kept = copy.deepcopy(optimizer.state[model.layers[4].linear.weight])
    taulearn.prune(model, keep=[0, 2, 4], optimizer=wrapped)
    assert set(optimizer.state) == set(model.parameters())
    for name, value in optimizer.state[model.layers[2].linear.weight].items():
        assert torch.equal(value, kept[name])
    wrapped.step()


def test_weight_decay_on_the_time_steps_is_said(tmp_path: Path) -> None:
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    training = trainer(model, TimeStepsCallback(), tmp_path, optimizer=optimizer, num_train_epochs=1)
    with pytest.warns(UserWarning, match=r"shrinks the time steps by weight decay, 0\.1: .*parameter_groups"):
        training.train()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"pruning must .*got 0\.1"):
        TimeStepsCallback(pruning=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must .*got a ViTForImage.* with 0"):
        trainer(taulearn.unwrap(vit(1.0)), TimeStepsCallback(), tmp_path, optimizer=torch.optim.SGD(vit().parameters()))


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^transformers must be installed .*pip install 'taulearn\[huggingface\]'$"):
        importlib.reload(sys.modules["taulearn.integrations.huggingface"])
