"""Targets and losses that do not go together are named before anything is trained or written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from taulearn.nn import resnet
from taulearn.training import evaluate
from training.support import assert_same_weights, digits, network, run_fit, sgd

X, Z = digits()


def refused(train: Any, tmp_path: Path, error: type[Exception], message: str, **options: Any) -> None:
    model = network()
    with pytest.raises(error, match=message):
        run_fit(model, train, sgd(model), run=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert_same_weights(model, network())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("argument", ["train", "validation"])
def test_class_numbers_of_another_type(dtype: torch.dtype, argument: str, tmp_path: Path) -> None:
    data = {"train": (X, Z), argument: (X, Z.to(dtype))}
    message = rf"{argument} must hold targets that the loss can compare.* got {dtype} of shape .*use targets\.long\(\)"
    refused(data["train"], tmp_path, ValueError, message, validation=data.get("validation"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_class_numbers_in_a_column(dtype: torch.dtype, tmp_path: Path) -> None:
    message = r"train must hold targets .* of shape \(2, 1\).*use targets\.squeeze\(1\)\.long\(\)"
    refused((X, Z.unsqueeze(1).to(dtype)), tmp_path, ValueError, message)


def test_one_hot_rows_of_integers(tmp_path: Path) -> None:
    message = r"use targets\.to\(torch\.float32\), or class numbers, targets\.argmax\(1\)"
    refused((X, F.one_hot(Z, 10)), tmp_path, ValueError, message)


def test_class_probabilities_and_bytes_are_targets() -> None:
    for targets in (F.one_hot(Z, 10).float(), Z.byte()):
        model = network()
        assert run_fit(model, (X, targets), sgd(model), epochs=1).num_iterations == 5


@pytest.mark.parametrize("argument", ["train", "validation"])
def test_labels_that_are_all_ignored(argument: str, tmp_path: Path) -> None:
    data = {"train": (X, Z), argument: (X, torch.full_like(Z, -100))}
    message = f"{argument} must hold a label that counts, got -100, which losses ignore, for every sample"
    refused(data["train"], tmp_path, ValueError, message, validation=data.get("validation"))


def test_a_batch_whose_labels_are_all_ignored_is_named() -> None:
    model, targets = network(), Z.clone()
    targets[::2] = -100
    with pytest.raises(ArithmeticError, match=r"training data are the cause: all labels of its batch.* are -100"):
        run_fit(model, (X, targets), sgd(model), batch_size=1)


LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (
        nn.CrossEntropyLoss(reduction="none"),
        ValueError,
        r"got shape \(2,\) for 2 samples: use reduction='mean'",
    ),
    "one number": (lambda y, z: F.cross_entropy(y, z).reshape(1), ValueError, r"loss must return a scalar.* \(1,\)"),
    "a name": ("cross_entropy", TypeError, r"loss must be a function .* torch\.nn\.functional\.cross_entropy"),
    "a short name": ("mse", TypeError, r"got 'mse': pass for instance torch\.nn\.functional\.mse_loss"),
    "a class": (nn.CrossEntropyLoss, TypeError, r"got a class: pass CrossEntropyLoss\(\)"),
    "nothing": (None, ValueError, "loss must be given with this train, got None"),
    "a float": (lambda y, z: F.cross_entropy(y, z).item(), TypeError, "loss must return a scalar tensor, got float"),
    "detached": (lambda y, z: F.cross_entropy(y, z).detach(), ValueError, "loss must be differentiable"),
    "an integer": (lambda y, z: (y.argmax(1) != z).sum(), TypeError, "loss must return a floating point scalar"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_are_none(case: str, tmp_path: Path) -> None:
    loss, error, message = LOSSES[case]
    refused((X, Z), tmp_path, error, message, loss=loss)


def test_a_loss_that_asks_for_gradients_is_tried_with_them() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if output.grad_fn is None:
            raise RuntimeError("no graph")
        return F.cross_entropy(output, target)

    model = network()
    assert run_fit(model, (X, Z), sgd(model), loss=loss, epochs=1).num_iterations == 5


def test_trying_the_loss_draws_no_random_number() -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output + 0.1 * torch.randn_like(output), target)

    model = network()
    torch.manual_seed(1)
    run_fit(model, (X[:40], Z[:40]), sgd(model), loss=noisy, epochs=1, batch_size=40)
    after = torch.rand(1)
    torch.manual_seed(1)
    torch.randn(40, 10)  # the one step
    assert torch.equal(after, torch.rand(1))


def test_labels_out_of_range_in_a_later_batch_of_a_loader() -> None:
    labels = Z.clone()
    labels[150] = 12
    model = network()
    loader = DataLoader(TensorDataset(X, labels), batch_size=40)
    with pytest.raises(ValueError, match=r"train must .*got 12 at sample 30 of a batch"):
        run_fit(model, loader, sgd(model))
    with pytest.raises(ValueError, match=r"data must .*got 12 at sample 30 of a batch"):
        evaluate(model, loader, loss=F.cross_entropy)


def test_a_single_output_has_no_accuracy() -> None:
    """Its largest output is the first for any sample, which would be right for class 0 alone."""
    data = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    assert evaluate(resnet(2, 3, 1, 2), data) == {}
    assert list(evaluate(resnet(2, 3, 2, 2), data)) == ["accuracy"]
