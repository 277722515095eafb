"""Wording shared by the errors of the package: unknown names, numbers out of range, packages that are missing."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import SupportsIndex, TypeGuard


def unknown_name(argument: str, value: object, known: Iterable[str]) -> ValueError:
    """An error that names the argument, the value, the nearest known name and all known names."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, got {value!r}{hint}")


def positive_integer(argument: str, value: SupportsIndex, why: str = "") -> int:
    """The value as an int, numpy's integers included, or an error that names the argument."""
    number = value if isinstance(value, bool) else getattr(value, "__index__", lambda: 0)()
    if isinstance(number, bool) or number < 1:
        raise ValueError(f"{argument} must be an integer >= 1, got {value!r}" + (f": {why}" if why else ""))
    return int(number)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_short(error: BaseException) -> str:
    """An error in one line, with its class."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be compared with numbers: Python's and numpy's numbers, tensors of one element."""
    return hasattr(value, "__float__")


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Name the extra of this package that brings what cannot be imported in the body.

    Example:
        >>> with needs("app", "the report"):
        ...     import no_such_package
        Traceback (most recent call last):
        ImportError: no_such_package must be installed for the report: pip install 'taulearn[app]'
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == "taulearn":
            raise
        raise ImportError(f"{package} must be installed for {purpose}: pip install 'taulearn[{extra}]'") from error
