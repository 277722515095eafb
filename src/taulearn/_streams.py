"""Output on consoles and into files whose encoding lacks characters, such as cp1252 (Windows), ISO 8859-1, ASCII."""

import codecs
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_HANDLER = "taulearn.plain"
_PLAIN = {
    "τ": "tau",
    "→": "->",
    "±": "+-",
    "—": "-",
    "–": "-",
    "−": "-",
    "·": "-",
    "•": "*",
    "…": "...",
    "’": "'",
}


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for codecs: plain letters for a sign that the encoding lacks, or its number."""
    if isinstance(error, UnicodeEncodeError) and (instead := _PLAIN.get(error.object[error.start])):
        return instead, error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(_HANDLER, _plain)


def printable(text: str, stream: IO[str]) -> str:
    """A text as a stream can show it."""
    encoding = getattr(stream, "encoding", None)
    return text.encode(encoding, _HANDLER).decode(encoding) if encoding else text


@contextmanager
def plain_output() -> Iterator[None]:
    """Let whatever is written to standard output and error meanwhile be shown, in plain letters where it must be."""
    changed = []
    for stream in (sys.stdout, sys.stderr):
        reconfigure, errors = getattr(stream, "reconfigure", None), getattr(stream, "errors", None)
        if reconfigure is not None and errors in ("strict", "surrogateescape"):
            reconfigure(errors=_HANDLER)
            changed.append((reconfigure, errors))
    try:
        yield
    finally:
        for reconfigure, errors in changed:
            reconfigure(errors=errors)
