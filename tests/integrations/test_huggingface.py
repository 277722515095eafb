"""The callback in the real Trainer: what it does against a loop by hand, resumed runs, and what it refuses."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import taulearn
from taulearn import Pruning
from taulearn.files import read_tensors
from taulearn.integrations.checkpoints import RECORD, follow_states
from taulearn.penalties import L1, ElasticNet, StageCost
from taulearn.training import History

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install 'taulearn[huggingface]'")
pytest.importorskip("accelerate", reason="pip install 'taulearn[huggingface]'")

from taulearn.integrations.huggingface import TimeStepsCallback  # noqa: E402  it needs what is asked for above

BATCH = 20


def digits(number: int = 200) -> tuple[Tensor, Tensor]:
    inputs, targets = taulearn.data.load("digits")
    return inputs[:number], targets[:number]


class Items(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Digits as Trainer wants them."""

    def __init__(self, number: int = 200) -> None:
        self.inputs, self.targets = digits(number)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.inputs[i], "labels": self.targets[i]}


def vit(init: Any = (1.2, 0.55, 1.3, 0.9, 1.25), **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config)
    return taulearn.wrap(model, example_inputs=digits(2)[0], init=init, **options)


class Plain(nn.Module):
    """A model that is none of transformers: its checkpoints are plain state dicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = taulearn.nn.resnet(64, 12, 10, 5, activation="tanh", init=[0.5, 0.05, 0.3, 0.1, 0.2])

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def optimizer_of(model: nn.Module, weight_decay: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    model = getattr(model, "network", model)
    groups = taulearn.parameter_groups(model, lr=3e-3, tau_lr=2e-2, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, **options)


def trainer(model: Any, callback: TimeStepsCallback, folder: Path, **options: Any) -> Any:
    given = options.pop("optimizer", None)
    defaults: dict[str, Any] = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **defaults | options)
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=Items(),
        callbacks=[callback],
        optimizers=(given or optimizer_of(model), None),
    )


def pruning_callback(**options: Any) -> TimeStepsCallback:
    return TimeStepsCallback([L1(0.5, proximal=True)], Pruning(0.08, **options), progress=False)


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


@pytest.mark.parametrize("make", [vit, Plain])
def test_resumed_training_ends_with_the_same_bits(make: Any, tmp_path: Path) -> None:
    """From a checkpoint before and from one after the deletion, with models that were built anew."""

    def run(**resume: Any) -> tuple[Any, History]:
        model, callback = make(), TimeStepsCallback([L1(0.5, proximal=True)], Pruning(0.08), progress=False)
        trainer(model, callback, tmp_path, num_train_epochs=6, save_strategy="epoch").train(**resume)
        return model, callback.history

    expected, record = run()
    gone = [d.iteration for d in record.deletions]
    assert gone
    assert gone[0] < 60
    for iteration in (10, max(gone)):
        folder = tmp_path / f"checkpoint-{iteration}"
        model, history = run(resume_from_checkpoint=str(folder))
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
        assert history.deletions == record.deletions
        for name in ("tau", "penalty.l1", "loss"):
            np.testing.assert_array_equal(history.iterations[name], record.iterations[name])


def test_checkpoints_hold_the_record_and_are_not_taken_for_models(tmp_path: Path) -> None:
    model, callback = vit(), pruning_callback()
    trainer(model, callback, tmp_path, save_strategy="epoch").train()
    folder = tmp_path / "checkpoint-40"
    tensors, _ = read_tensors(folder / "model.safetensors")
    record = History.from_tensors(safetensors.torch.load(tensors[RECORD].numpy().tobytes()))
    np.testing.assert_array_equal(record.iterations["tau"], callback.history.iterations["tau"])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.ViTForImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="the time steps must all be 1 for save_pretrained"):
        model.save_pretrained(tmp_path / "model")


def stopping(at: int, *, save: bool = False, error: type[BaseException] | None = None) -> Any:
    """A callback that ends the training, saves, or fails after a step."""

    class Stopping(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at:
                control.should_save = save
                control.should_training_stop = True
                if error is not None:
                    raise error

    return Stopping()


@pytest.mark.parametrize("make", [vit, Plain])
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


def test_after_ctrl_c_the_model_and_the_optimizer_are_the_users(tmp_path: Path) -> None:
    model = vit()
    optimizer = optimizer_of(model)
    training = trainer(model, pruning_callback(), tmp_path, optimizer=optimizer, num_train_epochs=1)
    training.add_callback(stopping(3, error=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.train()
    with pytest.raises(ValueError, match="the time steps must all be 1 for save_pretrained"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
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


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"pruning must be a Pruning policy, got 0\.1"):
        TimeStepsCallback(pruning=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="penalties must depend on the model alone in a callback, got 'stage_cost'"):
        TimeStepsCallback([StageCost(0.1, nn.functional.cross_entropy)])
    with pytest.raises(TypeError, match=r"model must contain one model with time steps, got a ViTForImage.* with 0"):
        trainer(taulearn.unwrap(vit(1.0)), TimeStepsCallback(), tmp_path, optimizer=torch.optim.SGD(vit().parameters()))
    callback, model = pruning_callback(), vit()
    training = trainer(model, callback, tmp_path)
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda _: 2))
    state = transformers.TrainerState(max_steps=1, num_train_epochs=1)
    with pytest.raises(ValueError, match="pruning must be None where 2 processes train in this trainer"):
        callback.on_train_begin(training.args, state, None, model=model, optimizer=training.optimizer)


def test_missing_extra() -> None:
    import subprocess
    import sys

    program = "import sys; sys.modules['transformers'] = None; import taulearn.integrations.huggingface"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: transformers must be installed for this callback: pip install 'taulearn[huggingface]'"
    )
