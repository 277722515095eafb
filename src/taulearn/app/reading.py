"""Settings out of files, and what pydantic says of them in our words."""

import os
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .._errors import unknown_name
from .values import shown, unknown_key

if TYPE_CHECKING:
    from .config import TrainConfig

FORMAT = 1

_WORDING = {
    "Input should": "must",
    "String should": "must",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
    "a valid integer": "an integer",
    "valid ": "",
}


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a file, with known keys, their values not yet checked.

    Args:
        path: A TOML file of plain keys, or the run.toml of a run, whose table [config] is taken.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no TOML file, of another format version, or has an unknown key.
    """
    file = Path(path)
    if not file.is_file():
        inside = file / "run.toml"
        reason = "there is no such file"
        if file.is_dir():
            reason = f"it is a folder{f'; did you mean {str(inside)!r}?' if inside.is_file() else ''}"
        raise FileNotFoundError(f"config must be a TOML file, got {str(path)!r}: {reason}")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        reason = str(error).partition(";")[0]
        raise ValueError(f"{path} must be a TOML file: {reason}") from error
    if "format" in content and content["format"] != FORMAT:
        found = content["format"]
        raise ValueError(
            f"{path} must have format = {FORMAT}, got {found!r}: it belongs to another version of taulearn"
        )
    values = content.get("config", content)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must have config as a table of settings, got {values!r}")
    for key in values:
        if key not in _settings().model_fields:
            raise ValueError(f"{path}: {unknown_key(key, _settings().model_fields)}")
    return values


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse values that no other setting could make right, each by itself.

    Args:
        values: Settings by name; whether they go together is not looked at.

    Raises:
        ValueError: Naming the settings.

    Example:
        >>> check_fields({"hidden_layers": 1, "prune": 0.01})
        >>> check_fields({"tensorboard": "yes"})
        Traceback (most recent call last):
        ...
        ValueError: tensorboard must be a boolean, got 'yes'
    """
    try:
        _settings().model_validate(dict(values))
    except ValidationError as error:
        reasons = [_sentence(each) for each in error.errors(include_url=False) if each["loc"]]
        if reasons:
            raise ValueError("; ".join(reasons)) from error


def explain(error: ValidationError) -> str:
    """What a validation error says, in one line that names each setting, what it must be and what it is.

    Args:
        error: From :class:`TrainConfig`.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> try:
        ...     TrainConfig(skips="lerned", epochs=0)
        ... except ValidationError as error:
        ...     print(explain(error))
        skips must be one of 'learned', 'pad', got 'lerned': did you mean 'learned'?; epochs must be >= 1, got 0
    """
    return "; ".join(_sentence(each) for each in error.errors(include_url=False))


def _sentence(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "settings"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return unknown_key(name, _settings().model_fields)
    if error["type"] == "literal_error":
        given = error["input"]
        given = shown(given) if isinstance(given, int) and given.bit_length() > 64 else given
        return str(unknown_name(name, given, typing.get_args(_settings().model_fields[name].annotation)))
    must = error["msg"]
    for words, instead in _WORDING.items():
        must = must.replace(words, instead)
    return f"{name} {must}, got {shown(error['input'])}"


def _settings() -> "type[TrainConfig]":
    """The class of settings, whose module reads files with this one."""
    from .config import TrainConfig

    return TrainConfig
