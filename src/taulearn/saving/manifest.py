"""The content of model.json, checked strictly: a file may be damaged, hostile or of another format.

The manifest holds the digest of the weights that it belongs to. Saving writes the new manifest aside, then the weights,
and moves the manifest into place last; loading takes whichever of the two manifests has the digest of the weights. So a
crash at any moment leaves the old pair or the new one, and a mixed-up pair is noticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from .format_1 import as_format_2

WEIGHTS, MANIFEST, ASIDE = "model.safetensors", "model.json", ".model.json.new"
FORMAT: Final = 2
_LARGEST = 2**24

COUNT = range(1, 2**28 + 1)  # widths, whose product in bytes stays far below 2^63, where torch's arithmetic ends
LAYERS = range(1, 2**12 + 1)  # few bytes shall not keep a machine busy; deeper networks are saved by their parts
NAMED = {"name": str, "options": dict}
RECIPE = {"builder": str, "keywords": dict}
_DTYPES = frozenset(("float16", "bfloat16", "float32", "float64"))
_STATE = [(None, str, int)]
_REASONS = [{"block": range(2**28), "why": str}]
_BRANCH = {
    "site": str,
    "key": (None, str, int),
    "argument": (None, str, int),
    "output": (None, frozenset(("tuple", "list", "other"))),
    "size": int,
    "sizes": [[int]],
    "ends": [{"parameter": str, "offset": range(2)}],
    "not_folded": str,
    "not_deleted": str,
}
_MODELS: dict[str, Any] = {
    "network": {"kind": str, "dtype": _DTYPES, **RECIPE},
    "host": {"kind": str, "saved_from": str, "because": str, "modules": dict},
    "wrapped": {
        "kind": str,
        "saved_from": str,
        "blocks": [str, ...],
        "shortened": [str],
        "states": [_STATE],
        "modules": dict,
        "form": frozenset(("whole", "branches")),
        "per": frozenset(("block", "branch")),
        "branches": [[_BRANCH, ...]],
        "plain": bool,
        "stays": _REASONS,
        "not_saved": _REASONS,
    },
}
_NUMBER = range(2**28)
_GRID = {"origin": [_NUMBER, ...], "next_number": range(2**28 + 1), "parents": [[_NUMBER]]}
_STEPS = _GRID | {"constraint": str, "horizon": float, "lower_bound": (None, float)}
_CONTENT = {
    "format": int,
    "taulearn": str,
    "weights_sha256": str,
    "time_steps": _STEPS | {"options": dict},
    "scheme": NAMED,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest that belongs to the weights in the folder; its names and numbers may still contradict each other."""
    weights = folder / WEIGHTS
    present = [path for name in (MANIFEST, ASIDE) if (path := folder / name).is_file()]
    if not present or not weights.is_file():
        missing = weights if present else folder / MANIFEST
        raise FileNotFoundError(
            f"{missing} does not exist: path must be a folder that save_model wrote, or a run directory"
        )
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifests = []
    for path in present:
        manifests.append(_read(path))
        if manifests[-1]["weights_sha256"] == digest:
            return manifests[-1]
    raise ValueError(
        f"{weights} must have the sha256 {short(manifests[0]['weights_sha256'])} that {present[0].name} names, got "
        f"{digest!r}: it is damaged or from another save; take both files from one place, or save again"
    )


def _read(path: Path) -> dict[str, Any]:
    """One manifest."""
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} must have at most {_LARGEST} bytes, got {size}: it is no manifest; save again")
    try:
        content = json.loads(path.read_bytes())
        if type(content) is not dict or type(content.get("format")) is not int:
            raise ValueError(f"the file must have a format, got {short(content)}")
        if content["format"] in (1, FORMAT):
            manifest = as_format_2(content) if content["format"] == 1 else content
            model: Any = manifest.get("model")
            kind: Any = model.get("kind") if type(model) is dict else model
            check("model.kind", kind, frozenset(_MODELS))
            if kind != "network":
                model.setdefault("modules", {})  # which older files have not
            if kind == "wrapped":
                older = {"form": "whole", "per": "block", "branches": [], "plain": False, "stays": [], "not_saved": []}
                for key, value in older.items():
                    model.setdefault(key, value)
            if type(manifest.get("time_steps")) is dict:
                for key, value in {"options": {}, "next_number": 0, "parents": []}.items():
                    manifest["time_steps"].setdefault(key, value)
            check("", manifest, _CONTENT | {"model": _MODELS[kind]})
            if any(len(pair) != 2 or pair[1] >= pair[0] for pair in manifest["time_steps"]["parents"]):
                raise ValueError("time_steps.parents must be pairs of a number and the smaller one of its parent")
            return manifest
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a manifest that save_model wrote, got another content ({error}): restore it, or save again"
        ) from error
    raise ValueError(
        f"{path} must have format 1 or {FORMAT}, got {content['format']}: load it with the version of taulearn that "
        f"wrote it, {short(content.get('taulearn', '?'))}"
    )


def check(where: str, value: object, shape: Any) -> None:
    """Refuse a JSON value of another shape, with a ValueError that names the place.

    A shape is a type; a range; a set of names; None; a list of one shape, with ... if it must not be empty;
    a dictionary of shapes, whose keys must all be there and no others; a tuple of shapes of which one must fit.
    """
    if refused := _refusal(where, value, shape):
        raise ValueError(refused)


def _refusal(where: str, value: Any, shape: Any) -> str:
    """Why :func:`check` refuses a value, or nothing."""
    inner: list[str] = []
    match shape:
        case tuple():
            refused = [_refusal(where, value, each) for each in shape]
            return "" if "" in refused else "; or ".join(refused)
        case dict():
            fits, wanted = type(value) is dict and value.keys() == shape.keys(), f"an object with {', '.join(shape)}"
            if type(value) is dict and not fits:
                return f"{where or 'the file'} must be {wanted}, got one that differs in {sorted(value ^ shape.keys())}"
            inner = [_refusal(f"{where}.{key}".strip("."), value[key], shape[key]) for key in shape if fits]
        case list():
            fits, wanted = type(value) is list and (len(value) > 0 or ... not in shape), "a list of at least 1 item"
            inner = [_refusal(f"{where}.{l}", each, shape[0]) for l, each in enumerate(value if fits else ())]
        case frozenset():
            fits, wanted = type(value) is str and value in shape, f"one of {', '.join(map(repr, sorted(shape)))}"
        case range():
            fits, wanted = type(value) is int and value in shape, f"an integer in {shape[0]} .. {shape[-1]}"
        case None:
            fits, wanted = value is None, "null"
        case _ if shape is float:
            fits, wanted = type(value) in (int, float) and abs(value) < 1e308, "a finite number"
        case _:
            fits, wanted = type(value) is shape, f"of type {shape.__name__}"
    return next(filter(None, inner), "") if fits else f"{where or 'the file'} must be {wanted}, got {short(value)}"


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
