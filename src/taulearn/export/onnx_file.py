"""The model's graph as ONNX, with "batch" as the name of the free dimension and nothing of the machine it came from."""

import importlib.util
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import Arguments, outputs
from .trace import Runner, output_of, quiet, trace, with_constant_steps

EMBEDDED = 1_500_000_000
"""Bytes of weights up to which the file holds them itself; protobuf ends at 2 GiB."""


def need_onnx() -> None:
    """Refuse to go on without the packages of the extra."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} must be installed for format 'onnx': pip install 'taulearn[onnx]'")


def write_onnx(model: nn.Module, example: Arguments, folder: Path, *, dynamic_batch: bool) -> Runner:
    """Write model.onnx, and model.onnx.data beside it where the weights are too large for one file."""
    import onnx
    import onnxruntime

    tensors = [*model.parameters(), *model.buffers()]
    if any(t.dtype == torch.bfloat16 for t in tensors):
        raise ValueError(
            "model must be of float16, float32 or float64 for format 'onnx', got one of bfloat16, in which onnxruntime "
            "does not compute: export copy.deepcopy(model).float()"
        )
    program = trace(model, example, dynamic_batch=dynamic_batch)
    program = with_constant_steps(program, example, dynamic_batch=dynamic_batch)
    names = output_names(outputs(output_of(model, example)), example.tensors)
    try:
        with quiet():
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=list(example.tensors), output_names=names
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(_refusal(error)) from error
    assert converted is not None
    proto, file = converted.model_proto, folder / "model.onnx"
    _clean(proto)
    options: dict[str, Any] = {}
    if sum(t.numel() * t.element_size() for t in tensors) > EMBEDDED:
        options = {"save_as_external_data": True, "location": f"{file.name}.data"}
    onnx.save_model(proto, str(file), **options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}

    def run(inputs: Arguments) -> list[torch.Tensor]:
        values = {name: value.numpy() for name, value in inputs.tensors.items() if name in taken}
        return [torch.from_numpy(value) for value in session.run(None, values)]

    return run


def output_names(names: Iterable[str], inputs: Container[str]) -> list[str]:
    """Names of the outputs in the file, where none may be that of an input.

    Example:
        >>> output_names(["x", "y"], ["x"])
        ['x_output', 'y']
    """
    return [f"{name}_output" if name in inputs else name for name in names]


def _refusal(error: BaseException) -> str:
    """The operators that ONNX lacks, out of a chain of errors."""
    found: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        found += re.findall(r"OpOverload\(op='([^']+)'", str(cause))
        cause = cause.__cause__
    names = ", ".join(dict.fromkeys(name.removeprefix("aten.") for name in found))
    if not names:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        return f"model must be one that ONNX can express, got one that it cannot ({reason}): use format='torch'"
    return (
        f"model must consist of operators that ONNX knows, got {names}: compute the same in other operations, or use "
        "format='torch'"
    )


def _clean(proto: Any) -> None:
    """Rename the free dimension, and drop what the exporter notes of source files and of its own graph."""
    graph, shapes = proto.graph, re.compile(r"\bs\d+\b")
    del proto.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *(node for each in proto.functions for node in each.node)):
        del part.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.HasField("dim_param"):
                dimension.dim_param = shapes.sub("batch", dimension.dim_param)
