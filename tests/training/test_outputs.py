"""Networks may answer anything that the loss takes: dictionaries, tuples, dataclasses, namespaces, objects."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import taulearn
from taulearn import Pruning
from taulearn.training import EpochEnd, evaluate
from training.support import assert_same_weights, run_fit, sgd

X = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Z = (torch.arange(30) % 4).masked_fill(torch.arange(30) < 11, -100)
Pair = namedtuple("Pair", ["extra", "logits"])


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


class Ordered(OrderedDict):
    """As transformers' outputs are."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dictionary": (lambda y: {"logits": y, "nothing": None}, lambda o: o["logits"]),
    "tuple": (lambda y: (y.sum(), (y,)), lambda o: o[1][0]),
    "list": (lambda y: [y], lambda o: o[0]),
    "named tuple": (lambda y: Pair(1, y), lambda o: o.logits),
    "dataclass": (Answer, lambda o: o.logits),
    "namespace": (lambda y: SimpleNamespace(logits=y), lambda o: o.logits),
    "ordered": (lambda y: Ordered(logits=y), lambda o: o.logits),
    "channels behind": (lambda y: y.unsqueeze(1), lambda o: o.squeeze(1)),
}


class Host(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.answer(self.head(x))


def host(answer: Callable[[Tensor], Any] = lambda y: y) -> Any:
    torch.manual_seed(0)
    return taulearn.wrap(Host(answer).double(), ["blocks.0", "blocks.1", "blocks.2"], example_inputs=X[:2])


@pytest.mark.parametrize("kind", OUTPUTS)
def test_training_evaluation_and_callbacks(kind: str) -> None:
    answer, logits = OUTPUTS[kind]
    ours, plain = host(answer), host()
    ends: list[EpochEnd] = []
    options = {"batch_size": 10, "validation": (X, Z), "epochs": 2}
    history = run_fit(
        ours,
        (X, Z),
        sgd(ours),
        loss=lambda output, target: F.cross_entropy(logits(output), target),
        accumulate=2,
        callbacks=[ends.append],
        **options,
    )
    expected = run_fit(plain, (X, Z), sgd(plain), **options)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0.0, atol=1e-12)
    for name, column in expected.epochs.items():
        if name != "seconds":
            np.testing.assert_allclose(history.epochs[name], column, rtol=1e-10, err_msg=name)
    assert "validation.accuracy" in ends[-1].metrics
    share = (plain(X).argmax(1) == Z)[Z >= 0].double().mean().item()
    assert history.epochs["validation.accuracy"][-1] == pytest.approx(share)
    loss = nn.CrossEntropyLoss()
    found = evaluate(ours, (X, Z), loss=lambda output, target: loss(logits(output), target), batch_size=7)
    assert found == pytest.approx({"loss": loss(plain(X), Z).item(), "accuracy": share})
    if kind != "channels behind":
        assert evaluate(ours, (X, Z)) == {}


@pytest.mark.parametrize("kind", ["dictionary", "dataclass"])
def test_labels_out_of_range_are_named(kind: str, tmp_path: Path) -> None:
    answer, logits = OUTPUTS[kind]
    labels = Z.clone()
    labels[25] = 4

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(logits(output), target)

    model = host(answer)
    with pytest.raises(ValueError, match=r"train must .*got 4 at sample 25"):
        run_fit(model, (X, labels), sgd(model), loss=loss, run=tmp_path / "run")
    assert_same_weights(model, host(answer))
    loader = DataLoader(TensorDataset(X, labels), batch_size=15)
    with pytest.raises(ValueError, match=r"train .* got 4 at sample 10 of a batch"):
        run_fit(model, loader, sgd(model), loss=loss)
    with pytest.raises(ValueError, match=r"validation .* got 4 at sample 25"):
        run_fit(model, (X, Z), sgd(model), loss=loss, validation=(X, labels))


def test_pruning_a_host_that_answers_a_dictionary() -> None:
    answer, logits = OUTPUTS["dictionary"]
    model = host(answer)
    run_fit(
        model,
        (X, Z),
        sgd(model),
        loss=lambda output, target: F.cross_entropy(logits(output), target),
        pruning=Pruning(target_blocks=1),
        validation=(X, Z),
    )
    assert model.time_steps.num_steps == 1


def test_a_loss_without_a_gradient_is_told_whatever_the_output() -> None:
    answer, logits = OUTPUTS["dataclass"]
    model = host(answer)
    with pytest.raises(ValueError, match="loss must be differentiable"):
        run_fit(model, (X, Z), sgd(model), loss=lambda output, target: F.cross_entropy(logits(output).detach(), target))


def test_a_second_output_that_counts_too() -> None:
    """A loss of two terms is a mean over samples; its labels are known all the same."""
    model = host(lambda y: (y, y.square().mean()))

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target, ignore_index=-100) + 0.1 * output[1]

    labels = Z.clamp(min=0)
    history = run_fit(model, (X, labels), sgd(model), loss=loss, validation=(X, labels))
    share = (model(X)[0].argmax(1) == labels).double().mean().item()
    assert history.epochs["validation.accuracy"][-1] == pytest.approx(share)


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2,
        num_channels=1, num_labels=4,
    )  # fmt: skip
    model, images = transformers.ViTForImageClassification(config), torch.rand(12, 1, 4, 4)
    labels = (torch.arange(12) % 4).masked_fill(torch.arange(12) < 5, -100)
    taulearn.wrap(model, example_inputs=images[:2])
    history = run_fit(
        model,
        (images, labels),
        sgd(model),
        loss=lambda output, target: F.cross_entropy(output.logits, target),
        validation=(images, labels),
        batch_size=12,
        accumulate=3,
        epochs=1,
    )
    model.eval()
    right = F.cross_entropy(model(images).logits, labels).item()
    assert history.epochs["validation.loss"][-1] == pytest.approx(right, rel=1e-5)
    assert "validation.accuracy" in history.epochs


def test_a_frozen_normalisation_stays_frozen() -> None:
    model = taulearn.nn.resnet(2, 3, 1, 2)
    model.head = nn.Sequential(model.head, norm := nn.BatchNorm1d(1))
    norm.eval()
    evaluate(model, (torch.ones(3, 2), torch.ones(3, 1)), loss=F.mse_loss)
    assert model.training
    assert not norm.training
