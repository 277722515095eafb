"""The report of a suite: claims, figures, tables, and every run with a link and what it can be filtered by."""

from collections.abc import Sequence
from pathlib import Path

from taulearn.app.config import TrainConfig
from taulearn.app.results import Results
from taulearn.report.catalogue import ClaimRow, Picture, RunRow, write_catalogue

from .judging import Judged, tabulate
from .suite import Suite

_PENALTIES = (
    "l1", "l2", "elastic_net", "weight_elastic_net", "group_lasso", "time_horizon", "bias_ordering", "stage_cost"
)  # fmt: skip


def write_report(suite: Suite, results: Results, judged: Sequence[Judged], out: str | Path) -> Path:
    """Write the suite's report.html: claims, figures, tables, and every run with a link."""
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


def facets(config: TrainConfig, hooks: str | None = None) -> dict[str, str]:
    """The settings in which the runs of a suite differ, for the filters of its report.

    Example:
        >>> facets(TrainConfig(l1=0.01, time_horizon=1.0))["penalty"]
        'l1 + time horizon'
    """
    words = {"l1": "l1, proximal" if config.proximal else "l1"}
    penalties = [words.get(name, name.replace("_", " ")) for name in _PENALTIES if getattr(config, name)]
    return {
        "data": config.data,
        "network": config.network + (f", {hooks.replace('_', ' ')}" if hooks else ""),
        "depth": str(config.hidden_layers),
        "steps": config.constraint,
        "penalty": " + ".join(penalties) or "none",
        "pruned": "yes" if config.prune or config.prune_blocks else "no",
    }


def _run_row(results: Results, setting: str, seed: int) -> RunRow:
    note = results.done(setting, seed)
    trained = note.get("config") is not None
    found = facets(results.config(setting, seed), results.hooks(setting, seed)) if trained else {}
    values: dict[str, float | int | str | None] = {"seed": seed}
    values |= {f"test {name}": value for name, value in note.get("test", {}).items()}
    if trained:
        layers = results.history(setting, seed).epochs["layers"]
        values |= {"layers": f"{layers[0]} → {layers[-1]}"}
    values["seconds"] = note.get("seconds")
    name = f"{setting}/seed-{seed}"
    link = f"{name}/report.html" if (results.out / name / "report.html").exists() else None
    return RunRow(name, found, values, link)
