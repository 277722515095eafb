"""The report: one HTML file that holds everything it shows, plotly.js included, and asks no server for anything.

Names, labels and values of the configuration are data of unknown origin. They enter the page through the template's
autoescape (text), ``tojson`` (charts) and ``charts.plotly_text`` (labels that plotly.js would read as markup). Beyond
that the page's content security policy names its own scripts by their hashes and forbids every other script and every
connection.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taulearn._errors import needs
from taulearn.files import move
from taulearn.report.records import unique_names
from taulearn.report.sections import comparison, description, flat, run_section

if TYPE_CHECKING:
    from taulearn.training.run_folder import Run


def write_html(runs: "Run | Sequence[Run]", path: str | os.PathLike[str]) -> Path:
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
    with needs("app", "the report"):
        from plotly.offline import get_plotlyjs

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
    names = unique_names([run.name for run in several])
    sections = [run_section(f"run-{k}", name, run) for k, (name, run) in enumerate(zip(names, several, strict=True), 1)]
    content: dict[str, Any] = {"runs": sections, "comparison": None}
    if len(several) == 1:
        content |= {"title": f"Run {names[0]}", "subtitle": description(several[0].config)}
    else:
        content |= {"title": f"{len(several)} runs compared", "subtitle": ", ".join(names)}
        content["comparison"] = comparison(names, several)
    charts = {key: chart for section in sections for key, chart in section["charts"].items()}
    charts |= content["comparison"]["charts"] if content["comparison"] else {}
    figures = {key: {"data": chart.data, "layout": chart.layout} for key, chart in charts.items()}
    plotly = str(get_plotlyjs()).replace("</script", "<\\/script")
    return write_page(target, render([asset("report.css")], [plotly, asset("report.js")], figures=figures, **content))


def render(styles: Sequence[str], scripts: Sequence[str], **content: Any) -> str:
    """The page: the template filled with its content, the styles and the scripts that its policy allows."""
    with needs("app", "the report"):
        from jinja2 import Environment
        from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": True, "separators": (",", ":")}
    environment.filters |= {"text": text, "flat": flat}
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    return environment.from_string(asset("template.html")).render(
        content,
        styles=[Markup(style) for style in styles],
        scripts=[Markup(script) for script in scripts],
        policy=Markup(" ".join(f"'sha256-{each}'" for each in hashes)),
    )


def asset(name: str) -> str:
    """A file that the pages are made of."""
    return (resources.files("taulearn.report") / "assets" / name).read_text(encoding="utf-8")


def text(value: object) -> str:
    """A value as text: numbers short, None as "none", text as it is, anything else as JSON.

    Example:
        >>> text(0.1 + 0.2), text(130006), text(None), text([100, 50]), text(True)
        ('0.3', '130006', 'none', '[100, 50]', 'true')
    """
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str, ensure_ascii=False)


def write_page(target: Path, page: str) -> Path:
    """Write a page aside and rename it, so that an earlier one stays whole until then; without torch."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.write_text(page, encoding="utf-8", errors="replace", newline="\n")
        move(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target
