"""Long records made small: rows per iteration kept logarithmically and evenly, rows per epoch kept all.

Which iterations are kept depends on their number alone, and the coarse choice is a part of the fine one: thinning a
thinned record gives what thinning the whole one would have given.
"""

import numpy as np
from jaxtyping import Int

from .history import History

FINE, COARSE = 2000, 200
"""About how many iterations a thinned record keeps."""


def numbers(history: History) -> Int[np.ndarray, " rows"]:
    """The iteration, from 1, that each row of a record belongs to."""
    column = history.iterations.get("iteration")
    return np.arange(1, history.num_iterations + 1) if column is None else np.asarray(column, dtype=np.int64)


def thinned(history: History, *, coarse: bool = False) -> History:
    """A record with fewer rows per iteration, and a column "iteration" that tells which.

    Besides the evenly and the logarithmically spaced ones, those rows stay between which a step comes or is deleted,
    and those in which a step is negative for the first time.
    """
    there = numbers(history)
    total = int(there[-1]) if len(there) else 0
    if total == 0:
        return history
    chosen = _spaced(total, COARSE) if coarse else np.union1d(_spaced(total, FINE), _spaced(total, COARSE))
    rows = np.flatnonzero(np.isin(there, chosen))
    rows = np.union1d(rows, _events(history, len(there)))
    columns = {name: column[rows] for name, column in history.iterations.items() if name != "iteration"}
    return History(
        {"iteration": there[rows], **columns},
        dict(history.epochs),
        list(history.deletions),
        list(history.insertions),
    )


def _spaced(total: int, number: int) -> Int[np.ndarray, " kept"]:
    """Half of the iterations spaced logarithmically, half evenly."""
    if total <= number:
        return np.arange(1, total + 1)
    spaced = [np.geomspace(1, total, number // 2), np.linspace(1, total, number // 2)]
    return np.unique(np.concatenate(spaced).round().astype(np.int64))


def _events(history: History, number: int) -> Int[np.ndarray, " rows"]:
    """Rows before and after a step comes or is deleted, and those in which one is negative for the first time."""
    rows: list[int] = []
    for name in ("tau", "raw_tau"):
        for column in history.iterations.get(name, np.zeros((0, 0))).T:
            present, negative = np.flatnonzero(np.isfinite(column)), np.flatnonzero(column < 0)
            if len(present):
                rows += [max(0, int(present[0]) - 1), int(present[0]), int(present[-1]), int(present[-1]) + 1]
            rows += [int(negative[0])] if len(negative) else []
    return np.array([row for row in set(rows) if row < number], dtype=np.int64)
