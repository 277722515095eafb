"""The public ``export_model``: a model as a file that runs without this package, checked on random inputs.

    onnx          model.onnx                      for onnxruntime and others; pip install 'taulearn[onnx]'
    torch         model.pt2                       for torch.export.load, and what compiles it further
    safetensors   model.safetensors, model.json   weights and architecture, as taulearn.save_model writes them

Beside them lies manifest.json: what goes in and comes out, the layers and steps that are left, and the check.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._deletion import prunable_of
from .._errors import unknown_name
from ..files import write_bytes
from ..penalties import time_steps_of
from ..saving import load_model, save_model
from .arguments import Arguments, answers, arguments, inference_copy, outputs
from .onnx_file import need_onnx, write_onnx
from .trace import Runner, output_of, write_program

FORMATS = ("onnx", "torch", "safetensors")
MANIFEST = "manifest.json"

_FORMAT = 1
_BATCHES = (1, 2, 7)
_TOLERANCE = 1e-5
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 1e-1}


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
    """What :func:`export_model` left; prints as a few lines.

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

    The model is written as it computes in evaluation mode, on the CPU; it stays as it is. Files of an earlier export in
    the folder are replaced once the new ones have passed the check.

    Args:
        model: A network of the package, or a wrapped model.
        path: The folder, made if missing.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keywords, with the batch in front. They are
            not written.
        format: "onnx", "torch" (torch.export) or "safetensors".
        dynamic_batch: Whether the file takes batches of any size; otherwise of that of the example.
        about: More entries for the manifest.

    Returns:
        What was written, and how far it is from the model.

    Raises:
        ImportError: If the format needs packages that are not installed.
        TypeError: If the model has no time steps.
        ValueError: If the model cannot be expressed in this format (the message names the operator), or the file does
            not agree with it to 1e-5 (float16: 1e-2); nothing is written then.

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
    time_steps_of(getattr(model, "_orig_mod", model))
    twin = inference_copy(model)
    example = arguments(twin, example_inputs)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path must be a folder, got the file {folder}: an export is several files")
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        if format == "safetensors":
            run = _write_safetensors(twin, aside)
        else:
            write = write_onnx if format == "onnx" else write_program
            run = write(twin, example, aside, dynamic_batch=dynamic_batch)
        sizes = _BATCHES if dynamic_batch else (example.batch,) * len(_BATCHES)
        difference, size = _compare(twin, run, example, sizes, format)
        files = sorted(aside.iterdir())
        exported = Exported(
            folder,
            format,
            tuple(folder / file.name for file in files),
            _signatures(example.tensors, example.batch if dynamic_batch else None),
            _signatures(outputs(output_of(twin, example)), example.batch if dynamic_batch else None),
            sum(sizes),
            difference,
            size,
        )
        manifest = _manifest(twin, exported, {file.name: _digest(file) for file in files}, about or {})
        exported.manifest.unlink(missing_ok=True)  # it never stands beside another's files
        for file in files:
            file.replace(folder / file.name)
        write_bytes(exported.manifest, manifest)
    finally:
        shutil.rmtree(aside)
    return exported


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


@torch.no_grad()
def _compare(
    model: nn.Module,
    run: Runner,
    example: Arguments,
    sizes: Sequence[int],
    format: str,  # noqa: A002
) -> tuple[float, float]:
    """Largest difference and largest output on random inputs, or an error if the file does not agree."""
    difference = size = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number in sizes:
            inputs = example.of_batch(number)
            for found, expected in zip(run(inputs), answers(model, inputs), strict=True):
                tolerance = _TOLERANCES.get(expected.dtype, _TOLERANCE)
                a, b = found.double().nan_to_num(), expected.double().nan_to_num()
                largest = float(b.abs().amax())
                apart = float((a - b).abs().amax()) if a.shape == b.shape else float("inf")
                difference, size = max(difference, apart), max(size, largest)
                if apart > tolerance * max(1.0, largest):
                    others = " or ".join(repr(name) for name in FORMATS if name != format)
                    raise ValueError(
                        f"the exported file must agree with the model to {tolerance:g} on random inputs, got a "
                        f"difference of {apart:.2g} in a batch of {number} (outputs up to {largest:.2g}): format "
                        f"{format!r} does not express this model; use {others}"
                    )
    return difference, size


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
