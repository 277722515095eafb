"""Parts of the report as HTML text: tables, and the frame of a figure.

Cells are HTML; captions, names and values are escaped here.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from taulearn.report.records import HistoryRecord, count_iterations, last_finite, thin
from taulearn.report.traces import Figure

EPOCH_ROWS = 200


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, foot: Sequence[str] | None = None
) -> str:
    """An HTML table with a caption, headers of columns, and the first cell of each row as its header.

    Args:
        caption: Plain text.
        head: HTML of the column headers.
        rows: HTML of the cells.
        foot: HTML of the cells of a closing row.

    Example:
        >>> "<th scope='row'>3</th><td>12</td>" in table("Layers", ["Layer", "Epoch"], [["3", "12"]])
        True
    """
    columns = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    body = "".join(map(_row, rows))
    closing = f"<tfoot>{_row(foot)}</tfoot>" if foot is not None else ""
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(caption)}'>"
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody>{closing}</table></div>"
    )


def key_value_table(caption: str, values: Mapping[str, Any]) -> str:
    """A table of names and values, nested tables as ``outer.inner``; everything is escaped.

    Example:
        >>> "<td>&lt;b&gt;</td>" in key_value_table("Configuration", {"run": {"name": "<b>"}})
        True
    """
    rows = [[escape(key), escape(number(value))] for key, value in _flat(values)]
    return table(caption, ["Name", "Value"], rows) if rows else ""


def number(value: object) -> str:
    """A value as text: numbers short, None as "none", text as it is, anything else as JSON.

    Example:
        >>> number(0.1 + 0.2), number(130006), number(None), number([100, 50]), number(True)
        ('0.3', '130006', 'none', '[100, 50]', 'true')
    """
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str, ensure_ascii=False)


def figure_element(
    key: str, figure: Figure, title: str, caption: str, *, controls: tuple[str, ...] = (), wide: bool = False
) -> str:
    """The frame of an interactive figure: title, buttons, the place where the page draws it, caption.

    Args:
        key: Name of the figure in the page's data, a valid HTML id.
        figure: The figure; its axes name the buttons, its variants get one each.
        title: Plain text.
        caption: Plain text, also the alternative text of the picture.
        controls: Axes ("x", "y") that switch between logarithmic and linear.
        wide: Draw it taller, for a figure over the width of the page.
    """
    layout = figure["layout"]
    groups = []
    for axis in controls:
        unit, scale = layout[f"{axis}axis"]["title"]["text"], layout[f"{axis}axis"].get("type", "linear")
        pair = ((kind, f'data-axis="{axis}axis" data-type="{kind}"', kind == scale) for kind in ("log", "linear"))
        groups.append(_button_group(unit, pair))
    variants = list(dict.fromkeys(trace["meta"]["variant"] for trace in figure["data"] if "variant" in trace["meta"]))
    if variants:
        choices = ((name, f'data-variant="{name}"', name == variants[0]) for name in variants)
        groups.append(_button_group("values", choices))
    everything = '<button type="button">show all</button>' if layout["showlegend"] else ""
    return (
        f'<figure{" class=wide" if wide else ""} aria-labelledby="{key}-title">'
        f'<div class="bar"><h3 id="{key}-title">{escape(title)}</h3>'
        f'<div class="controls">{"".join(groups)}{everything}</div></div>'
        f'<div class="plot" data-figure="{key}" role="img" aria-label="{escape(title)}: {escape(caption)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def key_figures(history: HistoryRecord) -> list[tuple[str, str, str]]:
    """The figures of the headline as (label, value, note), plain text.

    Accuracy, layers and parameters before and after, seconds.
    """
    best = np.asarray(history.epochs.get("validation.accuracy", np.empty(0)))
    seconds = np.asarray(history.epochs.get("seconds", np.empty(0)))
    epochs, iterations = max(0, len(seconds) - 1), count_iterations(history)
    return [
        (
            "Final accuracy (validation data)",
            final_accuracy(history),
            f"best {np.nanmax(best):.4f}" if np.isfinite(best).any() else "",
        ),
        ("Layers", _before_and_after(history, "layers"), f"{len(history.deletions)} deleted"),
        (
            "Parameters",
            _before_and_after(history, "parameters"),
            f"{sum(gone.parameters for gone in history.deletions):,} deleted",
        ),
        ("Seconds", f"{np.nansum(seconds):,.1f}", f"{epochs:,} epochs, {iterations:,} iterations"),
    ]


def final_accuracy(history: HistoryRecord) -> str:
    """The last recorded accuracy on the validation data, four digits."""
    value = last_finite(history.epochs.get("validation.accuracy"))
    return "not recorded" if value is None else f"{value:.4f}"


def deletion_table(history: HistoryRecord) -> str:
    """What was deleted and when, the parameters added up below; nothing where no layer was deleted."""
    if not history.deletions:
        return ""
    head = ["Layer", "Epoch", "Iteration", "Share", "Parameters removed"]
    rows = [
        [str(gone.layer), str(gone.epoch), f"{gone.iteration:,}", f"{gone.share:.3g}", f"{gone.parameters:,}"]
        for gone in history.deletions
    ]
    total = ["All", "", "", "", f"{sum(gone.parameters for gone in history.deletions):,}"]
    return table("Deleted layers", head, rows, foot=total)


def epoch_table(history: HistoryRecord) -> str:
    """All columns per epoch, folded away; of a long run ``EPOCH_ROWS`` rows, spread as in the figures."""
    count = len(history.epochs.get("layers", ()))
    rows = thin(count, EPOCH_ROWS)
    columns = list(history.epochs)
    body = [
        [str(row), *(escape(number(history.epochs[column][row].item())) for column in columns)] for row in rows.tolist()
    ]
    title = "Every epoch" if len(rows) == count else f"{len(rows)} of {count} epochs"
    content = table(title, ["Epoch", *map(escape, columns)], body)
    return f"<details><summary>Table: {title.lower()}</summary>{content}</details>"


def _before_and_after(history: HistoryRecord, column: str) -> str:
    values = np.asarray(history.epochs.get(column, np.empty(0)))
    return f"{int(values[0]):,} → {int(values[-1]):,}" if len(values) else "not recorded"


def _button_group(label: str, buttons: Iterable[tuple[str, str, bool]]) -> str:
    content = "".join(
        f'<button type="button" {attributes} aria-pressed="{str(pressed).lower()}">{name}</button>'
        for name, attributes, pressed in buttons
    )
    return f'<span role="group" aria-label="{escape(label)}"><span>{escape(label)}</span>{content}</span>'


def _row(cells: Sequence[str]) -> str:
    return f"<tr><th scope='row'>{cells[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
