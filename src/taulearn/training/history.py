"""The record of a run: per iteration losses and steps, per epoch metrics, and what was deleted when."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._errors import unknown_name
from ..penalties.base import Penalty

Array = NDArray[np.floating | np.integer]

FORMAT = 1
FLUSH_EVERY = 1000
"""Iterations whose rows stay on the device at most."""


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


@dataclass(frozen=True)
class Insertion:
    """One new layer.

    Attributes:
        iteration: Iteration after which it came, from 1.
        epoch: Epoch of that iteration, from 1.
        layer: Its number.
        parent: Number of the layer that it is the second half of, or was made from.
        step: Its step then: 0 (or the lower bound) of an inserted one, else its share of the parent's.
        parameters: Number of variables that came with it.
    """

    iteration: int
    epoch: int
    layer: int
    parent: int
    step: float
    parameters: int


@dataclass
class History:
    """The record of a run; figures and verdicts are drawn from this alone.

    Attributes:
        iterations: Columns with one row per iteration: "loss", "total", "penalty.NAME", "weight.l1" (the penalty's
            weight, where a target steers it), "tau" (I, N) with the steps that iteration was computed with, in column l
            that of the layer with number l, NaN before it came and once it is deleted; "raw_tau" likewise where it can
            differ; with a stage cost "stage_loss" (I, N + 1), in column k the loss of the network cut after its first k
            layers, NaN where there is no such output or no layer any more; and what other penalties have as
            ``columns``.
        epochs: Columns with one row per epoch, row 0 before training: "iteration", "layers", "parameters", "seconds",
            "train.loss", "train.total", "validation.NAME".
        deletions: In the order in which they happened.
        insertions: Likewise, of layers that came.

    Example:
        >>> History()
        History(iterations: 0 of nothing; epochs: 0 of nothing; deletions: 0; insertions: 0)
    """

    iterations: dict[str, Array] = field(default_factory=dict)
    epochs: dict[str, Array] = field(default_factory=dict)
    deletions: list[Deletion] = field(default_factory=list)
    insertions: list[Insertion] = field(default_factory=list)

    def __repr__(self) -> str:
        epochs = max(0, len(self.epochs.get("iteration", ())) - 1)
        return (
            f"History(iterations: {self.num_iterations} of {', '.join(self.iterations) or 'nothing'}; "
            f"epochs: {epochs} of {', '.join(self.epochs) or 'nothing'}; deletions: {len(self.deletions)}; "
            f"insertions: {len(self.insertions)})"
        )

    @property
    def num_iterations(self) -> int:
        """Number of iterations recorded."""
        return len(self.iterations["loss"]) if "loss" in self.iterations else 0

    def tensors(self) -> dict[str, Tensor]:
        """The record as named tensors, which is how it is stored."""
        named = {f"iteration/{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in self.iterations.items()}
        named |= {f"epoch/{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in self.epochs.items()}
        for group, kind, rows in (("deletion", Deletion, self.deletions), ("insertion", Insertion, self.insertions)):
            for name in kind.__dataclass_fields__ if rows or kind is Deletion else ():  # as older records are
                dtype = torch.float64 if name in ("share", "step") else torch.int64
                named[f"{group}/{name}"] = torch.tensor([getattr(row, name) for row in rows], dtype=dtype)
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> "History":
        """The inverse of :meth:`tensors`; other names are passed over."""
        groups: dict[str, dict[str, Array]] = {"iteration": {}, "epoch": {}, "deletion": {}, "insertion": {}}
        for name, tensor in named.items():
            group, _, column = name.partition("/")
            if group in groups:
                groups[group][column] = tensor.numpy()

        def rows(columns: dict[str, Array], kind: type[Deletion | Insertion]) -> list[Any]:
            listed = [columns[name].tolist() for name in kind.__dataclass_fields__] if columns else []
            return [kind(*row) for row in zip(*listed, strict=True)]

        changes = rows(groups["deletion"], Deletion), rows(groups["insertion"], Insertion)
        return cls(groups["iteration"], groups["epoch"], *changes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        from ..files import write_tensors

        write_tensors(Path(path), self.tensors(), {"format": str(FORMAT), "kind": "taulearn history"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "History":
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or of another format.
        """
        from ..files import read_tensors

        named, metadata = read_tensors(Path(path))
        if metadata.get("kind") != "taulearn history" or metadata.get("format") != str(FORMAT):
            raise ValueError(
                f"{path} must be a taulearn history of format {FORMAT}, got {metadata}: use the version that wrote it"
            )
        return cls.from_tensors(named)


class Row:
    """How the record of an iteration lies in a tensor: numbers first, then what has one a layer, then one a depth."""

    LOSS = 0  # where the loss lies

    def __init__(self, penalties: Iterable[Penalty] = (), *, raw: bool = False) -> None:
        penalties = list(penalties)
        own = [(name, kind, p) for p in penalties for name, kind in p.columns.items()]
        for _, kind, _ in own:
            if kind not in ("number", "layers", "depths"):
                raise unknown_name("columns", kind, ("number", "layers", "depths"))
        self.numbers = ["loss", "total", *(f"penalty.{p.name}" for p in penalties)]
        self.numbers += [name for name, kind, _ in own if kind == "number"]
        self.layers = ["tau", *["raw_tau"] * raw, *(name for name, kind, _ in own if kind == "layers")]
        self.depths = {name: p.loss is not None for name, kind, p in own if kind == "depths"}  # whether of losses
        names = [*self.numbers, *self.layers, *(name for name, kind, _ in own if kind == "depths")]
        if len(set(names)) < len(names):
            raise ValueError(f"columns of penalties must have names of their own, got {names}")

    def pack(self, columns: Mapping[str, Tensor]) -> Tensor:
        """One row, of the columns by name; at the end of losses at each depth stands the loss."""
        wide = torch.promote_types(columns["tau"].dtype, torch.float32)
        found = {name: column.detach().to(wide) for name, column in columns.items()}
        self._check({name: tuple(column.shape) for name, column in found.items()})
        parts = [torch.stack([found[name] for name in self.numbers]), *(found[name] for name in self.layers)]
        for name, losses in self.depths.items():
            last = found["loss"] if losses else torch.full_like(found["loss"], float("nan"))
            parts += [found[name], last.unsqueeze(0)]
        return torch.cat(parts)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse columns that could not be found again in the row."""
        layers = shapes["tau"]
        depths = [(layers[0] - 1,), layers]  # the input state has an output of its own in some models
        depths = [shape for shape in depths if shape in [shapes[name] for name in self.depths][:1]] or depths
        for name in (*self.numbers, *self.layers, *self.depths):
            allowed = [()] if name in self.numbers else [layers] if name in self.layers else depths
            if shapes[name] not in allowed:
                raise ValueError(f"column {name!r} of a penalty must have shape {allowed[0]}, got {shapes[name]}")

    def split(self, rows: Tensor, layers: int) -> dict[str, Tensor]:
        """The columns in rows (..., width) of a model with so many layers: numbers (...), others (..., n)."""
        rest = rows.shape[-1] - len(self.numbers) - layers * len(self.layers)
        depths = rest // max(1, len(self.depths))
        widths = [layers] * len(self.layers) + [depths] * len(self.depths)
        numbers, *others = rows.split([len(self.numbers), *widths], -1)
        vectors = zip((*self.layers, *self.depths), others, strict=True)
        return dict(zip(self.numbers, numbers.unbind(-1), strict=True)) | dict(vectors)


class Recorder:
    """Collects rows on the device during training, and turns them into a :class:`History` when asked."""

    def __init__(self, row: Row, layers: int, history: History | None = None) -> None:
        self.row, self.layers = row, layers
        self._pending: list[Tensor] = []
        self._done: dict[str, list[Array]] = {name: [] for name in (*row.numbers, *row.layers, *row.depths)}
        self._epochs: list[dict[str, float]] = []
        self.deletions: list[Deletion] = []
        self.insertions: list[Insertion] = []
        if history is not None:
            unknown = np.full((history.num_iterations, layers + 1), np.nan, np.float32)
            for name, done in self._done.items():
                width = 0 if name in row.numbers else slice(layers + (name in row.depths))
                done.append(history.iterations.get(name, unknown[:, width]))
            names = list(history.epochs)
            self._epochs = [dict(zip(names, row, strict=True)) for row in zip(*history.epochs.values(), strict=True)]
            self.deletions, self.insertions = list(history.deletions), list(history.insertions)

    def add(self, rows: Tensor) -> None:
        """Take rows (k, columns) from the device, without looking at them."""
        self._pending.append(rows)

    def flush(self, origin: tuple[int, ...]) -> Array:
        """Bring the pending rows to the host; to be called before the layers change."""
        if not self._pending:
            return np.zeros(0)
        rows = torch.cat(self._pending).cpu()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self._pending.clear()
        self.layers = max(self.layers, *(l + 1 for l in origin))
        for name, found in self.row.split(rows, len(origin)).items():
            column = found.numpy().copy()
            if name not in self.row.numbers:
                places = list(origin) if name in self.row.layers else [0, *(l + 1 for l in origin)][-found.shape[1] :]
                whole = np.full((len(rows), self.layers + (name in self.row.depths)), np.nan, column.dtype)
                whole[:, places] = column
                column = whole
            self._done[name].append(column)
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
                self._done[name] = [np.concatenate(_as_wide(parts))]

    def history(self) -> History:
        """All that has been flushed."""
        self._compact()
        integers = {"iteration", "layers", "parameters"}
        epochs: dict[str, Array] = {}
        for name in dict.fromkeys(key for row in self._epochs for key in row):
            column = [row.get(name, float("nan")) for row in self._epochs]
            epochs[name] = np.array(column, dtype=np.int64 if name in integers else np.float64)
        iterations = {name: parts[0] for name, parts in self._done.items() if parts}
        return History(iterations, epochs, list(self.deletions), list(self.insertions))


def _as_wide(parts: list[Array]) -> list[Array]:
    """Parts of a column, with NaN for layers that were not there yet."""
    wide = max(each.shape[1:] for each in parts)
    return [
        each if each.shape[1:] == wide else np.pad(each, [(0, 0), (0, wide[0] - each.shape[1])], constant_values=np.nan)
        for each in parts
    ]
