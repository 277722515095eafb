"""Models that something is put around before Trainer gets them: PEFT, torch.compile, modules of the user's."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import taulearn
from integrations.huggingface_runs import Items, Plain, TimeStepsCallback, digits, trainer, transformers, vit
from taulearn import Pruning
from taulearn.integrations.huggingface import load_checkpoint

LONG = pytest.mark.long

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "query"], **options))


def around() -> Any:
    model = lora(vit(1.0))
    model.time_steps.values.requires_grad_(True)
    return model


def inside() -> Any:
    return taulearn.wrap(lora(taulearn.unwrap(vit(1.0))), example_inputs=digits(2)[0])


class Holder(nn.Module):
    """A module of the user's, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit(1.0)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        return self.backbone(pixel_values=pixel_values, labels=labels)


def compiled() -> Any:
    return torch.compile(vit(1.0), backend="eager")


def by_target() -> TimeStepsCallback:
    return TimeStepsCallback(pruning=Pruning(target_blocks=3), progress=False)


def own(model: Any, **options: Any) -> Any:
    """A Trainer that makes the optimiser itself."""
    folder, callback = options.pop("folder"), options.pop("callback", None) or by_target()
    silent = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    defaults = {"num_train_epochs": 4, "per_device_train_batch_size": 50, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(folder), **{**silent, **defaults, **options})
    return transformers.Trainer(model, arguments, train_dataset=Items(), callbacks=[callback])


@pytest.mark.parametrize("make", [around, inside])
def test_adapters_around_and_inside(make: Any, tmp_path: Path) -> None:
    """Steps and adapters train, the rest does not; layers go with their adapters."""
    model = make()
    host = model.base_model.model if make is around else model
    before = {name: value.clone() for name, value in host.state_dict().items()}
    callback = by_target()
    own(model, folder=tmp_path, callback=callback).train()
    origin, tau = host.time_steps.origin, host.time_steps.tau
    assert len(origin) == 3
    assert bool((tau != 1).all())
    assert {d.layer for d in callback.history.deletions} | set(origin) == set(range(5))
    names = [name for name in host.state_dict() if "lora_B" in name]
    assert len(names) == 3
    assert all(bool(host.state_dict()[name].any()) for name in names)
    frozen = [name for name in before if "embeddings" in name and name in host.state_dict()]
    assert frozen
    assert all(torch.equal(before[name], host.state_dict()[name]) for name in frozen)
    assert all(p.grad is None or p.requires_grad for p in model.parameters())


def test_what_adapters_around_leave_is_saved_and_loaded(tmp_path: Path) -> None:
    model = around()
    own(model, folder=tmp_path).train()
    taulearn.save_model(model.base_model.model, tmp_path / "it")
    host = lora(taulearn.unwrap(vit(1.0))).base_model.model
    loaded = taulearn.load_model(tmp_path / "it", host=host)
    inputs = digits(4)[0]
    assert torch.equal(loaded.eval()(inputs).logits, model.eval()(pixel_values=inputs).logits)


def test_frozen_steps_are_said_before_the_first_step(tmp_path: Path) -> None:
    frozen = vit(1.0)
    frozen.time_steps.values.requires_grad_(False)
    for model in (lora(vit(1.0)), frozen):
        with pytest.warns(UserWarning, match=r"time steps do not train.*requires_grad_\(True\)"):
            own(model, folder=tmp_path, callback=TimeStepsCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        own(vit(1.0), folder=tmp_path)
        own(vit(1.0, constraint="fixed", horizon=5.0), folder=tmp_path, callback=TimeStepsCallback())


def part() -> Any:
    model = taulearn.unwrap(vit(1.0))
    taulearn.wrap(model.vit, example_inputs=digits(2)[0])
    return model


def adapted() -> Any:
    """Adapters of transformers' own."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = taulearn.unwrap(vit(1.0))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "query"]))
    return taulearn.wrap(model, example_inputs=digits(2)[0])


@pytest.mark.parametrize("make", [around, adapted, pytest.param(inside, marks=LONG), pytest.param(part, marks=LONG)])
def test_checkpoints_of_adapters_and_wrapped_parts_hold_the_steps(make: Any, tmp_path: Path) -> None:
    """They are taken for no model, and what was saved otherwise before is again after training."""

    def run(**resume: Any) -> tuple[Any, TimeStepsCallback]:
        model, callback = make(), by_target()
        own(model, folder=tmp_path, callback=callback, save_strategy="epoch").train(**resume)
        return model, callback

    model, callback = run()
    again, same = run(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert same.history.deletions == callback.history.deletions
    assert len([name for name in state if name.endswith("layernorm_before.weight")]) == 3
    fresh = make()
    load_checkpoint(fresh, tmp_path / "checkpoint-16")
    assert all(torch.equal(state[name], value) for name, value in fresh.state_dict().items())
    if make in (adapted, part):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-16", config=make().config)
    assert type(vars(model).get("save_pretrained")) is type(vars(fresh).get("save_pretrained"))


@pytest.mark.parametrize("make", [Holder, pytest.param(compiled, marks=LONG)])
def test_checkpoints_of_wrappers_are_resumed(make: Any, tmp_path: Path) -> None:
    def run(**resume: Any) -> Any:
        model = make()
        keep = {"save_strategy": "epoch", "remove_unused_columns": False}
        with torch.compiler.set_stance("force_eager"):  # the wrapper is the point
            own(model, folder=tmp_path, **keep).train(**resume)
        return model

    model = run()
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    state, same = model.state_dict(), again.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert len([name for name in state if name.endswith("layernorm_before.weight")]) == 3
    if make is Holder:
        fresh = make()
        load_checkpoint(fresh, tmp_path / "checkpoint-16")
        assert all(torch.equal(fresh.state_dict()[name], value) for name, value in state.items())


def test_averages_in_the_model_lose_the_layers_too(tmp_path: Path) -> None:
    class Averaging(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.network)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            if self.training:
                self.average.update_parameters(self.network)
            return super().forward(pixel_values, labels)

    def run(**resume: Any) -> Any:
        model = Averaging()
        callback = TimeStepsCallback(pruning=Pruning(target_blocks=3, every=3), progress=False)
        trainer(model, callback, tmp_path, save_strategy="epoch", num_train_epochs=3).train(**resume)
        return model

    model = run()
    assert model.average.module.time_steps.origin == model.network.time_steps.origin
    assert model.network.time_steps.num_steps == 3
    again = run(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_several_models_are_refused_when_trainer_is_made(tmp_path: Path) -> None:
    model = Holder()
    model.teacher = copy.deepcopy(model.backbone)
    with pytest.raises(TypeError, match=r"must contain one model .*a Holder with 2 \('backbone', 't"):
        own(model, folder=tmp_path)
