"""The kept part of a suite's results: verdicts, small figures, tables, recipe, provenance, and thinned records."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from taulearn.app.results import Results
from taulearn.files import write_bytes
from taulearn.training.devices import machine

from .judging import Judged, draw, tabulate, write_claims
from .packed_results import kept_options, pack
from .suite import Suite

PACK = "records.npz"
_SMALL_DPI = 80


def keep(suite: Suite, results: Results, judged: Sequence[Judged], folder: str | Path) -> list[Path]:
    """Write what stays of a suite's results: verdicts, small figures, tables, and the records they are made from."""
    kept = Path(folder)
    kept.mkdir(parents=True, exist_ok=True)
    files = write_claims(judged, kept)
    figures = draw(suite, results, kept, kinds=("png",), dpi=_SMALL_DPI)[0]
    for file in figures:
        write_bytes(file, _with_fewer_colours(file.read_bytes()))
    files += figures
    for name, text in tabulate(suite, results).items():
        write_bytes(kept / f"table-{name}.md", text.encode())
        files.append(kept / f"table-{name}.md")
    pack(results, kept / PACK, suite.shown, suite.kept)
    write_bytes(kept / "provenance.json", (json.dumps(provenance(suite, results), indent=1) + "\n").encode())
    write_bytes(kept / "recipe.toml", tomli_w.dumps(recipe(results)).encode())
    return [*files, kept / PACK, kept / "provenance.json", kept / "recipe.toml"]


def recipe(results: Results) -> dict[str, dict[str, Any]]:
    """The trainings: for each setting its seeds and the options that are not at their defaults.

    Example:
        >>> recipe(Results("nowhere"))
        {}
    """
    found: dict[str, dict[str, Any]] = {}
    for setting, seed in results.readable:
        if setting not in found:
            options = {}
            if results.done(setting, seed).get("config") is not None:
                options = kept_options(results, setting, seed)
                options = {name: value for name, value in options.items() if name != "seed" and value is not None}
            found[setting] = {"seeds": [], **options}
        found[setting]["seeds"].append(seed)
    return found


def provenance(suite: Suite, results: Results) -> dict[str, Any]:
    """Under what a suite's members were trained: versions, machines, time."""
    notes = [results.done(setting, seed) for setting, seed in results.readable]
    versions = sorted({json.dumps(note.get("versions", {}), sort_keys=True) for note in notes})
    return {
        "suite": suite.name,
        "members": len(notes),
        "settings": Counter(setting for setting, _ in results.readable),
        "versions": [json.loads(each) for each in versions],
        "machines": sorted({str(note.get("machine", "unknown")) for note in notes}),
        "hours of training": round(sum(float(note.get("seconds", 0.0)) for note in notes) / 3600, 2),
        "written on": machine(),
    }


def _with_fewer_colours(png: bytes) -> bytes:
    """The same picture with a palette of 256 colours, a third of the size."""
    from PIL import Image  # matplotlib brings it

    content = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE).save(
            content, format="png", optimize=True
        )
    return content.getvalue()
