"""Where batches come from: tensors kept whole in memory, or a loader that yields them."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from .._batches import inputs_and_targets, on_device
from .._counting import BY_SAMPLES
from .._errors import positive_integer

Batch = tuple[Any, Any]  # inputs, one tensor or several in tuples and dictionaries, and targets, or None


def _generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of one epoch's order, a function of seed and epoch alone: a run resumes without its state."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class TensorBatches:
    """Two tensors, reshuffled each epoch; batches are gathered by one indexing operation.

    Attributes:
        full: Number of batches of that size, which come first.
    """

    argument = "data"

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> None:
        self.inputs, self.targets = inputs, targets
        self.batch_size = min(batch_size, len(inputs))
        self.seed = seed
        self.full = len(inputs) // self.batch_size
        self.joined = False

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size) - self.joined

    def join_last(self, least: int) -> None:
        """Let a last batch of fewer samples than a network can take go with the one before."""
        last = _check_sizes(len(self.inputs), self.batch_size, least)
        if last and self.full == 1:
            self.batch_size = len(self.inputs)
        elif last:
            self.joined, self.full = True, self.full - 1

    def order(self, epoch: int) -> Tensor:
        """The order of the samples in an epoch, (n,); a batch of all samples needs none."""
        if self.batch_size == len(self.inputs):
            return torch.arange(len(self.inputs), device=self.inputs.device)
        return torch.randperm(len(self.inputs), generator=_generator(self.seed, epoch)).to(self.inputs.device)

    def gather(self, index: Tensor) -> Batch:
        """The samples at ``index``."""
        return self.inputs.index_select(0, index), self.targets.index_select(0, index)

    def split(self, order: Tensor) -> list[Tensor]:
        """An order, batch by batch."""
        parts = list(order.split(self.batch_size))
        return [*parts[:-2], torch.cat(parts[-2:])] if self.joined else parts

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        for index in self.split(self.order(epoch))[start:]:
            yield self.gather(index)

    def sample(self) -> Batch:
        """A few samples, to check shapes with."""
        return self.inputs[:2], self.targets[:2]


class LoaderBatches:
    """A torch DataLoader; its order is its own affair and follows its generator, or torch's global one.

    Attributes:
        counting: How the loss counts, where it is known: each batch's class numbers are checked before they leave the
            host.
        keys: Of the first batch that was seen, where batches are dictionaries; None: no batch was one.
    """

    def __init__(
        self, loader: DataLoader[Any], device: torch.device, argument: str = "train", *, own: bool = False
    ) -> None:
        self.loader, self.device, self.argument, self.own = loader, device, argument, own
        self.counting = BY_SAMPLES
        self.keys: list[str] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def join_last(self, least: int) -> None:
        """Let a last batch of fewer samples than a network can take go with the one before."""
        sampler, loader = self.loader.batch_sampler, self.loader
        if not isinstance(sampler, BatchSampler) or not isinstance(sampler.sampler, Sized):
            return  # sizes are not known
        number = len(sampler.sampler)
        if sampler.drop_last:
            number -= number % sampler.batch_size
        last = _check_sizes(number, sampler.batch_size, least, self.argument)
        if last and not self.own:
            raise ValueError(
                f"{self.argument} must not end with a batch of {last}, got {number} samples in batches of "
                f"{sampler.batch_size}: batch normalisation needs at least {least} in training. Make the DataLoader "
                "with drop_last=True, or with another batch_size"
            )
        if last:
            joined = _Joined(sampler.sampler, sampler.batch_size, drop_last=False)
            self.loader = DataLoader(loader.dataset, batch_sampler=joined, generator=loader.generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; a loader cannot start in the middle."""
        for batch in self.loader:
            inputs, targets = self._taken(batch)
            if targets is not None and targets.device.type == "cpu":
                self.counting.check(self.argument, targets, "of a batch")
            yield on_device((inputs, targets), self.device)

    def _taken(self, batch: Any) -> Batch:
        """Inputs and targets of what the loader yields; dictionaries must have the same keys in all batches."""
        if not isinstance(batch, Mapping):
            return _pair(batch, self.argument, "yield", " or a dictionary of tensors")
        keys = sorted(batch)
        self.keys = keys if self.keys is None else self.keys
        if keys != self.keys:
            raise ValueError(
                f"{self.argument} must yield dictionaries with the same keys, got {keys} after {self.keys}: let "
                "collate_fn give all batches the same"
            )
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{self.argument} must yield dictionaries of tensors, got {type(value).__name__} for {name!r}: "
                    "leave it out of the data set, or let collate_fn make a tensor of it"
                )
        return inputs_and_targets(batch, self.argument)

    def sample(self) -> Batch:
        """A few samples, without touching the loader's generators."""
        dataset = cast(Any, self.loader.dataset)
        whole = self.loader.batch_sampler is None  # the dataset's items are batches
        items = dataset[0] if whole else [dataset[i] for i in range(min(2, len(dataset)))]
        with torch.random.fork_rng([]):  # of which collate_fn may draw
            batch: Batch = on_device(self._taken(self.loader.collate_fn(items)), self.device)
        return batch


class _Joined(BatchSampler):
    """Batches of which the last two are one."""

    def __len__(self) -> int:
        return super().__len__() - 1

    def __iter__(self) -> Iterator[list[int]]:
        held: list[list[int]] = []
        for batch in super().__iter__():
            held.append(batch)
            if len(held) > 2:
                yield held.pop(0)
        yield [number for batch in held for number in batch]


def _check_sizes(number: int, batch_size: int, least: int, argument: str = "train") -> int:
    """The size of a last batch that is too small; 0 if none is. Batches that are all too small are refused."""
    why = "batch normalisation takes the statistics of each process's share of a batch in training"
    if number < least:
        raise ValueError(f"{argument} must hold at least {least} samples, got {number}: {why}")
    if batch_size < least:
        raise ValueError(f"batch_size must be at least {least}, got {batch_size}: {why}")
    return number % batch_size if number % batch_size < least else 0


def _pair(data: Any, argument: str, verb: str, otherwise: str = "") -> Batch:
    """Inputs and targets with a batch dimension, or an error that says what there is instead."""
    what = f"{argument} must {verb} a pair of tensors (inputs, targets){otherwise}"
    if not isinstance(data, tuple | list):
        remedy = ": let a DataLoader yield them" if isinstance(data, Mapping) else _conversion([data])
        raise TypeError(f"{what}, got {type(data).__name__}{remedy}")
    # of a loader, inputs may be several tensors
    inputs = tree_leaves(data[0]) if verb == "yield" and len(data) == 2 else data[:1]
    if len(data) != 2 or not inputs or not all(isinstance(t, Tensor) for t in (*inputs, data[1])):
        kinds = ", ".join(type(t).__name__ for t in data[:4]) + (", ..." if len(data) > 4 else "")
        batches = verb == "be" and all(isinstance(each, Mapping | tuple) for each in data)
        remedy = ": let DataLoader(batches, batch_size=None) yield them" if batches else _conversion(data)
        raise TypeError(f"{what}, got {type(data).__name__} of {len(data)} ({kinds}){remedy}")
    for name, tensors in (("inputs", inputs), ("targets", data[1:])):
        if any(tensor.ndim == 0 for tensor in tensors):
            raise ValueError(
                f"{argument} must hold {name} with one row per sample, got a single number: use shape (n, ...)"
            )
    return inputs_and_targets(data)


def _conversion(values: Sequence[Any]) -> str:
    if any(isinstance(value, np.ndarray) for value in values):
        return ": convert arrays with torch.from_numpy"
    return ": convert them with torch.as_tensor" if any(isinstance(value, list) for value in values) else ""


def make_batches(
    data: Any, batch_size: int, seed: int, device: torch.device, *, shuffle: bool = True, argument: str = "train"
) -> TensorBatches | LoaderBatches:
    """The batches of what a user calls training data."""
    batch_size = positive_integer("batch_size", batch_size)
    if isinstance(data, TensorDataset):
        data = data.tensors
    source = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(source, IterableDataset) or (isinstance(source, Dataset) and not hasattr(source, "__len__")):
        raise TypeError(
            f"{argument} must have a length, got the {type(source).__name__} without one: "
            "give it __len__ and __getitem__"
        )
    if isinstance(data, Dataset | DataLoader):
        if len(cast(Any, data)) == 0:
            raise ValueError(f"{argument} must hold at least one batch, got an empty {type(data).__name__}")
        if isinstance(data, Dataset):
            loader = DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=_generator(seed, 0))
            return LoaderBatches(loader, device, argument, own=True)
        return LoaderBatches(data, device, argument)
    inputs, targets = _pair(data, argument, "be", ", a Dataset or a DataLoader")
    if len(inputs) != len(targets):
        raise ValueError(
            f"{argument} must hold as many targets as inputs, got {len(inputs)} inputs and {len(targets)} targets"
        )
    if len(inputs) == 0:
        raise ValueError(f"{argument} must hold at least one sample, got none")
    return TensorBatches(inputs.to(device), targets.to(device), batch_size, seed)
