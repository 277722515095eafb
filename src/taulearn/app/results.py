"""The records of a suite's finished members, which claims, figures and tables are made from.

Records are looked at in one form, whether they come from the members' folders or from the one small file in which a
suite's results are kept: rows per iteration coarsely thinned, time steps as 16 bit numbers, all else as 32 bit numbers.
What is computed from a folder is therefore what is computed from the file.
"""

import contextlib
import io
import json
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from ..files import write_bytes
from ..training.history import Array, History
from ..training.thinned_records import thinned
from .config import TrainConfig, explain, split_hooks

FORMAT = 1
DONE = "done.json"
MEASUREMENTS = "measurements.json"
_NOTES = "notes"
_SHOWN = "shown/"

_KEPT = ("validation.accuracy", "validation.loss", "train.loss", "train.total")
_WHOLE = ("iteration", "layers", "parameters")
_LONG = 250  # epochs


class NotMeasured(LookupError):
    """Records that a claim or a figure needs are missing."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "records are missing"


class Results:
    """The finished members of a suite.

    Args:
        out: The suite's folder, or a file that :meth:`pack` wrote.

    Raises:
        ValueError: If it is a file that is damaged or something else.

    Example:
        >>> Results("nowhere").settings
        []
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self._source: Source = PackSource(self.out) if self.out.is_file() else FolderSource(self.out)
        self._histories: dict[tuple[str, int], History] = {}
        self.asked: set[str] = set()
        """The settings whose seeds were asked for; whoever wants to know what a judge looked at clears it before."""

    @cached_property
    def _members(self) -> Mapping[str, Mapping[int, str]]:
        return self._source.members()

    @property
    def settings(self) -> list[str]:
        """Settings with a finished member, sorted by name."""
        return sorted(self._members)

    def seeds(self, *settings: str) -> list[int]:
        """The seeds with which all these settings are finished.

        Args:
            *settings: Names of settings.

        Raises:
            NotMeasured: If there is none.
        """
        self.asked |= set(settings)
        common = sorted(set.intersection(*(set(self._members.get(setting, ())) for setting in settings)))
        if not common:
            missing = [setting for setting in settings if setting not in self._members]
            raise NotMeasured(
                f"no finished member of {', '.join(missing)}" if missing else f"no common seed of {', '.join(settings)}"
            )
        return common

    def has(self, setting: str, seed: int) -> bool:
        """Whether a member is finished."""
        return seed in self._members.get(setting, ())

    def folder(self, setting: str, seed: int) -> Path:
        """The folder of a finished member.

        Raises:
            NotMeasured: If it is not finished, or only its results were kept.
        """
        folder = self.out / self._name(setting, seed)
        if not folder.is_dir():
            raise NotMeasured(f"{setting}/seed-{seed} has no folder: only its results were kept")
        return folder

    def history(self, setting: str, seed: int) -> History:
        """The record of a member, in the form in which all records are looked at.

        Raises:
            NotMeasured: If it is not finished, or its record is missing, damaged or of another version.
        """
        if (setting, seed) not in self._histories:
            self.done(setting, seed)
            self._histories[setting, seed] = _in_one_form(self._source.history(self._name(setting, seed)))
        return self._histories[setting, seed]

    def measurements(self, setting: str, seed: int) -> dict[str, Any]:
        """The figures measured on a member after its training.

        Raises:
            NotMeasured: If it is not finished, or nothing was measured.
        """
        return self._source.content(self._name(setting, seed), MEASUREMENTS)

    def done(self, setting: str, seed: int) -> dict[str, Any]:
        """The note on a finished member: settings, figures on the test data, versions, seconds.

        Raises:
            NotMeasured: If it is not finished, or by another version.
        """
        content = self._source.content(self._name(setting, seed), DONE)
        if content.get("format") != FORMAT:
            found = content.get("format")
            raise NotMeasured(f"{setting}/seed-{seed} must have format {FORMAT}, got {found!r}: train the member anew")
        return content

    def config(self, setting: str, seed: int) -> TrainConfig:
        """The settings of a member.

        Raises:
            NotMeasured: If it is not finished, only measures, or its settings are those of another version.
        """
        values = self.done(setting, seed).get("config")
        if values is None:
            raise NotMeasured(f"{setting}/seed-{seed} has no settings: it only measures")
        try:
            return TrainConfig.model_validate(split_hooks(values)[0])
        except ValidationError as error:
            raise NotMeasured(f"{setting}/seed-{seed}: {explain(error)}") from error

    def options(self, setting: str, seed: int) -> dict[str, Any]:
        """The settings of a member that are not at their defaults, and the name of its hooks as one more that is true.

        Raises:
            NotMeasured: As :meth:`config`.
        """
        config = self.config(setting, seed)
        options = config.model_dump(mode="json", exclude_defaults=True, exclude={"run", "overwrite"})
        hooks = self.hooks(setting, seed)
        return options if hooks is None else options | {hooks: True}

    def hooks(self, setting: str, seed: int) -> str | None:
        """The name of the hooks with which a member was trained, if there were any."""
        return split_hooks(self.done(setting, seed).get("config") or {})[1]

    @cached_property
    def unreadable(self) -> dict[str, str]:
        """Why members cannot be looked at, by name: notes or records that are damaged or of another version."""
        found = {}
        for setting, seeds in self._members.items():
            for seed, name in seeds.items():
                try:
                    if self.done(setting, seed).get("config") is not None:
                        self.config(setting, seed)
                        self.history(setting, seed)
                except NotMeasured as reason:
                    found[name] = str(reason)
        return found

    @property
    def readable(self) -> list[tuple[str, int]]:
        """Setting and seed of the finished members that can be looked at, sorted."""
        names = ((setting, seed) for setting, seeds in sorted(self._members.items()) for seed in sorted(seeds))
        return [(setting, seed) for setting, seed in names if self._name(setting, seed) not in self.unreadable]

    def arrays(self, figure: str, compute: "Callable[[Results], Mapping[str, Array]]") -> dict[str, Array]:
        """Arrays that a figure shows besides records, rounded to 16 bit numbers: networks, fields.

        Args:
            figure: Its number.
            compute: Makes the arrays from the members' folders; not called where they were kept.

        Raises:
            NotMeasured: If only records were kept, or a member is missing.
        """
        found = self._source.arrays(figure, lambda: compute(self))
        return {name: array.astype(np.float16).astype(np.float32) for name, array in found.items()}

    def pack(
        self, path: str | Path, shown: "Mapping[str, Callable[[Results], Mapping[str, Array]]] | None" = None
    ) -> None:
        """Write all that is needed to judge and to draw into one file, some kilobytes for each member.

        Args:
            path: The file; ``Results(path)`` reads it.
            shown: What makes the arrays of a figure, by its number; see :meth:`arrays`.
        """
        figures: dict[str, dict[str, Array]] = {}
        for number, compute in (shown or {}).items():
            with contextlib.suppress(NotMeasured):
                arrays = self.arrays(number, compute)
                figures[number] = {name: array.astype(np.float16) for name, array in arrays.items()}
        records: dict[str, tuple[History | None, dict[str, Any], dict[str, Any] | None]] = {}
        for setting, seed in self.readable:
            note = dict(self.done(setting, seed))
            history = None
            if note.get("config") is not None:
                note["config"] = self.options(setting, seed)
                history = self.history(setting, seed)
            try:
                measured: dict[str, Any] | None = self.measurements(setting, seed)
            except NotMeasured:
                measured = None
            records[f"{setting}/seed-{seed}"] = (history, note, measured)
        write_pack(Path(path), records, figures)

    def _name(self, setting: str, seed: int) -> str:
        try:
            return self._members[setting][seed]
        except KeyError:
            raise NotMeasured(f"{setting}/seed-{seed} is not finished") from None


def _in_one_form(history: History) -> History:
    """Thinned, with the columns that are kept, rounded as they are kept."""
    small = thinned(history, coarse=True)
    iterations: dict[str, Array] = {
        name: column.astype(np.float16) for name, column in small.iterations.items() if name in ("tau", "raw_tau")
    }
    if "iteration" in small.iterations:
        iterations["iteration"] = small.iterations["iteration"].astype(np.int32)
    epochs: dict[str, Array] = {name: _rounded(small.epochs[name]) for name in _KEPT if name in small.epochs}
    epochs |= {name: small.epochs[name].astype(np.int32) for name in _WHOLE if name in small.epochs}
    return History(iterations, epochs, list(small.deletions), list(small.insertions))


def _rounded(column: Array) -> Array:
    """A column per epoch in float32; a long one to three digits, which take a third of the space when compressed."""
    found: Array = column.astype(np.float32)
    if len(found) > _LONG:
        found = (found.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    return found


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
        """The contents of a member's file DONE or MEASUREMENTS."""

    def arrays(self, figure: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """Arrays that a figure shows besides records, by name."""
        return compute()


class FolderSource(Source):
    """The members' folders."""

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
