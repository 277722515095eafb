"""The public ``export_model``: a model as a file that runs without this package, checked on random inputs.

    onnx          model.onnx                      for onnxruntime and others; pip install 'taulearn[onnx]'
    torch         model.pt2                       for torch.export.load, and what compiles it further
    safetensors   model.safetensors, model.json   weights and architecture, as taulearn.save_model writes them

Beside them lies manifest.json: what goes in and comes out, the layers and steps that are left, and the check.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import refuse_distributed
from .._errors import unknown_name
from ..files import move, write_bytes
from ..nn.pruned_models import prunable_of, wrapping_of
from ..nn.time_steps import time_steps_of
from ..saving import load_model, save_model
from ..wrapping.folding import unwrap
from .arguments import answers, arguments, inference_copy
from .check import compare, outputs_on
from .onnx_file import need_onnx, output_names, write_onnx
from .trace import Runner, write_program

FORMATS = ("onnx", "torch", "safetensors")
MANIFEST = "manifest.json"

_FORMAT = 1
_BATCHES = (1, 2, 7)


@dataclass(frozen=True)
class Signature:
    """One input or output.

    Attributes:
        name: Its name.
        dtype: Its type, as torch calls it.
        shape: Its shape, with "batch" for the size that is free.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Exported:
    """The result of :func:`export_model`; prints as a few lines.

    Attributes:
        path: The folder.
        format: "onnx", "torch" or "safetensors".
        files: The files of the model, the manifest apart.
        inputs: What goes in.
        outputs: What comes out.
        samples: Number of random samples that the file was checked with.
        difference: Largest difference between the file's outputs and the model's.
        size: Largest absolute output of the model.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    samples: int
    difference: float
    size: float

    @property
    def manifest(self) -> Path:
        """The file that describes the others."""
        return self.path / MANIFEST

    def rows(self) -> list[tuple[str, str]]:
        """The lines, each with its heading."""
        return [
            *(("file", f"{file} ({file.stat().st_size:,} bytes)") for file in self.files),
            *(("input", str(each)) for each in self.inputs),
            *(("output", str(each)) for each in self.outputs),
            (
                "check",
                f"differs by at most {self.difference:.2g} from the model on {self.samples} random samples "
                f"(outputs up to {self.size:.2g})",
            ),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self.rows())


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    format: str = "onnx",  # noqa: A002  it is called so everywhere
    dynamic_batch: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model, pruned or not, as a file that runs without this package, and check the file on random inputs.

    The model is written as it computes in evaluation mode, on the CPU; it stays as it is. Steps that fold into weights
    are folded in "onnx" and "torch", others are numbers there; "safetensors" keeps them. Files of an earlier export in
    the folder are replaced once the new ones have passed the check.

    Args:
        model: A network of the package, or a wrapped model.
        path: The folder, made if missing.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keywords, with the batch in front. They are
            not written. An input is batched if it has as many entries in front as the first one: choose a number of
            samples that no other input has there.
        format: "onnx", "torch" (torch.export) or "safetensors".
        dynamic_batch: Whether the file takes batches of any size; otherwise of that of the example.
        about: More entries for the manifest.

    Returns:
        What was written, and how far it is from the model.

    Raises:
        ImportError: If the format needs packages that are not installed.
        TypeError: If the model has no time steps, does not take these inputs, or ``about`` holds what JSON does not.
        ValueError: If the model cannot be expressed in this format (the message names the operator), returns no tensors
            or NaN alone, or the file does not agree with it: by more than 1e-5 (float16: 1e-2), or that share of the
            largest output where it exceeds 1. Nothing is written then.
        OSError: If the folder cannot be made, or is that of a run.

    Example:
        >>> from taulearn.nn import resnet
        >>> exported = export_model(resnet(2, 8, 1, 3), tempfile.mkdtemp(), torch.rand(4, 2), format="torch")
        >>> print(exported.inputs[0], "->", exported.outputs[0])
        x, float32 (batch, 2) -> output, float32 (batch, 1)
        >>> torch.export.load(exported.files[0]).module()(torch.rand(9, 2)).shape
        torch.Size([9, 1])
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if format == "onnx":
        need_onnx()
    refuse_distributed("model", model, "export")
    try:
        json.dumps(dict(about or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(f"about must hold what JSON can, got something else ({error}): use text and numbers") from error
    time_steps_of(getattr(model, "_orig_mod", model))
    twin = inference_copy(model)
    if format != "safetensors":
        _fold(twin)
    example = arguments(twin, example_inputs, dynamic_batch=dynamic_batch)
    returned = outputs_on(twin, example)
    if format == "onnx":
        returned = dict(zip(output_names(returned, example.tensors), returned.values(), strict=True))
    folder = Path(path)
    with _aside(folder) as aside:
        if format == "safetensors":
            run = _write_safetensors(twin, aside)
        else:
            write = write_onnx if format == "onnx" else write_program
            run = write(twin, example, aside, dynamic_batch=dynamic_batch)
        sizes = _BATCHES if dynamic_batch else (example.batch,) * len(_BATCHES)
        others = [name for name in FORMATS if name != format]
        difference, size = compare(twin, run, example, sizes, format, others)
        files = sorted(aside.iterdir())
        exported = Exported(
            folder,
            format,
            tuple(folder / file.name for file in files),
            _signatures(example.tensors, example.batch if dynamic_batch else None),
            _signatures(returned, example.batch if dynamic_batch else None),
            sum(sizes),
            difference,
            size,
        )
        manifest = _manifest(
            getattr(model, "_orig_mod", model), exported, {file.name: _digest(file) for file in files}, about or {}
        )
        _remove_export(exported.manifest)  # it never stands beside another's files
        for file in files:
            move(file, folder / file.name)
        write_bytes(exported.manifest, manifest)
    return exported


def _fold(twin: nn.Module) -> None:
    """Fold the steps of a wrapped model, where that can be done."""
    wrapping = wrapping_of(twin)
    if wrapping is not None and wrapping.form == "branches":
        with suppress(ValueError):
            unwrap(twin)
            twin.requires_grad_(False)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Make a folder, and a temporary one in it; take away what was made if the body fails."""
    if (folder / "run.toml").exists():
        raise FileExistsError(
            f"path must not be the folder of a run, got {str(folder)!r}, whose network it would replace: choose "
            f"another one, {str(folder / 'export')!r} for instance"
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path must be a folder, got the file {folder}: an export is several files")
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside = tempfile.TemporaryDirectory(prefix=".export-", dir=folder)
        except OSError as error:
            raise type(error)(
                f"path must be a folder to write into, got {str(folder)!r} ({error.strerror}): choose another place"
            ) from error
        with aside:
            yield Path(aside.name)
    except BaseException:
        for each in new:
            with suppress(OSError):
                each.rmdir()
        raise


def _remove_export(manifest: Path) -> None:
    """Delete an earlier export: its manifest, and the files that are still as it says."""
    try:
        digests = dict(json.loads(manifest.read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        digests = {}
    manifest.unlink(missing_ok=True)
    for file in manifest.parent.iterdir():
        if file.is_file() and file.name in digests and _digest(file) == digests[file.name]:
            file.unlink()


def _write_safetensors(model: nn.Module, folder: Path) -> Runner:
    save_model(model, folder)
    if json.loads((folder / "model.json").read_bytes())["model"]["kind"] == "network":
        loaded: nn.Module = load_model(folder).eval()
    else:
        host = inference_copy(model)
        with torch.no_grad():
            for tensor in host.state_dict().values():
                tensor.zero_()  # so that the check sees what the file holds
        loaded = load_model(folder, host=host)
    return lambda inputs: answers(loaded, inputs)


def _signatures(tensors: Mapping[str, Tensor], batch: int | None) -> tuple[Signature, ...]:
    """Names, types and shapes; first dimensions of size ``batch`` are free."""

    def shape(t: Tensor) -> tuple[int | str, ...]:
        return ("batch", *t.shape[1:]) if t.ndim and len(t) == batch else tuple(t.shape)

    return tuple(Signature(name, str(t.dtype).removeprefix("torch."), shape(t)) for name, t in tensors.items())


def _manifest(model: nn.Module, exported: Exported, digests: Mapping[str, str], about: Mapping[str, Any]) -> bytes:
    from .. import __version__

    steps = time_steps_of(model)
    content = {
        "format": _FORMAT,
        "kind": exported.format,
        "taulearn": __version__,
        "torch": torch.__version__,
        "sha256": dict(digests),
        "inputs": [vars(each) for each in exported.inputs],
        "outputs": [vars(each) for each in exported.outputs],
        "scheme": prunable_of(model).scheme.name,
        "layers": list(steps.origin),
        "time_steps": steps.tau.detach().double().tolist(),
        "check": {
            "samples": exported.samples,
            "largest_difference": exported.difference,
            "largest_output": exported.size,
        },
        **about,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
