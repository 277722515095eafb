"""IDX files: the content arrives bit by bit, and no damaged file passes."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from taulearn import data
from taulearn.data.idx import MNIST

IMAGES = "mini/raw/train-images-idx3-ubyte.gz"
LABELS = "mini/raw/train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_written(miniature, tmp_path: Path, split: str, compressed: bool) -> None:
    miniature.write(tmp_path, compressed=compressed)
    inputs, targets = miniature.data.read(split, tmp_path)
    assert inputs.dtype == torch.uint8
    assert targets.dtype == torch.int64
    np.testing.assert_array_equal(inputs.numpy(), miniature.images[split][:, None])
    np.testing.assert_array_equal(targets.numpy(), miniature.labels[split])


def test_a_decompressed_file_under_its_compressed_name_is_read(miniature, tmp_path: Path) -> None:
    miniature.write(tmp_path)
    (tmp_path / IMAGES).write_bytes(miniature.payloads[IMAGES])
    assert miniature.data.read("train", tmp_path).inputs.shape == (6, 1, 3, 5)


def test_samples_may_be_written_to(miniature, tmp_path: Path) -> None:
    miniature.write(tmp_path)
    inputs = miniature.data.read("train", tmp_path).inputs
    assert inputs.any()
    assert not inputs.zero_().any()


def _flip_last_bit(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda payload: b"", "expected 106 bytes of content, found 0"),
    "magic": (
        lambda payload: b"\0\0\x08\x01" + payload[4:],
        "expected content that begins with 00000803 00000006 00000003 00000005, found 00000801 ",
    ),
    "dimensions": (lambda payload: payload[:4] + b"\0\0\0\x07" + payload[8:], "found 00000803 00000007"),
    "short": (lambda payload: gzip.compress(payload[:-7]), "expected 106 bytes of content, found 99"),
    "short-header": (lambda payload: gzip.compress(payload[:5]), "expected 106 bytes of content, found 5"),
    "long": (lambda payload: gzip.compress(payload + b"x"), "expected 106 bytes of content, found more"),
    "checksum": (lambda payload: gzip.compress(_flip_last_bit(payload)), "expected content with the md5 checksum "),
    "truncated": (lambda payload: gzip.compress(payload)[:-9], "expected a complete gzip file, found a damaged one"),
    "no-trailer": (lambda payload: gzip.compress(payload)[:-8], "expected a complete gzip file, found a damaged one"),
    "crc": (lambda payload: gzip.compress(payload)[:-8] + bytes(8), "expected a complete gzip file"),
    "deflate": (lambda payload: gzip.compress(payload)[:10] + b"\xff" * 40, "expected a complete gzip file"),
    "gzip-header": (lambda payload: b"\x1f\x8b\xff" + gzip.compress(payload)[3:], "expected a complete gzip file"),
    "junk-behind": (lambda payload: gzip.compress(payload) + b"junk", "expected a complete gzip file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_with_the_remedy(miniature, tmp_path: Path, kind: str) -> None:
    miniature.write(tmp_path)
    damage, reason = DAMAGE[kind]
    (tmp_path / IMAGES).write_bytes(damage(miniature.payloads[IMAGES]))
    with pytest.raises(data.DataError) as caught:
        miniature.data.read("train", tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / IMAGES))
    assert reason in message
    assert message.endswith("delete the file and run `taulearn data fetch mini`")


def test_a_decompression_bomb_is_not_decompressed(miniature, tmp_path: Path) -> None:
    miniature.write(tmp_path)
    payload = miniature.payloads[IMAGES]
    (tmp_path / IMAGES).write_bytes(gzip.compress(payload + bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(data.DataError, match=r"expected 106 bytes of content, found more"):
        miniature.data.read("train", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_labels_are_checked_too(miniature, tmp_path: Path) -> None:
    miniature.write(tmp_path)
    (tmp_path / LABELS).write_bytes(gzip.compress(_flip_last_bit(miniature.payloads[LABELS])))
    with pytest.raises(data.DataError, match=r"train-labels-idx1-ubyte.gz: expected content with the md5 checksum"):
        miniature.data.read("train", tmp_path)


def test_real_mnist(real_data_root: Path) -> None:
    inputs, targets = data.load("mnist", root=real_data_root, download=False)
    assert inputs.shape == (60_000, 1, 28, 28)
    assert inputs.dtype == torch.float32
    assert (inputs.min().item(), inputs.max().item()) == (0, 1)
    assert inputs.mean().item() == pytest.approx(0.13066, abs=1e-5)
    assert targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert targets.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_inputs, test_targets = data.load("mnist", "test", root=real_data_root, download=False)
    assert test_inputs.shape == (10_000, 1, 28, 28)
    assert test_targets[:5].tolist() == [7, 2, 1, 0, 4]


def test_real_fashion_mnist(real_data_root: Path) -> None:
    inputs, targets = data.load("fashion-mnist", "test", root=real_data_root, download=False, as_uint8=True)
    assert inputs.dtype == torch.uint8
    assert inputs.shape == (10_000, 1, 28, 28)
    assert targets.bincount().tolist() == [1000] * 10
    scaled = data.load("fashion-mnist", "test", root=real_data_root, download=False).inputs
    assert torch.equal(scaled, inputs.float() / 255)
    assert len(data.verify("fashion-mnist", root=real_data_root)) == 4


def test_reading_holds_the_images_once(real_data_root: Path) -> None:
    tracemalloc.start()
    MNIST.read("train", real_data_root)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 47_040_016 + 4_000_000
