"""The data sets by name.

A new one is one more entry of CATALOGUE, which `register` makes: a `Generated` with its function, or a `DataSet` of its
own with files.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .._errors import needs, unknown_name
from ..files import is_path
from .cifar import CIFAR10, CIFAR100
from .digits import DIGITS
from .files import DataError, DataFile, check
from .idx import FASHION_MNIST, MNIST
from .maxwell import MAXWELL
from .samples import DataSet, Samples
from .synthetic import NESTED_SPHERES, PEAKS, SINE

CATALOGUE: dict[str, DataSet] = {
    entry.name: entry
    for entry in (DIGITS, MNIST, FASHION_MNIST, CIFAR10, CIFAR100, MAXWELL, PEAKS, SINE, NESTED_SPHERES)
}


class Description(NamedTuple):
    """One line of `taulearn data list`.

    Attributes:
        name: What `load` takes.
        kind: "images", "classification" or "regression".
        samples: Number of samples of each split.
        shape: Shape of one input.
        classes: Number of classes, None for a regression.
        location: "built in", the folder that holds the files, "not there", which part is there, or what is no file.

    Example:
        >>> next(row.shape for row in describe() if row.name == "cifar10")
        (3, 32, 32)
    """

    name: str
    kind: str
    samples: Mapping[str, int]
    shape: tuple[int, ...]
    classes: int | None
    location: str


def names() -> tuple[str, ...]:
    """The names that `load` takes.

    Example:
        >>> names()[:3]
        ('digits', 'mnist', 'fashion-mnist')
    """
    return tuple(CATALOGUE)


def register(entry: DataSet) -> None:
    """Add a data set, which `load` and the command line know by its name from then on, in this process.

    Args:
        entry: A `Generated`, or another `DataSet`.

    Raises:
        TypeError: If it is no `DataSet`.
        ValueError: If there is one of this name, the name reads as a path, or it has no split "train" or "test".

    Example:
        >>> import torch
        >>> from taulearn.data import Generated
        >>> def halves(split):
        ...     inputs = torch.linspace(0, 1, 8).unsqueeze(1)
        ...     return Samples(inputs, inputs / 2)
        >>> register(Generated(name="halves", kind="regression", samples={"train": 8, "test": 8}, shape=(1,),
        ...                    generate=halves))
        >>> load("halves")
        Samples(inputs (8, 1), targets (8, 1))
        >>> del CATALOGUE["halves"]
    """
    if not isinstance(entry, DataSet):
        raise TypeError(f"entry must be a DataSet, got {entry!r}: write taulearn.data.Generated(name=.., generate=..)")
    if entry.name in CATALOGUE:
        raise ValueError(f"entry must have a name of its own, got {entry.name!r}, which is there: choose another")
    if is_path(entry.name):
        raise ValueError(f"entry must have a name that is no path, got {entry.name!r}: leave out slashes and endings")
    if missing := [split for split in ("train", "test") if split not in entry.samples]:
        raise ValueError(f"samples must count the splits 'train' and 'test', got none for {missing[0]!r}")
    CATALOGUE[entry.name] = entry


def load(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    target: str | None = None,
    root: str | Path | None = None,
    download: bool = True,
    as_uint8: bool = False,
) -> Samples:
    """A named data set, or a file or folder of one's own, as a pair of tensors.

    Args:
        name: One of `names()`, or a path, with a slash or an ending: an .npz file with arrays inputs and targets, a
            .parquet or .csv file of numbers, or a folder with a folder of images for each class. Where it has no test
            data, a fifth of the samples is kept for them, always the same.
        split: "train" or "test"; peaks, sine and nested-spheres also have "validation".
        target: The column of a .parquet or .csv file that holds the targets.
        root: Folder of the data files; by default $TAULEARN_DATA, else the user's cache folder.
        download: Fetch files that are not there.
        as_uint8: Leave images that are stored as bytes (mnist, fashion-mnist, cifar10, cifar100) in uint8, 0 to 255,
            for a quarter of the memory; other data sets come as they always do.

    Returns:
        Images as (n, channels, height, width), float32 in [0, 1], with classes as (n,), int64; other inputs as
        (n, features), float32, with classes (n,), int64, or values (n, outputs), float32.

    Raises:
        ValueError: Unknown name, split or target.
        DataError: A file does not hold what it must.
        ImportError: pyarrow or Pillow is not installed, which the file needs.
        FileNotFoundError: A file is not there and `download` is False.
        ConnectionError: No mirror delivered a file that is not there.

    Example:
        >>> inputs, targets = load("digits")
        >>> inputs.shape, targets.shape
        (torch.Size([1442, 1, 8, 8]), torch.Size([1442]))
    """
    return samples_of(entry_of(name, target), split, root=root, download=download, as_uint8=as_uint8)


def samples_of(
    entry: DataSet, split: str, *, root: str | Path | None = None, download: bool = True, as_uint8: bool = False
) -> Samples:
    """The samples of a split, as :func:`load` gives them."""
    if split not in entry.samples:
        raise unknown_name("split", split, entry.samples)
    files = entry.files(split)
    folder = _root(root) if files else Path()
    if download:
        for file in files:
            _find_or_download(file, folder)
    samples = entry.read(split, folder)
    if entry.kind == "images" and not as_uint8 and not samples.inputs.is_floating_point():
        samples = samples._replace(inputs=samples.inputs.float().div_(255))
    return samples


def fetch(name: str, *, root: str | Path | None = None) -> tuple[Path, ...]:
    """Download the files of a data set that are not there, and check all of them.

    Args:
        name: One of `names()`.
        root: As in `load`.

    Returns:
        The files; none for a data set that needs no download.

    Raises:
        ValueError: Unknown name.
        DataError: A file that was there does not hold what it must.
        ConnectionError: No mirror delivered.

    Example:
        >>> fetch("digits")
        ()
    """
    files = _files(_entry(name))
    folder = _root(root) if files else Path()
    for file in files:
        _find_or_download(file, folder)
    return verify(name, root=root)


def verify(name: str, *, root: str | Path | None = None) -> tuple[Path, ...]:
    """Read the files of a data set once and compare length and checksum of their content.

    Args:
        name: One of `names()`.
        root: As in `load`.

    Returns:
        The files, which are all in order; none for a data set that needs no download.

    Raises:
        ValueError: Unknown name.
        DataError: A file does not hold what it must.
        FileNotFoundError: A file is not there.

    Example:
        >>> verify("digits")
        ()
    """
    files = _files(_entry(name))
    folder = _root(root) if files else Path()
    paths = tuple(file.find(folder) for file in files)
    for file, path in zip(files, paths, strict=True):
        check(file, path)
    return paths


def describe(*, root: str | Path | None = None) -> tuple[Description, ...]:
    """The data sets that are there and where they lie; whether the files are in order is for `verify` to say.

    Args:
        root: As in `load`.

    Returns:
        One row per data set.

    Example:
        >>> describe()[0].location
        'built in'
    """
    folder = _root(root)
    return tuple(
        Description(entry.name, entry.kind, entry.samples, entry.shape, entry.classes, _location(entry, folder))
        for entry in CATALOGUE.values()
    )


def entry_of(name: str | os.PathLike[str], target: str | None = None, argument: str = "name") -> DataSet:
    """The data set of a name, or the one that lies at a path, which is read."""
    if not isinstance(name, str) or is_path(name):
        from .own_data import own_data

        return own_data(Path(name), target)
    entry = _entry(name, argument)
    if target is not None:
        raise ValueError(
            f"target must be left out with data {name!r}, got {target!r}: it names a column of a .parquet or .csv file"
        )
    return entry


def _entry(name: str, argument: str = "name") -> DataSet:
    if name in CATALOGUE:
        return CATALOGUE[name]
    unknown = unknown_name(argument, name, CATALOGUE)
    raise ValueError(f"{unknown}; the folder is './{name}'") if Path(name).is_dir() else unknown


def _root(root: str | Path | None) -> Path:
    if root is None:
        root = os.environ.get("TAULEARN_DATA") or None
    if root is None:
        with needs("app", "the folder of downloads, where neither root nor TAULEARN_DATA is given"):
            import pooch

        root = pooch.os_cache("taulearn")
    return Path(root).expanduser()


def _files(entry: DataSet) -> tuple[DataFile, ...]:
    return tuple(dict.fromkeys(file for split in entry.samples for file in entry.files(split)))


def _find_or_download(file: DataFile, root: Path) -> Path:
    try:
        return file.find(root)
    except FileNotFoundError:
        from .download import download

        return download(file, root)


def _location(entry: DataSet, root: Path) -> str:
    files = _files(entry)
    if not files:
        return "built in"
    there = []
    for file in files:
        try:
            there.append(file.find(root))
        except FileNotFoundError:
            continue
        except DataError as error:
            return f"{error.path} is no file"
    if not there:
        return "not there"
    folder = str(there[0].parent)
    return folder if len(there) == len(files) else f"{folder} ({len(there)} of {len(files)} files)"
