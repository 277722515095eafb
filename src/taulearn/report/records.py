"""Columns of a record for pictures, and the arithmetic they share: naming, thinning, smoothing, the lines of tau."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from taulearn.training.history import History
    from taulearn.training.run_folder import Run

Runs: TypeAlias = "Run | History | Sequence[Run | History] | Mapping[str, Run | History]"
Column = np.ndarray[Any, np.dtype[Any]]
POINTS = 2000


class Line(NamedTuple):
    """One line of a picture: ``x`` and ``y`` of equal length, all finite."""

    x: Int[np.ndarray, "points"]
    y: Float[np.ndarray, "points"]


def named_histories(runs: Runs) -> "list[tuple[str, History]]":
    """The histories of one or several runs, each with a name that no other has."""
    if isinstance(runs, Mapping):
        pairs = [(str(name), run) for name, run in runs.items()]
    elif isinstance(runs, Iterable):
        pairs = [(str(getattr(run, "name", f"run {k}")), run) for k, run in enumerate(runs, start=1)]
    else:
        pairs = [(str(getattr(runs, "name", "run")), runs)]
    if not pairs:
        raise ValueError(
            "runs must hold at least one run, got none: give a run, a history, a list or a mapping from names to them"
        )
    names = unique_names([name for name, _ in pairs])
    return [(name, cast("History", getattr(run, "history", run))) for name, (_, run) in zip(names, pairs, strict=True)]


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, a repeated one numbered so that each occurs once."""
    seen: Counter[str] = Counter()
    result: list[str] = []
    for name in names:
        unique = name
        while seen[unique]:
            seen[name] += 1
            unique = f"{name} ({seen[name]})"
        seen[unique] += 1
        result.append(unique)
    return result


def thin(count: int, limit: int, *, keep: Iterable[int] = ()) -> Int[np.ndarray, "points"]:
    """The rows of a long trace to draw: half spaced logarithmically, half evenly, ``keep`` and both ends among them."""
    if count <= limit:
        return np.arange(count)
    half = limit // 2
    logarithmic = np.geomspace(1, count, half).round().astype(np.int64) - 1
    even = np.linspace(0, count - 1, half).round().astype(np.int64)
    kept = np.array([row for row in keep if 0 <= row < count], dtype=np.int64)
    return np.unique(np.concatenate([logarithmic, even, kept]))


def running_mean(values: Float[np.ndarray, "rows"], window: int) -> Float[np.ndarray, "rows"]:
    """The mean of the finite values in each row and the ``window - 1`` rows before it; NaN where there is none."""
    if window < 1:
        raise ValueError(
            f"smooth must be at least 1, got {window}: it is a number of rows, 1 leaves the values as they are"
        )
    finite = np.isfinite(values)
    if window == 1:
        return np.where(finite, values, np.nan).astype(np.float64)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0), dtype=np.float64)])
    number = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray((total[end] - total[start]) / (number[end] - number[start]))


def finite_line(x: Column, y: Column) -> Line:
    """The points of ``y`` over ``x`` that are finite."""
    finite = np.isfinite(y)
    return Line(x[finite], np.asarray(y[finite], dtype=np.float64))


def time_steps(history: "History", raw: bool) -> Float[np.ndarray, "rows layers"]:
    """The recorded time steps, or those before the constraint was applied where the record tells them apart."""
    if "tau" not in history.iterations:
        raise ValueError("history must hold time steps, got a record without iterations: train for one at least")
    name = "raw_tau" if raw and "raw_tau" in history.iterations else "tau"
    return np.asarray(history.iterations[name], dtype=np.float64)


def tau_lines(history: "History", *, raw: bool = False, limit: int = POINTS) -> tuple[list[Line], Line]:
    """The time steps over the iterations, thinned for drawing: one line per layer, and their sum.

    A line begins where its layer came, and ends where it was deleted; the iterations around both are always there.
    """
    tau = time_steps(history, raw)
    present = np.isfinite(tau)
    rows = _rows(present, limit)
    iteration = iteration_numbers(history)[rows]
    total = np.where(present[rows].any(axis=1), np.where(present[rows], tau[rows], 0.0).sum(axis=1), np.nan)
    return [finite_line(iteration, tau[rows, layer]) for layer in range(tau.shape[1])], finite_line(iteration, total)


def grid_lines(history: "History", *, limit: int = POINTS) -> list[Line]:
    """The time grid over the iterations, thinned for drawing: for each layer the time at its end, the sum of steps.

    Layers are summed in the order of the network, in which a new one lies behind its parent.
    """
    tau = time_steps(history, raw=False)
    present = np.isfinite(tau)
    came = [each.layer for each in history.insertions]
    order = [layer for layer in range(tau.shape[1]) if layer not in came]
    for each in history.insertions:
        order.insert(order.index(each.parent) + 1, each.layer)
    rows = _rows(present, limit)
    times = np.empty_like(tau[rows])
    times[:, order] = np.cumsum(np.where(present, tau, 0.0)[rows][:, order], axis=1)
    times[~present[rows]] = np.nan
    return [finite_line(iteration_numbers(history)[rows], times[:, layer]) for layer in range(tau.shape[1])]


def _rows(present: np.ndarray[Any, np.dtype[np.bool_]], limit: int) -> Int[np.ndarray, "points"]:
    """The rows to draw, those around the first and the last of each layer among them."""
    known = [rows for rows in map(np.flatnonzero, present.T) if len(rows)]
    keep = (int(row) for rows in known for row in (rows[0] - 1, rows[0], rows[-1], rows[-1] + 1))
    return thin(len(present), limit, keep=keep)


def last_finite(column: Column | None) -> float | None:
    """The last finite value of a column, None where there is none."""
    finite = np.empty(0) if column is None else np.asarray(column)[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def iteration_numbers(history: "History") -> Int[np.ndarray, "rows"]:
    """The iteration, from 1, of each row; a thinned record has a column that tells."""
    column = history.iterations.get("iteration")
    if column is not None:
        return np.asarray(column, dtype=np.int64)
    return np.arange(1, max((len(column) for column in history.iterations.values()), default=0) + 1)


def count_iterations(history: "History") -> int:
    """Number of iterations of the run; 0 for the record of a run that was stopped before its first."""
    numbers = iteration_numbers(history)
    return int(numbers[-1]) if len(numbers) else 0


def penalty_names(history: "History") -> list[str]:
    """Names of the penalties that the record holds, in its order."""
    return [name.removeprefix("penalty.") for name in history.iterations if name.startswith("penalty.")]
