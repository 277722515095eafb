"""The time steps of runs with several seeds over the iterations: means as lines, the range over the seeds as bands."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from taulearn.report.figures import palette
from taulearn.report.records import Column, iteration_numbers, last_finite, time_steps
from taulearn.report.seed_bands import band
from taulearn.training import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 400


def tau_bands(histories: Sequence[History], ax: "Axes", *, raw: bool = False) -> "Axes":
    """Draw the time steps over the iterations, one line per layer, and their sum.

    A layer's line is the mean over the seeds that still have it and ends where fewer than half of them do; a cross
    marks each deletion. ``raw``: the steps before the lower bound was applied, where the record tells them apart.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> record = SimpleNamespace(iterations={"tau": np.ones((9, 2))}, epochs={}, deletions=[], insertions=[])
        >>> len(tau_bands([record], Figure().subplots()).lines)
        3
    """
    last = min(int(iteration_numbers(history)[-1]) for history in histories)
    x = np.unique(np.geomspace(1, last, _POINTS).round().astype(np.int64))
    steps = np.stack([_on_grid(history, x, raw) for history in histories])
    colours = palette(steps.shape[2])
    for layer, colour in enumerate(colours):
        values = steps[:, :, layer]
        shown = np.isfinite(values).sum(0) >= max(1, (len(values) + 1) // 2)
        kept = values[:, shown]
        lines = np.nanmean(kept, axis=0), np.nanmin(kept, axis=0), np.nanmax(kept, axis=0)
        band(ax, x[shown], lines, colour, rf"$\tau^{{[{layer}]}}$", "-")
    total = np.nansum(steps, axis=2)
    band(ax, x, (total.mean(0), total.min(0), total.max(0)), "black", r"$\sum_\ell \tau^{[\ell]}$", "--")
    cross: dict[str, Any] = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6, "linestyle": "none"}
    for history in histories:
        for gone in history.deletions:
            value = last_finite(history.iterations["tau"][:, gone.layer])
            if value is not None:
                ax.plot([gone.iteration], [value], "X", color=colours[gone.layer], **cross)
    ax.set_xscale("log")
    ax.set_xlim(1, last)
    ax.set_xlabel("Iteration")
    ax.set_ylabel(r"Value of $\tau$" + (" (raw)" if raw else ""))
    ax.grid(True, color="0.9", linewidth=0.6)
    return ax


def _on_grid(history: "History", x: Column, raw: bool) -> Float[np.ndarray, "points layers"]:
    """The steps at given iterations, between recorded ones along straight lines, NaN from their deletion on."""
    tau, there = time_steps(history, raw), iteration_numbers(history)
    result = np.full((len(x), tau.shape[1]), np.nan)
    for layer, column in enumerate(tau.T):
        known = np.isfinite(column)
        if known.any():
            inside = x <= there[known][-1]
            result[inside, layer] = np.interp(x[inside], there[known], column[known])
    return result
