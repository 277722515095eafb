"""A miniature MNIST: 6 training and 4 test images of 3 x 5 pixels, in real IDX files."""

import gzip
import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from taulearn.data.idx import IdxImages


@dataclass(frozen=True)
class Miniature:
    """The data set, its content, and the payload of each of its files by path."""

    data: IdxImages
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    payloads: dict[str, bytes]

    def write(self, root: Path, *, compressed: bool = True) -> None:
        for name, payload in self.payloads.items():
            path = root / name if compressed else (root / name).with_suffix("")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(payload) if compressed else payload)


@pytest.fixture
def miniature() -> Miniature:
    generator = np.random.default_rng(0)
    samples = {"train": 6, "test": 4}
    images = {split: generator.integers(0, 256, (n, 3, 5), dtype=np.uint8) for split, n in samples.items()}
    labels = {split: generator.integers(0, 10, n, dtype=np.uint8) for split, n in samples.items()}
    payloads, md5 = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels = struct.pack(">4I", 2051, samples[split], 3, 5) + images[split].tobytes()
        classes = struct.pack(">2I", 2049, samples[split]) + labels[split].tobytes()
        payloads[f"mini/raw/{prefix}-images-idx3-ubyte.gz"] = pixels
        payloads[f"mini/raw/{prefix}-labels-idx1-ubyte.gz"] = classes
        md5[split] = (hashlib.md5(pixels).hexdigest(), hashlib.md5(classes).hexdigest())
    data = IdxImages(
        name="mini",
        kind="images",
        samples=samples,
        shape=(1, 3, 5),
        classes=10,
        folder="mini/raw",
        md5=md5,
        mirrors=(),
    )
    return Miniature(data, images, labels, payloads)
