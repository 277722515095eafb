"""A last batch of one sample, of which batch normalisation has no statistics: joined to the one before, or refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

import taulearn
from taulearn import Pruning
from taulearn.training.batches import TensorBatches
from training.support import Crash, assert_same_history, assert_same_weights, crash_after, run_fit, sgd

X = torch.randn(41, 8, generator=torch.Generator().manual_seed(0))
Z = torch.arange(41) % 3


class Pairs(Dataset[Any]):
    """Data that are no tensors."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i], Z[i]


class Images(nn.Module):
    """(n, 8) as images of two channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, 2, 2))


def normalised() -> Any:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(3))
    return taulearn.wrap(nn.Sequential(*blocks, nn.Linear(8, 3)), ["0", "1", "2"])


def over_pixels() -> Any:
    """Batch normalisation that finds several values of a channel in a single sample."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(2))
    return taulearn.wrap(nn.Sequential(Images(), *blocks, nn.Flatten(), nn.Linear(8, 3)), ["1", "2"])


def over_one_pixel() -> Any:
    """The same where a single pixel is left."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(2))
    return taulearn.wrap(nn.Sequential(Images(), nn.AvgPool2d(2), *blocks, nn.Flatten(), nn.Linear(2, 3)), ["2", "3"])


def sizes_seen(model: nn.Module) -> list[int]:
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])) if module.training else None)
    return sizes


@pytest.mark.parametrize("data", [(X, Z), Pairs(), TensorDataset(X, Z)], ids=["tensors", "Dataset", "TensorDataset"])
def test_a_single_last_sample_goes_with_the_batch_before(data: Any) -> None:
    model = normalised()
    sizes = sizes_seen(model)
    history = run_fit(model, data, sgd(model), batch_size=10, epochs=2)
    assert sizes == [10, 10, 10, 11] * 2
    assert history.num_iterations == 8


def test_joined_batches_hold_each_sample_once() -> None:
    batches = TensorBatches(X, Z, 10, seed=3)
    batches.join_last(2)
    found = list(batches.epoch(1))
    assert [len(z) for _, z in found] == [10, 10, 10, 11]
    assert (batches.full, len(batches)) == (3, 4)
    assert torch.equal(torch.cat([x for x, _ in found]), X[batches.order(1)])
    assert torch.equal(torch.cat([x for x, _ in batches.epoch(1, start=3)]), found[3][0])


def test_one_pixel_is_one_value_and_several_are_not() -> None:
    for model, sizes in ((over_one_pixel(), [10, 10, 10, 11]), (over_pixels(), [10, 10, 10, 10, 1])):
        found = sizes_seen(model)
        run_fit(model, (X, Z), sgd(model), batch_size=10, epochs=1)
        assert found == sizes


def test_all_but_one_in_a_batch_are_one_batch() -> None:
    model = normalised()
    sizes = sizes_seen(model)
    run_fit(model, (X, Z), sgd(model), batch_size=40, epochs=1)
    assert sizes == [41]


def test_no_other_model_is_touched() -> None:
    torch.manual_seed(0)
    model = taulearn.wrap(
        nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))), ["0", "1"]
    )
    sizes = sizes_seen(model)
    run_fit(model, (X, Z), sgd(model), batch_size=10, epochs=1)
    assert sizes == [10, 10, 10, 10, 1]


def test_frozen_statistics_are_not_touched() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Any:
            return super().train(False)

    torch.manual_seed(0)
    model = taulearn.wrap(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Frozen(8)) for _ in range(2))), ["0", "1"])
    model.train()
    sizes = sizes_seen(model)
    run_fit(model, (X, Z), sgd(model), batch_size=10, epochs=1)
    assert sizes == [10, 10, 10, 10, 1]


def test_parts_have_two_samples_at_least() -> None:
    model = normalised()
    sizes = sizes_seen(model)
    run_fit(model, (X, Z), sgd(model), batch_size=10, epochs=1, accumulate=10)
    assert sizes == [2] * 15 + [3, 2, 2, 2, 2]


def test_the_numbers_of_iterations_agree() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(taulearn.parameter_groups(model, 0.1))
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
    history = run_fit(
        model, (X, Z), optimizer, batch_size=10, scheduler=scheduler, pruning=Pruning(target_blocks=2), epochs=3
    )
    assert history.num_iterations == 12
    assert scheduler.last_epoch == 12
    assert model.time_steps.num_steps == 2


@pytest.mark.parametrize("data", [(X, Z), Pairs()], ids=["tensors", "Dataset"])
def test_a_run_goes_on_to_the_bit(data: Any, tmp_path: Path) -> None:
    ours, whole = normalised(), normalised()
    expected = run_fit(whole, data, sgd(whole), batch_size=10)
    with pytest.raises(Crash):
        run_fit(ours, data, sgd(ours), batch_size=10, run=tmp_path / "run", callbacks=[crash_after(2)])
    ours = normalised()
    history = run_fit(ours, data, sgd(ours), batch_size=10, run=tmp_path / "run", resume=True)
    assert_same_weights(ours, whole)
    assert_same_history(history, expected)


def test_loaders_that_leave_the_sample_out() -> None:
    for loader in (DataLoader(Pairs(), batch_size=10, drop_last=True), DataLoader(Pairs(), batch_size=41)):
        model = normalised()
        sizes = sizes_seen(model)
        run_fit(model, loader, sgd(model), epochs=1)
        assert sizes == [size for size, _ in itertools.groupby(sizes) for _ in range(len(loader))]
        assert min(sizes) > 1
