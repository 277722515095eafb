"""Shared by the examples that resume: each training's figures are a cell, a small JSON file, read where it is there."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def once(path: Path, make: Callable[[], Cell]) -> Cell:
    """What the file holds; where there is none, what ``make`` returns, which is written whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(make()))
        part.replace(path)
    found: Cell = json.loads(path.read_text())
    return found


def settle(path: Path, **settings: Any) -> None:
    """Keep the settings of a folder's cells in a file there; refuse others, for which the cells would be taken."""
    wanted: Cell = json.loads(json.dumps(settings))
    kept = once(path, lambda: wanted)
    differs = [name for name in wanted if wanted[name] != kept.get(name)]
    if differs:
        there = ", ".join(f"{name} {kept.get(name)!r}, not {wanted[name]!r}" for name in differs)
        raise SystemExit(f"--out must be another folder for other settings: {path} has {there}")


def read_cells(places: Sequence[Path], *names: str) -> list[Cell]:
    """Cells from folders of runs, and from pages made of them, one for each value of the named entries."""
    cells: dict[tuple[Any, ...], Cell] = {}
    for place in places:
        page = place / "cells.jsonl"
        texts = [path.read_text() for path in sorted((place / "cells").glob("*.json"))]
        for cell in map(json.loads, [*texts, *(page.read_text().splitlines() if page.exists() else [])]):
            cells[tuple(cell[name] for name in names)] = cell
    return [cells[key] for key in sorted(cells)]


def write_cells(cells: Sequence[Cell], out: Path) -> None:
    """Write the cells of a page beside it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
