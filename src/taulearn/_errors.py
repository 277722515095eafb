"""Wording shared by the errors of the package: the nearest name to an unknown one, and what was found in place of what was asked."""

import difflib
from collections.abc import Iterable


def unknown_name(argument: str, value: object, known: Iterable[str]) -> ValueError:
    """An error that names the argument, the value, the nearest known name and all known names.

    Args:
        argument: The caller's argument name.
        value: What was given.
        known: The names that would do.

    Returns:
        The exception, to be raised by the caller.

    Example:
        >>> str(unknown_name("scheme", "residul", ["dense", "residual"]))
        "scheme must be one of 'dense', 'residual', got 'residul': did you mean 'residual'?"
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(f"{argument} must be one of {', '.join(map(repr, names))}, got {value!r}{hint}")
