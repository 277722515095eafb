"""The embedded digits: scikit-learn's values, a fixed stratified split."""

import pytest
import torch
from sklearn.datasets import load_digits

from taulearn import data


def test_the_splits_are_scikit_learns_images() -> None:
    train, test = data.load("digits"), data.load("digits", "test")
    images, labels = load_digits(return_X_y=True)
    ours = torch.cat([torch.cat([part.inputs.reshape(-1, 64), part.targets[:, None]], dim=1) for part in (train, test)])
    theirs = torch.cat([torch.tensor(images / 16), torch.tensor(labels)[:, None]], dim=1)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_types_and_shapes() -> None:
    inputs, targets = data.load("digits")
    assert inputs.shape == (1442, 1, 8, 8)
    assert inputs.dtype == torch.float32
    assert (inputs.min().item(), inputs.max().item()) == (0, 1)
    assert targets.shape == (1442,)
    assert targets.dtype == torch.int64


def test_every_fifth_image_of_a_class_is_in_the_test_set() -> None:
    images, labels = load_digits(return_X_y=True)
    inputs, targets = data.load("digits", "test")
    sevens = torch.tensor(images[labels == 7][4::5], dtype=torch.float32) / 16
    assert torch.equal(inputs[targets == 7].reshape(-1, 64), sevens)
    train_targets = data.load("digits").targets
    share = targets.bincount() / (targets.bincount() + train_targets.bincount())
    assert share.min() > 0.19
    assert share.max() <= 0.2


def test_as_uint8_changes_nothing_here() -> None:
    assert torch.equal(data.load("digits", as_uint8=True).inputs, data.load("digits").inputs)


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        data.load("digits")
