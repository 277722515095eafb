"""The record of a run: per iteration losses and steps, per epoch metrics, and what was deleted when."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import read_tensors, write_tensors

Array = NDArray[np.floating | np.integer]

FORMAT = 1


@dataclass(frozen=True)
class Deletion:
    """One deleted layer.

    Attributes:
        iteration: Iteration after which it was deleted, from 1.
        epoch: Epoch of that iteration, from 1.
        layer: Its number at the start, from 0.
        share: Its share of sum abs(tau)^p when it was chosen.
        parameters: Number of variables that went with it.
    """

    iteration: int
    epoch: int
    layer: int
    share: float
    parameters: int


@dataclass
class History:
    """What a run leaves; figures and verdicts are drawn from this alone.

    Attributes:
        iterations: Columns with one row per iteration: "loss", "total", "penalty.NAME", "weight.l1" (the penalty's
            weight, where a target steers it), "tau" (I, N) with the steps that iteration was computed with, NaN once
            deleted; "raw_tau" likewise where it can differ; with a stage cost "stage_loss" (I, N + 1), in column k the
            loss of the network cut after its first k layers, NaN where there is no such output or no layer any more.
        epochs: Columns with one row per epoch, row 0 before training: "iteration", "layers", "parameters", "seconds",
            "train.loss", "train.total", "validation.NAME".
        deletions: In the order in which they happened.

    Example:
        >>> History()
        History(iterations: 0 of nothing; epochs: 0 of nothing; deletions: 0)
    """

    iterations: dict[str, Array] = field(default_factory=dict)
    epochs: dict[str, Array] = field(default_factory=dict)
    deletions: list[Deletion] = field(default_factory=list)

    def __repr__(self) -> str:
        epochs = max(0, len(self.epochs.get("iteration", ())) - 1)
        return (
            f"History(iterations: {self.num_iterations} of {', '.join(self.iterations) or 'nothing'}; "
            f"epochs: {epochs} of {', '.join(self.epochs) or 'nothing'}; deletions: {len(self.deletions)})"
        )

    @property
    def num_iterations(self) -> int:
        """Number of iterations recorded."""
        return len(self.iterations["loss"]) if "loss" in self.iterations else 0

    def tensors(self) -> dict[str, Tensor]:
        """The record as named tensors, which is how it is stored."""
        named = {f"iteration/{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in self.iterations.items()}
        named |= {f"epoch/{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in self.epochs.items()}
        for name in Deletion.__dataclass_fields__:
            dtype = torch.float64 if name == "share" else torch.int64
            named[f"deletion/{name}"] = torch.tensor([getattr(d, name) for d in self.deletions], dtype=dtype)
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "History":
        """The inverse of :meth:`tensors`; other names are passed over."""
        groups: dict[str, dict[str, Array]] = {"iteration": {}, "epoch": {}, "deletion": {}}
        for name, tensor in named.items():
            group, _, column = name.partition("/")
            if group in groups:
                groups[group][column] = tensor.numpy()
        columns = groups["deletion"]
        rows = zip(*(columns[name].tolist() for name in Deletion.__dataclass_fields__), strict=True) if columns else []
        return cls(groups["iteration"], groups["epoch"], [Deletion(*row) for row in rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        write_tensors(Path(path), self.tensors(), {"format": str(FORMAT), "kind": "taulearn history"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or of another format.
        """
        named, metadata = read_tensors(Path(path))
        if metadata.get("kind") != "taulearn history" or metadata.get("format") != str(FORMAT):
            raise ValueError(
                f"{path} must be a taulearn history of format {FORMAT}, got {metadata}: use the version that wrote it"
            )
        return cls.from_tensors(named)


class Recorder:
    """Collects rows on the device during training, and turns them into a :class:`History` when asked.

    Args:
        columns: Names of the scalars that head each row.
        layers: Number of layers at the start.
        raw: Whether the raw steps follow the steps.
        depths: Whether the losses at each depth end the rows.
        history: What was recorded before, when a run is resumed.
    """

    def __init__(
        self, columns: list[str], layers: int, *, raw: bool, depths: bool = False, history: History | None = None
    ) -> None:
        self.columns, self.layers, self.raw, self.depths = columns, layers, raw, depths
        self._pending: list[Tensor] = []
        vectors = ["tau", *(["raw_tau"] if raw else []), *(["stage_loss"] if depths else [])]
        self._done: dict[str, list[Array]] = {name: [] for name in [*columns, *vectors]}
        self._epochs: list[dict[str, float]] = []
        self.deletions: list[Deletion] = []
        if history is not None:
            for name, array in history.iterations.items():
                self._done[name].append(array)
            names = list(history.epochs)
            self._epochs = [dict(zip(names, row, strict=True)) for row in zip(*history.epochs.values(), strict=True)]
            self.deletions = list(history.deletions)

    def add(self, rows: Tensor) -> None:
        """Take rows (k, columns) from the device, without looking at them."""
        self._pending.append(rows)

    def flush(self, origin: tuple[int, ...]) -> Array:
        """Bring the pending rows to the host; to be called before the layers change."""
        if not self._pending:
            return np.zeros(0)
        pending = torch.cat(self._pending).cpu()
        rows = pending.to(torch.promote_types(pending.dtype, torch.float32)).numpy()
        self._pending.clear()
        width = len(self.columns)
        for i, name in enumerate(self.columns):
            self._done[name].append(rows[:, i].copy())
        for offset, name in enumerate(["tau", "raw_tau"][: 1 + self.raw]):
            steps = np.full((len(rows), self.layers), np.nan, rows.dtype)
            start = width + offset * len(origin)
            steps[:, list(origin)] = rows[:, start : start + len(origin)]
            self._done[name].append(steps)
        if self.depths:
            found = rows[:, width + (1 + self.raw) * len(origin) :]
            losses = np.full((len(rows), self.layers + 1), np.nan, rows.dtype)
            losses[:, [0, *(l + 1 for l in origin)][-found.shape[1] :]] = found
            self._done["stage_loss"].append(losses)
        return self._done["total"][-1]

    def mean_since(self, name: str, iteration: int) -> float:
        """Mean of a flushed column from an iteration (from 0) on."""
        self._compact()
        column = self._done[name][0][iteration:] if self._done[name] else np.zeros(0)
        return float(column.astype(np.float64).mean()) if len(column) else float("nan")

    def add_epoch(self, row: dict[str, float]) -> None:
        """Take the figures of an epoch."""
        self._epochs.append(row)

    def _compact(self) -> None:
        for name, parts in self._done.items():
            if len(parts) > 1:
                self._done[name] = [np.concatenate(parts)]

    def history(self) -> History:
        """All that has been flushed."""
        self._compact()
        integers = {"iteration", "layers", "parameters"}
        epochs: dict[str, Array] = {}
        for name in dict.fromkeys(key for row in self._epochs for key in row):
            column = [row.get(name, float("nan")) for row in self._epochs]
            epochs[name] = np.array(column, dtype=np.int64 if name in integers else np.float64)
        iterations = {name: parts[0] for name, parts in self._done.items() if parts}
        return History(iterations, epochs, list(self.deletions))
