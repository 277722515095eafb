"""A command line that is not understood: one line that says why, instead of tyro's box."""

import contextlib
import difflib
import io
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

import tyro

from .options import UsageError

_OWN = ("help", "tyro-print-completion", "tyro-write-completion")
_SIDES, _RULES = "│┃| ", "─━╰╯-+"
"""The characters that tyro draws boxes with, in ASCII too where the terminal has nothing else."""


def check_names(argv: Sequence[str], commands: Mapping[str, type]) -> None:
    """Refuse commands and options that there are not, with the nearest that there is.

    Example:
        >>> check_names(["trian"], {"train": object})
        Traceback (most recent call last):
        ...
        taulearn.app.command_line.options.UsageError: unknown command 'trian': did you mean 'train'?
    """
    if not argv:
        return
    command, *rest = argv
    if command not in commands:
        if not command.startswith("-"):
            nearest = difflib.get_close_matches(command.lower(), commands, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(commands)}"
            raise UsageError(f"unknown command {command!r}: {hint}")
        known: list[str] = []
        rest = [command]
    else:
        known = _names(commands[command])
    for token in rest:
        name = token.partition("=")[0].removeprefix("--").replace("_", "-")
        if token.startswith("--") and name and name not in (*known, *_OWN):
            nearest = difflib.get_close_matches(name, known, n=1)
            where = f"taulearn {command}" if known else "taulearn"
            hint = f"did you mean --{nearest[0]}?" if nearest else f"`{where} --help` lists them"
            raise UsageError(f"unknown option --{name}: {hint}")


@contextlib.contextmanager
def in_one_line() -> typing.Iterator[None]:
    """Turn what tyro says of a line that it does not understand into an error of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code != 2:
            sys.stderr.write(said.getvalue())
            raise
        raise UsageError(_condensed(said.getvalue())) from None
    sys.stderr.write(said.getvalue())


def _condensed(box: str) -> str:
    r"""The text between the title and the first rule of a box, in one line.

    Example:
        >>> _condensed("╭─ Missing ─╮\n│ No value. │\n│ ───────── │\n│ See help  │\n╰───────────╯")
        'No value'
    """
    text = ""
    for line in box.splitlines()[1:]:
        inside = line.strip(_SIDES)
        if not set(inside) <= set(_RULES):
            text += f" {inside}"
        elif text:
            break
    text = " ".join(text.split()).rstrip(".:")
    return text.replace("Unrecognized options:", "unexpected argument") or "not understood: `taulearn --help`"


def _names(kind: type) -> list[str]:
    """The options of a command, as they are spelled."""
    names: list[str] = []
    for each in fields(kind) if is_dataclass(kind) else ():
        inner = each.type if isinstance(each.type, type) else None
        if inner is not None and is_dataclass(inner):
            names += _names(inner)
            continue
        if _is_positional(each):
            continue
        name = each.name.replace("_", "-")
        names += [name, f"no-{name}"] if _is_flag(each.type) else [name]
    return names


def _is_positional(each: "Field[Any]") -> bool:
    return any(note in typing.get_args(each.type) for note in _POSITIONAL)


def _is_flag(annotation: Any) -> bool:
    return annotation is bool or bool in typing.get_args(annotation)


_POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1:]
