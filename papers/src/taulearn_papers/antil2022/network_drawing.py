"""A network drawn as in Antil, Diaz, Herberg (2022), figure 2: weights as lines, biases as dots, the steps above."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from taulearn._errors import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

_MOST_LINES = 2500
"""Lines per pair of layers; of wider layers the largest weights are drawn."""


class Parts(NamedTuple):
    """The drawn parts of a network.

    Attributes:
        weights: Of the hidden layers and of the output, each (outputs, inputs).
        biases: Of the hidden layers.
        origin: The layers' numbers at the start of training.
        tau: Their steps.
    """

    weights: Sequence[NDArray[Any]]
    biases: Sequence[NDArray[Any]]
    origin: Sequence[int]
    tau: Sequence[float]

    @property
    def names(self) -> list[str]:
        """The texts above the columns."""
        pairs = zip(self.origin, self.tau, strict=True)
        return ["input", *(f"layer {number}\n$\\tau$ = {tau:.2f}" for number, tau in pairs), "output"]


def network(
    model: "nn.Module | Parts",
    *,
    ax: "Axes | None" = None,
    largest_weight: float | None = None,
    largest_bias: float | None = None,
    colour_bars: bool = True,
) -> "Axes":
    """Draw weights as lines, coloured by their magnitude, and biases as dots, coloured by their value.

    Columns are the input, the hidden layers with their numbers at the start of training and their time steps, and the
    output; neurons without a bias (input, output) are empty dots.

    Args:
        model: A network of fully connected layers, or what :func:`parts` says of it.
        ax: Where to draw; None makes a figure.
        largest_weight: Magnitude at the end of the lines' colours. None: the largest one.
        largest_bias: Magnitude at both ends of the dots' colours. None: the largest one.
        colour_bars: Whether to draw the bars that explain the colours.

    Returns:
        The Axes.

    Raises:
        TypeError: If the model has layers that are not fully connected.

    Example:
        >>> from taulearn.nn import resnet
        >>> ax = network(resnet(7, 10, 3, 5))
        >>> len(ax.texts)  # the columns' names: input, five layers, output
        7
    """
    with needs("app", "figures"):
        from matplotlib.cm import ScalarMappable
        from matplotlib.collections import LineCollection
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

    shown = model if isinstance(model, Parts) else parts(model)
    weights, biases, names = shown.weights, shown.biases, shown.names
    if ax is None:
        ax = Figure(figsize=(1.6 * (len(weights) + 2), 4.0), dpi=150, layout="constrained").subplots()
    top = max(float(np.abs(w).max()) for w in weights) if largest_weight is None else largest_weight
    bound = max(float(np.abs(b).max()) for b in biases) if largest_bias is None else largest_bias
    heights = [_heights(weights[0].shape[1]), *(_heights(w.shape[0]) for w in weights)]
    lines = Normalize(0.0, top)
    for column, w in enumerate(weights):
        order = np.argsort(np.abs(w), axis=None)[-_MOST_LINES:]  # the largest last, above the others
        to, of = np.unravel_index(order, w.shape)
        left, right = heights[column][of], heights[column + 1][to]
        ends = [[(column, start), (column + 1, end)] for start, end in zip(left, right, strict=True)]
        sizes = np.abs(w)[to, of]
        widths = 0.3 + 1.5 * np.clip(sizes / top, 0, 1)
        ax.add_collection(LineCollection(ends, array=sizes, cmap="Greys", norm=lines, linewidths=widths))
    dots = Normalize(-bound, bound)
    for column, y in enumerate(heights):
        colours: dict[str, Any] = {"facecolors": "white"}
        if 0 < column <= len(biases):
            colours = {"c": biases[column - 1], "cmap": "coolwarm", "norm": dots}
        ax.scatter(np.full(len(y), column), y, s=26, edgecolors="0.3", linewidths=0.5, zorder=3, **colours)
        ax.text(column, 1.06, names[column], ha="center", va="bottom", fontsize="small")
    ax.set_xlim(-0.3, len(weights) + 0.3)
    ax.set_ylim(-0.05, 1.05)
    ax.axis("off")
    if colour_bars:
        figure = cast(Any, ax.figure)
        figure.colorbar(ScalarMappable(lines, "Greys"), ax=ax, label="abs(weight)", shrink=0.8, pad=0.01)
        figure.colorbar(ScalarMappable(dots, "coolwarm"), ax=ax, label="bias", shrink=0.8, pad=0.01)
    return ax


def _heights(neurons: int) -> NDArray[np.float64]:
    """Where the neurons of a column lie, the first at the top."""
    return np.linspace(1.0, 0.0, neurons) if neurons > 1 else np.array([0.5])


def parts(model: "nn.Module") -> Parts:
    """The drawn parts of a network.

    Args:
        model: A network of fully connected layers.

    Raises:
        TypeError: If it has other layers.

    Example:
        >>> from taulearn.nn import resnet
        >>> [w.shape for w in parts(resnet(7, 10, 3, 2)).weights]
        [(10, 7), (10, 10), (3, 10)]
    """
    from torch import nn

    layers = getattr(model, "layers", None)
    linears = [getattr(layer, "linear", None) for layer in layers or ()]
    head = getattr(model, "head", None)
    if not linears or not all(isinstance(each, nn.Linear) for each in [*linears, head]):
        raise TypeError(
            f"model must be a network of fully connected layers, got {type(model).__name__}: build it with "
            "taulearn.nn.resnet, feedforward, densenet or fractional_dnn"
        )
    found = cast(Any, [*linears, head])
    weights = [each.weight.detach().double().cpu().numpy() for each in found]
    biases = [each.bias.detach().double().cpu().numpy() for each in found[:-1]]
    steps = cast(Any, model).time_steps
    return Parts(weights, biases, steps.origin, steps.tau.detach().tolist())
