"""The options of ``taulearn train``, made from the fields of TrainConfig: one for each, with its description as help.

tyro lays out the help and splits the line; what values mean and whether they do is decided by TrainConfig alone.
"""

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any

import tyro
from pydantic import ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from ..config import TrainConfig, check_fields, explain, read_toml

GROUPS = {
    "network": "data",
    "objective": "loss",
    "pruning": "prune",
    "refinement": "refine",
    "optimisation": "epochs",
    "machine": "device",
    "run": "run",
}
"""Headings in the help, each with the first field under it."""

_METAVARS = {"run": "DIR", "data": "NAME|PATH"}


class UsageError(ValueError):
    """The command line, or a file of settings that it names, does not do."""


def numbers_option(metavar: str, *kinds: type, spaces: bool = True) -> object:
    """The annotation of an option that takes one or several numbers, separated by commas or spaces."""
    convert = _converter(kinds)

    def parse(texts: list[str]) -> object:
        values = [convert(text) for each in texts for text in each.split(",") if text]
        return values[0] if len(values) == 1 and "," not in texts[0] else tuple(values)

    return PrimitiveConstructorSpec(
        nargs="*" if spaces else 1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda _: True,
        str_from_instance=_texts,
    )


def option_groups(defaults: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields of a dataclass that tyro shows as one box of options for each of GROUPS."""
    names = list(TrainConfig.model_fields)
    starts = [names.index(first) for first in GROUPS.values()]
    groups: list[tuple[str, Any, Any]] = []
    for heading, start, end in zip(GROUPS, starts, [*starts[1:], len(names)], strict=True):
        options = [_option(name, defaults) for name in names[start:end]]
        group = make_dataclass(heading.capitalize(), options, frozen=True)
        groups.append((heading, group, field(default_factory=group)))
    return groups


def settings_from(options: Any) -> TrainConfig:
    """The settings that the parsed options stand for."""
    groups = [getattr(options, heading) for heading in GROUPS]
    values = {each.name: getattr(group, each.name) for group in groups for each in fields(group)}
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(spelled(explain(error))) from error


def settings_in(path: str) -> dict[str, Any]:
    """The settings in a file that the command line names."""
    try:
        values = read_toml(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        check_fields(values)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return values


def spelled(message: str) -> str:
    """A message with the settings it names as they are spelled on the command line.

    Example:
        >>> spelled("width must be one number or 6 (hidden_layers), got 3: change one of the two")
        '--width must be one number or 6 (--hidden-layers), got 3: change one of the two'
    """
    long = "|".join(name for name in TrainConfig.model_fields if "_" in name)
    short = "|".join(name for name in TrainConfig.model_fields if "_" not in name)
    pattern = rf"(?<![\w./'])({long})(?![\w./'])|(?:(?<=^)|(?<=; ))({short})(?= must )|(?<=\()({short})(?=[,)])"
    message = message.replace("penalties.TimeHorizon", "time_horizon")
    return re.sub(pattern, lambda match: "--" + match[0].replace("_", "-"), message)


def _option(name: str, defaults: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Name, annotation and default of one option."""
    info = TrainConfig.model_fields[name]
    default = defaults.get(name, info.default)
    default = tuple(default) if isinstance(default, list) else default
    about = tyro.conf.arg(help=info.description, help_behavior_hint="" if default is None else None)
    leaves = _leaves(info.annotation)
    if bool in leaves:
        return name, Annotated[bool, about], field(default=default)
    if any(typing.get_origin(part) is tuple for part in typing.get_args(info.annotation)):
        kinds = [leaf for leaf in leaves if isinstance(leaf, type)]
        spec = numbers_option("INT ..." if int in kinds else "FLOAT ...", *kinds)
        return name, Annotated[Any, about, spec], field(default=default)
    convert = _converter(leaves)
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=_METAVARS.get(name, _metavar(leaves)),
        instance_from_str=lambda texts: convert(texts[0]),
        is_instance=lambda _: True,
        str_from_instance=_texts,
    )
    return name, Annotated[Any, about, spec], field(default=default)


def _leaves(annotation: Any) -> list[Any]:
    """The types and literal values in a nested annotation."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, tuple):
        return [leaf for part in typing.get_args(annotation) if part is not ... for leaf in _leaves(part)]
    return list(typing.get_args(annotation)) if origin is typing.Literal else [annotation]


def _metavar(leaves: list[Any]) -> str:
    words = {int: "INT", float: "FLOAT", str: "NAME"}
    shown = [words.get(leaf, leaf) for leaf in leaves if leaf is not types.NoneType]
    return "|".join(shown) if len(shown) < 2 or any(word.isupper() for word in shown) else "{" + ",".join(shown) + "}"


def _converter(leaves: typing.Iterable[Any]) -> Callable[[str], object]:
    """Text to the first of the types that it can mean; what means none of them stays text, to be refused later."""
    kinds = [kind for kind in (int, float) if kind in leaves]
    optional = types.NoneType in leaves

    def convert(text: str) -> object:
        if optional and text.lower() == "none":
            return None
        for kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    return convert


def _texts(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
