"""Measurements on a trained surrogate: errors in the cube, on the square, in the cylinder; and after a reduction.

Measurements take a member's folder and return figures as JSON takes them. u is the exact solution, u^NN the network.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taulearn.data import maxwell
from taulearn.files import write_tensors
from taulearn.training import History

AT_STEPS = (10, 100, 1000)
"""After how many steps the mean squared error is noted, besides the end (claim A1)."""

HEIGHT = 0.5
GRID = 101
SQUARE = "square.safetensors"
REDUCED = "reduced"

NEAR_ZERO = 0.05
""" "tau is approximately 0": below a twentieth of the 1 at which tau starts; the article prints no number."""

PAPERS_LAYERS = (1, 3, 4)
"""The layers that the article deletes, by their numbers from 0."""

_POINTS_PER_CHUNK = 1 << 14  # small enough for the caches: a quarter faster than chunks of 65,536


def surrogate(folder: Path, *, meshes: Iterable[int]) -> dict[str, Any]:
    """All errors of a trained surrogate; its values on the square go into a file beside the network.

    Args:
        folder: The run's folder.
        meshes: Subdivisions per edge of the meshes of the cube, at whose quadrature points the L2 error is computed.

    Returns:
        "mse": after the steps of AT_STEPS and at the "end"; "largest_rise": the largest relative increase of the
        objective in a step, <= 0 where it never rises; "mse_rises": number of steps in which the mean squared error
        rises; "test_error": relative, Euclidean, on the test samples; "tau"; "cube": L2 error for each mesh;
        "square" and "inside": see :func:`square_errors` and :func:`inside_errors`.
    """
    from taulearn.fem import l2_error
    from taulearn.saving import load_model

    model, history = load_model(folder), History.load(folder / "history.safetensors")
    field = field_of(model)
    values = field(square_points())
    write_tensors(folder / SQUARE, {"values": values.float()}, {"height": str(HEIGHT), "grid": str(GRID)})
    return {
        **course(history),
        "test_error": relative_test_error(model),
        "tau": model.time_steps.tau.detach().double().tolist(),
        "cube": {str(n): l2_error(field, n, points_per_chunk=_POINTS_PER_CHUNK) for n in meshes},
        "square": square_errors(values),
        "inside": inside_errors(field),
    }


def course(history: History) -> dict[str, Any]:
    """How the training went, from its record.

    Example:
        >>> rows = {"loss": np.array([4.0, 1.0, 2.0]), "total": np.array([4.0, 3.0, 2.0])}
        >>> course(History(rows))
        {'mse': {'end': 2.0}, 'largest_rise': -0.25, 'mse_rises': 1}
    """
    loss, total = (history.iterations[name].astype(np.float64) for name in ("loss", "total"))
    after = {str(n): float(loss[n - 1]) for n in AT_STEPS if n <= len(loss)}
    return {
        "mse": {**after, "end": float(loss[-1])},
        "largest_rise": float((np.diff(total) / total[:-1]).max()),
        "mse_rises": int((np.diff(loss) > 0).sum()),
    }


def field_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The field u^NN that a network describes, as a function of points (k, 3)."""
    dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def field(points: Tensor) -> Tensor:
        value: Tensor = model(maxwell.inputs_at(points).to(dtype))
        return value.double()

    model.eval()
    return field


def relative_test_error(model: nn.Module) -> float:
    """The relative error in the Euclidean norm on the test samples."""
    from taulearn.data import load

    inputs, targets = load("maxwell", "test")
    with torch.no_grad():
        error = model.eval()(inputs.to(next(model.parameters()).dtype)) - targets
    return float(error.double().norm() / targets.double().norm())


def square_points() -> Tensor:
    """A grid on the square (-1, 1)^2 x {0.5}, row by row: (GRID^2, 3)."""
    line = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.full((GRID**2,), HEIGHT, dtype=torch.float64)], dim=1)


def square_errors(values: Tensor) -> dict[str, float]:
    """Errors of the values on the square: root mean square and maximum of abs(u - u^NN), outside and inside the disc.

    Example:
        >>> square_errors(maxwell.solution(square_points()))["rms_outside"]
        0.0
    """
    points = square_points()
    error = (values.double() - maxwell.solution(points)).norm(dim=1)
    inside = maxwell.inside(points)
    return {
        "rms_outside": float(error[~inside].square().mean().sqrt()),
        "max_outside": float(error[~inside].max()),
        "rms_inside": float(error[inside].square().mean().sqrt()),
    }


def inside_errors(field: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Errors within the cylinder, at five heights of a grid: the range of u3 and the error of (u1, u2)."""
    plane = square_points()
    plane = plane[maxwell.inside(plane)]
    points = torch.cat(
        [torch.cat([plane[:, :2], torch.full_like(plane[:, 2:], z)], 1) for z in (0, 0.25, 0.5, 0.75, 1)]
    )
    values, exact = field(points), maxwell.solution(points)
    error = (values - exact)[:, :2].norm(dim=1)
    return {
        "u3_min": float(values[:, 2].min()),
        "u3_max": float(values[:, 2].max()),
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "relative_error": float(error.norm() / exact[:, :2].norm()),
    }


def finite_elements(_: Path, *, n: int) -> dict[str, Any]:
    """The best approximation on one mesh."""
    from taulearn.fem import best_approximation_error

    return dict(vars(best_approximation_error(n)))


def reduction(folder: Path, *, further: int) -> dict[str, Any]:
    """Delete layers of the trained network and compare its relative test error before, after, and after further steps.

    For the figure the reduced network is saved beside the whole one: without the layers whose steps are near zero, or,
    where there are none, without the paper's.

    Args:
        folder: The run's folder.
        further: Number of further steps, which the whole network takes, too.

    Returns:
        "tau"; "near_zero": the layers with abs(tau) < NEAR_ZERO that can be deleted; "shown": which of the deletions
        the saved network has; "before"; "after" deleting
        "near_zero", "paper" (layers 1, 3, 4) and "smallest" (as many as the paper deletes, the smallest steps first);
        "further": the errors after further steps of "whole", "near_zero" and "paper".
    """
    from taulearn.adaptivity.coarsen import prune
    from taulearn.saving import load_model, save_model

    whole = load_model(folder)
    tau = whole.time_steps.tau.detach().double()
    candidates = sorted(range(1, len(tau)), key=lambda l: abs(float(tau[l])))  # layer 0 changes the width and stays
    deletions = {
        "near_zero": [l for l in candidates if abs(float(tau[l])) < NEAR_ZERO],
        "paper": list(PAPERS_LAYERS),
        "smallest": candidates[: len(PAPERS_LAYERS)],
    }
    shown = "near_zero" if deletions["near_zero"] else "paper"
    after, later = {}, {"whole": _further(load_model(folder), folder, further)}
    for name, gone in deletions.items():
        model = load_model(folder)
        if gone:
            prune(model, keep=[l for l in range(len(tau)) if l not in gone])
        after[name] = relative_test_error(model)
        if name == shown:
            save_model(model, folder / REDUCED)
        if name != "smallest":
            later[name] = _further(model, folder, further)
    return {
        **course(History.load(folder / "history.safetensors")),
        "tau": tau.tolist(),
        "near_zero": sorted(deletions["near_zero"]),
        "shown": shown,
        "before": relative_test_error(whole),
        "after": after,
        "further": later,
    }


def _further(model: nn.Module, folder: Path, steps: int) -> float:
    """The test error after further steps of the run's own kind."""
    from taulearn.app import build
    from taulearn.app.train import settings_of
    from taulearn.training import Run, fit

    config = settings_of(Run.open(folder))
    splits = build.load_splits(config)
    fit(
        model,
        tuple(splits.train),
        loss=build.make_loss(config, classes=False)[1],
        optimizer=build.make_optimizer(config, model),
        epochs=steps,
        batch_size=build.batch_size(config, len(splits.train.inputs)),
        penalties=build.make_penalties(config),
        compile="never",
        progress=False,
    )
    return relative_test_error(model)
