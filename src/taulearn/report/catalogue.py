"""The report of many runs: verdicts, figures, and a table of all runs with filters, as one self-contained HTML file.

Like the report of one run it holds everything it shows and asks no server for anything; its links lead to the runs'
own reports beside it.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from taulearn.report.html import asset, render, write_page


@dataclass(frozen=True)
class ClaimRow:
    """A claim with its outcome ("holds", "does not hold", ...) and what was measured."""

    id: str
    statement: str
    outcome: str
    sentence: str
    figures: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRow:
    """A run: what it can be filtered by, its values by the columns' titles, and the relative path of its own report."""

    name: str
    facets: Mapping[str, str]
    values: Mapping[str, float | int | str | None]
    link: str | None = None


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its title, what it shows, the picture as PNG."""

    title: str
    caption: str
    png: bytes


def write_catalogue(
    path: str | os.PathLike[str],
    title: str,
    subtitle: str,
    *,
    claims: Sequence[ClaimRow] = (),
    pictures: Sequence[Picture] = (),
    tables: Mapping[str, str] | None = None,
    runs: Sequence[RunRow] = (),
) -> Path:
    """Write the report, whole or not at all.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "report.html"
        >>> row = RunRow("mnist/free/seed-0", {"data": "mnist"}, {"accuracy": 0.98})
        >>> "mnist/free/seed-0" in write_catalogue(file, "Suite", "", runs=[row]).read_text(encoding="utf-8")
        True
    """
    target = Path(path)
    if target.suffix.lower() != ".html":
        raise ValueError(f"path must end in .html, got {str(target)!r}")
    names = list(dict.fromkeys(name for run in runs for name in run.facets))
    columns = list(dict.fromkeys(name for run in runs for name in run.values))
    rows = []
    for run in runs:
        facets = {name: run.facets.get(name, "") for name in names}
        values = ("" if (value := run.values.get(column)) is None else value for column in columns)
        rows.append((facets, run.link, [run.name, *facets.values(), *values]))
    page = render(
        [asset("report.css"), asset("catalogue.css")],
        [asset("catalogue.js")],
        title=title,
        subtitle=subtitle,
        claims=claims,
        pictures=[(each, base64.b64encode(each.png).decode()) for each in pictures],
        tables={name: (*_markdown_table(text), text) for name, text in (tables or {}).items()},
        filters={name: sorted({facets[name] for facets, _, _ in rows} - {""}) for name in names},
        head=["run", *names, *columns],
        rows=rows,
    )
    return write_page(target, page)


def _markdown_table(text: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a Markdown table; of other text nothing."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) < 2 or not all(line.startswith("|") and line.endswith("|") for line in lines):
        return [], []
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return head, rows
