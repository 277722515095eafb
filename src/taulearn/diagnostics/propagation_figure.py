"""Pictures of the propagation of gradients, drawn from :class:`GradientPropagation` alone with matplotlib."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from .._errors import needs, unknown_name
from .gradients import GradientPropagation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "largest": r"$\sigma_{\max}(\partial y_N / \partial y_{\ell+1})$",
    "smallest": r"$\sigma_{\min}(\partial y_N / \partial y_{\ell+1})$",
    "state": r"$\Vert\partial y_N / \partial y_{\ell+1}\Vert$",
    "weight": r"$\Vert\partial y_N / \partial W_\ell\Vert$",
    "bias": r"$\Vert\partial y_N / \partial b_\ell\Vert$",
    "step": r"$\vert\partial y_N / \partial\tau_\ell\vert$",
}
# Okabe and Ito's colours
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")
_BACK = r"layers between $\ell$ and the last, $N-1-\ell$"

Curves = Mapping[str, GradientPropagation | Iterable[GradientPropagation]]


def plot_propagation(
    results: GradientPropagation | Curves, *, part: str = "largest", relative: bool = False, ax: "Axes | None" = None
) -> "Axes":
    """A norm of d y_N over the number of layers that the gradient has come back through, logarithmic.

    Args:
        results: One result, or labels with one result or several (networks of different depths: one colour).
        part: "largest", "smallest", "state", "weight", "bias" or "step" (see GradientPropagation).
        relative: Divide by the structural growth of the dense scheme.
        ax: Where to draw; None makes a figure.

    Returns:
        The Axes; medians over the samples. Zeros, infinities and NaN are left out.

    Raises:
        ValueError: If there is no such part, or nothing to draw.

    Example:
        >>> from taulearn.nn import resnet
        >>> from taulearn.diagnostics import gradient_propagation
        >>> result = gradient_propagation(resnet(2, 3, 1, 8), torch.ones(2, 2))
        >>> plot_propagation({"fixed": result}, part="weight").get_yscale()
        'log'
    """
    curves: Curves = {"": results} if isinstance(results, GradientPropagation) else results
    if not curves:
        raise ValueError("results must hold at least one result, got none: call gradient_propagation first")
    _check_part(part)
    if ax is None:
        with needs("app", "figures"):
            from matplotlib.figure import Figure

        ax = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained").subplots()
    _draw(ax, curves, list(curves), part, relative)
    ax.set_xlabel(_BACK)
    ax.set_ylabel(_quantity(part, relative))
    if any(curves):
        ax.legend(fontsize="small", frameon=False)
    return ax


def propagation_figure(
    panels: Mapping[str, Mapping[str, Curves]], *, part: str = "largest", relative: bool = False
) -> "Figure":
    """A grid of :func:`plot_propagation`: rows such as before and after training, columns such as the schemes.

    Args:
        panels: Row titles with column titles with curves.
        part: As in :func:`plot_propagation`.
        relative: As in :func:`plot_propagation`.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: If there is no panel, or as :func:`plot_propagation`.

    Example:
        >>> from taulearn.nn import densenet, resnet
        >>> from taulearn.diagnostics import gradient_propagation
        >>> x = torch.ones(2, 2)
        >>> row = {net.__name__: {"fixed": gradient_propagation(net(2, 3, 1, 8), x)} for net in (resnet, densenet)}
        >>> len(propagation_figure({"before training": row}).axes)
        2
    """
    with needs("app", "figures"):
        from matplotlib.figure import Figure

    columns = list(dict.fromkeys(title for row in panels.values() for title in row))
    if not columns:
        raise ValueError("panels must hold at least one panel, got none: {row: {column: {label: result}}}")
    _check_part(part)
    labels = list(dict.fromkeys(label for row in panels.values() for curves in row.values() for label in curves))
    size = (1.0 + 3.0 * len(columns), 1.2 + 2.6 * len(panels))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(panels), len(columns), sharex=True, sharey="col", squeeze=False)
    for axes, (title, row) in zip(grid, panels.items(), strict=True):
        for ax, column in zip(axes, columns, strict=True):
            _draw(ax, row.get(column, {}), labels, part, relative)
            ax.set_title(f"{column}, {title}", fontsize="medium")
    figure.supxlabel(_BACK, fontsize="medium")
    figure.supylabel(_quantity(part, relative), fontsize="medium")
    lines = {line.get_label(): line for ax in figure.axes for line in ax.lines}
    shown = [label for label in labels if label in lines and label]
    figure.legend(
        [lines[label] for label in shown], shown, loc="outside upper center", ncols=max(1, len(shown)), frameon=False
    )
    return figure


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise unknown_name("part", part, PARTS)


def _quantity(part: str, relative: bool) -> str:
    return PARTS[part] + (r", dense divided by $2^{N-\ell-2}$" if relative else "")


def _draw(ax: "Axes", curves: Curves, labels: list[str], part: str, relative: bool) -> None:
    """One panel; a label has the same colour in all. A dot ends the curve of each depth, at the first layer."""
    for label, group in curves.items():
        number = labels.index(label)
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number % len(_STYLES)]
        depths = [group] if isinstance(group, GradientPropagation) else sorted(group, key=lambda r: len(r.layers))
        for position, result in enumerate(depths):
            values = getattr(result, part).median(dim=1).values
            if relative:
                values = values / result.structural_growth
            values = torch.where(values.isfinite() & (values > 0), values, torch.nan)
            back = range(len(values) - 1, -1, -1)
            ax.plot(back, values.tolist(), style, color=colour, linewidth=1.3, label=label if position == 0 else None)
            ax.plot(back[0], values[0].item(), "o", color=colour, markersize=3.5, label="_end")
    ax.set_yscale("log")
    ax.grid(True, color="0.9", linewidth=0.6)
