"""The sections of the report: one run, and several runs side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from taulearn.report.elements import (
    deletion_table,
    epoch_table,
    figure_element,
    final_accuracy,
    key_figures,
    key_value_table,
    number,
    table,
)
from taulearn.report.records import HistoryRecord, RunRecord, count_iterations, penalty_names
from taulearn.report.traces import (
    Figure,
    depth_losses,
    epoch_curves,
    loss_curves,
    sizes,
    smoothing_window,
    tau_explorer,
)


def run_section(run: RunRecord, figures: dict[str, Figure], prefix: str) -> str:
    """Everything about one run.

    Args:
        run: The run.
        figures: Takes the figures that the page is to draw, by the names that the section refers to.
        prefix: What these names start with.

    Returns:
        HTML.
    """
    history = run.history
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for label, value, note in key_figures(history)
    )
    parts = [f'<dl class="key-figures">{tiles}</dl>']
    curves = []
    if count_iterations(history):
        parts.append(_time_steps(history, figures, f"{prefix}-tau"))
        curves.append(_losses(history, figures, f"{prefix}-loss"))
    if "validation.accuracy" in history.epochs:
        curves.append(_accuracy(history, figures, f"{prefix}-accuracy"))
    if count_iterations(history) and "stage_loss" in history.iterations:
        curves.append(_depths(history, figures, f"{prefix}-depths"))
    size = _sizes(history, figures, f"{prefix}-sizes") if "layers" in history.epochs else ""
    parts.append(f'<div class="aside">{deletion_table(history)}{size}</div>')
    parts.append(f'<div class="pair">{"".join(curves)}</div>')
    parts.append(epoch_table(history))
    settings = {"Configuration": run.config, "Versions": run.versions, "Decisions": run.decisions}
    tables = "".join(key_value_table(title, values) for title, values in settings.items())
    parts.append(f'<div class="settings">{tables}</div>')
    return "\n".join(parts)


def comparison(names: Sequence[str], runs: Sequence[RunRecord], figures: dict[str, Figure]) -> str:
    """Several runs side by side: key figures, the options that differ, curves.

    Args:
        names: One name per run; run k = 1, 2, ... is the target of the link ``#run-k``.
        runs: The runs.
        figures: Takes the figures that the page is to draw.

    Returns:
        HTML.
    """
    pairs = [(name, run.history) for name, run in zip(names, runs, strict=True)]
    links = [f'<a href="#run-{k}">{escape(name)}</a>' for k, name in enumerate(names, start=1)]
    parts = [_results(links, [run.history for run in runs]), _differences(links, runs)]
    penalised = any("train.total" in history.epochs and penalty_names(history) for _, history in pairs)
    training = {"train.loss": "data loss", "train.total": "total"} if penalised else {"train.loss": ""}
    curves = {
        "accuracy": epoch_curves(pairs, {"validation.accuracy": ""}, "accuracy"),
        "loss": epoch_curves(pairs, training, "loss", log=True),
        "validation-loss": epoch_curves(pairs, {"validation.loss": ""}, "loss", log=True),
        "layers": epoch_curves(pairs, {"layers": ""}, "layers", steps=True),
    }
    words = {
        "accuracy": ("Accuracy", "Accuracy on the validation data after each epoch."),
        "loss": ("Training loss", f"Mean loss over each epoch{', dashed with all penalties' if penalised else ''}."),
        "validation-loss": ("Validation loss", "Loss on the validation data after each epoch."),
        "layers": ("Layers", "Layers after each epoch."),
    }
    shown = {key: figure for key, figure in curves.items() if figure["data"]}
    figures.update(shown)
    elements = (
        figure_element(key, figure, *words[key], controls=("y",) if "loss" in key else ())
        for key, figure in shown.items()
    )
    parts.append(f'<div class="pair">{"".join(elements)}</div>')
    return '<section aria-label="Comparison">' + "\n".join(parts) + "</section>"


def description(config: Mapping[str, Any]) -> str:
    """One line about a run, from the options that its configuration holds.

    Example:
        >>> description({"network": "resnet", "data": "digits", "hidden_layers": 6, "width": 100, "l1": 0.0, "seed": 0})
        'resnet on digits, 6 hidden layers of width 100, seed 0'
    """
    words = [str(config[key]) for key in ("network", "data") if key in config]
    parts = [" on ".join(words)] if words else []
    if config.get("network") == "resnet-v2" and "hidden_layers" in config:
        parts.append(f"{config['hidden_layers']} blocks")
    elif "hidden_layers" in config:
        width = f" of width {config['width']}" if "width" in config else ""
        parts.append(f"{config['hidden_layers']} hidden layers{width}")
    labels = {
        "constraint": "τ",
        "l1": "l1",
        "time_horizon": "time horizon",
        "stage_cost": "stage cost",
        "prune": "prune",
        "lr": "lr",
    }
    parts += [f"{label} {config[key]}" for key, label in labels.items() if config.get(key)]
    parts += [f"seed {config['seed']}"] if "seed" in config else []
    return ", ".join(parts)


def _time_steps(history: HistoryRecord, figures: dict[str, Figure], key: str) -> str:
    count, layers = count_iterations(history), history.iterations["tau"].shape[1]
    gone = ", ".join(f"{deletion.layer} (iteration {deletion.iteration:,})" for deletion in history.deletions[:12])
    more = f" and {len(history.deletions) - 12} more" if len(history.deletions) > 12 else ""
    caption = (
        f"Time steps of {layers} layers over {count:,} iterations; layers are numbered as at the start. "
        f"{f'Deleted: {gone}{more}' if gone else 'No layer was deleted'}. A click on a name isolates its line."
    )
    figures[key] = tau_explorer(history)
    return figure_element(key, figures[key], "Time steps", caption, controls=("x",), wide=True)


def _losses(history: HistoryRecord, figures: dict[str, Figure], key: str) -> str:
    window = smoothing_window(history)
    smoothed = f" (mean over {window} iterations, or each batch)" if window > 1 else ""
    total = "the total that is differentiated (without proximal penalties, which act after a step)"
    penalties = f", each penalty, and {total}" if penalty_names(history) else ""
    figures[key] = loss_curves(history)
    return figure_element(key, figures[key], "Losses", f"Data loss{smoothed}{penalties}.", controls=("x", "y"))


def _depths(history: HistoryRecord, figures: dict[str, Figure], key: str) -> str:
    figures[key] = depth_losses(history)
    caption = "Loss of the network cut after its first layers, on the training batches of three parts of the training."
    return figure_element(key, figures[key], "Loss at each depth", caption, controls=("y",))


def _accuracy(history: HistoryRecord, figures: dict[str, Figure], key: str) -> str:
    columns = {"validation.accuracy": "validation"} | (
        {"train.accuracy": "training"} if "train.accuracy" in history.epochs else {}
    )
    figures[key] = epoch_curves([("", history)], columns, "accuracy")
    return figure_element(key, figures[key], "Accuracy", f"Accuracy after each epoch, last {final_accuracy(history)}.")


def _sizes(history: HistoryRecord, figures: dict[str, Figure], key: str) -> str:
    figures[key] = sizes(history)
    caption = "Layers and parameters after each epoch, and the seconds it took."
    return figure_element(key, figures[key], "Layers, parameters, time", caption)


def _results(links: Sequence[str], histories: Sequence[HistoryRecord]) -> str:
    head = ["Run", *(escape(label) for label, _, _ in key_figures(histories[0])), "Deleted layers"]
    rows = []
    for link, history in zip(links, histories, strict=True):
        values = (escape(value) for _, value, _ in key_figures(history))
        rows.append([link, *values, ", ".join(str(gone.layer) for gone in history.deletions) or "none"])
    return table("Results", head, rows)


def _differences(links: Sequence[str], runs: Sequence[RunRecord]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [key for key in keys if len({repr(run.config.get(key, "")) for run in runs}) > 1]
    rows = [
        [link, *(escape(number(run.config.get(key, ""))) for key in differing)]
        for link, run in zip(links, runs, strict=True)
    ]
    return table("Options that differ", ["Run", *map(escape, differing)], rows) if differing else ""
