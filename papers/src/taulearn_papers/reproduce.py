"""``taulearn reproduce`` on a suite: trains what is missing, judges, draws, reports, keeps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from taulearn.app.command_line.options import UsageError
from taulearn.app.command_line.output import say, table
from taulearn.app.command_line.reproduce import Reproduce
from taulearn.app.command_line.sweep import fail_with, train_members
from taulearn.app.config import TrainConfig
from taulearn.app.members import Member
from taulearn.files import expand_user, is_path

from .judging import draw, judge, tabulate, write_claims
from .keeping import keep
from .packed_results import results_in
from .suite import SEPARATOR, Suite
from .suite_report import write_report


def reproduce(suite: Suite, options: Reproduce) -> None:
    """Train, judge and draw as the command line says."""
    for kind, known in (("figure", suite.figures), ("table", suite.tables)):
        if (number := getattr(options, kind)) is not None and number not in known:
            raise UsageError(f"--{kind} must be one of {', '.join(known) or 'none'}, got {number!r}")
    out = Path(options.out or f"results/{options.suite}{'-quick' * options.quick}")
    if options.train and out.is_file():
        raise UsageError(f"--out must be a folder, got the file {str(out)!r}: --no-train judges kept records")
    numbers = [number for number in (options.figure, options.table) if number is not None]
    members = suite.needed(suite.members(options.quick, options.seeds), numbers)
    for given in options.data:
        members = _on_own_data(members, given)
    failed: dict[str, str] = {}
    if options.train:
        say(f"{suite.title}\n{len(members)} members in {out}")
        failed = train_members(members, out, engine=options.engine, workers=options.workers, address=options.address)
    if numbers:
        _draw(suite, options, out)
    else:
        _judge(suite, options, out, members)
    fail_with(failed)


def _on_own_data(members: Sequence[Member], given: str) -> list[Member]:
    """The members with a path in the place of the data set that ``given``, NAME=PATH, names."""
    name, _, path = given.partition("=")
    sets = {member.config.data for member in members if member.config is not None}
    if name not in sets or not expand_user(path).exists() or not is_path(path):
        raise UsageError(
            f"--data must be NAME=PATH, NAME one of {', '.join(sorted(sets))}, PATH a file (.npz, .parquet, .csv) or a "
            f"folder, with a slash, got {given!r}"
        )

    def moved(config: TrainConfig) -> TrainConfig:
        return TrainConfig(**config.model_dump(exclude_unset=True) | {"data": path})

    return [
        replace(member, config=moved(member.config)) if member.config and member.config.data == name else member
        for member in members
    ]


def _draw(suite: Suite, options: Reproduce, out: Path) -> None:
    """One figure, one table, or one of each."""
    results = results_in(out)
    if options.figure is not None:
        files, missing = draw(suite, results, _folder(out) / "figures", options.figure)
        say(f"figure {options.figure}: {files[0] if files else missing[options.figure]}")
    if options.table is not None:
        say(tabulate(suite, results, options.table)[options.table].rstrip())


def _judge(suite: Suite, options: Reproduce, out: Path, members: Sequence[Member]) -> None:
    """Everything: verdicts, figures, report."""
    results = results_in(out)
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
    if options.keep is not None:
        files = keep(suite, results, judged, options.keep)
        say(f"kept: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e3:,.0f} kB in {options.keep}")
    say(f"verdicts: {folder / 'claims.md'}, .csv, .json\nreport: {report}")


def _folder(out: Path) -> Path:
    """Where results are written: the suite's folder, or that of the file of kept records."""
    return out.parent if out.is_file() else out
