"""The toy problems: their formulas, and the same samples every time."""

import numpy as np
import pytest
import torch

from taulearn import data
from taulearn.data.synthetic import nested_spheres, peaks


@pytest.mark.parametrize("name", ["peaks", "sine", "nested-spheres"])
def test_splits_have_the_published_sizes_and_differ(name: str) -> None:
    splits = {split: data.load(name, split) for split in ("train", "validation", "test")}
    assert [len(samples.inputs) for samples in splits.values()] == [9000, 1000, 1000]
    assert [len(samples.targets) for samples in splits.values()] == [9000, 1000, 1000]
    assert len({samples.inputs[0, 0].item() for samples in splits.values()}) == 3
    again = data.load(name, "validation")
    assert torch.equal(again.inputs, splits["validation"].inputs)
    assert torch.equal(again.targets, splits["validation"].targets)


@pytest.mark.parametrize(("name", "features"), [("peaks", 2), ("sine", 1)])
def test_inputs_are_uniform(name: str, features: int) -> None:
    inputs, targets = data.load(name)
    assert inputs.shape == (9000, features)
    assert targets.shape == (9000, 1)
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs.abs().max() <= 3
    counts = torch.histc(inputs, bins=6, min=-3, max=3)
    assert counts.sum() == 9000 * features
    # Five standard deviations of a bin count.
    assert (counts - 1500 * features).abs().max() < 5 * (9000 * features * 5 / 36) ** 0.5


def test_sine_is_the_sine() -> None:
    inputs, targets = data.load("sine", "test")
    torch.testing.assert_close(targets, inputs.sin())


def test_peaks_has_matlabs_extrema() -> None:
    # Maximum and minimum as MATLAB's documentation and fminsearch give them.
    assert peaks(np.array([[-0.0093, 1.5814]])).item() == pytest.approx(8.1062, abs=1e-4)
    assert peaks(np.array([[0.2283, -1.6255]])).item() == pytest.approx(-6.5511, abs=1e-4)
    assert peaks(np.array([[-3.0, -3.0]])).item() == pytest.approx(6.6713e-05, abs=1e-9)
    inputs, targets = data.load("peaks", "test")
    torch.testing.assert_close(targets, torch.from_numpy(peaks(inputs.double().numpy())).float(), rtol=1e-4, atol=1e-5)


def test_the_stream_of_numbers_is_the_documented_one() -> None:
    random = np.random.Generator(np.random.Philox(key=1)).random((1000, 2))
    torch.testing.assert_close(data.load("peaks", "validation").inputs, torch.from_numpy(6 * random - 3).float())
    assert data.load("sine", "train").inputs[0, 0].item() == pytest.approx(-2.9307193756103516, abs=1e-6)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_spheres_are_nested_and_uniform_in_volume(dimension: int) -> None:
    inputs, targets = nested_spheres(4000, dimension=dimension, key=3)
    assert inputs.shape == (4000, dimension)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert targets.bincount().tolist() == [2000, 2000]
    radius = inputs.double().norm(dim=1)
    ball, shell = radius[targets == 0], radius[targets == 1]
    assert ball.max() <= 0.5 + 1e-6
    assert shell.min() >= 1 - 1e-6
    assert shell.max() <= 1.5 + 1e-6
    # The share of the volume inside a radius is uniform in (0, 1); its mean is 1/2 within five standard deviations.
    five_sigma = 5 / (12 * 2000) ** 0.5
    assert ((ball / 0.5) ** dimension).mean().item() == pytest.approx(0.5, abs=five_sigma)
    share = (shell**dimension - 1) / (1.5**dimension - 1)
    assert share.mean().item() == pytest.approx(0.5, abs=five_sigma)
    assert inputs.mean(dim=0).abs().max() < 0.1


def test_the_named_spheres_are_discs() -> None:
    inputs, targets = data.load("nested-spheres", "validation")
    assert inputs.shape == (1000, 2)
    assert targets.shape == (1000,)
    assert torch.equal(inputs, nested_spheres(1000, key=1).inputs)
