"""What the faults of the published program changed: its settings beside the formulas as written."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ....report.bands import epoch_bands
from ....report.figures import PALETTE
from ....training import History
from ...results import NotMeasured, Results
from . import quantities as q
from .figures import TITLES, new_axes
from .judges import accuracy_after, difference, final_accuracy, values
from .members import PUBLISHED, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def table(results: Results) -> str:
    """Accuracy, test loss and steps, as published against the formulas, over the seeds that both have.

    The published program's test loss contains the penalties. No training depends on that, so it is not imitated in a
    record; here the penalties are added, as their mean over each epoch's iterations.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for title, own, published in pairs():
        try:
            seeds = results.seeds(own, published)
        except NotMeasured as missing:
            lines.append(f"| {title} | {missing} |" + " |" * (len(_COLUMNS) - 2))
            continue
        cells = [
            _mean(results, own, seeds, accuracy_after(1)),
            _mean(results, published, seeds, accuracy_after(1)),
            _mean(results, own, seeds, final_accuracy),
            _mean(results, published, seeds, final_accuracy),
            str(difference(results, published, own, final_accuracy)),
            _mean(results, own, seeds, _test_loss),
            _mean(results, published, seeds, _test_loss),
            _mean(results, published, seeds, _test_loss_with_penalties),
            _steps(results, own, seeds[0]),
            _steps(results, published, seeds[0]),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(results: Results) -> "Figure":
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


def _mean(results: Results, name: str, seeds: Sequence[int], figure: Callable[[History], float]) -> str:
    return f"{np.mean(values(results, name, seeds, figure)):.4f}"


def _test_loss(history: History) -> float:
    return q.final(history.epochs["validation.loss"])


def _test_loss_with_penalties(history: History) -> float:
    epochs = history.epochs
    return q.final(epochs["validation.loss"] + epochs["train.total"] - epochs["train.loss"])


def _steps(results: Results, name: str, seed: int) -> str:
    tau = q.last_taus(results.history(name, seed))
    return ", ".join("deleted" if np.isnan(each) else f"{each:.2f}" for each in tau)
