"""Output of the commands."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...training import Run
    from ..train import Result


def follower() -> int:
    """The number of this process where torchrun started several, 0 for the one that speaks for all."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return 0 if alone else int(os.environ.get("RANK", "0"))


def say(text: object) -> None:
    """A line on standard output."""
    if follower():
        return
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def complain(kind: str, text: object) -> None:
    """A line on standard error, whatever the text contains."""
    who = f" (rank {follower()})" if follower() else ""
    sys.stderr.write(f"taulearn{who}: {kind}: {' '.join(str(text).split())}\n")
    sys.stderr.flush()


def table(rows: Sequence[Sequence[str]]) -> None:
    """Rows in aligned columns.

    Example:
        >>> table([("layers", "6"), ("test accuracy", "0.97")])
        layers         6
        test accuracy  0.97
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def figure(name: str, *values: float) -> tuple[str, str]:
    """A row of the table for a figure on the test data, or for how it changed.

    Example:
        >>> figure("accuracy", 0.5, 0.25)
        ('test accuracy', '0.5000 -> 0.2500')
    """
    form = ".4f" if name == "accuracy" else ".4g"
    return f"test {name}", " -> ".join(format(value, form) for value in values)


def watched(training: "Callable[[Callable[[Run], None]], Result]") -> None:
    """Run a training that tells when it starts, and print what came of it."""
    from ...report.sections import description
    from ...training import Interrupted

    started: list[Run] = []

    def on_start(run: "Run") -> None:
        started.append(run)
        say(f"{description(run.config)}\nrun: {run.path}")

    try:
        result = training(on_start)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if not started:
            raise
        raise Interrupted(started[0]) from None
    layers, parameters = result.layers, result.parameters
    say("")
    table(
        [
            *(figure(name, value) for name, value in reversed(result.test.items())),
            ("layers", f"{layers[0]} -> {layers[1]}"),
            ("parameters", f"{parameters[0]:,} -> {parameters[1]:,}"),
            ("training time", f"{result.seconds:.1f} s"),
            ("report", str(result.run.report_path)),
        ]
    )
