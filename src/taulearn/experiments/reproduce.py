"""A suite from its members to its verdicts: train what is missing, judge, draw, write."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_bytes
from .results import Results
from .suite import Suite, Verdict


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


def judge(suite: Suite, results: Results) -> list[Judged]:
    """The verdicts on all claims of a suite.

    Args:
        suite: The suite.
        results: The records.

    Example:
        >>> from taulearn.experiments.suites import load
        >>> judge(load("herberg2023"), Results("nowhere"))[0].verdict.outcome
        'not measured'
    """
    return [Judged(claim.id, claim.statement, claim.verdict(results)) for claim in suite.claims]


def write_claims(judged: Sequence[Judged], out: str | Path) -> list[Path]:
    """Write the table of verdicts as claims.md, claims.csv and claims.json.

    Args:
        judged: The claims with their verdicts.
        out: Folder.

    Returns:
        The files.
    """
    texts = {"claims.md": as_markdown(judged), "claims.csv": _as_csv(judged)}
    texts["claims.json"] = json.dumps([asdict(each) for each in judged], indent=1, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        write_bytes(Path(out) / name, text.encode())
    return [Path(out) / name for name in texts]


def as_markdown(judged: Sequence[Judged]) -> str:
    """The table of verdicts, and below it the figures behind each.

    Args:
        judged: The claims with their verdicts.
    """
    lines = ["| claim | verdict | what holds |", "|---|---|---|"]
    lines += [
        f"| **{each.id}** {each.statement} | {each.verdict.outcome} | {each.verdict.sentence} |" for each in judged
    ]
    for each in judged:
        if each.verdict.figures:
            lines += ["", f"## {each.id}", "", "| figure | value |", "|---|---|"]
            lines += [f"| {name} | {_number(value)} |" for name, value in each.verdict.figures.items()]
    return "\n".join(lines) + "\n"


def _as_csv(judged: Sequence[Judged]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["claim", "outcome", "figure", "value"])
    for each in judged:
        rows = each.verdict.figures.items() or [("", "")]
        writer.writerows([each.id, each.verdict.outcome, name, value] for name, value in rows)
    return text.getvalue()


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
