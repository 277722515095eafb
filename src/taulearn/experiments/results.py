"""The records of a suite's finished members, which claims, figures and tables are made from."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..training.history import History
from ..training.thinning import thinned
from .config import TrainConfig, explain

FORMAT = 1
DONE = "done.json"
MEASUREMENTS = "measurements.json"


class NotMeasured(LookupError):
    """Records that a claim or a figure needs are missing."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "records are missing"


class Results:
    """The finished members in a suite's folder.

    Args:
        out: The folder.

    Example:
        >>> Results("nowhere").settings
        []
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self._histories: dict[Path, History] = {}

    @cached_property
    def _members(self) -> dict[str, dict[int, Path]]:
        found: dict[str, dict[int, Path]] = {}
        for file in sorted(self.out.glob(f"**/seed-*/{DONE}")):
            folder = file.parent
            seed = folder.name.removeprefix("seed-")
            if seed.isdigit():
                found.setdefault(folder.parent.relative_to(self.out).as_posix(), {})[int(seed)] = folder
        return found

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
        common = sorted(set.intersection(*(set(self._members.get(setting, ())) for setting in settings)))
        if not common:
            missing = [setting for setting in settings if setting not in self._members]
            raise NotMeasured(
                f"no finished member of {', '.join(missing)}" if missing else f"no common seed of {', '.join(settings)}"
            )
        return common

    def folder(self, setting: str, seed: int) -> Path:
        """The folder of a finished member.

        Raises:
            NotMeasured: If it is not finished.
        """
        try:
            return self._members[setting][seed]
        except KeyError:
            raise NotMeasured(f"{setting}/seed-{seed} is not finished") from None

    def history(self, setting: str, seed: int) -> History:
        """The record of a member, thinned as all records are that claims are judged by.

        Raises:
            NotMeasured: If it is not finished, or its record is missing, damaged or of another version.
        """
        folder = self.folder(setting, seed)
        if folder not in self._histories:
            try:
                self._histories[folder] = thinned(History.load(folder / "history.safetensors"), coarse=True)
            except (FileNotFoundError, ValueError) as error:
                raise NotMeasured(str(error)) from error
        return self._histories[folder]

    def measurements(self, setting: str, seed: int) -> dict[str, Any]:
        """What was measured on a member after its training.

        Raises:
            NotMeasured: If it is not finished, or nothing was measured.
        """
        return _read_json(self.folder(setting, seed) / MEASUREMENTS)

    def done(self, setting: str, seed: int) -> dict[str, Any]:
        """What was noted when the member was finished: settings, versions, seconds.

        Raises:
            NotMeasured: If it is not finished, or by another version.
        """
        file = self.folder(setting, seed) / DONE
        content = _read_json(file)
        if content.get("format") != FORMAT:
            raise NotMeasured(f"{file} must have format {FORMAT}, got {content.get('format')!r}: train the member anew")
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
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            raise NotMeasured(f"{setting}/seed-{seed}: {explain(error)}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotMeasured(f"{file} is missing") from None
    except ValueError as error:
        raise NotMeasured(f"{file} must be a JSON file, got a damaged one ({error})") from error
    if not isinstance(content, dict):
        raise NotMeasured(f"{file} must hold an object, got {type(content).__name__}")
    return content
