"""The interactive charts of the report, as plotly.js reads them: traces and layout, made from records.

Colours of text, grid and background are left to the page, which knows whether it is light or dark; a trace whose
``meta`` says ``ink`` takes the colour of the text. ``meta.variant`` names the alternative drawings of one chart between
which the page switches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from taulearn.report.figures import PALETTE, palette
from taulearn.report.records import (
    POINTS,
    Line,
    count_iterations,
    finite_line,
    grid_lines,
    iteration_numbers,
    last_finite,
    penalty_names,
    running_mean,
    tau_lines,
    thin,
)

if TYPE_CHECKING:
    from taulearn.training.history import History

Trace = dict[str, Any]
STEPS: Trace = {"shape": "hv"}
INK: Trace = {"line": {"dash": "dash"}, "meta": {"ink": True}}


@dataclass(frozen=True)
class Chart:
    """A chart and the plain words around it; ``controls`` are the axes that switch between logarithmic and linear."""

    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    controls: Sequence[str] = ()
    wide: bool = False

    @property
    def variants(self) -> list[str]:
        """The alternative drawings, the one that is shown first in front."""
        return list(dict.fromkeys(trace["meta"]["variant"] for trace in self.data if "variant" in trace["meta"]))


def run_charts(history: "History") -> dict[str, Chart]:
    """The charts of one run, those for which its record holds the columns."""
    charts = {}
    if count_iterations(history):
        charts["tau"], charts["loss"] = tau_explorer(history), loss_curves(history)
        if history.insertions or history.deletions:
            charts["grid"] = time_grid(history)
    accuracy = history.epochs.get("validation.accuracy")
    if accuracy is not None:
        columns = {"validation.accuracy": "validation", "train.accuracy": "training"}
        last = last_finite(accuracy)
        caption = f"Accuracy after each epoch, last {'not recorded' if last is None else f'{last:.4f}'}."
        charts["accuracy"] = epoch_curves("Accuracy", caption, [("", history)], columns, "accuracy")
    if count_iterations(history) and "stage_loss" in history.iterations:
        charts["depths"] = depth_losses(history)
    if "layers" in history.epochs:
        charts["sizes"] = sizes(history)
    return charts


def comparison_charts(runs: "Sequence[tuple[str, History]]") -> dict[str, Chart]:
    """The charts of several runs side by side, those with at least one line."""
    penalised = any("train.total" in history.epochs and penalty_names(history) for _, history in runs)
    training = {"train.loss": "data loss", "train.total": "total"} if penalised else {"train.loss": ""}
    mean = f"Mean loss over each epoch{', dashed with all penalties' if penalised else ''}."
    after = "on the validation data after each epoch."
    charts = {
        "accuracy": epoch_curves("Accuracy", f"Accuracy {after}", runs, {"validation.accuracy": ""}, "accuracy"),
        "loss": epoch_curves("Training loss", mean, runs, training, "loss"),
        "validation-loss": epoch_curves("Validation loss", f"Loss {after}", runs, {"validation.loss": ""}, "loss"),
        "layers": epoch_curves("Layers", "Layers after each epoch.", runs, {"layers": ""}, "layers"),
    }
    return {key: chart for key, chart in charts.items() if chart.data}


def tau_explorer(history: "History") -> Chart:
    """The time steps over the iterations: a line per layer, a cross where it was deleted, and the sum."""
    variants = {"effective": False, "raw": True} if "raw_tau" in history.iterations else {None: False}
    data = [trace for variant, raw in variants.items() for trace in _tau_traces(history, variant, raw)]
    gone = ", ".join(f"{deletion.layer} (iteration {deletion.iteration:,})" for deletion in history.deletions[:12])
    more = f" and {len(history.deletions) - 12} more" if len(history.deletions) > 12 else ""
    came = f" {len(history.insertions)} came later, from a circle on." if history.insertions else ""
    caption = (
        f"Time steps of {history.iterations['tau'].shape[1]} layers over {count_iterations(history):,} iterations; "
        f"layers are numbered as at the start. {f'Deleted: {gone}{more}' if gone else 'No layer was deleted'}.{came} "
        "A click on a name isolates its line."
    )
    return Chart("Time steps", caption, data, _layout("iteration", "τ", x_type="log"), ("x",), wide=True)


def time_grid(history: "History") -> Chart:
    """The times at the ends of the layers over the iterations: a mesh that gets finer and coarser."""
    lines = grid_lines(history)
    traces = zip(lines, palette(len(lines)), strict=True)
    data = [_trace(line, f"end of layer {l}", colour, "iteration") for l, (line, colour) in enumerate(traces)]
    caption = f"Times at the ends of the layers, {len(history.insertions)} new, {len(history.deletions)} deleted."
    return Chart("Time grid", caption, data, _layout("iteration", "t"), ("x",))


def loss_curves(history: "History") -> Chart:
    """Data loss, each penalty and their total over the iterations, and the loss on validation data after each epoch.

    Long records have the variants "mean", smoothed over one batch in 200, and "batch".
    """
    columns = {"loss": "data loss"} | {f"penalty.{name}": f"penalty {name}" for name in penalty_names(history)}
    if len(columns) > 1 and "total" in history.iterations:
        columns["total"] = "total"
    numbers = iteration_numbers(history)
    window = max(1, len(numbers) // 200)
    rows = thin(len(numbers), POINTS)
    data = []
    for variant, width in ({"mean": window, "batch": 1} if window > 1 else {None: 1}).items():
        for (column, label), colour in zip(columns.items(), palette(len(columns)), strict=True):
            line = finite_line(numbers[rows], running_mean(history.iterations[column], width)[rows])
            style = INK if column == "total" else {}
            data.append(_variant(_trace(line, label, colour, "iteration", **style), variant))
    if "validation.loss" in history.epochs:
        # Without the value before training: plotly.js draws a line from iteration 0 along the whole logarithmic axis.
        line = finite_line(np.asarray(history.epochs["iteration"])[1:], history.epochs["validation.loss"][1:])
        data.append(_trace(line, "validation loss", PALETTE[4], "iteration", line={"dash": "dot"}, markers=True))
    smoothed = f" (mean over {window} iterations, or each batch)" if window > 1 else ""
    total = "the total that is differentiated (without proximal penalties, which act after a step)"
    penalties = f", each penalty, and {total}" if penalty_names(history) else ""
    layout = _layout("iteration", "loss", x_type="log", y_type="log")
    return Chart("Losses", f"Data loss{smoothed}{penalties}.", data, layout, ("x", "y"))


def depth_losses(history: "History") -> Chart:
    """The loss of the network cut after each layer, on the training batches of three parts of a training."""
    losses = np.asarray(history.iterations["stage_loss"], dtype=np.float64)
    width = max(1, len(losses) // 10)
    middle = (len(losses) - width) // 2
    parts = {"first tenth": slice(0, width), "middle": slice(middle, middle + width), "last tenth": slice(-width, None)}
    data = []
    for (label, rows), colour in zip(parts.items(), palette(3), strict=True):
        there = np.flatnonzero(np.isfinite(losses[rows]).any(0))
        if len(there):
            line = finite_line(there, np.nanmean(losses[rows][:, there], axis=0))
            data.append(_trace(line, label, colour, "layers", markers=True))
    caption = "Loss of the network cut after its first layers, on the training batches of three parts of the training."
    return Chart("Loss at each depth", caption, data, _layout("first k layers", "loss", y_type="log"), ("y",))


def epoch_curves(
    title: str, caption: str, runs: "Sequence[tuple[str, History]]", columns: Mapping[str, str], label: str
) -> Chart:
    """One or two columns of one or several runs over the epochs; a column that a run lacks is left out.

    Of several runs each has its colour, and the columns differ by dashes.
    """
    compared, log, steps = len(runs) > 1, label == "loss", label == "layers"
    colours = palette(len(runs) if compared else len(columns))
    data = []
    for number, (name, history) in enumerate(runs):
        for k, (column, meaning) in enumerate(columns.items()):
            if column not in history.epochs:
                continue
            values = np.asarray(history.epochs[column])
            rows = thin(len(values), POINTS)
            words = ", ".join(word for word in (name, meaning) if word)
            colour, markers = colours[number if compared else k], len(values) <= 60 and not steps
            style = STEPS if steps else {"dash": "dash"} if compared and k else {}
            data.append(_trace(finite_line(rows, values[rows]), words, colour, "epoch", markers=markers, line=style))
    layout = _layout("epoch", label, y_type="log" if log else "linear")
    if steps:
        layout["yaxis"] |= {"rangemode": "tozero", "tickformat": ",d", "nticks": 6}
    if compared:
        layout["legend"]["orientation"] = "h"
    return Chart(title, caption, data, layout | {"showlegend": len(data) > 1}, ("y",) if log else ())


def sizes(history: "History") -> Chart:
    """Layers, parameters and seconds per epoch over the epochs, in three panels with one axis below."""
    panels = (
        ("layers", "layers", ",d", PALETTE[0], STEPS),
        ("parameters", "parameters", ",d", PALETTE[3], STEPS),
        ("seconds", "seconds per epoch", ".3~g", PALETTE[2], {"shape": "linear"}),
    )
    layout = _layout("epoch", "") | {"showlegend": False, "annotations": []}
    layout["xaxis"] |= {"anchor": "y3"}
    data = []
    for number, (column, label, form, colour, style) in enumerate(panels):
        values = np.asarray(history.epochs[column])
        rows = thin(len(values), POINTS)[1 if column == "seconds" else 0 :]
        hover = f"{label}<br>epoch %{{x:,d}}<br>%{{y:{form}}}<extra></extra>"
        axis, top = str(number + 1 if number else ""), round(0.93 - 0.35 * number, 2)
        trace = _trace(finite_line(rows, values[rows]), label, colour, "epoch", line=style)
        data.append(trace | {"yaxis": f"y{axis}", "hovertemplate": hover})
        place = {"domain": [round(top - 0.23, 2), top], "rangemode": "tozero"}
        layout[f"yaxis{axis}"] = place | {"nticks": 4, "tickformat": form}
        corner = {"xref": "paper", "yref": "paper", "x": 0, "y": top, "xanchor": "left", "yanchor": "bottom"}
        layout["annotations"].append(corner | {"text": label, "showarrow": False})
    caption = "Layers and parameters after each epoch, and the seconds it took."
    return Chart("Layers, parameters, time", caption, data, layout)


def plotly_text(text: str) -> str:
    """Text that plotly.js shows as it is: it reads a small part of HTML in names, and fills in what stands in %{}."""
    return escape(text, quote=False).replace("%{", "%&#123;")


def _tau_traces(history: "History", variant: str | None, raw: bool) -> list[Trace]:
    """The lines of the layers, the crosses at their ends, and the sum."""
    layers, total = tau_lines(history, raw=raw)
    colours = palette(len(layers))
    # Said on the line rather than on the cross: near both, plotly.js shows the line's text.
    fates = {
        gone.layer: f"<br>deleted after iteration {gone.iteration:,} (epoch {gone.epoch})"
        f"<br>share {gone.share:.3g}, {gone.parameters:,} parameters removed"
        for gone in history.deletions
    }
    births = {each.layer: f"<br>new, of layer {each.parent}" for each in history.insertions}
    data = []
    for layer, (line, colour) in enumerate(zip(layers, colours, strict=True)):
        name = f"layer {layer}"
        fate = births.get(layer, "") + fates.get(layer, "")
        hover = f"{name}<br>iteration %{{x:,d}}<br>τ = %{{y:.5~g}}{fate}<extra></extra>"
        data.append(_trace(line, name, colour, "iteration", hovertemplate=hover, legendgroup=name))
    places = [(layer, slice(-1, None), "x", "deleted") for layer in fates]
    places += [(layer, slice(0, 1), "circle-open", "new") for layer in births]
    for layer, at, symbol, what in places:
        end = Line(layers[layer].x[at], layers[layer].y[at])
        mark: Trace = {"mode": "markers", "marker": {"symbol": symbol, "size": 10, "color": colours[layer]}}
        mark |= {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None, "legendgroup": f"layer {layer}"}
        data.append(_trace(end, f"layer {layer} {what}", colours[layer], "iteration") | mark)
    hover = "sum of all layers<br>iteration %{x:,d}<br>Σ τ = %{y:.5~g}<extra></extra>"
    data.append(_trace(total, "sum", PALETTE[0], "iteration", hovertemplate=hover, legendgroup="sum", **INK))
    return [_variant(trace, variant) for trace in data]


def _trace(points: Line, name: str, colour: str, unit: str, /, *, markers: bool = False, **more: Any) -> Trace:
    """A line of a chart over iterations, epochs or layers; ``more`` are attributes that plotly.js knows."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": plotly_text(name),
        "x": points.x.tolist(),
        "y": [float(f"{value:.7g}") for value in points.y.tolist()],
        "line": {"color": colour, "width": 1.8} | more.pop("line", {}),
        "marker": {"size": 5},
        "hovertemplate": f"%{{fullData.name}}<br>{unit} %{{x:,d}}<br>%{{y:.5~g}}<extra></extra>",
        "meta": {},
    } | more


def _variant(trace: Trace, variant: str | None) -> Trace:
    """A trace as part of one of the alternative drawings."""
    choice = {"meta": trace["meta"] | {"variant": variant}, "visible": variant in ("effective", "mean")}
    return trace if variant is None else trace | choice


def _layout(x: str, y: str, *, x_type: str | None = None, y_type: str | None = None) -> dict[str, Any]:
    axes = (("xaxis", x, x_type), ("yaxis", y, y_type))
    return {axis: {"title": {"text": title}} | ({"type": kind} if kind else {}) for axis, title, kind in axes} | {
        "hovermode": "closest",
        "legend": {"itemclick": "toggleothers", "itemdoubleclick": "toggle"},
        "showlegend": True,
    }
