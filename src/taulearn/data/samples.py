"""Data sets as the rest of the package sees them: a name, its splits, and a pair of tensors for each of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Num
from torch import Tensor

from .files import DataFile

Kind = Literal["images", "classification", "regression"]


class Samples(NamedTuple):
    """Inputs and targets of one split, sample by sample along the first dimension.

    Attributes:
        inputs: Images (n, channels, height, width), float32 in [0, 1] or uint8; otherwise (n, features), float32.
        targets: Classes (n,), int64; otherwise (n, outputs), float32.

    Example:
        >>> import torch
        >>> Samples(torch.zeros(5, 2), torch.zeros(5, 1))
        Samples(inputs (5, 2), targets (5, 1))
    """

    inputs: Num[Tensor, "n ..."]
    targets: Num[Tensor, "n ..."]

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in self]
        return f"Samples(inputs {shapes[0]}, targets {shapes[1]})"


@dataclass(frozen=True, kw_only=True)
class DataSet(ABC):
    """One entry of the catalogue.

    Attributes:
        name: What the user calls it.
        kind: What inputs and targets are.
        samples: Number of samples of each split; the keys are the names of the splits.
        shape: Shape of one input.
        classes: Number of classes, None for a regression.

    Example:
        >>> from taulearn.data.catalog import CATALOGUE
        >>> CATALOGUE["mnist"].shape
        (1, 28, 28)
    """

    name: str
    kind: Kind
    samples: Mapping[str, int]
    shape: tuple[int, ...]
    classes: int | None = None

    @abstractmethod
    def files(self, split: str) -> tuple[DataFile, ...]:
        """The files that a split is read from; none where the data need no download."""

    @abstractmethod
    def read(self, split: str, root: Path) -> Samples:
        """The checked samples of a split, images as they are stored.

        Raises:
            FileNotFoundError: A file of the split is not below `root`.
            DataError: A file is damaged.
        """


@dataclass(frozen=True, kw_only=True)
class Generated(DataSet):
    """A data set that is computed, or shipped with a dependency, instead of downloaded.

    Attributes:
        generate: Makes the samples of the split of a given name, always the same ones.

    Example:
        >>> import torch
        >>> zeros = Generated(name="zeros", kind="regression", samples={"train": 3}, shape=(1,),
        ...                   generate=lambda split: Samples(torch.zeros(3, 1), torch.zeros(3, 1)))
        >>> zeros.read("train", Path()).inputs.shape
        torch.Size([3, 1])
    """

    generate: Callable[[str], Samples]

    def files(self, split: str) -> tuple[DataFile, ...]:
        """None."""
        return ()

    def read(self, split: str, root: Path) -> Samples:
        """The samples of a split; `root` is not looked at."""
        return self.generate(split)
