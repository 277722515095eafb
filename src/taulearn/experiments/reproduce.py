"""A suite from its records to its results: verdicts, figures, tables, the report, and what is kept of them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from .._devices import machine
from .._errors import unknown_name
from ..files import write_bytes
from .config import TrainConfig
from .results import NotMeasured, Results
from .suite import SEPARATOR, Member, Suite, Verdict

if TYPE_CHECKING:
    from ..report.catalogue import RunRow

PACK = "records.npz"
_SMALL_DPI = 80


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

    Args:
        suite: The suite.
        results: The records.
        members: Those that there should be: a verdict that lacks some of them, because their training failed or has
            not ended, says so.

    Example:
        >>> from taulearn.experiments.suites import load
        >>> judge(load("herberg2023"), Results("nowhere"))[0].verdict.outcome
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

    Args:
        judged: The claims with their verdicts.
        out: Folder.

    Returns:
        The files.

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

    Args:
        suite: The suite.
        results: The records.
        out: Folder, made if missing.
        only: The number of one figure; None: all of them.
        kinds: Formats; the last one is that of the files that are returned.
        dpi: Points per inch of the PNG.

    Returns:
        The files, and by number why a figure could not be drawn.

    Raises:
        ValueError: If the suite has no such figure.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments.suites import load
        >>> draw(load("herberg2023"), Results("nowhere"), tempfile.mkdtemp(), "4.1")
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


def _with_fewer_colours(png: bytes) -> bytes:
    """The same picture with a palette of 256 colours, a third of the size."""
    from PIL import Image  # matplotlib brings it

    content = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE).save(
            content, format="png", optimize=True
        )
    return content.getvalue()


def tabulate(suite: Suite, results: Results, only: str | None = None) -> dict[str, str]:
    """The tables of a suite as Markdown, by number; those whose records are missing say so.

    Args:
        suite: The suite.
        results: The records.
        only: The number of one table; None: all of them.

    Raises:
        ValueError: If the suite has no such table.

    Example:
        >>> from taulearn.experiments.suites import load
        >>> "no finished member" in tabulate(load("herberg2023"), Results("nowhere"))["as-published"]
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


def write_report(suite: Suite, results: Results, judged: Sequence[Judged], out: str | Path) -> Path:
    """Write the suite's report.html: claims, figures, tables, and every run with a link.

    Args:
        suite: The suite.
        results: The records.
        judged: The claims with their verdicts.
        out: Folder that holds the figures, drawn before.
    """
    from ..report.catalogue import ClaimRow, Picture, write_catalogue

    verdicts = [ClaimRow(j.id, j.statement, j.verdict.outcome, j.verdict.sentence, j.verdict.figures) for j in judged]
    pictures = [
        Picture(f"Figure {name}", (function.__doc__ or "").strip().partition("\n")[0], file.read_bytes())
        for name, function in suite.figures.items()
        if (file := Path(out) / "figures" / f"figure-{name}.png").exists()
    ]
    runs = [_run_row(results, setting, seed) for setting, seed in results.readable]
    subtitle = f"{suite.title}: {len(runs)} members with {len(results.settings)} settings"
    tables = {f"Table {name}": text for name, text in tabulate(suite, results).items()}
    file = Path(out) / "report.html"
    return write_catalogue(file, suite.name, subtitle, claims=verdicts, pictures=pictures, tables=tables, runs=runs)


def keep(suite: Suite, results: Results, judged: Sequence[Judged], folder: str | Path) -> list[Path]:
    """Write what stays of a suite's results: verdicts, small figures, tables, and the records they are made from.

    Args:
        suite: The suite.
        results: The records.
        judged: The claims with their verdicts.
        folder: Where; made if missing. ``Results(folder / "records.npz")`` reads the records again.

    Returns:
        The files.
    """
    kept = Path(folder)
    kept.mkdir(parents=True, exist_ok=True)
    files = write_claims(judged, kept)
    figures = draw(suite, results, kept, kinds=("png",), dpi=_SMALL_DPI)[0]
    for file in figures:
        write_bytes(file, _with_fewer_colours(file.read_bytes()))
    files += figures
    for name, text in tabulate(suite, results).items():
        write_bytes(kept / f"table-{name}.md", text.encode())
        files.append(kept / f"table-{name}.md")
    results.pack(kept / PACK, suite.shown)
    write_bytes(kept / "provenance.json", (json.dumps(provenance(suite, results), indent=1) + "\n").encode())
    write_bytes(kept / "recipe.toml", tomli_w.dumps(recipe(results)).encode())
    return [*files, kept / PACK, kept / "provenance.json", kept / "recipe.toml"]


def recipe(results: Results) -> dict[str, dict[str, Any]]:
    """What was trained: for each setting its seeds and the options that are not at their defaults.

    Args:
        results: The records.

    Example:
        >>> recipe(Results("nowhere"))
        {}
    """
    found: dict[str, dict[str, Any]] = {}
    for setting, seed in results.readable:
        if setting not in found:
            options = {}
            if results.done(setting, seed).get("config") is not None:
                config = results.config(setting, seed)
                options = config.model_dump(
                    mode="json", exclude_defaults=True, exclude_none=True, exclude={"run", "overwrite", "seed"}
                )
            found[setting] = {"seeds": [], **options}
        found[setting]["seeds"].append(seed)
    return found


def provenance(suite: Suite, results: Results) -> dict[str, Any]:
    """Under what a suite's members were trained: versions, machines, time.

    Args:
        suite: The suite.
        results: The records.
    """
    notes = [results.done(setting, seed) for setting, seed in results.readable]
    versions = sorted({json.dumps(note.get("versions", {}), sort_keys=True) for note in notes})
    return {
        "suite": suite.name,
        "members": len(notes),
        "settings": Counter(setting for setting, _ in results.readable),
        "versions": [json.loads(each) for each in versions],
        "machines": sorted({str(note.get("machine", "unknown")) for note in notes}),
        "hours of training": round(sum(float(note.get("seconds", 0.0)) for note in notes) / 3600, 2),
        "written on": machine(),
    }


def as_markdown(judged: Sequence[Judged]) -> str:
    """The table of verdicts, and below it the figures behind each.

    Args:
        judged: The claims with their verdicts.

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


_PENALTIES = (
    "l1", "l2", "elastic_net", "weight_elastic_net", "group_lasso", "time_horizon", "bias_ordering", "stage_cost"
)  # fmt: skip


def _facets(config: TrainConfig) -> dict[str, str]:
    """What the runs of a suite differ in, for the filters of its report."""
    penalties = [name.replace("_", " ") for name in _PENALTIES if getattr(config, name)]
    return {
        "data": config.data,
        "network": config.network + ", as published" * config.as_published,
        "depth": str(config.hidden_layers),
        "steps": config.constraint,
        "penalty": " + ".join(penalties).replace("l1", "l1, proximal" if config.proximal else "l1") or "none",
        "pruned": "yes" if config.prune or config.prune_blocks else "no",
    }


def _run_row(results: Results, setting: str, seed: int) -> "RunRow":
    from ..report.catalogue import RunRow

    note = results.done(setting, seed)
    trained = note.get("config") is not None
    facets = _facets(results.config(setting, seed)) if trained else {}
    values: dict[str, float | int | str | None] = {"seed": seed}
    values |= {f"test {name}": value for name, value in note.get("test", {}).items()}
    if trained:
        layers = results.history(setting, seed).epochs["layers"]
        values |= {"layers": f"{layers[0]} → {layers[-1]}"}
    values["seconds"] = note.get("seconds")
    name = f"{setting}/seed-{seed}"
    link = f"{name}/report.html" if (results.out / name / "report.html").exists() else None
    return RunRow(name, facets, values, link)
