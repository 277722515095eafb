"""The interactive figures of the report, as plotly.js reads them: dictionaries of traces and layout, made from records.

Colours of text, grid and background are left to the page, which knows whether it is light or dark; a trace whose
``meta`` says ``ink`` takes the colour of the text.
``meta.variant`` names the alternative drawings of one figure between which the page switches.
"""

from html import escape
from typing import Any

import numpy as np

from taulearn.report.figures import PALETTE, palette
from taulearn.report.records import (
    Column,
    HistoryRecord,
    Line,
    finite_line,
    iteration_numbers,
    penalty_names,
    running_mean,
    tau_lines,
    thin,
)

POINTS = 2000
DASHES = ("solid", "dash")
Figure = dict[str, Any]
Trace = dict[str, Any]


def tau_explorer(history: HistoryRecord) -> Figure:
    """The time steps over the iterations: a line per layer, a cross where it was deleted, and the sum.

    Args:
        history: The record of a run.

    Returns:
        The figure, with the variants "effective" and "raw" where the record tells them apart.
    """
    variants = {"effective": False, "raw": True} if "raw_tau" in history.iterations else {None: False}
    return {
        "data": [trace for variant, raw in variants.items() for trace in _tau_traces(history, variant, raw)],
        "layout": _layout("iteration", "τ", xaxis={"type": "log"}),
    }


def loss_curves(history: HistoryRecord) -> Figure:
    """Data loss, each penalty and their total over the iterations, and the loss on validation data after each epoch.

    Long records have the variants "mean", smoothed over ``smoothing_window`` batches, and "batch".
    """
    columns = {"loss": "data loss"} | {f"penalty.{name}": f"penalty {name}" for name in penalty_names(history)}
    if len(columns) > 1 and "total" in history.iterations:
        columns["total"] = "total"
    window = smoothing_window(history)
    data = []
    for variant, width in ({"mean": window, "batch": 1} if window > 1 else {None: 1}).items():
        colours = palette(len(columns))
        for (column, label), colour in zip(columns.items(), colours, strict=True):
            values = history.iterations[column]
            rows = thin(len(values), POINTS)
            line = finite_line(iteration_numbers(history)[rows], running_mean(values, width)[rows])
            trace = _trace(
                line, label, colour, "iteration", ink=column == "total", dash="dash" if column == "total" else "solid"
            )
            data.append(_variant(trace, variant))
    if "validation.loss" in history.epochs:
        # Without the value before training: plotly.js draws a line from iteration 0 along the whole logarithmic axis.
        line = finite_line(np.asarray(history.epochs["iteration"])[1:], history.epochs["validation.loss"][1:])
        data.append(_trace(line, "validation loss", PALETTE[4], "iteration", dash="dot", markers=True))
    return {"data": data, "layout": _layout("iteration", "loss", xaxis={"type": "log"}, yaxis={"type": "log"})}


def depth_losses(history: HistoryRecord) -> Figure:
    """The loss of the network cut after each layer, on the training batches of three parts of a training.

    Args:
        history: The record of a run with a stage cost.

    Returns:
        The figure; layers that are deleted leave gaps.
    """
    losses = np.asarray(history.iterations["stage_loss"], dtype=np.float64)
    number = len(losses)
    width = max(1, number // 10)
    middle = (number - width) // 2
    parts = {"first tenth": slice(0, width), "middle": slice(middle, middle + width), "last tenth": slice(-width, None)}
    data = []
    for (label, rows), colour in zip(parts.items(), palette(3), strict=True):
        there = np.flatnonzero(np.isfinite(losses[rows]).any(0))
        if len(there):
            line = finite_line(there, np.nanmean(losses[rows][:, there], axis=0))
            data.append(_trace(line, label, colour, "layers", markers=True))
    return {"data": data, "layout": _layout("first k layers", "loss", yaxis={"type": "log"})}


def smoothing_window(history: HistoryRecord) -> int:
    """Recorded batches over which the smoothed losses are averaged: one in 200, at least one.

    Example:
        >>> from types import SimpleNamespace
        >>> smoothing_window(SimpleNamespace(iterations={"loss": np.zeros(12000)}))
        60
    """
    return max(1, len(iteration_numbers(history)) // 200)


def epoch_curves(
    runs: list[tuple[str, HistoryRecord]],
    columns: dict[str, str],
    label: str,
    *,
    log: bool = False,
    steps: bool = False,
) -> Figure:
    """Columns of one or several runs over the epochs.

    Args:
        runs: Names and histories.
        columns: Names of one or two columns, each with the label of its line; those that a run lacks are left out.
        label: Title of the vertical axis.
        log: Start with a logarithmic vertical axis.
        steps: Whole numbers that change in steps, drawn from zero.

    Returns:
        The figure. Of several runs each has its colour, and the columns differ by dashes.
    """
    compared = len(runs) > 1
    colours = palette(len(runs) if compared else len(columns))
    data = []
    for number, (name, history) in enumerate(runs):
        for k, (column, meaning) in enumerate(columns.items()):
            if column in history.epochs:
                values = np.asarray(history.epochs[column])
                rows = thin(len(values), POINTS)
                title = ", ".join(word for word in (name, meaning) if word)
                colour, dash = (colours[number], DASHES[k]) if compared else (colours[k], "solid")
                shape, markers = "hv" if steps else "linear", len(values) <= 60 and not steps
                line = finite_line(rows, values[rows])
                data.append(_trace(line, title, colour, "epoch", dash=dash, shape=shape, markers=markers))
    whole = {"rangemode": "tozero", "tickformat": ",d", "nticks": 6} if steps else {}
    layout = _layout("epoch", label, yaxis={"type": "log" if log else "linear"} | whole)
    if compared:
        layout["legend"]["orientation"] = "h"
    return {"data": data, "layout": layout | {"showlegend": len(data) > 1}}


def sizes(history: HistoryRecord) -> Figure:
    """Layers, parameters and seconds per epoch over the epochs, in three panels with one axis below."""
    panels = (("layers", "layers", ",d"), ("parameters", "parameters", ",d"), ("seconds", "seconds per epoch", ".3~g"))
    layout = _layout("epoch", "", xaxis={"anchor": "y3"}) | {"showlegend": False, "annotations": []}
    data = []
    for panel, (column, label, number) in enumerate(panels):
        values = np.asarray(history.epochs[column])
        timed = column == "seconds"
        rows = thin(len(values), POINTS)[1 if timed else 0 :]
        colour, shape = PALETTE[(0, 3, 2)[panel]], "linear" if timed else "hv"
        trace = _trace(finite_line(rows, values[rows]), label, colour, "epoch", shape=shape, number=number)
        axis = f"yaxis{panel + 1 if panel else ''}"
        data.append(trace | {"yaxis": axis.replace("axis", "")})
        top = round(0.93 - 0.35 * panel, 2)
        layout[axis] = {"rangemode": "tozero", "domain": [round(top - 0.23, 2), top], "nticks": 4, "tickformat": number}
        place = {"xref": "paper", "yref": "paper", "x": 0, "y": top, "xanchor": "left", "yanchor": "bottom"}
        layout["annotations"].append(place | {"text": label, "showarrow": False})
    return {"data": data, "layout": layout}


def plotly_text(text: str) -> str:
    """Text that plotly.js shows as it is: it reads a small part of HTML in titles and names.

    Example:
        >>> plotly_text("<b>a & b</b>")
        '&lt;b&gt;a &amp; b&lt;/b&gt;'
    """
    return escape(text, quote=False)


def _tau_traces(history: HistoryRecord, variant: str | None, raw: bool) -> list[Trace]:
    layers, total = tau_lines(history, raw=raw, limit=POINTS)
    colours = palette(len(layers))
    # Said on the line rather than on the cross: near both, plotly.js shows the line's text.
    fates = {
        gone.layer: f"<br>deleted after iteration {gone.iteration:,} (epoch {gone.epoch})"
        f"<br>share {gone.share:.3g}, {gone.parameters:,} parameters removed"
        for gone in history.deletions
    }
    data = []
    for layer, (line, colour) in enumerate(zip(layers, colours, strict=True)):
        hover = f"layer {layer}<br>iteration %{{x:,d}}<br>τ = %{{y:.5~g}}{fates.get(layer, '')}<extra></extra>"
        data.append(
            _trace(line, f"layer {layer}", colour, "iteration", hover=hover) | {"legendgroup": f"layer {layer}"}
        )
    for layer in fates:
        end = Line(layers[layer].x[-1:], layers[layer].y[-1:])
        marker = {"symbol": "x", "size": 10, "color": colours[layer]}
        mark = {"mode": "markers", "marker": marker, "showlegend": False, "hoverinfo": "skip", "hovertemplate": None}
        trace = _trace(end, f"layer {layer} deleted", colours[layer], "iteration")
        data.append(trace | mark | {"legendgroup": f"layer {layer}"})
    hover = "sum of all layers<br>iteration %{x:,d}<br>Σ τ = %{y:.5~g}<extra></extra>"
    data.append(
        _trace(total, "sum", PALETTE[0], "iteration", hover=hover, ink=True, dash="dash") | {"legendgroup": "sum"}
    )
    return [_variant(trace, variant) for trace in data]


def _trace(
    line: Line,
    name: str,
    colour: str,
    unit: str,
    *,
    hover: str | None = None,
    ink: bool = False,
    dash: str = "solid",
    shape: str = "linear",
    markers: bool = False,
    number: str = ".5~g",
) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": plotly_text(name),
        "x": line.x.tolist(),
        "y": _rounded(line.y),
        "line": {"color": colour, "width": 1.8, "dash": dash, "shape": shape},
        "marker": {"size": 5},
        "hovertemplate": hover or f"%{{fullData.name}}<br>{unit} %{{x:,d}}<br>%{{y:{number}}}<extra></extra>",
        "meta": {"ink": ink},
    }


def _variant(trace: Trace, variant: str | None) -> Trace:
    if variant is None:
        return trace
    return trace | {"meta": trace["meta"] | {"variant": variant}, "visible": variant in ("effective", "mean")}


def _rounded(values: Column) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def _layout(
    x: str, y: str, *, xaxis: dict[str, Any] | None = None, yaxis: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}} | (xaxis or {}),
        "yaxis": {"title": {"text": y}} | (yaxis or {}),
        "hovermode": "closest",
        "legend": {"itemclick": "toggleothers", "itemdoubleclick": "toggle"},
        "showlegend": True,
    }
