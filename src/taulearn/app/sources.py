"""Where the records of finished members come from: their folders, or one file that keeps a suite's results."""

import io
import json
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_bytes
from ..training.history import Array, History

FORMAT = 1
DONE = "done.json"
MEASUREMENTS = "measurements.json"
_NOTES = "notes"
_SHOWN = "shown/"


class NotMeasured(LookupError):
    """Records that a claim or a figure needs are missing."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "records are missing"


class Source(ABC):
    """Records by the names of members."""

    @abstractmethod
    def members(self) -> Mapping[str, Mapping[int, str]]:
        """The names of the finished members, by setting and seed."""

    @abstractmethod
    def history(self, name: str) -> History:
        """The record of a member's training."""

    @abstractmethod
    def content(self, name: str, file: str) -> dict[str, Any]:
        """What a member's file DONE or MEASUREMENTS holds."""

    def arrays(self, figure: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """What a figure shows besides records, by name.

        Args:
            figure: Its number.
            compute: Makes them from the members' folders.
        """
        return compute()


class FolderSource(Source):
    """The members' folders.

    Args:
        out: Folder of the suite.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def members(self) -> Mapping[str, Mapping[int, str]]:
        return _by_setting(file.parent.relative_to(self.out).as_posix() for file in self.out.glob(f"**/seed-*/{DONE}"))

    def history(self, name: str) -> History:
        try:
            return History.load(self.out / name / "history.safetensors")
        except (FileNotFoundError, ValueError) as error:
            raise NotMeasured(str(error)) from error

    def content(self, name: str, file: str) -> dict[str, Any]:
        path = self.out / name / file
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotMeasured(f"{path} is missing") from None
        except ValueError as error:
            raise NotMeasured(
                f"{path} must be a JSON file, got a damaged one ({error}): delete its folder, and the same command "
                "trains the member anew"
            ) from error
        if not isinstance(content, dict):
            raise NotMeasured(f"{path} must hold an object, got {type(content).__name__}")
        return content


class PackSource(Source):
    """One file that :func:`write_pack` wrote.

    Args:
        file: The file.

    Raises:
        ValueError: If it is damaged, something else, or of another version.
    """

    def __init__(self, file: Path) -> None:
        try:
            with np.load(file, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            notes = json.loads(arrays.pop(_NOTES).tobytes())
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{file} must hold a suite's results, got something else or a damaged file ({error})"
            ) from error
        if notes.get("format") != FORMAT:
            raise ValueError(f"{file} must have format {FORMAT}, got {notes.get('format')!r}: another version wrote it")
        self.notes: dict[str, dict[str, Any]] = notes["members"]
        self.columns: dict[str, dict[str, Array]] = {name: {} for name in self.notes}
        self.shown = {name: arrays.pop(name) for name in [*arrays] if name.startswith(_SHOWN)}
        for column, array in arrays.items():
            start = 0
            for name, shape in notes["shapes"][column]:
                length = math.prod(shape)
                self.columns[name][column] = array[start : start + length].reshape(shape)
                start += length

    def members(self) -> Mapping[str, Mapping[int, str]]:
        return _by_setting(self.notes)

    def history(self, name: str) -> History:
        if not self.columns[name]:
            raise NotMeasured(f"{name} has no record: it only measures")
        return History.from_tensors({key: torch.from_numpy(array) for key, array in self.columns[name].items()})

    def content(self, name: str, file: str) -> dict[str, Any]:
        content: dict[str, Any] | None = self.notes[name].get(file)
        if content is None:
            raise NotMeasured(f"{name} has no {file}")
        return content

    def arrays(self, figure: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        prefix = f"{_SHOWN}{figure}/"
        found = {name.removeprefix(prefix): array for name, array in self.shown.items() if name.startswith(prefix)}
        if not found:
            raise NotMeasured(
                f"figure {figure} shows more than records, and no more was kept: draw it from the suite's folder"
            )
        return found


def write_pack(
    file: Path,
    records: Mapping[str, tuple[History | None, Mapping[str, Any], Mapping[str, Any] | None]],
    shown: Mapping[str, Mapping[str, Array]] | None = None,
) -> None:
    """Write the results of many members into one compressed file of arrays, each column of all members as one array.

    Args:
        file: The file; its name ends in .npz.
        records: By name: the record, what was noted at the end, what was measured.
        shown: What figures show besides, by their numbers.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "records.npz"
        >>> write_pack(file, {"a/seed-0": (None, {"seconds": 1.0}, {"error": 0.5})})
        >>> PackSource(file).content("a/seed-0", MEASUREMENTS)
        {'error': 0.5}
    """
    parts: dict[str, dict[str, Array]] = {}
    members: dict[str, Any] = {}
    for name, (history, note, measured) in records.items():
        members[name] = {DONE: note, MEASUREMENTS: measured}
        for column, tensor in (history.tensors() if history is not None else {}).items():
            parts.setdefault(column, {})[name] = tensor.numpy()
    shapes = {column: [(name, array.shape) for name, array in arrays.items()] for column, arrays in parts.items()}
    notes = json.dumps({"format": FORMAT, "members": members, "shapes": shapes}, sort_keys=True)
    arrays = {column: np.concatenate([a.ravel() for a in each.values()]) for column, each in parts.items()}
    arrays |= {f"{_SHOWN}{key}/{name}": array for key, each in (shown or {}).items() for name, array in each.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **{_NOTES: np.frombuffer(notes.encode(), dtype=np.uint8)}, **arrays)  # type: ignore[arg-type]
    write_bytes(file, content.getvalue())


def _by_setting(names: Any) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        setting, _, seed = name.rpartition("/seed-")
        if seed.isdigit():
            found.setdefault(setting, {})[int(seed)] = name
    return found
