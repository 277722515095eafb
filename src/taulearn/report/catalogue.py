"""The report of many runs: verdicts, figures, and a table of all runs with filters, as one self-contained HTML file.

Like the report of one run it holds everything it shows and asks no server for anything; its links lead to the runs'
own reports beside it.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from taulearn.report.elements import number, table
from taulearn.report.html import hash_source, write_page


@dataclass(frozen=True)
class ClaimRow:
    """A claim as the report shows it.

    Attributes:
        id: Short name.
        statement: What is claimed.
        outcome: "holds", "holds in part", "does not hold" or "not measured".
        sentence: Which parts hold.
        figures: What was measured.
    """

    id: str
    statement: str
    outcome: str
    sentence: str
    figures: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRow:
    """A run as the report lists it.

    Attributes:
        name: Setting and seed.
        facets: What it can be filtered by, for instance {"data": "mnist"}.
        values: Its figures, by the columns' titles.
        link: Its own report, relative to this one; None where there is none.
    """

    name: str
    facets: Mapping[str, str]
    values: Mapping[str, float | int | str | None]
    link: str | None = None


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        title: For instance "Figure 4.1".
        caption: What it shows, plain text.
        png: The picture.
    """

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

    Args:
        path: The file, which ends in .html; its folder must exist.
        title: Heading.
        subtitle: A line below it.
        claims: What was judged.
        pictures: Figures.
        tables: Further tables, by their titles: Markdown tables, or preformatted text.
        runs: All runs.

    Returns:
        The file.

    Raises:
        ValueError: If ``path`` does not end in .html.

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
    assets = resources.files("taulearn.report") / "assets"
    script = (assets / "catalogue.js").read_text(encoding="utf-8")
    sections = [_claims(claims), _pictures(pictures), _tables(tables or {}), _runs(runs)]
    style = "\n".join((assets / name).read_text(encoding="utf-8") for name in ("report.css", "catalogue.css"))
    page = Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{title} · taulearn"),
        heading=escape(title),
        subtitle=escape(subtitle),
        policy=hash_source(script),
        style=style,
        body="\n".join(section for section in sections if section),
        figures="{}",
        plotly="",
        script=script,
    )
    return write_page(target, page)


def _claims(claims: Sequence[ClaimRow]) -> str:
    if not claims:
        return ""
    rows = [
        [
            escape(claim.id),
            escape(claim.statement),
            f"<span class='outcome' data-outcome='{escape(claim.outcome)}'>{escape(claim.outcome)}</span>",
            escape(claim.sentence) + _details(claim.figures),
        ]
        for claim in claims
    ]
    content = table("Claims", ["Claim", "Statement", "Verdict", "What holds"], rows)
    return f"<section class='claims' aria-label='Claims'>{content}</section>"


def _details(figures: Mapping[str, float | str]) -> str:
    if not figures:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(number(value))}</dd>" for name, value in figures.items())
    return f"<details><summary>measured figures</summary><dl>{rows}</dl></details>"


def _pictures(pictures: Sequence[Picture]) -> str:
    figures = (
        f"<figure><h3>{escape(each.title)}</h3><img alt='{escape(f'{each.title}: {each.caption}')}' "
        f"src='data:image/png;base64,{base64.b64encode(each.png).decode()}'>"
        f"<figcaption>{escape(each.caption)}</figcaption></figure>"
        for each in pictures
    )
    return f"<section class='pictures' aria-label='Figures'>{''.join(figures)}</section>" if pictures else ""


def _tables(tables: Mapping[str, str]) -> str:
    return "".join(
        f"<section class='measured' aria-label='{escape(title)}'>{_table(title, text)}</section>"
        for title, text in tables.items()
    )


def _table(title: str, text: str) -> str:
    """A Markdown table as an HTML one; other text as it is."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) < 2 or not all(line.startswith("|") and line.endswith("|") for line in lines):
        return f"<h3>{escape(title)}</h3><div class='scroll' tabindex='0'><pre>{escape(text)}</pre></div>"
    head, _, *rows = ([escape(cell.strip()) for cell in line[1:-1].split("|")] for line in lines)
    return table(title, head, rows)


def _runs(runs: Sequence[RunRow]) -> str:
    if not runs:
        return ""
    names = list(dict.fromkeys(name for run in runs for name in run.facets))
    columns = list(dict.fromkeys(name for run in runs for name in run.values))
    choices = "".join(_choice(name, [run.facets.get(name, "") for run in runs]) for name in names)
    head = "".join(f"<th scope='col'>{escape(word)}</th>" for word in ("run", *names, *columns))
    body = "".join(_row(run, names, columns) for run in runs)
    return (
        f"<section class='runs' aria-label='Runs'><div class='filters'>{choices}"
        f"<output id='count' aria-live='polite'>{len(runs)} of {len(runs)} runs</output></div>"
        "<div class='scroll' tabindex='0' role='region' aria-label='Runs'><table id='runs'><caption>Runs</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _choice(name: str, values: Sequence[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in sorted(set(values) - {""}))
    facet = escape(name)
    return f"<label>{facet} <select data-facet='{facet}'><option value=''>all</option>{options}</select></label>"


def _row(run: RunRow, names: Sequence[str], columns: Sequence[str]) -> str:
    facets = escape(json.dumps({name: run.facets.get(name, "") for name in names}, sort_keys=True))
    title = escape(run.name) if run.link is None else f"<a href='{escape(run.link)}'>{escape(run.name)}</a>"
    cells = "".join(f"<td>{escape(run.facets.get(name, ''))}</td>" for name in names)
    cells += "".join(f"<td>{_value(run.values.get(name))}</td>" for name in columns)
    return f"<tr data-facets='{facets}'><th scope='row'>{title}</th>{cells}</tr>"


def _value(value: float | int | str | None) -> str:
    return "" if value is None else escape(number(value))
