"""The sections of the report as data for its template: one run, and several runs side by side."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from taulearn.report.charts import comparison_charts, run_charts
from taulearn.report.records import count_iterations, last_finite, thin

if TYPE_CHECKING:
    from taulearn.training.history import History
    from taulearn.training.run_folder import Run

EPOCH_ROWS = 200


def run_section(key: str, name: str, run: "Run") -> dict[str, Any]:
    """Everything about one run; ``key`` is its id in the page, which the ids of its charts start with."""
    epochs = run.history.epochs
    count = len(epochs.get("layers", ()))
    rows = thin(count, EPOCH_ROWS).tolist()
    return {
        "key": key,
        "name": name,
        "tiles": key_figures(run.history),
        "charts": {f"{key}-{chart}": made for chart, made in run_charts(run.history).items()},
        "deletions": run.history.deletions,
        "insertions": run.history.insertions,
        "epochs": {
            "title": "Every epoch" if len(rows) == count else f"{len(rows)} of {count} epochs",
            "head": ["Epoch", *epochs],
            "rows": [[row, *(column[row].item() for column in epochs.values())] for row in rows],
        },
        "settings": {"Configuration": run.config, "Versions": run.versions, "Decisions": run.decisions},
    }


def comparison(names: Sequence[str], runs: "Sequence[Run]") -> dict[str, Any]:
    """Several runs side by side: key figures, the options that differ, charts."""
    histories = [run.history for run in runs]
    results = []
    for name, history in zip(names, histories, strict=True):
        values = (value for _, value, _ in key_figures(history))
        results.append([name, *values, ", ".join(str(gone.layer) for gone in history.deletions) or "none"])
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [key for key in keys if len({repr(run.config.get(key, "")) for run in runs}) > 1]
    options = [[name, *(run.config.get(key, "") for key in differing)] for name, run in zip(names, runs, strict=True)]
    return {
        "charts": comparison_charts(list(zip(names, histories, strict=True))),
        "tables": {
            "Results": (["Run", *(label for label, _, _ in key_figures(histories[0])), "Deleted layers"], results),
            "Options that differ": (["Run", *differing], options if differing else []),
        },
    }


def key_figures(history: "History") -> list[tuple[str, str, str]]:
    """The headline's figures as (label, value, note): accuracy, layers and parameters before and after, seconds."""
    accuracy = np.asarray(history.epochs.get("validation.accuracy", np.empty(0)))
    last = last_finite(accuracy)
    seconds = np.asarray(history.epochs.get("seconds", np.empty(0)))
    epochs, iterations = max(0, len(seconds) - 1), count_iterations(history)
    removed = sum(gone.parameters for gone in history.deletions)
    changes = {
        column: f"{int(values[0]):,} → {int(values[-1]):,}" if len(values) else "not recorded"
        for column in ("layers", "parameters")
        for values in [np.asarray(history.epochs.get(column, np.empty(0)))]
    }
    new = f", {len(history.insertions)} new" if history.insertions else ""
    best = "" if last is None else f"best {np.nanmax(accuracy):.4f}"
    return [
        ("Final accuracy (validation data)", "not recorded" if last is None else f"{last:.4f}", best),
        ("Layers", changes["layers"], f"{len(history.deletions)} deleted{new}"),
        ("Parameters", changes["parameters"], f"{removed:,} deleted"),
        ("Seconds", f"{np.nansum(seconds):,.1f}", f"{epochs:,} epochs, {iterations:,} iterations"),
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, those of nested tables as ``outer.inner``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def description(config: Mapping[str, Any]) -> str:
    """One line about a run, from the options that its configuration holds.

    Example:
        >>> description({"network": "resnet", "data": "digits", "hidden_layers": 6, "width": 100, "l1": 0.0, "seed": 0})
        'resnet on digits, 6 hidden layers of width 100, seed 0'
    """
    words = [PurePath(str(config[key])).name for key in ("network", "data") if key in config]
    parts = [" on ".join(words)] if words else []
    if config.get("network") == "resnet-v2" and "hidden_layers" in config:
        parts.append(f"{config['hidden_layers']} blocks")
    elif "hidden_layers" in config:
        width = f" of width {config['width']}" if "width" in config else ""
        parts.append(f"{config['hidden_layers']} hidden layers{width}")
    labels = {"constraint": "τ", "l1": "l1", "time_horizon": "time horizon", "stage_cost": "stage cost"}
    parts += [f"{label} {config[key]}" for key, label in labels.items() if config.get(key)]
    parts += [f"{key} {config[key]}" for key in ("prune", "lr") if config.get(key)]
    return ", ".join(parts + ([f"seed {config['seed']}"] if "seed" in config else []))
