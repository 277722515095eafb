"""Figures of the papers, drawn from records with matplotlib.

Each function takes ``ax``, returns the Axes and shows nothing; without ``ax`` it makes a figure of its own, outside
pyplot, so it works without a display.
Save with ``ax.figure.savefig(path)``.

References:
    Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning, figures 4.1 to 4.6.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from taulearn._errors import needs
from taulearn.report.records import (
    POINTS,
    Runs,
    finite_line,
    grid_lines,
    iteration_numbers,
    named_histories,
    penalty_names,
    running_mean,
    tau_lines,
    thin,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.typing import LineStyleType

    from taulearn.training.history import History

# Okabe and Ito's colours, told apart under the common colour vision deficiencies; black is the sum's, yellow too pale.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D31", "#7F7F7F")
LEGEND_LIMIT = 12


def tau_trajectories(
    history: "History", *, ax: "Axes | None" = None, show_sum: bool = True, raw: bool = False
) -> "Axes":
    """The time steps over the iterations, on a logarithmic axis, as in figures 4.4 to 4.6.

    One line per layer, ending with a cross where the layer was deleted, and their sum.

    Args:
        history: The record of a run.
        ax: Where to draw; None makes a figure.
        show_sum: Draw the sum of the time steps (dashed, black).
        raw: Draw the time steps before the lower bound was applied, where the record tells them apart (constraint
            "dependent" with a lower bound).

    Returns:
        The Axes. Lines are labelled by the layers' numbers at the start; beyond 12 layers the legend names some of
        them.

    Example:
        >>> from types import SimpleNamespace
        >>> tau = np.array([[0.5, 0.5], [0.6, np.nan]])
        >>> history = SimpleNamespace(iterations={"tau": tau}, epochs={}, deletions=[], insertions=[])
        >>> ax = tau_trajectories(history)
        >>> ax.get_xscale(), len(ax.lines)
        ('log', 3)
    """
    outside = ax is None
    ax = _axes(ax)
    layers, total = tau_lines(history, raw=raw, limit=POINTS)
    colours = palette(len(layers))
    handles: list[Artist] = []
    for layer, (line, colour) in enumerate(zip(layers, colours, strict=True)):
        handles += ax.plot(line.x, line.y, color=colour, linewidth=1.4, label=rf"$\tau^{{[{layer}]}}$")
    if len(handles) > LEGEND_LIMIT:
        handles = [handles[layer] for layer in np.linspace(0, len(handles) - 1, LEGEND_LIMIT).round().astype(int)]
    if show_sum:
        handles += ax.plot(total.x, total.y, "--", color="black", linewidth=1.2, label=r"$\sum\,\tau^{[\ell]}$")
    ends = [(layers[gone.layer], colours[gone.layer]) for gone in history.deletions if len(layers[gone.layer].x)]
    if ends:
        x, y, marks = zip(*((line.x[-1], line.y[-1], colour) for line, colour in ends), strict=True)
        ax.scatter(x, y, c=marks, marker="X", s=55, edgecolors="white", linewidths=0.7, zorder=3)
        handles.append(_sample(marker="X", linestyle="none", label="deleted"))
    births = [each for each in history.insertions if len(layers[each.layer].x)]
    for each in births:  # a dotted line comes from the parent
        line, parent, colour = layers[each.layer], layers[each.parent], colours[each.layer]
        before = np.flatnonzero(parent.x < line.x[0])[-1:]
        link = np.append(parent.x[before], line.x[0]), np.append(parent.y[before], line.y[0])
        ax.plot(*link, ":", color=colour, linewidth=1.0, label="_")
        ax.scatter(line.x[0], line.y[0], color=colour, marker="o", s=28, edgecolors="white", zorder=3)
    if births:
        handles.append(_sample(marker="o", linestyle="none", label="new"))
    ax.set_xscale("log")
    ax.set_xlim(left=1)
    ax.set_xlabel("Iteration")
    ax.set_ylabel(r"Value of $\tau$" + (" (raw)" if raw else ""))
    if outside:
        ax.legend(handles=handles, fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        ax.legend(handles=handles, fontsize="small", ncols=2 if len(handles) > 8 else 1)
    return ax


def time_grid(history: "History", *, ax: "Axes | None" = None) -> "Axes":
    """The time grid while it trains: the times t_l at the ends of the layers, which come and go.

    Args:
        history: The record of a run.
        ax: Where to draw; None makes a figure.

    Returns:
        The Axes, with a line for each layer that was ever there.

    Raises:
        ValueError: If the record holds no iterations.

    Example:
        >>> from types import SimpleNamespace
        >>> birth = SimpleNamespace(layer=1, parent=0)
        >>> tau = np.array([[0.5, np.nan], [0.25, 0.25]])
        >>> ax = time_grid(SimpleNamespace(iterations={"tau": tau}, epochs={}, deletions=[], insertions=[birth]))
        >>> [line.get_ydata().tolist() for line in ax.lines]
        [[0.5, 0.25], [0.5]]
    """
    ax = _axes(ax)
    lines = grid_lines(history)
    for layer, (line, colour) in enumerate(zip(lines, palette(len(lines)), strict=True)):
        ax.plot(line.x, line.y, color=colour, linewidth=1.0, label=f"end of layer {layer}")
    ax.set_xlabel("Iteration")
    ax.set_ylabel(r"Time $t_\ell$")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    return ax


def losses(
    runs: Runs,
    *,
    ax: "Axes | None" = None,
    by: str = "epoch",
    smooth: int = 1,
    total: bool = True,
    validation: bool = False,
) -> "Axes":
    """Loss curves of several runs side by side.

    The data loss is solid, the total with all penalties dashed, the validation loss dotted.

    Args:
        runs: A run, a history, a list of them, or a mapping from names to them.
        ax: Where to draw; None makes a figure.
        by: "epoch" draws the mean over each epoch, "iteration" the loss of each batch.
        smooth: Mean over that many rows (the row and those before it); 1 leaves the values as they are.
        total: Draw the total as well, for the runs that have penalties.
        validation: Draw the loss on the validation data as well, where recorded.

    Returns:
        The Axes, loss on a logarithmic axis where all values are positive.

    Raises:
        ValueError: If ``by`` is another name, ``smooth`` is below 1, or there is no run.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(iterations={"loss": np.array([2.0, 1.0])}, epochs={}, deletions=[])
        >>> losses({"free": history}, by="iteration").lines[0].get_label()
        'free'
    """
    if by not in ("epoch", "iteration"):
        raise ValueError(
            f"by must be 'epoch' or 'iteration', got {by!r}: the loss is recorded per batch and as mean per epoch"
        )
    pairs = named_histories(runs)
    ax = _axes(ax)
    handles: list[Line2D] = []
    drawn: dict[str, LineStyleType] = {}
    for (name, history), colour in zip(pairs, palette(len(pairs)), strict=True):
        columns, prefix = (history.epochs, "train.") if by == "epoch" else (history.iterations, "")
        curves: list[tuple[str, LineStyleType, str]] = [(f"{prefix}loss", "-", "data loss")]
        if total and penalty_names(history):
            curves.append((f"{prefix}total", "--", "total with penalties"))
        if validation:
            curves.append(("validation.loss", ":", "validation loss"))
        for column, style, meaning in curves:
            source = history.epochs if column == "validation.loss" else columns
            if column not in source:
                continue
            values = running_mean(source[column], smooth if source is columns else 1)
            rows = thin(len(values), POINTS)
            numbers = history.epochs["iteration"] if source is history.epochs else iteration_numbers(history)
            line = finite_line(rows if by == "epoch" else np.asarray(numbers)[rows], values[rows])
            label = _plain(name if style == "-" else f"{name}, {meaning}")
            width = 1.6 if style == ":" else 1.4
            curve = ax.plot(line.x, line.y, style, color=colour, linewidth=width, label=label)
            handles += curve if style == "-" else []
            drawn[meaning] = style
    if ax.lines and all((np.asarray(line.get_ydata()) > 0).all() for line in ax.lines):
        ax.set_yscale("log")
    ax.set_xlabel("Epoch" if by == "epoch" else "Iteration")
    ax.set_ylabel("Loss")
    _legend(ax, handles, drawn if len(drawn) > 1 else {})
    return ax


def accuracy(runs: Runs, *, ax: "Axes | None" = None, smooth: int = 1) -> "Axes":
    """Accuracy on the validation data over the epochs, several runs side by side, as in figures 4.1 to 4.3.

    Args:
        runs: A run, a history, a list of them, or a mapping from names to them.
        ax: Where to draw; None makes a figure.
        smooth: Mean over that many epochs; 1 leaves the values as they are.

    Returns:
        The Axes; epoch 0 is before training.

    Raises:
        ValueError: If a run has no recorded accuracy, ``smooth`` is below 1, or there is no run.

    Example:
        >>> from types import SimpleNamespace
        >>> history = SimpleNamespace(iterations={}, epochs={"validation.accuracy": np.array([0.1, 0.8])}, deletions=[])
        >>> accuracy({"free": history}).get_ylabel()
        'Accuracy'
    """
    pairs = named_histories(runs)
    for name, history in pairs:
        if "validation.accuracy" not in history.epochs:
            raise ValueError(f"runs must have a validation accuracy, got {name!r} without: train with validation data")
    ax = _axes(ax)
    handles: list[Line2D] = []
    for (name, history), colour in zip(pairs, palette(len(pairs)), strict=True):
        column = history.epochs["validation.accuracy"]
        line = finite_line(np.arange(len(column)), running_mean(column, smooth))
        handles += ax.plot(line.x, line.y, color=colour, linewidth=1.4, label=_plain(name))
    ax.set_xlabel("Epoch")
    ax.set_ylabel("Accuracy")
    _legend(ax, handles, {})
    return ax


def layers_and_parameters(history: "History", *, ax: "Axes | None" = None) -> "Axes":
    """Number of layers (left axis) and of parameters (right axis) over the epochs.

    Args:
        history: The record of a run.
        ax: Where to draw; None makes a figure.

    Returns:
        The left Axes; both axes start at zero.

    Example:
        >>> from types import SimpleNamespace
        >>> epochs = {"layers": np.array([6, 5]), "parameters": np.array([130006, 119905])}
        >>> history = SimpleNamespace(iterations={}, epochs=epochs, deletions=[])
        >>> layers_and_parameters(history).get_ylabel()
        'Layers'
    """
    ax = _axes(ax)
    right_axes = ax.twinx()
    handles: list[Line2D] = []
    for axes, column, colour, style in ((ax, "layers", PALETTE[0], "-"), (right_axes, "parameters", PALETTE[3], "--")):
        values = np.asarray(history.epochs[column])
        handles += axes.step(
            np.arange(len(values)), values, where="post", color=colour, linestyle=style, linewidth=1.6, label=column
        )
        axes.set_ylim(0, 1.08 * max(1.0, float(np.max(values))))
    ax.locator_params(integer=True)
    right_axes.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("Epoch")
    ax.set_ylabel("Layers")
    right_axes.set_ylabel("Parameters")
    right_axes.spines["top"].set_visible(False)
    ax.legend(handles=handles, fontsize="small", loc="lower left")
    return ax


def palette(count: int) -> list[str]:
    """Colours of ``count`` lines: eight that are told apart by name, beyond that a ramp from first to last.

    Example:
        >>> palette(2)
        ['#0072B2', '#E69F00']
    """
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    with needs("app", "figures"):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.0, 0.9, count))]


def _axes(ax: "Axes | None") -> "Axes":
    if ax is None:
        with needs("app", "figures"):
            from matplotlib.figure import Figure

        ax = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained").subplots()
        ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _sample(**style: Any) -> "Line2D":
    """A grey line that explains a style in the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color="0.4", **style)


def _plain(name: str) -> str:
    """A name without mathematics."""
    return name.replace("$", r"\$")


def _legend(ax: "Axes", handles: "list[Line2D]", styles: "dict[str, LineStyleType]") -> None:
    """Name the runs by colour and the columns by style, also those whose label matplotlib would leave out."""
    samples = [_sample(linestyle=style) for style in styles.values()]
    if handles:
        ax.legend([*handles, *samples], [*(str(each.get_label()) for each in handles), *styles], fontsize="small")
