"""The report: one HTML file that holds everything it shows, plotly.js included, and asks no server for anything.

Names, labels and values of the configuration are data of unknown origin. They enter the page through ``html.escape``
(text), ``json`` with every ``<``, ``>`` and ``&`` written as an escape (figures) and ``traces.plotly_text`` (labels
that plotly.js would read as markup). Beyond that the page's content security policy names its own scripts by their
hashes and forbids every other script and every connection.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from taulearn.files import move
from taulearn.report.records import RunRecord, unique_names
from taulearn.report.sections import comparison, description, run_section
from taulearn.report.traces import Figure


def write_html(runs: RunRecord | Sequence[RunRecord], path: str | os.PathLike[str]) -> Path:
    """Write the interactive report of one or several runs as one self-contained HTML file.

    The file is written aside and renamed, so an earlier report stays whole until the new one is. The same records
    give the same bytes.

    Args:
        runs: A run or several; several get curves and a table that compare them, then a section each.
        path: The file to write, for instance ``runs/first/report.html``; its folder must exist.

    Returns:
        The path of the file.

    Raises:
        ValueError: If there is no run, or ``path`` does not end in .html.
        FileNotFoundError: If the folder of ``path`` does not exist.

    Example:
        >>> write_html([], "report.html")
        Traceback (most recent call last):
        ValueError: runs must hold at least one run, got none: open one with Run.open(path)
    """
    several = list(runs) if isinstance(runs, Sequence) else [runs]
    if not several:
        raise ValueError("runs must hold at least one run, got none: open one with Run.open(path)")
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path must end in .html, got {str(target)!r}: another file there would be overwritten")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path must lie in an existing folder, got {str(target)!r}: make {str(target.parent)!r} first"
        )
    return write_page(target, page(several))


def write_page(target: Path, text: str) -> Path:
    """Write a page aside and rename it, so that an earlier one stays whole until then; without torch."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        move(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def page(runs: Sequence[RunRecord]) -> str:
    """The text of the report.

    Args:
        runs: At least one run.

    Returns:
        A whole HTML document, the same for the same records.
    """
    from plotly.offline import get_plotlyjs

    names = unique_names([run.name for run in runs])
    figures: dict[str, Figure] = {}
    if len(runs) == 1:
        heading, subtitle = f"Run {names[0]}", description(runs[0].config)
        sections = [run_section(runs[0], figures, "run-1")]
    else:
        heading, subtitle = f"{len(runs)} runs compared", ", ".join(names)
        sections = [comparison(names, runs, figures)]
        for k, (name, run) in enumerate(zip(names, runs, strict=True), start=1):
            summary = f"<summary><h2>{escape(name)}</h2></summary>"
            section = run_section(run, figures, f"run-{k}")
            sections.append(f'<details class="run" id="run-{k}">{summary}\n{section}</details>')
    assets = resources.files("taulearn.report") / "assets"
    plotly = str(get_plotlyjs()).replace("</script", "<\\/script")
    script = (assets / "report.js").read_text(encoding="utf-8")
    return Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{heading} · taulearn"),
        heading=escape(heading),
        subtitle=escape(subtitle),
        policy=f"{hash_source(plotly)} {hash_source(script)}",
        style=(assets / "report.css").read_text(encoding="utf-8"),
        body="\n".join(sections),
        figures=_json(figures),
        plotly=plotly,
        script=script,
    )


def hash_source(script: str) -> str:
    """What the content security policy knows a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    text = json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
