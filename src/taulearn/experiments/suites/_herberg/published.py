"""What the faults of the published program changed: its settings beside the formulas as written."""

from typing import TYPE_CHECKING

import numpy as np

from ....report.bands import epoch_bands
from ....report.figures import PALETTE
from ...results import NotMeasured, Results
from . import quantities as q
from .figures import TITLES, new_axes, records
from .judges import accuracy_after, difference, final_accuracy, mean, values
from .members import PUBLISHED, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """Accuracy and steps, as published against the formulas, over the seeds that both have."""
    lines = [
        "| setting | accuracy after epoch 1, formulas | as published | at the end, formulas | as published "
        "| difference "
        "| steps at the end, formulas (first seed) | as published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, own, published in pairs():
        try:
            seeds = results.seeds(own, published)
        except NotMeasured as missing:
            lines.append(f"| {title} | {missing} |" + " |" * 6)
            continue
        early = [f"{np.mean(values(results, name, seeds, accuracy_after(1))):.4f}" for name in (own, published)]
        late = [f"{mean(results, name, final_accuracy):.4f}" for name in (own, published)]
        found = difference(results, published, own, final_accuracy)
        steps = [_steps(results, name, seeds[0]) for name in (own, published)]
        lines.append(f"| {title} | {' | '.join([*early, *late, str(found), *steps])} |")
    return "\n".join(lines) + "\n"


def figure(results: Results) -> "Figure":
    """Accuracies by the formulas and with the faults of the published program."""
    drawing, axes = new_axes(2, 4, 3.0)
    for ax, (title, own, published) in zip(axes.flat, pairs(), strict=False):
        ax.set_title(title, fontsize="small")
        try:
            groups = {"formulas": records(results, own), "as published": records(results, published)}
        except NotMeasured:
            ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
            continue
        epoch_bands(groups, "validation.accuracy", ax, colours=dict(zip(groups, PALETTE, strict=False)))
        ax.set_ylabel("Accuracy, test")
        ax.legend(fontsize="small", loc="lower right")
    axes.flat[-1].axis("off")
    return drawing


def _steps(results: Results, name: str, seed: int) -> str:
    tau = q.last_taus(results.history(name, seed))
    return ", ".join("deleted" if np.isnan(each) else f"{each:.2f}" for each in tau)
