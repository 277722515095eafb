"""The commands that train many members: ``taulearn reproduce`` and ``taulearn sweep``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from .options import UsageError
from .output import complain, say, table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ..experiments.suite import Member, Suite

Engine = Literal["processes", "serial", "ray", "vmap"]


def about(text: str, metavar: str | None = None) -> object:
    """What the help says of an option."""
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


Workers = Annotated[int | None, about("Processes, each with one thread; one per core unless given.", "INT")]
Address = Annotated[
    str | None, about("Of a Ray cluster, for --engine ray; one is started on this machine unless given.", "HOST:PORT")
]
EngineChoice = Annotated[
    Engine,
    about("processes: one per core; serial: in this process; ray: on a cluster; vmap: many at once, for a GPU."),
]


@dataclass(frozen=True)
class Reproduce:
    """Train what a paper's claims need, judge them, draw its figures; what is trained already is not trained again."""

    suite: Annotated[tyro.conf.Positional[str], about("herberg2023, antil2022, puettschneider2025 or beyond.", "SUITE")]
    quick: Annotated[bool, about("Minutes instead of hours: few epochs, few seeds.")] = False
    seeds: Annotated[int | None, about("Seeds of each setting; the suite's own number unless given.", "INT")] = None
    figure: Annotated[str | None, about("Only this figure, and the trainings that it needs.", "NUMBER")] = None
    table: Annotated[str | None, about("Only this table, and the trainings that it needs.", "NUMBER")] = None
    all: Annotated[
        bool, about("Verdicts, all figures, all tables and the report, as without --figure and --table.")
    ] = False
    out: Annotated[
        str | None, about("Folder of records and results; results/SUITE, or results/SUITE-quick, unless given.", "DIR")
    ] = None
    workers: Workers = None
    engine: EngineChoice = "processes"
    address: Address = None
    train: Annotated[bool, about("Train what is missing; --no-train judges what is there.")] = True
    keep: Annotated[str | None, about("Folder for what is worth keeping: verdicts, figures, small records.", "DIR")] = (
        None
    )

    def __call__(self) -> None:
        from ..experiments import suites

        if self.suite not in suites.NAMES:
            raise UsageError(f"SUITE must be one of {', '.join(suites.NAMES)}, got {self.suite!r}")
        if self.seeds is not None and self.seeds < 1:
            raise UsageError(f"--seeds must be >= 1, got {self.seeds}")
        if self.all and (self.figure or self.table):
            raise UsageError(
                "--all must stand without --figure and --table, which draw one alone: leave one of them out"
            )
        check_engine(self.engine, self.workers, self.address)
        suite = suites.load(self.suite)
        for kind, known in (("figure", suite.figures), ("table", suite.tables)):
            if (number := getattr(self, kind)) is not None and number not in known:
                raise UsageError(f"--{kind} must be one of {', '.join(known) or 'none'}, got {number!r}")
        out = Path(self.out or f"results/{self.suite}{'-quick' * self.quick}")
        if self.train and out.is_file():
            raise UsageError(f"--out must be a folder, got the file {str(out)!r}: --no-train judges kept records")
        numbers = [number for number in (self.figure, self.table) if number is not None]
        members = suite.needed(suite.members(self.quick, self.seeds), numbers)
        failed: dict[str, str] = {}
        if self.train:
            say(f"{suite.title}\n{len(members)} members in {out}")
            failed = train_members(members, out, engine=self.engine, workers=self.workers, address=self.address)
        if numbers:
            self._draw(suite, out)
        else:
            self._judge(suite, out, members)
        fail_with(failed)

    def _draw(self, suite: "Suite", out: Path) -> None:
        """One figure, one table, or one of each."""
        from ..experiments.reproduce import draw, tabulate
        from ..experiments.results import Results

        results = Results(out)
        if self.figure is not None:
            files, missing = draw(suite, results, _folder(out) / "figures", self.figure)
            say(f"figure {self.figure}: {files[0] if files else missing[self.figure]}")
        if self.table is not None:
            say(tabulate(suite, results, self.table)[self.table].rstrip())

    def _judge(self, suite: "Suite", out: Path, members: "Sequence[Member]") -> None:
        """Everything: verdicts, figures, report."""
        from ..experiments.keeping import keep
        from ..experiments.reproduce import draw, judge, tabulate, write_claims
        from ..experiments.results import Results
        from ..experiments.suite import SEPARATOR
        from ..experiments.suite_report import write_report

        results = Results(out)
        folder = _folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        judged = judge(suite, results, members)
        write_claims(judged, folder)
        _, missing = draw(suite, results, folder / "figures")
        for number, text in tabulate(suite, results).items():
            (folder / f"table-{number}.md").write_text(text, encoding="utf-8")
        report = write_report(suite, results, judged, folder)
        say("")
        table([("claim", "verdict"), *((each.id, each.verdict.outcome) for each in judged)])
        for each in judged:
            parts = each.verdict.sentence.split(SEPARATOR)
            say("\n    ".join([f"\n{each.id}  {each.statement}", *parts]))
        say("")
        for number, reason in missing.items():
            say(f"figure {number} is missing: {reason}")
        for name, reason in results.unreadable.items():
            say(f"{name} is left out of report and kept records: {reason}")
        if self.keep is not None:
            files = keep(suite, results, judged, self.keep)
            say(f"kept: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e3:,.0f} kB in {self.keep}")
        say(f"verdicts: {folder / 'claims.md'}, .csv, .json\nreport: {report}")


def _folder(out: Path) -> Path:
    """Where results are written: the suite's folder, or that of the file of kept records."""
    return out.parent if out.is_file() else out


def train_members(
    members: "Sequence[Member]", out: Path, *, engine: str, workers: int | None, address: str | None
) -> dict[str, str]:
    """Train members with a line for each, and say what failed.

    Returns:
        What went wrong, by the members' names.

    Raises:
        ValueError: If their folder holds something else.
        KeyboardInterrupt: On Ctrl-C, when those under way have their checkpoints.
    """
    from ..experiments.runner import run_members
    from ..experiments.watch import Watch

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
    """End with exit code 1 if members failed.

    Raises:
        SystemExit: If they did.
    """
    if failed:
        complain(
            "error",
            f"{len(failed)} member{'s' * (len(failed) > 1)} failed, see above: the same command trains them anew",
        )
        raise SystemExit(1)


def check_engine(engine: str, workers: int | None, address: str | None) -> None:
    """Refuse options that do not fit the engine.

    Raises:
        UsageError: If they do not.
    """
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
        from ..experiments.results import Results
        from ..experiments.sweep import load_sweep
        from ..experiments.sweep_results import rows, write_report, write_table

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
