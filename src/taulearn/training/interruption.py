"""Ctrl-C: the first one becomes a question that the loop asks between two steps, the second one ends at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .events import Interrupted


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Keep the first Ctrl-C for later; the second one ends at once."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(*_: object) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def announced(run: Any) -> Iterator[None]:
    """Let Ctrl-C before the first iteration say so, and name the run, where one is given."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        from .run_folder import Run

        raise Interrupted(run if isinstance(run, Run) else None, " before its first iteration") from None
