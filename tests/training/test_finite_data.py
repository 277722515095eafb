"""Data that hold NaN or infinity are named with their first sample, not blamed on the learning rate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from taulearn import fit
from taulearn.nn import resnet
from taulearn.training import Diverged
from taulearn.training.batches import TensorBatches
from taulearn.training.check_data import bad_tensor_sample
from training.support import digits, network, run_fit, sgd

X, Z = digits()


def test_sums_that_overflow_are_looked_at_again() -> None:
    large = torch.full((4, 2), 1e308, dtype=torch.float64)
    assert bad_tensor_sample(TensorBatches(large, torch.zeros(4), 2, 0)) is None
    many = torch.zeros(2_500_000, 1)
    many[2_000_003] = float("inf")
    found = bad_tensor_sample(TensorBatches(many, torch.zeros(len(many)), 2, 0))
    assert found == "the inputs of sample 2000003 hold inf: mend or drop it"


@pytest.mark.parametrize("position", [0, 1])
def test_a_loader_is_searched_when_its_loss_is_no_number(position: int, tmp_path: Path) -> None:
    """The learning rate was blamed."""
    model = resnet(1, 4, 1, 2)
    tensors = [torch.linspace(0, 1, 50).unsqueeze(1) for _ in range(2)]
    tensors[position][37] = float("nan")
    loader: Any = DataLoader(TensorDataset(*tensors), batch_size=10)
    name = ("inputs", "targets")[position]
    message = rf"not finite from iteration 4 on; the training data are the cause: the {name} of sample 37 hold nan"
    with pytest.raises(Diverged, match=message) as caught:
        fit(model, loader, loss=F.mse_loss, optimizer=sgd(model), epochs=2, progress=False, run=tmp_path / "run")
    assert "learning rate" not in str(caught.value)
    assert "checkpoint" in str(caught.value)


def test_a_learning_rate_is_still_blamed_where_data_are_sound() -> None:
    model = network()
    loader: Any = DataLoader(TensorDataset(X, Z), batch_size=50)
    with pytest.raises(Diverged, match="Lower the learning rate"):
        run_fit(model, loader, torch.optim.SGD(model.parameters(), lr=1e30))


def test_items_that_are_no_tensors_are_searched_too() -> None:
    class Items(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            return np.full(64, np.nan if i == 21 else 0.5, dtype=np.float32), i % 10

    model = network()
    with pytest.raises(Diverged, match="the inputs of sample 21 hold nan"):
        run_fit(model, Items(), sgd(model))
