"""``taulearn sweep``, and what it shares with ``taulearn reproduce``: engines, and many members trained at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .options import UsageError
from .output import complain, say

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ..members import Member


def about(text: str, metavar: str | None = None) -> object:
    """The help text of an option."""
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


Workers = Annotated[int | None, about("Processes, each with one thread; one per core unless given.", "INT")]
Address = Annotated[
    str | None, about("Of a Ray cluster, for --engine ray; one is started on this machine unless given.", "HOST:PORT")
]
EngineChoice = Annotated[
    str,
    about(
        "processes: one per core; serial: in this process; of taulearn-papers ray: on a cluster; vmap: many at once, "
        "for a GPU.",
        "NAME",
    ),
]


def train_members(
    members: "Sequence[Member]", out: Path, *, engine: str, workers: int | None, address: str | None
) -> dict[str, str]:
    """Train members with a line for each, and say what failed."""
    from ..member_progress import Watch
    from ..run_members import run_members

    watch = Watch(members, out)
    try:
        outcome = run_members(members, out, engine=engine, workers=workers, address=address, on_event=watch)
    except KeyboardInterrupt:
        say("")
        say("interrupted: the same command goes on from here")
        raise
    watch.close(outcome)
    return outcome.failed


def fail_with(failed: "Collection[str]") -> None:
    """End with exit code 1 if members failed."""
    if failed:
        complain(
            "error",
            f"{len(failed)} member{'s' * (len(failed) > 1)} failed, see above: the same command trains them anew",
        )
        raise SystemExit(1)


def check_engine(engine: str, workers: int | None, address: str | None) -> None:
    """Refuse an engine that is not there, and options that do not fit it."""
    from ..run_members import check_installed

    try:
        check_installed(engine)
    except (ValueError, ImportError) as error:
        raise UsageError(f"--{error}") from error
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be >= 1, got {workers}")
    if workers is not None and engine in ("serial", "vmap"):
        raise UsageError(f"--workers must be left out with --engine {engine}, which uses this process alone")
    if address is not None and engine != "ray":
        raise UsageError(f"--address must be left out with --engine {engine}: it is that of a Ray cluster")
    if address is not None and workers is not None:
        raise UsageError(
            f"--workers must be left out with --address, got {workers}: a cluster uses all of its cores, "
            "whose number `ray start --num-cpus` sets"
        )


@dataclass(frozen=True)
class Sweep:
    """Train every combination of settings that a file describes, and tabulate what comes of it."""

    spec: Annotated[tyro.conf.Positional[str], about("TOML file with [base], [grid], [[list]] and seeds.", "SPEC")]
    out: Annotated[str | None, about("Folder; sweeps/ and the file's name unless given.", "DIR")] = None
    workers: Workers = None
    engine: EngineChoice = "processes"
    address: Address = None
    train: Annotated[bool, about("Train what is missing; --no-train tabulates what is there.")] = True

    def __call__(self) -> None:
        from ..results import Results
        from ..sweep import load_sweep
        from ..sweep_report import rows, write_report, write_table

        try:
            sweep = load_sweep(self.spec)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
        check_engine(self.engine, self.workers, self.address)
        out = Path(self.out or f"sweeps/{sweep.name}")
        failed: dict[str, str] = {}
        if self.train:
            say(f"{len(sweep.points)} settings, {len(sweep.members)} trainings in {out}")
            failed = train_members(sweep.members, out, engine=self.engine, workers=self.workers, address=self.address)
        results = Results(out)
        rows_ = rows(sweep, results, failed)
        say(f"table: {write_table(rows_, out)}\nreport: {write_report(sweep, results, rows_, out)}")
        fail_with(failed)
