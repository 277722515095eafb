"""The content of model.json, checked strictly: a file may be damaged, hostile or of another format.

The manifest holds the digest of the weights that it belongs to. Saving writes the new manifest aside, then the weights,
and moves the manifest into place last; loading takes whichever of the two manifests has the digest of the weights. So a
crash at any moment leaves the old pair or the new one, and a mixed-up pair is noticed.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

from .._errors import unknown_name
from .format_1 import as_format_2

WEIGHTS, MANIFEST, ASIDE = "model.safetensors", "model.json", ".model.json.new"
FORMAT: Final = 2
COUNT = range(1, 2**28 + 1)
"""Widths: their product in bytes stays far below 2^63, where torch's arithmetic ends."""
LAYERS = range(1, 2**16 + 1)
"""Numbers of layers: a few bytes of a file shall not keep a machine busy."""

_LARGEST = 2**24
OPTIONS = {"name": str, "options": dict}
_ENTRY = (None, str, int)
_MODELS = {
    "network": {
        "kind": str,
        "dtype": frozenset(("float16", "bfloat16", "float32", "float64")),
        "builder": str,
        "keywords": dict,
    },
    "host": {"kind": str, "saved_from": str, "because": str},
    "wrapped": {"kind": str, "saved_from": str, "blocks": [str, ...], "shortened": [str], "states": [[_ENTRY]]},
}
_ALL = {
    "format": int,
    "taulearn": str,
    "weights_sha256": re.compile("[0-9a-f]{64}"),
    "time_steps": {"origin": [range(2**28), ...], "constraint": str, "horizon": float, "lower_bound": (None, float)},
    "scheme": OPTIONS,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest that belongs to the weights in the folder; its names and numbers may still contradict each other.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a manifest is damaged or of another format, or none belongs to the weights.
    """
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
        f"{weights} must have the sha256 {manifests[0]['weights_sha256']} that {present[0].name} names, got {digest}: "
        "it is damaged or from another save; take both files from one place, or save again"
    )


def _read(path: Path) -> dict[str, Any]:
    """One manifest."""
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path} must have at most {_LARGEST} bytes, got {size}: it is no manifest; save again")
    try:
        manifest = json.loads(path.read_bytes(), parse_constant=_no_number)
        if type(manifest) is not dict or type(manifest.get("format")) is not int:
            raise ValueError(f"the file must have a format, got {short(manifest)}")
        if manifest["format"] in (1, FORMAT):
            manifest = as_format_2(manifest) if manifest["format"] == 1 else manifest
            model = manifest.get("model")
            kind = model.get("kind") if type(model) is dict else model
            check("model.kind", kind, frozenset(_MODELS))
            check("", manifest, _ALL | {"model": _MODELS[kind]})
            if any(len(pair) != 2 for pair in manifest["model"].get("states", ())):
                raise ValueError(f"model.states must be pairs, got {short(manifest['model']['states'])}")
            return manifest
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a manifest that save_model wrote, got another content ({error}): restore it, or save again"
        ) from error
    raise ValueError(
        f"{path} must have format 1 or {FORMAT}, got {manifest['format']}: load it with the version of taulearn that "
        f"wrote it, {short(manifest.get('taulearn', '?'))}"
    )


def check(where: str, value: object, shape: Any) -> None:
    """Refuse a JSON value of another shape.

    A shape is a type; a range; a set of names; a pattern; a list of one shape, with ... if it must not be empty; a
    dictionary of shapes, whose keys must all be there and no others; a tuple of shapes of which one must fit; None.

    Raises:
        ValueError: Naming the place.

    Example:
        >>> check("origin", [0, "1"], [range(5), ...])
        Traceback (most recent call last):
        ...
        ValueError: origin.1 must be an integer in 0 .. 4, got '1'
    """
    what = f"{where or 'the file'} must be"
    match shape:
        case tuple():
            refused = [error for each in shape if (error := _refusal(where, value, each))]
            if len(refused) == len(shape):
                raise ValueError("; or ".join(refused))
            return
        case dict():
            if type(value) is not dict:
                raise ValueError(f"{what} an object with {', '.join(shape)}, got {short(value)}")
            for key in value.keys() - shape.keys():
                raise unknown_name(f"key of {where or 'the file'}", key, shape)
            for key, inner in shape.items():
                if key not in value:
                    raise ValueError(f"{where or 'the file'} must have {key}, got {short(list(value))}")
                check(f"{where}.{key}" if where else key, value[key], inner)
            return
        case list():
            if type(value) is not list or (not value and ... in shape):
                raise ValueError(f"{what} a list{' that is not empty' if ... in shape else ''}, got {short(value)}")
            for number, each in enumerate(value):
                check(f"{where}.{number}", each, shape[0])
            return
        case frozenset():
            if type(value) is not str or value not in shape:
                raise unknown_name(where, value, shape)
            return
        case range():
            fits, wanted = type(value) is int and value in shape, f"an integer in {shape[0]} .. {shape[-1]}"
        case re.Pattern():
            fits, wanted = type(value) is str and shape.fullmatch(value) is not None, f"like {shape.pattern}"
        case None:
            fits, wanted = value is None, "null"
        case type():
            number = shape is float and type(value) in (int, float)
            fits, wanted = type(value) is shape or number, f"of type {shape.__name__}"
            fits = fits and (shape is not float or -1e308 < value < 1e308)  # type: ignore[operator]
        case _:
            raise AssertionError(shape)
    if not fits:
        raise ValueError(f"{what} {wanted}, got {short(value)}")


def _refusal(where: str, value: object, shape: Any) -> str:
    """Why :func:`check` refuses a value, or nothing."""
    try:
        check(where, value, shape)
    except ValueError as error:
        return str(error)
    return ""


def _no_number(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
