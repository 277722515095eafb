"""The 8 x 8 digits that scikit-learn ships: 1,797 images with 17 gray levels, no download.

Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
The split is stratified and needs no generator: of each class, in the order of the file, every fifth image is in the
test set (1,442 train, 355 test).
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from .samples import Generated, Samples

_TEST_EVERY = 5
_GRAY_LEVELS = 16


def digits(split: str) -> Samples:
    """Images (n, 1, 8, 8), float32 in [0, 1], and classes (n,), int64.

    Example:
        >>> inputs, targets = digits("test")
        >>> inputs.shape, targets.bincount().tolist()
        (torch.Size([355, 1, 8, 8]), [35, 36, 35, 36, 36, 36, 36, 35, 34, 36])
    """
    table = np.loadtxt(_table(), delimiter=",", dtype=np.uint8)
    labels = table[:, -1]
    rank_in_class = np.empty(len(labels), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        rank_in_class[members] = np.arange(len(members))
    chosen = (rank_in_class % _TEST_EVERY == _TEST_EVERY - 1) == (split == "test")
    images = torch.from_numpy(table[chosen, :-1]).view(-1, 1, 8, 8)
    return Samples(images.float().div_(_GRAY_LEVELS), torch.from_numpy(labels[chosen]).long())


def _table() -> Path:
    # Importing scikit-learn takes a second, reading its data file some milliseconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("digits come with scikit-learn, which is not installed: pip install scikit-learn")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


DIGITS = Generated(
    name="digits", kind="images", samples={"train": 1442, "test": 355}, shape=(1, 8, 8), classes=10, generate=digits
)
