"""Names of modules and parameters that a user gives, exact or with wildcards."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matching(argument: str, patterns: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that match, in their own order; a wildcard stays within a part: ``h.*`` is ``h.0``, never ``h.0.x``."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted or not all(isinstance(each, str) for each in wanted):
        raise ValueError(f"{argument} must be a name or pattern, or several of them, got {patterns!r}")
    found: set[str] = set()
    for pattern in wanted:
        hits = {name for name in names if _matches(name, pattern)}
        if not hits:
            hint = nearest_names(pattern, names)
            raise ValueError(f"{argument} must match names of the model, got {pattern!r}, which matches none{hint}")
        found |= hits
    return [name for name in names if name in found]


def nearest_names(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name."""
    nearest = difflib.get_close_matches(name, [each for each in known if each], n=3, cutoff=0.3)
    return f": did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
