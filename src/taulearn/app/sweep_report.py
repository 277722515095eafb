"""Results of a sweep: one table with a row for each member, figures, and a report."""

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_bytes
from .results import NotMeasured, Results
from .sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = 12
"""Settings whose curves are drawn; more cannot be told apart."""


def rows(sweep: Sweep, results: Results, failed: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """One row for each member: what varies, the seed, and what came of it or what went wrong.

    Example:
        >>> from taulearn.app.sweep import make_sweep
        >>> rows(make_sweep("depth", {"grid": {"hidden_layers": [2]}}), Results("nowhere"))
        [{'hidden_layers': 2, 'seed': 0, 'status': 'missing', 'error': ''}]
    """
    table = []
    for member in sweep.members:
        point = sweep.points[member.setting]
        row: dict[str, Any] = {name: _cell(point.get(name)) for name in sweep.varied}
        error = (failed or {}).get(member.name)
        row |= {"seed": member.seed, "status": "missing" if error is None else "failed", "error": error or ""}
        try:
            note, history = results.done(member.setting, member.seed), results.history(member.setting, member.seed)
        except NotMeasured as reason:
            if results.has(member.setting, member.seed):
                row |= {"status": "unreadable", "error": str(reason)}
            table.append(row)
            continue
        row |= {"status": "finished", "error": ""}
        row |= {f"test.{name}": value for name, value in note.get("test", {}).items()}
        row |= {name: column[-1].item() for name, column in history.epochs.items() if not name.startswith("validation")}
        table.append(row | {"seconds": note.get("seconds")})
    return table


def write_table(table: Sequence[Mapping[str, Any]], out: str | Path) -> Path:
    """Write the rows as results.csv, and as results.parquet beside it where pyarrow is there (extra ``parquet``)."""
    columns = list(dict.fromkeys(name for row in table for name in row))
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = io.BytesIO()
        pq.write_table(pa.table({n: [row.get(n) for row in table] for n in columns}), content)
        write_bytes(Path(out) / "results.parquet", content.getvalue())
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    file = Path(out) / "results.csv"
    write_bytes(file, text.getvalue().encode())
    return file


def curves(sweep: Sweep, results: Results) -> "Figure":
    """Accuracy (or the loss on the validation data) over the epochs, mean and range over the seeds of each setting."""
    from matplotlib.figure import Figure

    from ..report.seed_bands import epoch_bands

    finished = [setting for setting in sweep.points if setting in results.settings][:CURVES]
    if not finished:
        raise NotMeasured("no member is finished")
    groups = {name: [results.history(name, seed) for seed in results.seeds(name)] for name in finished}
    column = _measure(groups[finished[0]][0].epochs)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    ax = epoch_bands(groups, column, figure.subplots())
    ax.set_ylabel(column.replace("validation.", "validation "))
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def dependences(sweep: Sweep, results: Results) -> "Figure":
    """The final figure over each number that varies: a point for each seed, a line through the means."""
    from matplotlib.figure import Figure

    finished = [setting for setting in sweep.points if setting in results.settings]
    names = [name for name in sweep.varied if all(_is_number(sweep.points[s].get(name)) for s in finished)]
    if not finished or not names:
        raise NotMeasured("no member is finished" if not finished else "nothing that varies is a number")
    column = _measure(results.history(finished[0], results.seeds(finished[0])[0]).epochs)
    figure = Figure(figsize=(5.2 * len(names), 4.2), dpi=120, layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for others in dict.fromkeys(_others(sweep.points[s], name) for s in finished):
            own = sorted(
                (s for s in finished if _others(sweep.points[s], name) == others), key=lambda s: sweep.points[s][name]
            )
            x = [float(sweep.points[s][name]) for s in own]
            values = [[results.history(s, seed).epochs[column][-1] for seed in results.seeds(s)] for s in own]
            (line,) = ax.plot(x, [np.mean(each) for each in values], "-o", markersize=4, linewidth=1.3, label=others)
            for at, each in zip(x, values, strict=True):
                ax.plot([at] * len(each), each, "_", color=line.get_color(), alpha=0.6)
        ax.set_xlabel(name)
        ax.set_ylabel(column.replace("validation.", "final validation "))
        ax.grid(True, color="0.9", linewidth=0.6)
        if len(sweep.varied) > 1:
            ax.legend(fontsize="small")
    return figure


def write_report(sweep: Sweep, results: Results, table: Sequence[Mapping[str, Any]], out: str | Path) -> Path:
    """Write figures and report.html."""
    from ..report.catalogue import Picture, RunRow, write_catalogue

    pictures = []
    for title, function in (("Curves", curves), ("Dependence", dependences)):
        try:
            figure = function(sweep, results)
        except NotMeasured:
            continue
        content = io.BytesIO()
        figure.savefig(content, format="png")
        write_bytes(Path(out) / f"{title.lower()}.png", content.getvalue())
        caption = (function.__doc__ or "").partition("\n")[0]
        pictures.append(Picture(title, caption, content.getvalue()))
    left_out = {*sweep.varied} if any(row.get("error") for row in table) else {*sweep.varied, "error"}
    runs = []
    for member, row in zip(sweep.members, table, strict=True):
        values = {name: value for name, value in row.items() if name not in left_out}
        link = f"{member.name}/report.html"
        there = (Path(out) / link).exists()
        facets = {name: str(row[name]) for name in sweep.varied}
        runs.append(RunRow(member.name, facets, values, link if there else None))
    subtitle = f"{len(sweep.points)} settings, {len(sweep.members)} trainings"
    return write_catalogue(Path(out) / "report.html", f"Sweep {sweep.name}", subtitle, pictures=pictures, runs=runs)


def _measure(epochs: Mapping[str, Any]) -> str:
    return "validation.accuracy" if "validation.accuracy" in epochs else "validation.loss"


def _others(point: Mapping[str, Any], name: str) -> str:
    return ", ".join(f"{key} = {_cell(value)}" for key, value in point.items() if key != name)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> Any:
    return "-".join(map(str, value)) if isinstance(value, list) else value
