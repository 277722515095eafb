"""Arguments of fit that are of the wrong kind: a sentence that names them, and nothing trained or written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from taulearn import Pruning, prune
from taulearn.nn import resnet
from taulearn.optim import register_projection
from taulearn.penalties import L1
from training.support import assert_same_history, assert_same_weights, digits, network, run_fit, sgd

X, Z = digits()


class Dictionaries(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        return {"x": X[i], "y": Z[i]}


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "optimizer name": ({"optimizer": "sgd"}, TypeError, r"optimizer must be an optimiser .*, got 'sgd': write"),
    "optimizer class": (
        {"optimizer": torch.optim.Adam},
        TypeError,
        r"got the class Adam: write Adam\(model\.parameters",
    ),
    "no optimizer": ({"optimizer": None}, TypeError, "optimizer must be an optimiser"),
    "penalty name": ({"penalties": ["l1"]}, TypeError, r"got 'l1': write for instance penalties=\[taulearn\.pen"),
    "penalties name": ({"penalties": "l1"}, TypeError, "penalties must be objects of taulearn.penalties, got 'l1'"),
    "penalty class": ({"penalties": [L1]}, TypeError, "got the class L1"),
    "no penalties": ({"penalties": None}, TypeError, "penalties must be objects of taulearn.penalties, got None"),
    "scheduler name": ({"scheduler": "cosine"}, TypeError, "scheduler must be a torch scheduler .* got 'cosine'"),
    "scheduler class": ({"scheduler": lr_scheduler.StepLR}, TypeError, "got the class StepLR"),
    "averaged": ({"averaged": network()}, TypeError, "averaged must be torch's AveragedModel .* got a TimeVariable"),
    "averaged of another": (
        {"averaged": AveragedModel(network(3))},
        ValueError,
        "averaged must average this model, got one whose parameters have other shapes",
    ),
    "one callback": ({"callbacks": print}, TypeError, r"callbacks must be a sequence .*got one function: write"),
    "callback name": ({"callbacks": ["stop"]}, TypeError, "callbacks must be functions of an EpochEnd, got 'stop'"),
    "metric": ({"metrics": {"acc": "accuracy"}}, TypeError, "metrics must map names to functions .* for 'acc'"),
    "clip_norm": ({"clip_norm": "1"}, ValueError, "clip_norm must be positive or None, got '1'"),
    "device": ({"device": "gpu"}, ValueError, r"device must be one that is there, got 'gpu' \(torch knows no such"),
    "meta": ({"device": "meta"}, ValueError, r"device must be one that is there, got 'meta' \(it holds no numbers\)"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_the_wrong_kind(case: str, tmp_path: Path) -> None:
    options, error, message = OPTIONS[case]
    model = network()
    with pytest.raises(error, match=message):
        run_fit(model, (X, Z), **{"optimizer": sgd(model), "run": tmp_path / "run"} | options)
    assert not (tmp_path / "run").exists()
    assert_same_weights(model, network())


DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "arrays": ((X.numpy(), Z.numpy()), TypeError, r"got tuple of 2 \(ndarray, ndarray\): convert arrays with torch\."),
    "an array": (X.numpy(), TypeError, "got ndarray: convert arrays with torch.from_numpy"),
    "lists": (([[1.0]], [1]), TypeError, r"got tuple of 2 \(list, list\): convert them with torch\.as_tensor"),
    "numbers": ((torch.tensor(1.0), torch.tensor(1)), ValueError, "inputs with one row per sample, got a single num"),
    "a number as targets": ((X, torch.tensor(1)), ValueError, "must hold targets with one row per sample"),
    "dictionaries": (
        DataLoader(Dictionaries(), batch_size=5),
        TypeError,
        "must yield a pair of tensors .* got dict with the keys 'x', 'y': let item i of the data set be",
    ),
    "dictionary items": (Dictionaries(), TypeError, "got dict with the keys 'x', 'y'"),
    "triples": (DataLoader(TensorDataset(X, Z, Z)), TypeError, r"got \w+ of 3 \(Tensor, Tensor, Tensor\)"),
    "singles": (DataLoader(TensorDataset(X)), TypeError, r"got \w+ of 1 \(Tensor\)"),
    "collated to arrays": (
        DataLoader(TensorDataset(X, Z), collate_fn=lambda items: (np.zeros((2, 64)), np.zeros(2))),
        TypeError,
        "convert arrays with torch.from_numpy",
    ),
}


@pytest.mark.parametrize("argument", ["train", "validation"])
@pytest.mark.parametrize("case", DATA)
def test_data_of_the_wrong_kind(case: str, argument: str) -> None:
    data, error, message = DATA[case]
    model = network()
    with pytest.raises(error, match=message) as caught:
        run_fit(model, **{"train": (X, Z), argument: data}, optimizer=sgd(model))
    assert str(caught.value).startswith(argument)


def test_a_single_penalty_needs_no_list() -> None:
    model, other = network(), network()
    history = run_fit(model, (X, Z), sgd(model), penalties=L1(0.1), epochs=1)
    assert_same_history(history, run_fit(other, (X, Z), sgd(other), penalties=[L1(0.1)], epochs=1))


@pytest.mark.parametrize("threshold", ["a", [0.1], True, 1.5, float("nan")], ids=repr)
def test_thresholds_that_are_none(threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        prune(network(), threshold)
    with pytest.raises(ValueError, match="threshold must lie in"):
        Pruning(threshold)


def test_an_optimizer_from_before_a_deletion_is_refused(tmp_path: Path) -> None:
    """It stopped training tau without a word."""
    model = network(init=[0.5, 0.5, 0.001, 0.5, 0.5])
    optimizer = sgd(model)
    model(X[:4]).sum().backward()
    report = prune(model, 0.01)
    assert "an optimiser made before this no longer trains tau: hand it over" in str(report)
    with pytest.raises(ValueError, match="optimizer must hold the model's time steps, got one that holds those from"):
        run_fit(model, (X, Z), optimizer, run=tmp_path / "run")
    with pytest.raises(ValueError, match="optimizer must hold the model's time steps"):
        prune(model, 0.3, optimizer=optimizer)
    run_fit(model, (X, Z), sgd(model), epochs=1)


def test_an_optimizer_that_was_told_of_a_deletion_goes_on() -> None:
    model = network(init=[0.5, 0.5, 0.001, 0.5, 0.5])
    optimizer = sgd(model)
    model(X[:4]).sum().backward()
    assert "no longer" not in str(prune(model, 0.01, optimizer=optimizer))
    before = model.time_steps.tau.tolist()
    run_fit(model, (X, Z), optimizer, epochs=1)
    assert model.time_steps.tau.tolist() != before


def test_a_model_that_is_not_trained_is_pruned_without_a_warning() -> None:
    assert "no longer" not in str(prune(network(), keep=[0, 2]))


@pytest.mark.parametrize("optimizer", [sgd, lambda model: torch.optim.LBFGS(model.parameters(), max_iter=2)])
def test_a_registered_projection_is_not_done_twice(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """fit took the proximal step, and the hook took it again."""
    model, other = network(init=0.3), network(init=0.3)
    penalty, own = L1(0.5, proximal=True), optimizer(model)
    handle = register_projection(own, model, [penalty])
    history = run_fit(model, (X, Z), own, penalties=[penalty], epochs=2)
    expected = run_fit(other, (X, Z), optimizer(other), penalties=[L1(0.5, proximal=True)], epochs=2)
    assert_same_history(history, expected)
    assert_same_weights(model, other)
    assert len(own._optimizer_step_post_hooks) == 1, "the hook is back"
    handle.remove()
    assert not own._optimizer_step_post_hooks


def test_a_registered_proximal_step_that_fit_does_not_know_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    register_projection(optimizer, model, [L1(0.5, proximal=True)])
    with pytest.raises(ValueError, match="penalties must contain those given to register_projection, whose 'l1' is"):
        run_fit(model, (X, Z), optimizer)


def rates(optimizer: torch.optim.Optimizer, seen: list[float]) -> None:
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))


def test_a_schedule_of_iterations_inside_another_steps_each_iteration() -> None:
    """OneCycleLR in a SequentialLR took a step an epoch."""
    model, seen = network(), list[float]()
    optimizer = sgd(model)
    cycle = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=11, cycle_momentum=False)
    warm = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm, cycle], milestones=[4])
    rates(optimizer, seen)
    run_fit(model, (X, Z), optimizer, scheduler=scheduler, epochs=3)
    other = sgd(network())
    cycle = lr_scheduler.OneCycleLR(other, 0.1, total_steps=11, cycle_momentum=False)
    warm = lr_scheduler.ConstantLR(other, 0.5, total_iters=4)
    scheduler, expected = lr_scheduler.SequentialLR(other, [warm, cycle], milestones=[4]), []
    for _ in range(15):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
    assert seen == expected


def test_a_cycle_that_ends_before_training_is_refused() -> None:
    model = network()
    optimizer = sgd(model)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=14)
    with pytest.raises(ValueError, match=r"scheduler must cover all 15 iterations, got OneCycleLR with total_steps=14"):
        run_fit(model, (X, Z), optimizer, scheduler=scheduler, epochs=3)


def test_a_schedule_that_is_none_of_torch(tmp_path: Path) -> None:
    model = resnet(64, 12, 10, 2)
    with pytest.raises(TypeError, match="scheduler must be a torch scheduler"):
        run_fit(model, (X, Z), sgd(model), scheduler=lambda epoch: 0.1)
