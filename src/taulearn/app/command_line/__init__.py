"""The command line, ``taulearn``. Help and errors in options come without importing torch.

Exit codes: 0 done, 1 failed (one line says why; TAULEARN_DEBUG=1 shows where), 2 not understood, 130 interrupted.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ... import __version__
from ..._errors import needs
from ..._streams import plain_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Example:
        >>> main(["data", "verify", "digits"])
        digits: built in, there is no file
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        sys.stdout.write(f"taulearn {__version__}\n")
        return 0
    with plain_output():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    from .output import complain, follower

    try:
        with needs("app", "the command line"):
            from .commands import parse
            from .launch import launch, started_here
            from .options import UsageError
    except ImportError as error:
        complain("error", error)
        return 1

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        complain("warning", message)

    debug = os.environ.get("TAULEARN_DEBUG", "") not in ("", "0")
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = show
            command = parse(arguments or ["--help"])
            processes = getattr(command, "processes", None)
            if processes is not None and started_here(processes):
                return launch(processes, arguments)
            command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except UsageError as error:
        complain("error", error)
        return 2
    except KeyboardInterrupt as interruption:
        run = getattr(interruption, "run", None)
        remedy = f": go on with `taulearn resume {run.path}`" if run is not None else ""
        if not follower():
            sys.stderr.write(f"taulearn: interrupted{remedy}\n")
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        complain("error", _sentence(error))
        return 1
    return 0


def _sentence(error: Exception) -> str:
    """The message of an error; that of a fault of ours names its type, too."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, TypeError, OSError, ArithmeticError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (TAULEARN_DEBUG=1 shows where)"
