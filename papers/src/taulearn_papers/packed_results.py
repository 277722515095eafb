"""A suite's results in one small file: what is computed from it is what is computed from the members' folders."""

import contextlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taulearn.app.results import DONE, FORMAT, MEASUREMENTS, NotMeasured, Results, by_setting
from taulearn.files import is_path, write_bytes
from taulearn.training.history import Array, History

Compute = Callable[[Results], Mapping[str, Array]]
_NOTES = "notes"
_SHOWN = "shown/"


def results_in(out: str | Path) -> Results:
    """The finished members of a suite.

    Args:
        out: The suite's folder, or a file that :func:`pack` wrote.

    Raises:
        ValueError: If it is a file that is damaged or something else.

    Example:
        >>> results_in("nowhere").settings
        []
    """
    out = Path(out)
    return Results(out, Pack(out) if out.is_file() else None)


def shown_arrays(results: Results, figure: str, compute: Compute) -> dict[str, Array]:
    """Arrays that a figure shows besides records, rounded to 16 bit numbers: networks, fields.

    Args:
        results: A suite's results.
        figure: Its number.
        compute: Makes the arrays from the members' folders; not called where they were kept.

    Raises:
        NotMeasured: If only records were kept, or a member is missing.
    """
    found = results.source.arrays(figure) if isinstance(results.source, Pack) else compute(results)
    return {name: array.astype(np.float16).astype(np.float32) for name, array in found.items()}


def pack(
    results: Results, path: str | Path, shown: Mapping[str, Compute] | None = None, columns: Sequence[str] = ("*",)
) -> None:
    """Write all that is needed to judge and to draw into one file, some kilobytes for each member.

    Args:
        results: A suite's results.
        path: The file; :func:`results_in` reads it.
        shown: What makes the arrays of a figure, by its number; see :func:`shown_arrays`.
        columns: Patterns of the columns of records that are written, by their names in ``History.tensors``.
    """
    figures: dict[str, dict[str, Array]] = {}
    for number, compute in (shown or {}).items():
        with contextlib.suppress(NotMeasured):
            found = shown_arrays(results, number, compute)
            figures[number] = {name: array.astype(np.float16) for name, array in found.items()}
    records: dict[str, tuple[History | None, dict[str, Any], dict[str, Any] | None]] = {}
    for setting, seed in results.readable:
        note = dict(results.done(setting, seed))
        history = None
        if note.get("config") is not None:
            note["config"] = kept_options(results, setting, seed)
            tensors = results.history(setting, seed).tensors().items()
            history = History.from_tensors(
                {name: tensor for name, tensor in tensors if any(fnmatchcase(name, each) for each in columns)}
            )
        try:
            measured: dict[str, Any] | None = results.measurements(setting, seed)
        except NotMeasured:
            measured = None
        records[f"{setting}/seed-{seed}"] = (history, note, measured)
    write_pack(Path(path), records, figures)


def kept_options(results: Results, setting: str, seed: int) -> dict[str, Any]:
    """The options of a training that are not at their defaults; of data of one's own the name, not where they lay."""
    options = dict(results.options(setting, seed))
    return options | ({"data": f"./{Path(options['data']).name}"} if is_path(options.get("data", "")) else {})


class Pack:
    """One file that :func:`write_pack` wrote."""

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
        """The names of the members, by setting and seed."""
        return by_setting(self.notes)

    def history(self, name: str) -> History:
        """The record of a member's training."""
        if not self.columns[name]:
            raise NotMeasured(f"{name} has no record: it only measures")
        return History.from_tensors({key: torch.from_numpy(array) for key, array in self.columns[name].items()})

    def content(self, name: str, file: str) -> dict[str, Any]:
        """The note on a member, or what was measured."""
        content: dict[str, Any] | None = self.notes[name].get(file)
        if content is None:
            raise NotMeasured(f"{name} has no {file}")
        return content

    def arrays(self, figure: str) -> Mapping[str, Array]:
        """What a figure shows besides records."""
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

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "records.npz"
        >>> write_pack(file, {"a/seed-0": (None, {"seconds": 1.0}, {"error": 0.5})})
        >>> Pack(file).content("a/seed-0", MEASUREMENTS)
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
