"""What the pictures need of a record, and the arithmetic they share: naming, thinning, smoothing, the lines of tau."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from jaxtyping import Float, Int

Column = np.ndarray[Any, np.dtype[Any]]


class DeletionRecord(Protocol):
    """One layer deleted while training.

    ``layer`` is its number at the start, ``share`` its part of sum |tau|, ``parameters`` the variables removed.
    """

    @property
    def iteration(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def parameters(self) -> int: ...


class HistoryRecord(Protocol):
    """Columns per iteration (row i is iteration i + 1) and per epoch (row 0 is before training), and the deletions."""

    @property
    def iterations(self) -> Mapping[str, Column]: ...
    @property
    def epochs(self) -> Mapping[str, Column]: ...
    @property
    def deletions(self) -> Sequence[DeletionRecord]: ...


class RunRecord(Protocol):
    """A named history with the configuration, versions and decisions it was made under."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def versions(self) -> Mapping[str, Any]: ...
    @property
    def decisions(self) -> Mapping[str, Any]: ...
    @property
    def history(self) -> HistoryRecord: ...


Runs = RunRecord | HistoryRecord | Sequence[RunRecord | HistoryRecord] | Mapping[str, RunRecord | HistoryRecord]


class Line(NamedTuple):
    """One line of a picture: ``x`` and ``y`` of equal length, all finite."""

    x: Int[np.ndarray, "points"]
    y: Float[np.ndarray, "points"]


def named_histories(runs: Runs) -> list[tuple[str, HistoryRecord]]:
    """The histories of one or several runs, each with a name that no other has.

    Args:
        runs: A run, a history, a sequence of these, or a mapping from names to them. A run brings its own name.

    Returns:
        Pairs of name and history, in the order given.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(name="free", history=SimpleNamespace(iterations={}, epochs={}, deletions=[]))
        >>> [name for name, _ in named_histories([run, run])]
        ['free', 'free (2)']
    """
    if isinstance(runs, Mapping):
        pairs = [(str(name), _history(run)) for name, run in runs.items()]
    elif isinstance(runs, Iterable):
        pairs = [(str(getattr(run, "name", f"run {k}")), _history(run)) for k, run in enumerate(runs, start=1)]
    else:
        pairs = [(str(getattr(runs, "name", "run")), _history(runs))]
    if not pairs:
        raise ValueError(
            "runs must hold at least one run, got none: give a run, a history, a list or a mapping from names to them"
        )
    return list(zip(unique_names([name for name, _ in pairs]), [history for _, history in pairs], strict=True))


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, a repeated one numbered so that each occurs once.

    Example:
        >>> unique_names(["a", "b", "a"])
        ['a', 'b', 'a (2)']
    """
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
    """Which rows of a long trace to draw, so that it reads well on a logarithmic and on a linear axis.

    Half of the rows are spaced logarithmically (each early row is there), half evenly.

    Args:
        count: Number of rows, >= 0.
        limit: Number of rows to draw, >= 4; rows in ``keep`` come on top.
        keep: Rows that must be there; those outside 0 .. count - 1 are ignored.

    Returns:
        Sorted row numbers without repetition, always with the first and the last row.

    Example:
        >>> len(thin(1000, 2000)), len(thin(10**6, 2000)) <= 2000
        (1000, True)
    """
    if count <= limit:
        return np.arange(count)
    half = limit // 2
    logarithmic = np.geomspace(1, count, half).round().astype(np.int64) - 1
    even = np.linspace(0, count - 1, half).round().astype(np.int64)
    kept = np.array([row for row in keep if 0 <= row < count], dtype=np.int64)
    return np.unique(np.concatenate([logarithmic, even, kept]))


def running_mean(values: Float[np.ndarray, "rows"], window: int) -> Float[np.ndarray, "rows"]:
    """The mean of each row and the ``window - 1`` rows before it (fewer at the start), non-finite values left out.

    Args:
        values: One column.
        window: Number of rows, >= 1.

    Returns:
        Float64, shaped like ``values``; NaN where the window holds no finite value.

    Raises:
        ValueError: If ``window`` is below 1.

    Example:
        >>> running_mean(np.array([2.0, 4.0, 6.0]), 2).tolist()
        [2.0, 3.0, 5.0]
    """
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
    """The points of ``y`` over ``x`` that are finite.

    Example:
        >>> finite_line(np.array([1, 2]), np.array([0.5, np.nan])).x.tolist()
        [1]
    """
    finite = np.isfinite(y)
    return Line(x[finite], np.asarray(y[finite], dtype=np.float64))


def tau_lines(history: HistoryRecord, *, raw: bool = False, limit: int = 2000) -> tuple[list[Line], Line]:
    """The time steps over the iterations, thinned for drawing: one line per layer, and their sum.

    Args:
        history: The record.
        raw: The values before the constraint was applied, where the record holds them; elsewhere the two are the same.
        limit: Points to draw per line; the first and last iteration of each layer and the iterations around a
            deletion come on top.

    Returns:
        The lines by starting number, each ending where its layer was deleted (empty if that was before the first
        iteration), and the sum over the layers that were there.

    Raises:
        ValueError: If the record holds no time steps.

    Example:
        >>> from types import SimpleNamespace
        >>> tau = np.array([[0.5, 0.5], [0.6, np.nan]])
        >>> (first, second), total = tau_lines(SimpleNamespace(iterations={"tau": tau}))
        >>> second.x.tolist(), total.y.tolist()
        ([1], [1.0, 0.6])
    """
    if "tau" not in history.iterations:
        raise ValueError("history must hold time steps, got a record without iterations: train for one at least")
    tau = np.asarray(
        history.iterations["raw_tau" if raw and "raw_tau" in history.iterations else "tau"], dtype=np.float64
    )
    present = np.isfinite(tau)
    ends = [rows[-1] for rows in map(np.flatnonzero, present.T) if len(rows)]
    rows = thin(len(tau), limit, keep=(int(row) for end in ends for row in (end, end + 1)))
    iteration = iteration_numbers(history)[rows]
    total = np.where(present[rows].any(axis=1), np.where(present[rows], tau[rows], 0.0).sum(axis=1), np.nan)
    return [finite_line(iteration, tau[rows, layer]) for layer in range(tau.shape[1])], finite_line(iteration, total)


def last_finite(column: Column | None) -> float | None:
    """The last finite value of a column, None where there is none.

    Example:
        >>> last_finite(np.array([0.5, np.nan]))
        0.5
    """
    finite = np.empty(0) if column is None else np.asarray(column)[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def iteration_numbers(history: HistoryRecord) -> Int[np.ndarray, "rows"]:
    """The iteration, from 1, of each row; a thinned record has a column that tells.

    Example:
        >>> from types import SimpleNamespace
        >>> iteration_numbers(SimpleNamespace(iterations={"loss": np.zeros(3)})).tolist()
        [1, 2, 3]
    """
    column = history.iterations.get("iteration")
    if column is not None:
        return np.asarray(column, dtype=np.int64)
    return np.arange(1, max((len(column) for column in history.iterations.values()), default=0) + 1)


def count_iterations(history: HistoryRecord) -> int:
    """Number of iterations of the run; 0 for the record of a run that was stopped before its first.

    Example:
        >>> from types import SimpleNamespace
        >>> count_iterations(SimpleNamespace(iterations={}))
        0
    """
    numbers = iteration_numbers(history)
    return int(numbers[-1]) if len(numbers) else 0


def penalty_names(history: HistoryRecord) -> list[str]:
    """Names of the penalties that the record holds, in its order.

    Example:
        >>> from types import SimpleNamespace
        >>> penalty_names(SimpleNamespace(iterations={"loss": np.zeros(1), "penalty.l1": np.zeros(1)}))
        ['l1']
    """
    return [name.removeprefix("penalty.") for name in history.iterations if name.startswith("penalty.")]


def _history(run: RunRecord | HistoryRecord) -> HistoryRecord:
    history: HistoryRecord | None = getattr(run, "history", None)
    return cast(HistoryRecord, run) if history is None else history
