"""A suite from its records to its results: verdicts, figures, tables."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from taulearn._errors import unknown_name
from taulearn.app.members import Member
from taulearn.app.results import NotMeasured, Results
from taulearn.files import write_bytes

from .suite import SEPARATOR, Suite, Verdict


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        id: The claim's short name.
        statement: What is claimed.
        verdict: What the records say.
    """

    id: str
    statement: str
    verdict: Verdict


def judge(suite: Suite, results: Results, members: Sequence[Member] = ()) -> list[Judged]:
    """The verdicts on all claims of a suite.

    Example:
        >>> from taulearn_papers.herberg2023 import SUITE
        >>> judge(SUITE, Results("nowhere"))[0].verdict.outcome
        'not measured'
    """
    judged = []
    for claim in suite.claims:
        results.asked.clear()
        verdict = claim.verdict(results)
        if verdict.outcome != "not measured" and (lacking := _lacking(results, members)):
            verdict = replace(verdict, sentence=f"{lacking}{SEPARATOR}{verdict.sentence}")
        judged.append(Judged(claim.id, claim.statement, verdict))
    return judged


def _lacking(results: Results, members: Sequence[Member]) -> str:
    """Which of the members that were asked for are not there, in words; empty if all are."""
    wanted = [member for member in members if member.setting in results.asked]
    missing = [member.name for member in wanted if not results.has(member.setting, member.seed)]
    if not missing:
        return ""
    more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
    return f"preliminary, {len(missing)} of {len(wanted)} members are missing: {', '.join(missing[:2])}{more}"


def write_claims(judged: Sequence[Judged], out: str | Path) -> list[Path]:
    """Write the table of verdicts as claims.md, claims.csv and claims.json.

    Example:
        >>> import tempfile
        >>> verdict = Verdict.of({"it": True}, {"difference": 0.01})
        >>> [file.name for file in write_claims([Judged("X1", "it is so", verdict)], tempfile.mkdtemp())]
        ['claims.md', 'claims.csv', 'claims.json']
    """
    texts = {"claims.md": as_markdown(judged), "claims.csv": _as_csv(judged)}
    texts["claims.json"] = json.dumps([asdict(each) for each in judged], indent=1, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        write_bytes(Path(out) / name, text.encode())
    return [Path(out) / name for name in texts]


def draw(
    suite: Suite,
    results: Results,
    out: str | Path,
    only: str | None = None,
    *,
    kinds: Sequence[str] = ("svg", "png"),
    dpi: int = 130,
) -> tuple[list[Path], dict[str, str]]:
    """Draw the figures of a suite, each as PNG and as SVG.

    Example:
        >>> import tempfile
        >>> from taulearn_papers.herberg2023 import SUITE
        >>> draw(SUITE, Results("nowhere"), tempfile.mkdtemp(), "4.1")
        ([], {'4.1': 'no finished member of mnist/resnet/free'})
    """
    if only is not None and only not in suite.figures:
        raise unknown_name("figure", only, suite.figures)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    from matplotlib import rc_context

    files, missing = [], {}
    for name, function in suite.figures.items():
        if only not in (None, name):
            continue
        try:
            figure = function(results)
        except NotMeasured as error:
            missing[name] = str(error)
            continue
        for kind in kinds:
            content = io.BytesIO()
            # without a date and with fixed ids the same records give the same bytes
            with rc_context({"svg.hashsalt": "taulearn", "svg.fonttype": "none"}):
                figure.savefig(content, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
            write_bytes(folder / f"figure-{name}.{kind}", content.getvalue())
        files.append(folder / f"figure-{name}.{kinds[-1]}")
    return files, missing


def tabulate(suite: Suite, results: Results, only: str | None = None) -> dict[str, str]:
    """The tables of a suite as Markdown, by number; those whose records are missing say so.

    Example:
        >>> from taulearn_papers.herberg2023 import SUITE
        >>> "no finished member" in tabulate(SUITE, Results("nowhere"))["as-published"]
        True
    """
    if only is not None and only not in suite.tables:
        raise unknown_name("table", only, suite.tables)
    texts = {}
    for name, function in suite.tables.items():
        if only in (None, name):
            try:
                texts[name] = function(results)
            except NotMeasured as error:
                texts[name] = f"not measured: {error}\n"
    return texts


def as_markdown(judged: Sequence[Judged]) -> str:
    """The table of verdicts, and below it the figures behind each.

    Example:
        >>> print(as_markdown([Judged("X1", "it is so", Verdict.of({"it": True}, {}))]))
        | claim | verdict | what holds |
        |---|---|---|
        | **X1** it is so | holds | holds: it |
        <BLANKLINE>
    """
    lines = ["| claim | verdict | what holds |", "|---|---|---|"]
    for each in judged:
        cells = f"**{each.id}** {each.statement}", each.verdict.outcome, each.verdict.sentence
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    for each in judged:
        if each.verdict.figures:
            lines += ["", f"## {each.id}", "", "| figure | value |", "|---|---|"]
            lines += [f"| {_cell(name)} | {_cell(_number(value))} |" for name, value in each.verdict.figures.items()]
    return "\n".join(lines) + "\n"


def _as_csv(judged: Sequence[Judged]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["claim", "outcome", "figure", "value"])
    for each in judged:
        rows = each.verdict.figures.items() or [("", "")]
        writer.writerows([each.id, each.verdict.outcome, name, value] for name, value in rows)
    return text.getvalue()


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
