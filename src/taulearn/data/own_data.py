"""Data of one's own, by path: arrays (.npz), a table (.parquet, .csv), class folders of images, or a folder of splits.

Integer or text targets are classes, the distinct values in order; floating point targets are values of a regression.
Where there is no test data, a fifth of each class is kept for it, always the same samples.
"""

import contextlib
import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._errors import first_line, needs, unknown_name
from ..files import expand_user
from .files import DataError, DataFile
from .samples import DataSet, Samples

_SPLITS = ("train", "validation", "test")
_NAMES = (("inputs", "targets"), ("x", "y"), ("{}_inputs", "{}_targets"), ("x_{}", "y_{}"))
_TABLES = (".parquet", ".csv")
_FILES = (".npz", *_TABLES)
_IMAGES = (".png", ".jpg", ".jpeg")
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}
_TEST_EVERY, _FIRST_TEST = 5, 2
_DRAWN = "4 of 5 samples to train on, 1 of 5 to test on, of each class, drawn once and for all"
_MOST_LABELS = 20

Part = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Inputs and targets of a split."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnData(DataSet):
    """A data set that was read from a path, checked and split.

    Attributes:
        parts: The samples of each split.
        notes: For the record of a run: a digest of the samples, the split where it was drawn, the names of classes.
    """

    parts: Mapping[str, Samples]
    notes: Mapping[str, str]

    def files(self, split: str) -> tuple[DataFile, ...]:
        """None that could be downloaded."""
        return ()

    def read(self, split: str, root: Path) -> Samples:
        """The samples of a split."""
        return self.parts[split]


def own_data(path: str | Path, target: str | None = None) -> OwnData:
    """Read and check all that a path holds.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.npz"
        >>> np.savez(path, x=np.arange(20.0).reshape(10, 2), y=["no", "yes"] * 5)
        >>> own_data(path).samples, own_data(path).classes
        ({'train': 8, 'test': 2}, 2)
    """
    path = expand_user(path).absolute()
    read = {split: _checked(path, *part) for split, part in _read(path, target).items()}
    if len({(x.shape[1:], x.dtype, y.shape[1:], y.dtype.kind in "fU" and y.dtype.kind) for x, y in read.values()}) > 1:
        found = ", ".join(f"{split} {x.dtype} {x.shape} {y.dtype} {y.shape}" for split, (x, y) in read.items())
        raise DataError(path, f"expected splits of one shape and kind, found {found}", "write all in the same way")
    labels = None
    if next(iter(read.values()))[1].dtype.kind != "f":
        labels = np.unique(np.concatenate([y for _, y in read.values()]))
        read = {split: (x, np.searchsorted(labels, y)) for split, (x, y) in read.items()}
    drawn = "" in read
    if drawn:
        read = _split(path, *read[""], classes=labels is not None)
    parts = {split: Samples(*(torch.from_numpy(np.ascontiguousarray(a)) for a in part)) for split, part in read.items()}
    if labels is not None:
        _check_classes(path, parts["train"].targets, labels)
    inputs = parts["train"].inputs
    notes = {"digest of the data": _digest(parts)} | ({"split": _DRAWN} if drawn else {})
    if labels is not None:
        named = ", ".join(map(str, labels[:_MOST_LABELS]))
        notes["classes"] = named + (f" ... ({len(labels)} in all)" if len(labels) > _MOST_LABELS else "")
    pixels = inputs.ndim == 4 and (inputs.dtype == torch.uint8 or bool(inputs.min() >= 0 and inputs.max() <= 1))
    return OwnData(
        name=str(path),
        kind="images" if pixels else "regression" if labels is None else "classification",
        samples={split: len(part.targets) for split, part in parts.items()},
        shape=tuple(inputs.shape[1:]),
        classes=None if labels is None else len(labels),
        parts=parts,
        notes=notes,
    )


def _read(path: Path, target: str | None) -> dict[str, Part]:
    """Arrays as they are stored, by split; under "" where there are no splits."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: give a folder, a file ({', '.join(_FILES)}), or a name out of `taulearn data list`"
        )
    if path.is_dir():
        places = {
            split: place
            for split in _SPLITS
            for place in (path / split, *(path / f"{split}{ending}" for ending in _FILES))
            if place.exists()
        }
        if {"train", "test"} <= places.keys():
            parts = {split: _read(place, target) for split, place in places.items()}
            for split, part in parts.items():
                if "" not in part:
                    raise DataError(places[split], "expected one split, found several", "give its path alone")
            return {split: part[""] for split, part in parts.items()}
    ending = path.suffix.lower()
    if not path.is_dir() and ending not in _FILES:
        raise DataError(path, f"expected a folder or a file ({', '.join(_FILES)}), found {ending!r}", "convert it")
    if not path.is_dir() and ending in _TABLES:
        return {"": _table(path, target)}
    if target is not None:
        raise ValueError(
            f"target must be left out with {path}, got {target!r}: it names a column of a .parquet or .csv file"
        )
    return {"": _images(path)} if path.is_dir() else _arrays(path)


def _arrays(path: Path) -> dict[str, Part]:
    """The arrays of an .npz file, without pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_memory(path, sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as file:
            names = {name.lower(): name for name in file.files}
            for pair in _NAMES:
                pairs = {split: [name.format(split) for name in pair] for split in _SPLITS}
                pairs = {"": list(pair)} if "{}" not in pair[0] else pairs
                there = {split: each for split, each in pairs.items() if set(each) <= names.keys()}
                if "" in there or {"train", "test"} <= there.keys():
                    return {split: (file[names[x]], file[names[y]]) for split, (x, y) in there.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        remedy = "write it with numpy.savez, from arrays of numbers or text: inputs.astype('float32')"
        raise DataError(
            path, f"expected arrays without pickle, found a file with {first_line(error)!r}", remedy
        ) from error
    found = ", ".join(names.values()) or "none"
    remedy = "numpy.savez(path, inputs=.., targets=..), or train_inputs=.. and so on"
    raise DataError(path, f"expected the arrays inputs and targets (or x and y, or x_train ..), found {found}", remedy)


def _table(path: Path, target: str | None) -> Part:
    """The columns of a table: all but one are inputs."""
    with needs("parquet", "tables (.parquet, .csv)"):
        import pyarrow as pa
        from pyarrow import csv, parquet
    try:
        if path.suffix.lower() == ".csv":
            _check_memory(path, path.stat().st_size)
            table = csv.read_csv(path)
        else:
            file = parquet.ParquetFile(path)
            _check_memory(path, 8 * file.metadata.num_rows * file.metadata.num_columns)
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"expected a table, found {first_line(error)!r}", "write it anew") from error
    names = [name for name in table.column_names if not name.startswith("__index_level_")]  # pandas' row labels
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(path, f"expected columns of different names, found {twice[0]!r} twice", "rename one")
    if target is None:
        raise ValueError(f"target must be a column of {path}, got none: give one of {', '.join(map(repr, names))}")
    if target not in names:
        raise unknown_name("target", target, names)
    columns = {name: _column(path, name, table.column(name), text=name == target) for name in names}
    targets = columns.pop(target)
    if not columns:
        raise DataError(path, f"expected columns beside {target!r}, found none", "add inputs")
    return np.stack([_numbers(path, f"column {name!r}", column) for name, column in columns.items()], axis=1), targets


def _column(path: Path, name: str, column: Any, *, text: bool) -> np.ndarray[Any, Any]:
    if column.null_count:
        reason = f"expected a value in each row of column {name!r}, found {column.null_count} missing"
        raise DataError(path, reason, "fill them in, or leave the rows or the column out")
    values: np.ndarray[Any, Any] = column.to_numpy()
    if text and values.dtype == object and all(isinstance(value, str) for value in values):
        return values.astype(str)
    if values.dtype.kind not in "biuf":
        wanted = "numbers or text" if text else "numbers"
        remedy = "encode it as numbers, or leave the column out"
        raise DataError(path, f"expected {wanted} in column {name!r}, found {column.type}", remedy)
    return values


def _images(path: Path) -> Part:
    """Images of one size as bytes, and the names of their folders."""
    with needs("app", "images (Pillow)"):
        from PIL import Image
    folders = [each for each in sorted(path.iterdir()) if each.is_dir() and not each.name.startswith(".")]
    files = [file for each in folders for file in sorted(each.iterdir()) if file.suffix.lower() in _IMAGES]
    empty = [each.name for each in folders if each not in {file.parent for file in files}]
    if not files or empty:
        found = f"none in {empty[0]!r}" if empty else "no such folder"
        reason = f"expected a folder of images ({', '.join(_IMAGES)}) for each class, found {found}"
        raise DataError(path, reason, "sort the images by class, below train/ and test/ where they are split")

    def pixels(file: Path) -> np.ndarray[Any, Any]:
        try:
            with Image.open(file) as image:
                if image.mode not in _MODES:
                    reason = f"expected a grey or RGB image of 8 bits, found mode {image.mode}"
                    raise DataError(file, reason, "convert all images to one of the two")
                values = np.asarray(image.convert(_MODES[image.mode]))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(file, f"expected an image, found {first_line(error)!r}", "replace or delete it") from error
        return values.reshape(*values.shape[:2], -1).transpose(2, 0, 1)

    first = pixels(files[0])
    _check_memory(path, len(files) * first.size)
    images = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        values = pixels(file)
        if values.shape != first.shape:
            like = f"{_size(first)} as {files[0].relative_to(path)}"
            raise DataError(
                file, f"expected {like}, found {_size(values)}", "bring all images to one size and one kind"
            )
        images[i] = values
    return images, np.array([file.parent.name for file in files])


def _size(image: np.ndarray[Any, Any]) -> str:
    return f"{image.shape[2]} x {image.shape[1]} {'grey' if len(image) == 1 else 'RGB'}"


def _checked(path: Path, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> Part:
    """Inputs as bytes with channels first, or as float32; targets as classes (n,) or values (n, outputs)."""
    if inputs.ndim == 0 or inputs.shape[:1] != targets.shape[:1]:
        found = f"shapes {inputs.shape} and {targets.shape}"
        raise DataError(
            path, f"expected inputs and targets of equal number, found {found}", "write one target a sample"
        )
    if inputs.size == 0:
        raise DataError(path, f"expected samples of at least one value, found shape {inputs.shape}", "write some")
    if inputs.ndim == 3 and inputs.dtype == np.uint8:
        inputs = inputs[:, None]
    if inputs.ndim == 4 and inputs.shape[-1] in (1, 3) and inputs.shape[1] not in (1, 3):
        inputs = np.moveaxis(inputs, -1, 1)
    if inputs.ndim < 4 or inputs.dtype != np.uint8:
        inputs = _numbers(path, "inputs", inputs.reshape(len(inputs), -1) if inputs.ndim == 1 else inputs)
    kind = targets.dtype.kind
    if kind not in "biufU" or targets.ndim > 2 or targets.size == 0 or (kind != "f" and targets.size != len(targets)):
        reason = "expected a class (integer or text) for each sample, or values (floating point) of shape (n, outputs)"
        raise DataError(path, f"{reason}, found targets {targets.dtype} {targets.shape}", "convert them")
    if kind == "f":
        targets = _numbers(path, "targets", targets).reshape(len(targets), -1)
    return inputs, targets if kind == "f" else targets.reshape(-1)


def _numbers(path: Path, what: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values as float32, all of them finite."""
    if values.dtype.kind not in "biuf":
        raise DataError(path, f"expected numbers in {what}, found {values.dtype}", "convert them to numbers")
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32, copy=False)
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        row, value = bad[0][0], numbers[tuple(bad[0])]
        raise DataError(path, f"expected finite numbers in {what}, found {value} in row {row}", "fill in or leave out")
    return numbers


def _split(
    path: Path, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], *, classes: bool
) -> dict[str, Part]:
    """Four fifths and one fifth of each class."""
    if len(inputs) < 2:
        raise DataError(path, f"expected at least two samples, found {len(inputs)}", "one is needed for the test")
    shuffled = np.random.default_rng(0).permutation(len(inputs))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")] if classes else shuffled
    test = np.zeros(len(inputs), bool)
    test[by_class[min(_FIRST_TEST, len(inputs) - 1) :: _TEST_EVERY]] = True
    return {"train": (inputs[~test], targets[~test]), "test": (inputs[test], targets[test])}


def _check_classes(path: Path, train: torch.Tensor, labels: np.ndarray[Any, Any]) -> None:
    if len(labels) < 2:
        remedy = "add another class, or write values as floating point numbers"
        raise DataError(path, f"expected at least two classes, found {labels[0]!s} alone", remedy)
    unseen = np.setdiff1d(np.arange(len(labels)), train.numpy())
    if len(unseen):
        reason = f"expected samples of each class to train on, found none of {labels[unseen[0]]!s}"
        raise DataError(path, reason, "give it more samples, or leave it out; write values as floating point numbers")


def _digest(parts: Mapping[str, Samples]) -> str:
    """A digest of all samples as they are trained on, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for split, part in parts.items():
        for tensor in part:
            digest.update(f"{split} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _check_memory(path: Path, size: int) -> None:
    with contextlib.suppress(ImportError):  # psutil belongs to an extra
        import psutil

        free = psutil.virtual_memory().available
        if size > free:
            found = f"expected at most {free / 2**30:.3g} GiB, which are free in memory, found {size / 2**30:.3g}"
            raise DataError(path, found, "take a part of it, or give taulearn.fit a DataLoader that reads it in parts")
