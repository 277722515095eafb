"""MNIST and Fashion-MNIST: gray images in IDX files, in the folders that torchvision uses.

An IDX file is a header of big-endian 32-bit numbers, then unsigned bytes. The header is the magic number, 0x0800 plus
the number of dimensions, then the length of each dimension.

References:
    LeCun, Cortes, Burges, "The MNIST database of handwritten digits"; Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel
    image dataset for benchmarking machine learning algorithms", arXiv:1708.07747.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from .files import DataFile, read
from .samples import DataSet, Samples

_PREFIX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True, kw_only=True)
class IdxImages(DataSet):
    """Images and labels, a pair of gzipped IDX files for each split.

    Attributes:
        folder: Where the four files lie below the root, with forward slashes.
        md5: Per split, the checksums of the decompressed images and labels.
        mirrors: Addresses of folders that hold the files.

    Example:
        >>> [file.path for file in FASHION_MNIST.files("test")]
        ['FashionMNIST/raw/t10k-images-idx3-ubyte.gz', 'FashionMNIST/raw/t10k-labels-idx1-ubyte.gz']
    """

    folder: str
    md5: dict[str, tuple[str, str]]
    mirrors: tuple[str, ...]

    def files(self, split: str) -> tuple[DataFile, ...]:
        """The images and the labels of the split."""
        return tuple(self._file(split, content) for content in ("images", "labels"))

    def read(self, split: str, root: Path) -> Samples:
        """Images (n, 1, height, width), uint8, and classes (n,), int64."""
        images, labels = (read(file, file.find(root))[len(file.header) :] for file in self.files(split))
        return Samples(torch.from_numpy(images).view(-1, *self.shape), torch.from_numpy(labels).long())

    def _file(self, split: str, content: str) -> DataFile:
        shape = (self.samples[split], *self.shape[1:]) if content == "images" else (self.samples[split],)
        header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
        return DataFile(
            dataset=self.name,
            path=f"{self.folder}/{_PREFIX[split]}-{content}-idx{len(shape)}-ubyte.gz",
            size=len(header) + math.prod(shape),
            md5=self.md5[split][content == "labels"],
            mirrors=self.mirrors,
            gzipped=True,
            header=header,
        )


MNIST = IdxImages(
    name="mnist",
    kind="images",
    samples={"train": 60_000, "test": 10_000},
    shape=(1, 28, 28),
    classes=10,
    folder="MNIST/raw",
    md5={
        "train": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
        "test": ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    },
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

FASHION_MNIST = IdxImages(
    name="fashion-mnist",
    kind="images",
    samples={"train": 60_000, "test": 10_000},
    shape=(1, 28, 28),
    classes=10,
    folder="FashionMNIST/raw",
    md5={
        "train": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
        "test": ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
    },
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
)
