"""Sweeps: any settings, in grids or lists, times seeds, described by a TOML file.

    seeds = 3                       # or a list of seeds

    [base]                          # what all have in common, settings of `taulearn train`
    data = "mnist"
    epochs = 20

    [grid]                          # every combination of these
    hidden_layers = [6, 12]
    l1 = [0.0, 0.01]

    [[list]]                        # and besides, or instead, settings one by one
    label = "fractional"
    network = "fractional"

With both, each entry of the list is combined with the whole grid; a setting stands in one of the two. What an entry or
the grid says goes before what the base says.
"""

import difflib
import itertools
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .config import TrainConfig, explain
from .members import Member

_KEYS = ("seeds", "base", "grid", "list")
_FIXED = ("run", "overwrite", "seed")
MOST = 10_000
"""More members than that are taken for a mistake."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's members, and what varies over them."""

    name: str  # that of its file
    members: tuple[Member, ...]  # all trainings, seed by seed
    varied: tuple[str, ...]  # names of the settings that vary, "label" where entries of a list have one
    points: Mapping[str, Mapping[str, Any]]  # by setting's name: its values of what varies


def load_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Read and check a sweep's file.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "depth.toml"
        >>> _ = file.write_text("seeds = 2" + chr(10) + "[grid]" + chr(10) + "hidden_layers = [2, 4]")
        >>> [member.name for member in load_sweep(file).members]
        ['hidden_layers=2/seed-0', 'hidden_layers=4/seed-0', 'hidden_layers=2/seed-1', 'hidden_layers=4/seed-1']
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"SPEC must be a TOML file, got {str(path)!r}: there is no such file")
    try:
        spec = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a TOML file: {error}") from error
    try:
        return make_sweep(file.stem, spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_sweep(name: str, spec: Mapping[str, Any]) -> Sweep:
    """A sweep from the content of its file.

    Example:
        >>> sweep = make_sweep("depth", {"seeds": [7], "grid": {"hidden_layers": [2, 4]}, "base": {"width": 8}})
        >>> [member.name for member in sweep.members], sweep.varied
        (['hidden_layers=2/seed-7', 'hidden_layers=4/seed-7'], ('hidden_layers',))
    """
    for key in spec:
        if key not in _KEYS:
            raise ValueError(
                f"unknown key {key!r}: {_nearest(key, _KEYS)}; settings of trainings go into [base] or [grid]"
            )
    seeds = _seeds(spec.get("seeds", 1))
    base, grid = _table(spec, "base"), _table(spec, "grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{key} must be a list of values, got {values!r}")
    entries = spec.get("list", [{}])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("list must hold one table for each entry: write [[list]]")
    _check_names(base, "[base]")
    _check_names(grid, "[grid]")
    for number, entry in enumerate(entries, 1):
        _check_names(entry, "[[list]]")
        _check_apart(entry, grid, number)
    _check_number(len(entries) * math.prod(map(len, grid.values())), seeds if isinstance(seeds, int) else len(seeds))
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    points = {_name(entry | chosen): entry | chosen for entry in entries for chosen in combinations}
    if len(points) < len(entries) * len(combinations):
        raise ValueError("every training must differ from the others, got some twice: give entries of the list labels")
    members = [
        Member(setting, seed, _config(setting, base | point | {"seed": seed}))
        for seed in (range(seeds) if isinstance(seeds, int) else seeds)
        for setting, point in points.items()
    ]
    varied = tuple(dict.fromkeys(key for point in points.values() for key in point))
    return Sweep(name, tuple(members), varied, points)


def _config(setting: str, values: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate({key: value for key, value in values.items() if key != "label"})
    except ValidationError as error:
        raise ValueError(f"{setting or 'base'}: {explain(error)}") from error


def _seeds(value: Any) -> int | list[int]:
    """The number of seeds, or the seeds: a number may be too large to count up to."""
    if _is_integer(value) and value >= 1:
        return int(value)
    good = isinstance(value, list) and all(_is_integer(seed) and seed >= 0 for seed in value)
    if not good or not value or len(set(value)) < len(value):
        raise ValueError(f"seeds must be a number >= 1, or a list of different seeds >= 0, got {value!r}")
    return list(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _table(spec: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = spec.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a table of settings, got {value!r}: write [{key}]")
    return value


def _check_names(settings: Mapping[str, Any], table: str) -> None:
    for key in settings:
        if key in _FIXED:
            raise ValueError(f"{key} must be left out: the sweep decides it")
        if key == "label":
            if table != "[[list]]":
                raise ValueError(f"label must be left out of {table}: it names an entry of [[list]]")
        elif key not in TrainConfig.model_fields:
            raise ValueError(f"unknown setting {key!r}: {_nearest(key, TrainConfig.model_fields)}")


def _check_apart(entry: Mapping[str, Any], grid: Mapping[str, Any], number: int) -> None:
    for key in entry:
        if key in grid:
            which = f"{number} ({entry['label']!r})" if "label" in entry else f"{number}"
            raise ValueError(
                f"{key} must stand in [grid] or in the entries of [[list]], got both, in entry {which}: every entry is "
                f"combined with the whole grid; leave {key} out of one"
            )


def _check_number(settings: int, seeds: int) -> None:
    """Whether so many can be meant, before they are made."""
    if settings * seeds > MOST:
        words = f"{settings:,} setting{'s' * (settings > 1)}, {seeds:,} seed{'s' * (seeds > 1)}"
        raise ValueError(
            f"the sweep must have at most {MOST:,} trainings, got {settings * seeds:,} ({words}): vary less"
        )


def _nearest(key: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(key.replace("-", "_"), list(known), n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else "`taulearn train --help` lists the settings"


def _name(point: Mapping[str, Any]) -> str:
    """The name of a setting: its values in words, or the label and the values of the grid."""
    parts = [_word(point["label"])] if "label" in point else []
    parts += [f"{key}={_word(value)}" for key, value in point.items() if key != "label"]
    return "/".join(parts) or "base"


def _word(value: object) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
