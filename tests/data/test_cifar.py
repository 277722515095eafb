"""CIFAR archives, small ones in the official format, with the members out of order and others between them."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from taulearn import data
from taulearn.data.cifar import CIFAR10, CIFAR100, CifarArchive

PER_MEMBER = 3


def small(official: CifarArchive) -> CifarArchive:
    """The official entry with three images per member."""
    samples = {split: PER_MEMBER * len(members) for split, members in official.members.items()}
    return replace(official, samples=samples)


def records(entry: CifarArchive) -> dict[str, bytes]:
    generator = np.random.default_rng(1)
    num_labels = len(entry.label_counts)
    content = {}
    for member in (member for members in entry.members.values() for member in members):
        table = generator.integers(0, 256, (PER_MEMBER, num_labels + 3072), dtype=np.uint8)
        table[:, :num_labels] = generator.integers(0, entry.label_counts, (PER_MEMBER, num_labels))
        content[member] = table.tobytes()
    return content


def pack(entry: CifarArchive, content: dict[str, bytes], root: Path) -> CifarArchive:
    """Write the archive and return the entry with its length and checksum."""
    path = root / entry.archive.path
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, payload in reversed({"readme.html": b"<html>", **content}.items()):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return seal(entry, path)


def seal(entry: CifarArchive, path: Path) -> CifarArchive:
    payload = path.read_bytes()
    return replace(entry, archive=replace(entry.archive, size=len(payload), md5=hashlib.md5(payload).hexdigest()))


@pytest.mark.parametrize("official", [CIFAR10, CIFAR100], ids=lambda entry: entry.name)
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_packed(official: CifarArchive, split: str, tmp_path: Path) -> None:
    content = records(small(official))
    entry = pack(small(official), content, tmp_path)
    inputs, targets = entry.read(split, tmp_path)
    joined = b"".join(content[member] for member in entry.members[split])
    table = np.frombuffer(joined, dtype=np.uint8).reshape(entry.samples[split], -1)
    num_labels = len(entry.label_counts)
    assert inputs.dtype == torch.uint8
    assert targets.dtype == torch.int64
    np.testing.assert_array_equal(inputs.numpy(), table[:, num_labels:].reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(targets.numpy(), table[:, num_labels - 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [entry.archive.path]


def test_blocks_join_seamlessly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = pack(small(CIFAR10), records(small(CIFAR10)), tmp_path)
    whole = entry.read("train", tmp_path)
    monkeypatch.setattr("taulearn.data.cifar._RECORDS_PER_BLOCK", 2)
    in_blocks = entry.read("train", tmp_path)
    assert torch.equal(whole.inputs, in_blocks.inputs)
    assert torch.equal(whole.targets, in_blocks.targets)


def test_cifar100_targets_are_the_fine_classes(tmp_path: Path) -> None:
    content = records(small(CIFAR100))
    content["cifar-100-binary/test.bin"] = b"".join(bytes([19, fine]) + bytes(3072) for fine in (99, 0, 42))
    entry = pack(small(CIFAR100), content, tmp_path)
    assert entry.read("test", tmp_path).targets.tolist() == [99, 0, 42]


def test_channels_are_planes(tmp_path: Path) -> None:
    content = records(small(CIFAR10))
    planes = bytes([4]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    content["cifar-10-batches-bin/test_batch.bin"] = planes * PER_MEMBER
    entry = pack(small(CIFAR10), content, tmp_path)
    assert entry.read("test", tmp_path).inputs[0].float().mean(dim=(1, 2)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("official", [CIFAR10, CIFAR100], ids=lambda entry: entry.name)
def test_a_label_out_of_range_is_refused(official: CifarArchive, tmp_path: Path) -> None:
    content = records(small(official))
    member = official.members["train"][-1]
    head = bytes(count - 1 for count in official.label_counts[:-1]) + bytes([official.label_counts[-1]])
    content[member] = head + content[member][len(head) :]
    entry = pack(small(official), content, tmp_path)
    with pytest.raises(data.DataError, match=rf"labels below .* in {member}, found .*taulearn data fetch cifar10"):
        entry.read("train", tmp_path)


def test_a_member_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    content = records(small(CIFAR10))
    content["cifar-10-batches-bin/test_batch.bin"] += b"x"
    entry = pack(small(CIFAR10), content, tmp_path)
    with pytest.raises(data.DataError, match=r"test_batch.bin to hold 3 records of 3073 bytes, found 9220 bytes"):
        entry.read("test", tmp_path)


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    content = records(small(CIFAR10))
    del content["cifar-10-batches-bin/data_batch_3.bin"]
    entry = pack(small(CIFAR10), content, tmp_path)
    with pytest.raises(data.DataError, match=r"expected a member cifar-10-batches-bin/data_batch_3.bin, found none"):
        entry.read("train", tmp_path)


def test_a_folder_in_place_of_a_member_is_refused(tmp_path: Path) -> None:
    entry = small(CIFAR10)
    path = tmp_path / entry.archive.path
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    with pytest.raises(data.DataError, match=r"test_batch.bin to be a file"):
        seal(entry, path).read("test", tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"), [("truncated", "a damaged one"), ("garbled", "found none"), ("no-tar", "a damaged one")]
)
def test_an_archive_that_cannot_be_unpacked_is_named(damage: str, reason: str, tmp_path: Path) -> None:
    entry = pack(small(CIFAR10), records(small(CIFAR10)), tmp_path)
    path = tmp_path / entry.archive.path
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(
        {"truncated": whole[:half], "garbled": whole[:half] + bytes(200) + whole[half + 200 :], "no-tar": b"no"}[damage]
    )
    with pytest.raises(data.DataError, match=f"expected .*{reason}.*delete the file"):
        seal(entry, path).read("train", tmp_path)


def test_the_checksum_is_compared_before_anything_is_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = pack(small(CIFAR10), records(small(CIFAR10)), tmp_path)
    path = tmp_path / entry.archive.path
    payload = bytearray(path.read_bytes())
    payload[5] ^= 1
    path.write_bytes(payload)
    monkeypatch.setattr(tarfile, "open", lambda *args, **keywords: pytest.fail("unpacked"))
    with pytest.raises(data.DataError, match=r"expected content with the md5 checksum"):
        entry.read("train", tmp_path)
