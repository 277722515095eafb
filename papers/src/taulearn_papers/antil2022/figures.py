"""Figures 1 to 5 in the article's form, and its tables.

Lines are geometric means over the seeds, bands reach from least to largest. Table 1 stands beside the printed one; toy
problems and other optimisers are what the article mentions without figures.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from taulearn.app.results import NotMeasured, Results
from taulearn.data import maxwell
from taulearn.files import read_tensors
from taulearn.report.figures import PALETTE
from taulearn.report.seed_bands import band

from ..axes_and_tables import markdown_table, new_axes
from ..packed_results import shown_arrays
from . import network_drawing
from .measurements import GRID, REDUCED, SQUARE, square_points
from .statistics import NAMES, PRINTED, measured, meshes_of
from .trainings import COARSER, OPTIMIZERS, ORDERS, SCHEMES, STEPS, TOYS, mesh, other, reduction, setting, toy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_FIXED = {"learned": r"variable $\tau$", "fixed": r"fixed $\tau$"}
_ORDERED = {"plain": "", "ordered": ", B.O."}
_FEM = "#333333"
_COLOURS = dict(zip(product(SCHEMES, ORDERS), PALETTE, strict=False))


def figure_1(results: Results) -> "Figure":
    """Mean squared error during training, 6-50."""
    figure, axes = new_axes(1, 2, 4.2, width=1.6, grid=True)
    for ax, scheme in zip(axes[0], SCHEMES, strict=True):
        _training(results, ax, "6-50", (scheme,))
        ax.set_title(f"{NAMES[scheme]}, 6-50", fontsize="medium")
    return figure


def figure_2(results: Results) -> "Figure":
    """The network 5-10 with learned steps and bias ordering, whole and without the layers whose steps are near zero.

    Where no step is near zero, without the layers that the article deletes.
    """
    from matplotlib.figure import Figure

    found = shown_arrays(results, "2", _networks)
    networks = [_parts(found, which) for which in ("whole", "reduced")]
    row = results.measurements(*_most_telling(results))
    limits = {
        "largest_weight": max(float(np.abs(w).max()) for each in networks for w in each.weights),
        "largest_bias": max(float(np.abs(b).max()) for each in networks for b in each.biases),
    }
    columns = [len(each.weights) for each in networks]
    figure = Figure(figsize=(1.5 * sum(columns) + 3.0, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=columns)
    errors = row["before"], row["after"][row["shown"]]
    gone = sorted({*range(len(row["tau"]))} - {*networks[1].origin})
    words = f"{len(row['tau'])} hidden layers", f"without layer{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
    for ax, each, error, what in zip(axes, networks, errors, words, strict=True):
        network_drawing.network(each, ax=ax, **limits, colour_bars=ax is axes[-1])
        ax.set_title(f"{what}: relative test error {error:.3f}", fontsize="medium", y=-0.1)
    return figure


def figure_3(results: Results) -> "Figure":
    """L2 error on the cube over h against the finite elements, 6-50 and 2-50; training of 2-50."""
    figure, axes = new_axes(2, 2, 4.2, width=1.6, grid=True)
    for ax, size, kinds, title in (
        (axes[0, 0], "6-50", ("fixed",), r"(a) fixed $\tau$, 6-50"),
        (axes[0, 1], "6-50", ("learned",), r"(b) variable $\tau$, 6-50"),
        (axes[1, 1], "2-50", STEPS, "(d) 2-50"),
    ):
        _errors(results, ax, size, kinds)
        ax.set_title(title, fontsize="medium")
    _training(results, axes[1, 0], "2-50", SCHEMES)
    axes[1, 0].set_title("(c) training, 2-50", fontsize="medium")
    return figure


def figure_4(results: Results) -> "Figure":
    """Pointwise errors on the square (-1, 1)^2 x {0.5}; the circle bounds the training data."""
    from matplotlib.colors import LogNorm

    figure, axes = new_axes(2, 2, 3.6, grid=True)
    panels = list(product(SCHEMES, ("fixed", "learned")))
    fields = shown_arrays(results, "4", _error_fields)
    every = np.concatenate([field.ravel() for field in fields.values()])
    norm = LogNorm(float(np.quantile(every, 0.01)), float(every.max()))
    line = np.linspace(-1, 1, GRID)
    for ax, letter, (scheme, kind) in zip(axes.flat, "abcd", panels, strict=True):
        picture = ax.pcolormesh(line, line, fields[f"{scheme}/{kind}"], norm=norm, cmap="viridis", rasterized=True)
        _disc(ax, "white")
        ax.set_title(f"({letter}) {NAMES[scheme]}, {_FIXED[kind]}", fontsize="medium")
    figure.colorbar(picture, ax=axes, label=r"$|u - u^{NN}|$, mean over the seeds", shrink=0.8)
    return figure


def figure_5(results: Results) -> "Figure":
    """The exact field and the fractional network 2-50 with learned steps as arrows, and their distance in the disc."""
    difference = shown_arrays(results, "5", _difference)["difference"].astype(np.float64)
    exact = _exact()
    values = exact + difference
    inside = maxwell.inside(square_points()).numpy().reshape(GRID, GRID)
    line = np.linspace(-1, 1, GRID)
    figure, axes = new_axes(1, 3, 4.0, grid=True)
    some = slice(GRID // 16, None, GRID // 13)
    arrows = np.ix_(range(GRID)[some], range(GRID)[some])
    for ax, field, title in zip(
        axes[0], (exact, values), ("exact field", "Frac-DNN, variable $\\tau$, 2-50"), strict=False
    ):
        shown = inside[arrows]
        x, y = (each[shown] for each in np.meshgrid(line[some], line[some]))
        first, second = (field[..., i][arrows][shown] for i in (0, 1))
        ax.quiver(x, y, first, second, color=PALETTE[0], angles="xy", scale_units="xy", scale=3.2, width=0.005)
        ax.set_title(title, fontsize="medium")
        _disc(ax, "0.5")
    error = np.where(inside, np.linalg.norm(difference[..., :2], axis=-1), np.nan)
    picture = axes[0, 2].pcolormesh(line, line, error, cmap="viridis", rasterized=True)
    figure.colorbar(picture, ax=axes[0, 2], label=r"$|(u_1, u_2) - (u_1, u_2)^{NN}|$", shrink=0.8)
    axes[0, 2].set_title("pointwise error in the cylinder", fontsize="medium")
    _disc(axes[0, 2], "0.5")
    return figure


def _training(results: Results, ax: "Axes", size: str, schemes: Sequence[str]) -> None:
    """Mean squared error over the steps, one line per treatment."""
    for scheme, kind, order in product(schemes, STEPS, ORDERS):
        name = setting(size, scheme, kind, order)
        rows = [results.history(name, seed).epochs for seed in results.seeds(name)]
        steps = min(len(row["iteration"]) for row in rows)  # one step per epoch; row 0 is before the first
        losses = np.stack([row["train.loss"][1:steps] for row in rows])
        _band(ax, rows[0]["iteration"][1:steps], losses, scheme, kind, order)
    ax.set(xscale="log", yscale="log", xlabel="Step", ylabel="Mean squared error")
    ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _errors(results: Results, ax: "Axes", size: str, kinds: Sequence[str]) -> None:
    """L2 errors over h, one line per treatment, and the finite elements."""
    ns = meshes_of(results)
    h = np.array([measured("h")(results, mesh(n), 0) for n in ns])
    line = [[measured(key)(results, mesh(n), 0) for n in (*COARSER, *ns)] for key in ("h", "l2")]
    ax.plot(*line, "o-", color=_FEM, markersize=4, linewidth=1.6, label="FEM (lowest order Nédélec)")
    for scheme, kind, order in product(SCHEMES, kinds, ORDERS):
        name = setting(size, scheme, kind, order)
        found = [[measured("cube", str(n))(results, name, seed) for n in ns] for seed in results.seeds(name)]
        _band(ax, h, np.array(found), scheme, kind, order)
    ax.set(xscale="log", yscale="log", xlabel="Mesh size h", ylabel=r"$L^2$ error on the cube")
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0, 2.0], minor=False)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_xlim(0.9 * min(line[0]), 1.1 * max(line[0]))
    ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _band(ax: "Axes", x: NDArray[Any], rows: NDArray[Any], scheme: str, kind: str, order: str) -> None:
    """Geometric mean and range over the seeds; the colour tells network and ordering, dashes tell fixed steps."""
    colour, style = _COLOURS[scheme, order], "-" if kind == "learned" else "--"
    label = f"{NAMES[scheme]}, {_FIXED[kind]}{_ORDERED[order]}"
    band(ax, x, (np.exp(np.log(rows).mean(0)), rows.min(0), rows.max(0)), colour, label, style)


def _most_telling(results: Results) -> tuple[str, int]:
    """The reduced network to draw: most layers deleted, then the smallest error without them."""
    found = []
    for start in ("ones", "uniform"):
        name = reduction(start)
        if name in results.settings:
            for seed in results.seeds(name):
                row = results.measurements(name, seed)
                found.append((-len(row["near_zero"]), row["after"][row["shown"]], name, seed))
    if not found:
        raise NotMeasured("no reduced network is finished")
    return min(found)[2:]


def _square(results: Results, name: str, seed: int) -> NDArray[np.float64]:
    """u^NN on the square, (GRID, GRID, 3)."""
    try:
        tensors, _ = read_tensors(results.folder(name, seed) / SQUARE)
    except (FileNotFoundError, ValueError) as error:
        raise NotMeasured(str(error)) from error
    return tensors["values"].double().numpy().reshape(GRID, GRID, 3)


def _exact() -> NDArray[np.float64]:
    """u on the square, (GRID, GRID, 3)."""
    values: NDArray[np.float64] = maxwell.solution(square_points()).numpy().reshape(GRID, GRID, 3)
    return values


def _error_fields(results: Results) -> dict[str, NDArray[Any]]:
    """abs(u - u^NN) on the square, mean over the seeds, of four networks 2-50."""
    exact, fields = _exact(), {}
    for scheme, kind in product(SCHEMES, STEPS):
        name = setting("2-50", scheme, kind, "plain")
        errors = [np.linalg.norm(_square(results, name, seed) - exact, axis=-1) for seed in results.seeds(name)]
        fields[f"{scheme}/{kind}"] = np.mean(errors, axis=0)
    return fields


def _difference(results: Results) -> dict[str, NDArray[Any]]:
    """u^NN - u on the square, of the first fractional network 2-50 with learned steps."""
    name = setting("2-50", "fractional", "learned", "plain")
    return {"difference": _square(results, name, results.seeds(name)[0]) - _exact()}


def _networks(results: Results) -> dict[str, NDArray[Any]]:
    """Weights, biases and steps of the network of figure 2, whole and reduced."""
    from taulearn.saving import load_model

    folder = results.folder(*_most_telling(results))
    arrays: dict[str, NDArray[Any]] = {}
    for which, path in (("whole", folder), ("reduced", folder / REDUCED)):
        shown = network_drawing.parts(load_model(path))
        arrays |= {f"{which}/weight.{number}": w for number, w in enumerate(shown.weights)}
        arrays |= {f"{which}/bias.{number}": b for number, b in enumerate(shown.biases)}
        arrays |= {f"{which}/origin": np.array(shown.origin), f"{which}/tau": np.array(shown.tau)}
    return arrays


def _parts(arrays: Mapping[str, NDArray[Any]], which: str) -> network_drawing.Parts:
    """The note of :func:`_networks` on one of the two networks."""
    origin = [int(number) for number in arrays[f"{which}/origin"]]
    weights = [arrays[f"{which}/weight.{number}"] for number in range(len(origin) + 1)]
    biases = [arrays[f"{which}/bias.{number}"] for number in range(len(origin))]
    return network_drawing.Parts(weights, biases, origin, arrays[f"{which}/tau"].tolist())


SHOWN = {"2": _networks, "4": _error_fields, "5": _difference}
"""The functions that make the arrays that figures show besides records."""


def _disc(ax: "Axes", colour: str) -> None:
    from matplotlib.patches import Circle

    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=colour, linestyle="--", linewidth=1.2))
    ax.set(aspect="equal", xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), xlabel="$x_1$", ylabel="$x_2$")


def table_1(results: Results) -> str:
    """The learned steps, mean and standard deviation over the seeds, beside the printed ones."""
    rows = []
    for (size, scheme, order), printed in PRINTED.items():
        name = setting(size, scheme, "learned", order)
        if name not in results.settings:
            continue
        taus = np.array([results.measurements(name, seed)["tau"] for seed in results.seeds(name)])
        for l, value in enumerate(printed):
            spread = f" ± {taus[:, l].std(ddof=1):.2f}" if len(taus) > 1 else ""
            first = f"{size} {NAMES[scheme]}{_ORDERED[order]}" if l == 0 else ""
            rows.append([first, f"tau_{l}", f"{value:.2f}", f"{taus[:, l].mean():.2f}{spread}", str(len(taus))])
    if not rows:
        raise NotMeasured("no network with learned steps is finished")
    return markdown_table(["network", "step", "printed", "here", "seeds"], rows)


def toys(results: Results) -> str:
    """Test loss on the toy problems, learned and fixed steps: geometric means over the seeds."""
    rows = []
    for data, scheme in product(TOYS, SCHEMES):
        names = [toy(data, scheme, kind) for kind in STEPS]
        if not set(names) <= set(results.settings):
            continue
        seeds = results.seeds(*names)
        cells = [_geometric([results.measurements(name, seed)["test.loss"] for seed in seeds]) for name in names]
        rows.append([data, NAMES[scheme], *cells, str(len(seeds))])
    if not rows:
        raise NotMeasured("no toy problem is finished")
    return markdown_table(["problem", "network", "learned steps", "fixed steps", "seeds"], rows)


def optimizers(results: Results) -> str:
    """Final errors of the residual network 6-50 with three optimisers; on the cube at the points of the finest mesh."""
    rows = []
    for words, kind in product(("steepest descent", *OPTIMIZERS), STEPS):
        name = other(words, kind) if words in OPTIMIZERS else setting("6-50", "resnet", kind, "plain")
        if name not in results.settings:
            continue
        found = [results.measurements(name, seed) for seed in results.seeds(name)]
        finest = max(found[0]["cube"], key=int)
        errors = [(each["mse"]["end"], each["test_error"], each["cube"][finest]) for each in found]
        rows.append([words, kind, *(_geometric(column) for column in zip(*errors, strict=True)), str(len(found))])
    if not rows:
        raise NotMeasured("no optimiser is finished")
    return markdown_table(["optimiser", "steps", "MSE", "relative test error", "L2 error on the cube", "seeds"], rows)


def _geometric(values: Sequence[float]) -> str:
    return f"{np.exp(np.mean(np.log(values))):.3g}" if min(values) > 0.0 else f"{np.mean(values):.3g}"
