"""A process that dies between two writes: from a chosen one on, nothing changes a folder any more."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


class Killed(BaseException):
    """The error that a killed process sees at its next write, and at each one after that, in ``finally`` too."""


class _Watch:
    """Counts what is about to change a folder, by whatever means Python has, and ends it."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.last = 0
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in _CHANGES | {"open"}:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        paths = [os.fspath(a) for a in arguments[:2] if isinstance(a, str | os.PathLike)]
        if not any(str(path).startswith(self.folder) for path in paths):
            return
        if len(self.seen) >= self.last:
            raise Killed(f"before {event} {paths}")
        self.seen.append(f"{event} {' -> '.join(Path(path).name for path in paths)}")


_WATCH = _Watch()
sys.addaudithook(_WATCH)


@contextmanager
def killed_after(writes: int, folder: Path) -> Iterator[list[str]]:
    """Let so many writes, renames and deletions in a folder happen, and none after them.

    Yields:
        Those that happened, in words.
    """
    _WATCH.folder, _WATCH.last, _WATCH.seen = str(folder), writes, []
    try:
        yield _WATCH.seen
    finally:
        _WATCH.folder = None
