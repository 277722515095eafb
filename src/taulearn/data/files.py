"""Files whose content is known beforehand, by length and md5 checksum of the payload.

The payload of a gzip file is what it holds once decompressed. The checksum of the .gz file itself says nothing: the
same content can be compressed in many ways, and mirrors did so.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from jaxtyping import UInt8

_BLOCK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"


class DataError(ValueError):
    """A data file that does not hold what it must hold.

    Attributes:
        path: The file.
        reason: What was expected and what was found.

    Example:
        >>> print(DataError(Path("train.gz"), "expected 784 bytes, found 12", "delete the file"))
        train.gz: expected 784 bytes, found 12: delete the file
    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}: {remedy}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of a data set, where it lies and what it must hold.

    Attributes:
        dataset: Name of the data set, for the remedy in errors.
        path: Place below the root, with forward slashes.
        size: Bytes of the payload.
        md5: Checksum of the payload, hexadecimal.
        mirrors: Addresses of folders that hold the file, tried in turn; each ends in a slash.
        gzipped: The payload is the decompressed content. The file may then also lie there decompressed, without ".gz".
        header: Bytes that the payload begins with.

    Example:
        >>> file = DataFile(dataset="mnist", path="labels.gz", size=10008, md5="27ae3e4e", mirrors=(), gzipped=True)
        >>> file.find(Path("nowhere"))
        Traceback (most recent call last):
        FileNotFoundError: nowhere/labels.gz is not there: run `taulearn data fetch mnist`, or set TAULEARN_DATA ...
    """

    dataset: str
    path: str
    size: int
    md5: str
    mirrors: tuple[str, ...]
    gzipped: bool = False
    header: bytes = b""

    def find(self, root: Path) -> Path:
        """The file as it lies below `root`, decompressed before compressed.

        Some archives unpack to a folder of the file's name with the file in it, which is then taken.
        """
        path = root / self.path
        candidates = (path.with_suffix(""), path) if self.gzipped else (path,)
        for candidate in candidates:
            found = self._in_folder(candidate) if candidate.is_dir() else candidate
            if found is not None and found.is_file():
                return found
        for candidate in candidates:
            if found_instead := _described(candidate):
                remedy = f"put the file there, or move that away and run `taulearn data fetch {self.dataset}`"
                raise DataError(candidate, f"expected a file, found {found_instead}", remedy)
        raise FileNotFoundError(
            f"{path} is not there: run `taulearn data fetch {self.dataset}`, or set TAULEARN_DATA (or root) to the "
            f"folder that holds {self.path}"
        )

    def _in_folder(self, folder: Path) -> Path | None:
        """The file in a folder that has its name: the one of that name, or the only one."""
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
        name = Path(self.path).name
        named = [path for path in files if path.name == name or (self.gzipped and path.name == Path(name).stem)]
        if named or len(files) == 1:
            return (named or files)[0]
        return None

    def error(self, path: Path, reason: str) -> DataError:
        """The error that says that `path` is not this file."""
        return DataError(path, reason, f"delete the file and run `taulearn data fetch {self.dataset}`")


def _described(path: Path) -> str:
    """A description of something else in a file's place; empty where nothing is there."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there"
    if path.is_dir():
        return "a folder without it"
    return "neither a file nor a folder" if path.exists() else ""


def blocks(file: DataFile, path: Path) -> Iterator[bytes]:
    """The payload of `path` piece by piece; it is checked as a whole only once the iterator is exhausted.

    At most one byte more than the expected length is asked of the decompressor: a decompression bomb stays harmless.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "hello"
        >>> _ = path.write_bytes(b"hello")
        >>> file = DataFile(dataset="hello", path="hello", size=5, md5=hashlib.md5(b"hello").hexdigest(), mirrors=())
        >>> b"".join(blocks(file, path))
        b'hello'
    """
    digest = hashlib.md5(usedforsecurity=False)
    found = 0
    with _open(file, path) as stream:
        while block := _read(file, path, stream, min(_BLOCK, file.size + 1 - found)):
            if found == 0 and not block.startswith(file.header[: len(block)]):
                start = block[: len(file.header)].hex(" ", 4)
                raise file.error(path, f"expected content that begins with {file.header.hex(' ', 4)}, found {start}")
            found += len(block)
            if found > file.size:
                raise file.error(path, f"expected {file.size} bytes of content, found more")
            digest.update(block)
            yield block
    if found < file.size:
        raise file.error(path, f"expected {file.size} bytes of content, found {found}")
    if digest.hexdigest() != file.md5:
        raise file.error(path, f"expected content with the md5 checksum {file.md5}, found {digest.hexdigest()}")


def check(file: DataFile, path: Path) -> None:
    """Read `path` once and raise DataError where its payload is not the expected one.

    Example:
        >>> file = DataFile(dataset="mnist", path="labels", size=10008, md5="", mirrors=())
        >>> check(file, Path("/dev/null"))
        Traceback (most recent call last):
        taulearn.data.files.DataError: /dev/null: expected 10008 bytes of content, found 0: delete the file and run ...
    """
    for _ in blocks(file, path):
        pass


def read(file: DataFile, path: Path) -> UInt8[np.ndarray, " size"]:
    """The checked payload of `path` in one array; nothing else of its length is held meanwhile.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "hello"
        >>> _ = path.write_bytes(b"hello")
        >>> md5 = hashlib.md5(b"hello").hexdigest()
        >>> read(DataFile(dataset="hello", path="hello", size=5, md5=md5, mirrors=()), path)
        array([104, 101, 108, 108, 111], dtype=uint8)
    """
    payload = np.empty(file.size, dtype=np.uint8)
    start = 0
    for block in blocks(file, path):
        payload[start : start + len(block)] = np.frombuffer(block, dtype=np.uint8)
        start += len(block)
    return payload


def _open(file: DataFile, path: Path) -> BinaryIO:
    try:
        with path.open("rb") as stream:
            compressed = file.gzipped and stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        return cast(BinaryIO, gzip.open(path, "rb")) if compressed else path.open("rb")
    except PermissionError as error:
        raise PermissionError(
            f"{path} cannot be read ({error.strerror}): let this user read it, or set TAULEARN_DATA (or root) to "
            f"another folder and run `taulearn data fetch {file.dataset}`"
        ) from error


def _read(file: DataFile, path: Path, stream: BinaryIO, size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise file.error(path, f"expected a complete gzip file, found a damaged one ({error})") from error
