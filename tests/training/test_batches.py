"""Tensors, Datasets and DataLoaders as training and validation data, and the figures on them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from taulearn.training import accuracy, evaluate
from taulearn.training.batches import make_batches
from training.support import LOSS, assert_same_history, assert_same_weights, digits, network, plain_loop, run_fit, sgd

CPU = torch.device("cpu")


def test_images_kept_as_bytes_train_alike() -> None:
    inputs, targets = digits()
    images = (inputs * 255).round().to(torch.uint8)
    results = []
    for values in (images, images.float() / 255):
        model = network()
        results.append((model, run_fit(model, (values, targets), sgd(model), validation=(values[:50], targets[:50]))))
    assert_same_weights(results[0][0], results[1][0])
    assert_same_history(results[0][1], results[1][1])


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """A Dataset that is not a TensorDataset."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


def test_a_tensor_dataset_is_its_tensors() -> None:
    results = []
    for data in (digits(), list(digits()), TensorDataset(*digits())):
        model = network()
        run_fit(model, data, sgd(model), validation=data)
        results.append(model)
    assert_same_weights(results[0], results[1])
    assert_same_weights(results[0], results[2])


def test_a_dataset_is_shuffled_after_the_seed_alone() -> None:
    losses = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = network()
        torch.manual_seed(noise)
        data = Pairs(*digits())
        losses.append(run_fit(model, data, sgd(model), seed=seed, validation=data).iterations["loss"])
    assert np.array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])
    assert len(losses[0]) == 15


def test_a_loader_gives_its_own_batches() -> None:
    data = digits(190)
    ours, theirs = network(), network()
    loader = DataLoader(Pairs(*data), batch_size=40, shuffle=False)
    history = run_fit(ours, loader, sgd(ours), batch_size=7)
    plain_loop(theirs, data, sgd(theirs), [torch.arange(190)] * 3)
    assert_same_weights(ours, theirs)
    assert history.num_iterations == 15


def test_a_loader_may_collate_in_its_own_way() -> None:
    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x.flatten() for x, _ in samples]), torch.stack([z for _, z in samples])

    class Named(Pairs):
        def __getitem__(self, i: int) -> Any:
            return {"x": self.inputs[i], "z": self.targets[i]}

    model = network()
    loader = DataLoader(Named(*digits()), batch_size=40, collate_fn=lambda s: collate([(d["x"], d["z"]) for d in s]))
    assert run_fit(model, loader, sgd(model)).num_iterations == 15


def test_evaluation_does_not_disturb_training() -> None:
    histories = []
    loader = DataLoader(Pairs(*digits(50)), batch_size=10, shuffle=True)
    for validation in (None, loader, digits(50)):
        model = network(dropout=0.3)
        histories.append(run_fit(model, digits(), sgd(model), validation=validation).iterations["loss"])
        assert model.training
    assert np.array_equal(histories[0], histories[1])
    assert np.array_equal(histories[0], histories[2])


def test_metrics_by_name() -> None:
    model = network()
    metrics = {"accuracy": accuracy, "largest": lambda output, target: output.amax(1).mean()}
    held_out = digits(50)
    history = run_fit(model, digits(), sgd(model), validation=held_out, metrics=metrics)
    assert {"validation.loss", "validation.accuracy", "validation.largest"} <= history.epochs.keys()
    with torch.no_grad():
        expected = model(held_out[0]).amax(1).mean()
    assert history.epochs["validation.largest"][-1] == pytest.approx(float(expected), rel=1e-6)


def test_evaluation_weights_batches_by_their_size() -> None:
    model, data = network(), digits(130)
    assert evaluate(model, data, loss=LOSS, batch_size=100) == pytest.approx(evaluate(model, data, loss=LOSS), rel=1e-6)
    loader = DataLoader(Pairs(*data), batch_size=100)
    assert evaluate(model, loader, loss=LOSS) == pytest.approx(evaluate(model, data, loss=LOSS), rel=1e-6)
    assert evaluate(model, Pairs(*data), loss=LOSS) == pytest.approx(evaluate(model, data, loss=LOSS), rel=1e-6)


def test_regression_has_no_accuracy() -> None:
    inputs, targets = digits()
    model = network()
    data = inputs, nn.functional.one_hot(targets, 10).float()
    history = run_fit(model, data, sgd(model), loss=nn.functional.mse_loss, validation=data)
    assert "validation.accuracy" not in history.epochs
    assert history.epochs["validation.loss"].shape == (4,)


def test_batches_cover_each_sample_once() -> None:
    data = torch.arange(23).unsqueeze(1), torch.arange(23)
    batches: Any = make_batches(data, 5, 0, CPU)
    assert len(batches) == 5
    seen = [inputs.flatten() for inputs, _ in batches.epoch(0)]
    assert [len(x) for x in seen] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(23))
    rest = [inputs.flatten() for inputs, _ in batches.epoch(0, start=2)]
    assert all(torch.equal(a, b) for a, b in zip(rest, seen[2:], strict=True))
    assert not torch.equal(batches.order(0), batches.order(1))
    assert not torch.equal(batches.order(0), make_batches(data, 5, 1, CPU).order(0))
    assert len(make_batches(data, 100, 0, CPU)) == 1
