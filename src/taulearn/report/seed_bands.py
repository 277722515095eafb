"""Settings that were trained with several seeds: means as lines, the range over the seeds as bands."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from taulearn.report.figures import palette
from taulearn.report.records import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from taulearn.training.history import History

BAND = 0.18


def epoch_bands(
    groups: "Mapping[str, Sequence[History]]",
    column: str,
    ax: "Axes",
    *,
    colours: Mapping[str, str] | None = None,
    styles: Mapping[str, Any] | None = None,
    first: int = 0,
) -> "Axes":
    """Draw a column per epoch for several settings: the mean over the seeds as a line, their range as a band.

    ``groups`` are the records of each setting's seeds by the label of its line, ``colours`` and ``styles`` those of the
    lines by label; ``first`` is the first epoch drawn: 0 is before training, 1 the first that has a training loss.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> record = SimpleNamespace(iterations={}, epochs={"validation.accuracy": np.array([0.1, 0.8])}, deletions=[])
        >>> len(epoch_bands({"free": [record, record]}, "validation.accuracy", Figure().subplots()).lines)
        1
    """
    own = dict(zip(groups, palette(len(groups)), strict=True))
    for label, histories in groups.items():
        length = min(len(history.epochs[column]) for history in histories)
        values = np.stack([np.asarray(history.epochs[column], dtype=np.float64)[first:length] for history in histories])
        lines = values.mean(0), values.min(0), values.max(0)
        band(ax, np.arange(first, length), lines, (colours or own)[label], label, (styles or {}).get(label, "-"))
    ax.set_xlabel("Epoch")
    ax.grid(True, color="0.9", linewidth=0.6)
    return ax


def band(ax: "Axes", x: Column, lines: tuple[Column, Column, Column], colour: str, label: str, style: Any) -> None:
    """Draw a mean as a line and the range from the lowest to the highest as a band around it."""
    mean, low, high = lines
    ax.plot(x, mean, color=colour, linewidth=1.3, linestyle=style, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=BAND, linewidth=0)
