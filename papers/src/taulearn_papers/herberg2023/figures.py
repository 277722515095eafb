"""Figures 4.1 to 4.6 in the paper's form, means and ranges over the seeds; and what the published faults changed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from taulearn.app.results import NotMeasured, Results
from taulearn.report.figures import PALETTE
from taulearn.report.seed_bands import epoch_bands
from taulearn.training import History

from ..axes_and_tables import markdown_table, new_axes
from . import statistics as q
from .statistics import accuracy_after, difference, final_accuracy, values
from .tau_bands import tau_bands
from .trainings import DATA, LEARNED, NETWORKS, PUBLISHED, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "resnet": "ResNet", "fractional": "Fractional DNN"}
WORDS = {
    "free": "no regularization",
    "fixed": "fixed",
    "l1": r"$\ell_1$",
    "horizon": "time horizon",
    "dependent": r"final $\tau$ dependent",
    "l1-horizon": r"$\ell_1$ and time horizon",
}
TRAJECTORIES = ("free", "l1", "horizon", "dependent", "l1-horizon")


def figure_4_1(results: Results) -> "Figure":
    """Accuracies with learned and with fixed time steps."""
    figure, axes = new_axes(1, 2, 4.0)
    for ax, data in zip(axes[0], reversed(DATA), strict=True):
        groups, colours, styles = {}, {}, {}
        for k, network in enumerate(NETWORKS):
            for treatment, style in (("free", "-"), ("fixed", "--")):
                label = f"{TITLES[network]}, {'trainable' if treatment == 'free' else 'fixed'} $\\tau$"
                groups[label] = records(results, setting(data, network, treatment))
                colours[label], styles[label] = PALETTE[k], style
        epoch_bands(groups, "validation.accuracy", ax, colours=colours, styles=styles)
        _accuracy_axis(ax, TITLES[data])
        ax.legend(fontsize="small", loc="lower right")
    return figure


def figure_4_2(results: Results) -> "Figure":
    """Accuracies and losses of the residual network with four treatments of the time steps."""
    return _accuracies_and_losses(results, "resnet")


def figure_4_3(results: Results) -> "Figure":
    """The same for the fractional network."""
    return _accuracies_and_losses(results, "fractional")


def figure_4_4(results: Results) -> "Figure":
    """The time steps of the residual network on Fashion-MNIST."""
    return _trajectories(results, "resnet", "")


def figure_4_5(results: Results) -> "Figure":
    """The time steps of the fractional network on Fashion-MNIST; the dependent one before its lower bound."""
    return _trajectories(results, "fractional", "", raw=True)


def figure_4_6(results: Results) -> "Figure":
    """The time steps of the residual network on Fashion-MNIST, with pruning."""
    return _trajectories(results, "resnet", "-pruned")


def _accuracies_and_losses(results: Results, network: str) -> "Figure":
    columns = {
        "validation.accuracy": "Accuracy, test",
        "train.total": "Loss with penalties, training",
        "train.loss": "Cross entropy, training",
        "validation.loss": "Cross entropy, test",
    }
    figure, axes = new_axes(2, 4, 3.0)
    for row, data in zip(axes, reversed(DATA), strict=True):
        groups = {WORDS[name]: records(results, setting(data, network, name)) for name in LEARNED}
        for ax, (column, label) in zip(row, columns.items(), strict=True):
            epoch_bands(groups, column, ax, first=0 if column.startswith("validation") else 1)
            ax.set_ylabel(label)
            ax.set_title(TITLES[data], fontsize="medium")
            if column != "validation.accuracy":
                ax.set_yscale("log")
            else:
                _accuracy_axis(ax, TITLES[data])
        row[0].legend(fontsize="small", loc="lower right")
    return figure


def _trajectories(results: Results, network: str, suffix: str, *, raw: bool = False) -> "Figure":
    figure, axes = new_axes(2, 3, 3.4)
    panels = list(axes.flat)
    for letter, ax, treatment in zip("abcde", panels, TRAJECTORIES, strict=False):
        name = setting(DATA[0], network, f"{treatment}{suffix}")
        ax.set_title(f"({letter}) {WORDS[treatment]}", fontsize="medium")
        try:
            tau_bands(records(results, name), ax, raw=raw and treatment == "dependent")
        except NotMeasured as missing:
            ax.text(0.5, 0.5, str(missing), ha="center", va="center", transform=ax.transAxes, fontsize="small")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].axis("off")
    panels[-1].legend(handles, labels, loc="center", frameon=False)
    return figure


def records(results: Results, name: str) -> Sequence[History]:
    """The records of all seeds of a setting."""
    return [results.history(name, seed) for seed in results.seeds(name)]


def _accuracy_axis(ax: "Axes", title: str) -> None:
    ax.set_ylim(0, 1)
    ax.set_ylabel("Accuracy, test")
    ax.set_title(title, fontsize="medium")


_COLUMNS = (
    "setting",
    "accuracy after epoch 1, formulas",
    "as published",
    "at the end, formulas",
    "as published",
    "difference",
    "test loss at the end, formulas",
    "as published",
    "as published, penalties included",
    "steps at the end, formulas (first seed)",
    "as published",
)


def pairs() -> list[tuple[str, str, str]]:
    """Title, setting by the formulas, setting as published."""
    return [
        (
            f"{TITLES[network]}, {treatment}, {TITLES[data]}",
            setting(data, network, treatment),
            setting(data, f"{network}-as-published", treatment),
        )
        for data, network, treatment in PUBLISHED
    ]


def published_table(results: Results) -> str:
    """Accuracy, test loss and steps, as published against the formulas, over the seeds that both have.

    The published program's test loss contains the penalties. No training depends on that, so it is not imitated in a
    record; here the penalties are added, as their mean over each epoch's iterations.
    """
    rows = []
    for title, own, published in pairs():
        try:
            seeds = results.seeds(own, published)
        except NotMeasured as missing:
            rows.append([title, str(missing), *[""] * (len(_COLUMNS) - 2)])
            continue
        both = own, published
        means = [(name, figure) for figure in (accuracy_after(1), final_accuracy, _test_loss) for name in both]
        means.append((published, _test_loss_with_penalties))
        cells = [f"{np.mean(values(results, name, seeds, figure)):.4f}" for name, figure in means]
        cells.insert(4, str(difference(results, published, own, final_accuracy)))
        rows.append([title, *cells, *(_steps(results, name, seeds[0]) for name in both)])
    return markdown_table(_COLUMNS, rows)


def published_figure(results: Results) -> "Figure":
    """Accuracies by the formulas and with the faults of the published program, over the seeds that both have."""
    drawing, axes = new_axes(2, 4, 3.0)
    for ax, (title, own, published) in zip(axes.flat, pairs(), strict=False):
        ax.set_title(title, fontsize="small")
        try:
            seeds = results.seeds(own, published)
        except NotMeasured:
            ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
            continue
        named = {"formulas": own, "as published": published}
        groups = {words: [results.history(name, seed) for seed in seeds] for words, name in named.items()}
        epoch_bands(groups, "validation.accuracy", ax, colours=dict(zip(groups, PALETTE, strict=False)))
        ax.set_ylabel("Accuracy, test")
        ax.legend(fontsize="small", loc="lower right")
    axes.flat[-1].axis("off")
    return drawing


def _test_loss(history: History) -> float:
    return q.final(history.epochs["validation.loss"])


def _test_loss_with_penalties(history: History) -> float:
    epochs = history.epochs
    return q.final(epochs["validation.loss"] + epochs["train.total"] - epochs["train.loss"])


def _steps(results: Results, name: str, seed: int) -> str:
    tau = q.last_taus(results.history(name, seed))
    return ", ".join("deleted" if np.isnan(each) else f"{each:.2f}" for each in tau)
