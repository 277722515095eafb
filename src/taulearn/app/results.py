"""The records of a sweep's finished members, which tables and reports are made from.

Records are looked at in one form, small enough to be kept in one file for many members (taulearn_papers does): rows per
iteration coarsely thinned, time steps as 16 bit numbers, all else as 32 bit numbers.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import ValidationError

from ..training.history import Array, History
from ..training.thinned_records import thinned
from .config import TrainConfig, explain, split_hooks

FORMAT = 1
DONE = "done.json"
MEASUREMENTS = "measurements.json"

_KEPT = ("validation.accuracy", "validation.loss", "train.loss", "train.total")
_WHOLE = ("iteration", "layers", "parameters")
_LONG = 250  # epochs


class NotMeasured(LookupError):
    """Records that a claim or a figure needs are missing."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "records are missing"


class Source(Protocol):
    """Where the records of members are, by the names of members."""

    def members(self) -> Mapping[str, Mapping[int, str]]:
        """The names of the finished members, by setting and seed."""

    def history(self, name: str) -> History:
        """The record of a member's training."""

    def content(self, name: str, file: str) -> dict[str, Any]:
        """The contents of a member's file DONE or MEASUREMENTS."""


class Results:
    """The finished members of a sweep.

    Args:
        out: The folder in which they were trained.
        source: Where their records are. None: in the members' folders.

    Example:
        >>> Results("nowhere").settings
        []
    """

    def __init__(self, out: str | Path, source: Source | None = None) -> None:
        self.out = Path(out)
        self.source: Source = Folders(self.out) if source is None else source
        self._histories: dict[tuple[str, int], History] = {}
        self.asked: set[str] = set()
        """The settings whose seeds were asked for; whoever wants to know what a judge looked at clears it before."""

    @cached_property
    def _members(self) -> Mapping[str, Mapping[int, str]]:
        return self.source.members()

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
            self._histories[setting, seed] = _in_one_form(self.source.history(self._name(setting, seed)))
        return self._histories[setting, seed]

    def measurements(self, setting: str, seed: int) -> dict[str, Any]:
        """The figures measured on a member after its training.

        Raises:
            NotMeasured: If it is not finished, or nothing was measured.
        """
        return self.source.content(self._name(setting, seed), MEASUREMENTS)

    def done(self, setting: str, seed: int) -> dict[str, Any]:
        """The note on a finished member: settings, figures on the test data, versions, seconds.

        Raises:
            NotMeasured: If it is not finished, or by another version.
        """
        content = self.source.content(self._name(setting, seed), DONE)
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


class Folders:
    """The members' folders."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def members(self) -> Mapping[str, Mapping[int, str]]:
        return by_setting(file.parent.relative_to(self.out).as_posix() for file in self.out.glob(f"**/seed-*/{DONE}"))

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


def by_setting(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Names of members by setting and seed."""
    found: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        setting, _, seed = name.rpartition("/seed-")
        if seed.isdigit():
            found.setdefault(setting, {})[int(seed)] = name
    return found
