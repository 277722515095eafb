"""Where batches come from: tensors kept whole in memory, or a loader that yields them."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Batch = tuple[Tensor, Tensor]


def _generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of one epoch's order, a function of seed and epoch alone, so that a run resumes without a generator's state."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class TensorBatches:
    """Two tensors, reshuffled each epoch; batches are gathered by one indexing operation.

    Args:
        inputs: (n, ...).
        targets: (n, ...).
        batch_size: Samples per batch; the last batch of an epoch may be smaller.
        seed: Of the order.

    Raises:
        ValueError: If they are empty or of different lengths.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"train must hold as many targets as inputs, got {len(inputs)} inputs and {len(targets)} targets")
        if len(inputs) == 0:
            raise ValueError("train must hold at least one sample, got none")
        self.inputs, self.targets = inputs, targets
        self.batch_size = min(batch_size, len(inputs))
        self.seed = seed
        self.full = len(inputs) // self.batch_size

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The order of the samples in an epoch, (n,)."""
        return torch.randperm(len(self.inputs), generator=_generator(self.seed, epoch)).to(self.inputs.device)

    def gather(self, index: Tensor) -> Batch:
        """The samples at ``index``."""
        return self.inputs.index_select(0, index), self.targets.index_select(0, index)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        for index in self.order(epoch).split(self.batch_size)[start:]:
            yield self.gather(index)

    def sample(self) -> Batch:
        """A few samples, to check shapes with."""
        return self.inputs[:2], self.targets[:2]


class LoaderBatches:
    """A torch DataLoader; its order is its own affair and follows torch's global generator.

    Args:
        loader: Yields pairs (inputs, targets).
        device: Where batches go.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        if len(loader) == 0:
            raise ValueError("train must yield at least one batch, got an empty DataLoader")

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; a loader cannot start in the middle."""
        for batch in self.loader:
            inputs, targets = batch
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def sample(self) -> Batch:
        """A few samples, without touching the loader's generators."""
        dataset = cast(Any, self.loader.dataset)
        pairs = [dataset[i] for i in range(min(2, len(dataset)))]
        inputs, targets = (torch.stack([torch.as_tensor(p[i]) for p in pairs]) for i in (0, 1))
        return inputs.to(self.device), targets.to(self.device)


def make_batches(data: Any, batch_size: int, seed: int, device: torch.device) -> TensorBatches | LoaderBatches:
    """The batches of what a user calls training data.

    Args:
        data: A pair (inputs, targets) of tensors, a torch Dataset of such pairs, or a DataLoader (whose own batch size and order count).
        batch_size: Samples per batch, >= 1.
        seed: Of the order.
        device: Where tensors are kept.

    Returns:
        Something with ``len`` (batches per epoch), ``epoch(number)`` and ``sample()``.

    Raises:
        TypeError: If ``data`` is none of these.
        ValueError: If it is empty, or batch_size < 1.

    Example:
        >>> len(make_batches((torch.zeros(10, 2), torch.zeros(10)), 4, 0, torch.device("cpu")))
        3
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    if isinstance(data, DataLoader):
        return LoaderBatches(data, device)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        if len(cast(Any, data)) == 0:
            raise ValueError("train must hold at least one sample, got an empty Dataset")
        return LoaderBatches(DataLoader(data, batch_size=batch_size, shuffle=True), device)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        return TensorBatches(data[0].to(device), data[1].to(device), batch_size, seed)
    raise TypeError(f"train must be a pair of tensors (inputs, targets), a Dataset or a DataLoader, got {type(data).__name__}")
