"""Progress of a run: one bar on a terminal, one line per epoch elsewhere."""

import sys
import time
from collections.abc import Mapping

from torch import Tensor

from .._streams import printable
from .history import Row

_REFRESH_SECONDS = 0.2


class Progress:
    """One bar for the whole run, or plain lines where standard output is not a terminal."""

    def __init__(self, iterations: int, done: int, *, enabled: bool) -> None:
        self.enabled = enabled
        self._bar = None
        self._next = 0.0
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                auto_refresh=False,
            )
            self._task = self._bar.add_task("training", total=iterations, completed=done)
            self._bar.start()

    def advance(self, iteration: int, rows: Tensor, description: str) -> None:
        """Show the newest loss, at most five times a second; only then is the device asked for it."""
        if self._bar is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _REFRESH_SECONDS
        loss = f"loss {float(rows[-1, Row.LOSS]):.4f}"
        self._bar.update(self._task, completed=iteration, description=f"{description}, {loss}", refresh=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.enabled:
            return
        if self._bar is not None:
            console = self._bar.console
            console.print(printable(text, console.file), highlight=False, markup=False)
        else:
            sys.stdout.write(printable(f"{text}\n", sys.stdout))
            sys.stdout.flush()

    def close(self, iteration: int) -> None:
        """Take the bar away, leaving its last state."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, refresh=True)
            self._bar.stop()
            self._bar = None


def layers_left(number: int) -> str:
    """A number of layers."""
    return f"{number} layer" if number == 1 else f"{number} layers"


def epoch_line(epoch: int, epochs: int, row: Mapping[str, float]) -> str:
    """An epoch in one line."""
    parts = [f"epoch {epoch:>{len(str(epochs))}}/{epochs}", f"loss {row['train.loss']:.4f}"]
    parts += [
        f"{name.removeprefix('validation.')} {value:.4f}"
        for name, value in row.items()
        if name.startswith("validation.") and name != "validation.loss"
    ]
    if "validation.accuracy" not in row and "validation.loss" in row:
        parts.append(f"validation loss {row['validation.loss']:.4f}")
    return "  ".join([*parts, layers_left(int(row["layers"])), f"{row['seconds']:.1f} s"])
