"""Models in bfloat16 and float16, wholly or in part: inputs go by what the model takes, records are in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taulearn
from taulearn import Pruning, parameter_groups
from taulearn.nn import resnet
from taulearn.training import Run, evaluate
from taulearn.training.history import Recorder, Row
from training.support import assert_same_history, assert_same_weights, run_fit

HALF = [torch.bfloat16, torch.float16]
X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
Z = torch.arange(24) % 4


class Mixed(nn.Module):
    """A body of one type and a head of float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).to(dtype) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        return self.head(x.float())


def built(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return resnet(8, 8, 4, 3, dtype=dtype)


def wrapped(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
    return taulearn.wrap(
        nn.Sequential(*blocks, nn.Linear(8, 4)).to(dtype), ["0", "1", "2"], example_inputs=X[:2].to(dtype)
    )


def converted(dtype: torch.dtype) -> Any:
    return wrapped(torch.float32).to(dtype)


def mixed(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return taulearn.wrap(Mixed(dtype), ["body.0", "body.1", "body.2"], example_inputs=X[:2].to(dtype))


def half_steps(dtype: torch.dtype) -> Any:
    model = mixed(dtype)
    model.time_steps.to(dtype)
    return model


MODELS = {"built": built, "wrapped": wrapped, "converted": converted, "mixed": mixed, "half steps": half_steps}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameter_groups(model, 0.1, 0.05), momentum=0.9)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_training_is_that_of_plain_torch(kind: str, dtype: torch.dtype) -> None:
    ours, plain, x = MODELS[kind](dtype), MODELS[kind](dtype), X.to(dtype)
    history = run_fit(ours, (x, Z), sgd(ours), batch_size=24, validation=(x, Z))
    optimizer, losses = sgd(plain), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), Z)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert_same_weights(ours, plain)
    assert history.iterations["loss"].dtype == history.iterations["tau"].dtype == np.float32
    np.testing.assert_array_equal(history.iterations["loss"], np.float32(losses))
    found = evaluate(ours, (x, Z), loss=F.cross_entropy)
    assert found["loss"] == history.epochs["validation.loss"][-1] == F.cross_entropy(plain(x), Z).item()


def test_a_record_of_half_precision_is_kept_in_float32() -> None:
    recorder = Recorder(Row(), 2)
    recorder.add(torch.tensor([[0.5, 0.5, 1.0, 0.25]], dtype=torch.bfloat16))
    recorder.flush((0, 1))
    assert recorder.history().iterations["tau"].tolist() == [[1.0, 0.25]]


def test_the_steps_of_wrapped_models_stay_in_float32() -> None:
    model = wrapped(torch.bfloat16)
    run_fit(model, (X.bfloat16(), Z), sgd(model))
    assert model.time_steps.values.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("argument", ["train", "validation"])
def test_inputs_of_another_type_are_told_the_right_one(kind: str, given: torch.dtype, argument: str) -> None:
    model = MODELS[kind](torch.bfloat16)
    data = {"train": (X.bfloat16(), Z), argument: (X.to(given), Z)}
    with pytest.raises(
        TypeError, match=rf"{argument} .*type torch\.bfloat16, got {given}: .*inputs\.to\(torch\.bfloat16"
    ):
        run_fit(model, data["train"], sgd(model), validation=data.get("validation"))


def test_a_model_may_take_any_type() -> None:
    class Casting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    torch.manual_seed(0)
    model = taulearn.wrap(Casting(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))), ["0", "1"])
    assert run_fit(model, (X.double(), Z), sgd(model), epochs=1, validation=(X.half(), Z)).num_iterations == 1


@pytest.mark.parametrize("kind", MODELS)
def test_images_of_bytes_come_in_the_type_of_the_model(kind: str) -> None:
    model, images = MODELS[kind](torch.bfloat16), (X * 50 + 128).clamp(0, 255).byte()
    history = run_fit(model, (images, Z), sgd(model), validation=(images, Z), pruning=Pruning(target_blocks=2))
    assert np.isfinite(history.iterations["loss"]).all()
    assert model.time_steps.num_steps == 2


@pytest.mark.parametrize("kind", ["built", "mixed"])
def test_runs_go_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    data, options = (X.bfloat16(), Z), {"batch_size": 8, "accumulate": 2}
    whole, ours = MODELS[kind](torch.bfloat16), MODELS[kind](torch.bfloat16)
    expected = run_fit(whole, data, sgd(whole), epochs=4, **options)
    run_fit(ours, data, sgd(ours), epochs=2, run=tmp_path / "run", **options)
    ours = MODELS[kind](torch.bfloat16)
    history = run_fit(ours, data, sgd(ours), epochs=4, run=tmp_path / "run", resume=True, **options)
    assert_same_weights(ours, whole)
    assert_same_history(history, expected)
    assert Run.open(tmp_path / "run").history.num_iterations == 12


def test_parts_of_a_batch_add_up() -> None:
    """In bfloat16 gradients of parts are rounded one by one; the losses are not."""
    nets = [mixed(torch.bfloat16), mixed(torch.bfloat16)]
    labels = Z.masked_fill(torch.arange(24) < 13, -100)
    histories = [
        run_fit(net, (X.bfloat16(), labels), sgd(net), batch_size=24, epochs=2, accumulate=parts)
        for net, parts in zip(nets, (4, 1), strict=True)
    ]
    np.testing.assert_allclose(histories[0].iterations["loss"], histories[1].iterations["loss"], rtol=1e-2)
    np.testing.assert_allclose(histories[0].iterations["loss"][0], histories[1].iterations["loss"][0], rtol=1e-6)


def test_inputs_in_bfloat16_under_autocast() -> None:
    model = built(torch.float32)
    assert run_fit(model, (X.bfloat16(), Z), sgd(model), epochs=1, precision="bf16").num_iterations == 1
