"""CIFAR-10 and CIFAR-100: colour images in the official binary archives, read without extracting them to disk.

A record is one byte per label (CIFAR-10: the class; CIFAR-100: coarse, then fine class), then 3 x 32 x 32 bytes: red,
green, blue, each row by row (Krizhevsky, "Learning multiple layers of features from tiny images", 2009).
"""

import math
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import UInt8

from .files import DataFile, check
from .samples import DataSet, Samples

_RECORDS_PER_BLOCK = 1000


@dataclass(frozen=True, kw_only=True)
class CifarArchive(DataSet):
    """Images and classes in the members of one .tar.gz archive.

    Attributes:
        archive: The archive; its checksum is compared before anything is decompressed.
        members: Per split, the members of the archive in the order of the samples, of equal length.
        label_counts: Number of classes of each label of a record; the last one is the target.

    Example:
        >>> CIFAR100.members["test"]
        ('cifar-100-binary/test.bin',)
    """

    archive: DataFile
    members: Mapping[str, tuple[str, ...]]
    label_counts: tuple[int, ...]

    def files(self, split: str) -> tuple[DataFile, ...]:
        """The archive, which holds every split."""
        return (self.archive,)

    def read(self, split: str, root: Path) -> Samples:
        """Images (n, 3, 32, 32), uint8, and classes (n,), int64."""
        path = self.archive.find(root)
        check(self.archive, path)
        images = np.empty((self.samples[split], *self.shape), dtype=np.uint8)
        labels = np.empty(self.samples[split], dtype=np.uint8)
        members = self.members[split]
        per_member = self.samples[split] // len(members)
        missing = set(members)
        try:
            with tarfile.open(path, "r|gz") as archive:
                for member in archive:
                    if member.name not in missing:
                        continue
                    stream = archive.extractfile(member)
                    if stream is None:
                        raise self.archive.error(path, f"expected {member.name} to be a file, found a folder or device")
                    missing.remove(member.name)
                    start = members.index(member.name) * per_member
                    target = slice(start, start + per_member)
                    self._read_member(stream, member, path, images[target], labels[target])
                    if not missing:
                        break
        except (tarfile.TarError, EOFError, zlib.error) as error:
            reason = f"expected a complete .tar.gz archive, found a damaged one ({error})"
            raise self.archive.error(path, reason) from error
        if missing:
            raise self.archive.error(path, f"expected a member {min(missing)}, found none")
        return Samples(torch.from_numpy(images), torch.from_numpy(labels).long())

    def _read_member(
        self,
        stream: IO[bytes],
        member: tarfile.TarInfo,
        path: Path,
        images: UInt8[np.ndarray, "n 3 32 32"],
        labels: UInt8[np.ndarray, " n"],
    ) -> None:
        num_labels = len(self.label_counts)
        record = num_labels + math.prod(self.shape)
        if member.size != len(labels) * record:
            reason = (
                f"expected {member.name} to hold {len(labels)} records of {record} bytes, found {member.size} bytes"
            )
            raise self.archive.error(path, reason)
        for start in range(0, len(labels), _RECORDS_PER_BLOCK):
            target = slice(start, min(start + _RECORDS_PER_BLOCK, len(labels)))
            block = stream.read((target.stop - start) * record)
            records = np.frombuffer(block, dtype=np.uint8).reshape(-1, record)
            largest = records[:, :num_labels].max(axis=0)
            if np.any(largest >= self.label_counts):
                reason = f"expected labels below {self.label_counts} in {member.name}, found {tuple(largest.tolist())}"
                raise self.archive.error(path, reason)
            labels[target] = records[:, num_labels - 1]
            images[target] = records[:, num_labels:].reshape(-1, *self.shape)


_MIRRORS = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")

CIFAR10 = CifarArchive(
    name="cifar10",
    kind="images",
    samples={"train": 50_000, "test": 10_000},
    shape=(3, 32, 32),
    classes=10,
    archive=DataFile(
        dataset="cifar10",
        path="cifar-10-binary.tar.gz",
        size=170_052_171,
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        mirrors=_MIRRORS,
    ),
    members={
        "train": tuple(f"cifar-10-batches-bin/data_batch_{batch}.bin" for batch in range(1, 6)),
        "test": ("cifar-10-batches-bin/test_batch.bin",),
    },
    label_counts=(10,),
)

CIFAR100 = CifarArchive(
    name="cifar100",
    kind="images",
    samples={"train": 50_000, "test": 10_000},
    shape=(3, 32, 32),
    classes=100,
    archive=DataFile(
        dataset="cifar100",
        path="cifar-100-binary.tar.gz",
        size=168_513_733,
        md5="03b5dce01913d631647c71ecec9e9cb8",
        mirrors=_MIRRORS,
    ),
    members={"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
    label_counts=(20, 100),
)
