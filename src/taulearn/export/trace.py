"""The model's graph as torch.export has it, and the file that holds it."""

import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Arguments, TensorsOnly, outputs

Runner = Callable[[Arguments], list[Tensor]]
"""Runs what a file holds, and returns its output tensors."""


def trace(model: nn.Module, example: Arguments, *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The graph of a model in evaluation mode, without the example and the source lines that it came from."""
    module = model
    if not isinstance(output_of(model, example), Tensor):
        module = TensorsOnly(model)
    try:
        program = _traced(module, example, dynamic_batch)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        remedy = "replace branches that depend on values by torch.where or torch.cond"
        if "Constraints violated" in reason:
            reason = "it fixes the size of the batch"
            remedy = "pass dynamic_batch=False, or let it compute the same for every sample"
        raise ValueError(
            f"model must be one that torch.export can trace, got a {type(model).__name__} that it cannot ({reason}): "
            f"{remedy}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch's exporters say of their own parts to themselves, whole graphs of a refused model among it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _traced(module: nn.Module, example: Arguments, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic_batch:
        batch, free = torch.export.Dim("batch"), torch.export.ShapesCollection()
        for name, value in example.tensors.items():
            if example.batched(name):
                free[value] = {0: batch}
        shapes = free.dynamic_shapes(module, example.args, example.kwargs)
    with quiet(), torch.no_grad():
        return torch.export.export(module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)


def with_constant_steps(
    program: torch.export.ExportedProgram, example: Arguments, *, dynamic_batch: bool
) -> torch.export.ExportedProgram:
    """The same graph with numbers in the place of all that depends on the time steps alone.

    Trained steps are constants. The weights of a fractional network's memory are computed from them in double
    precision with operators that runtimes lack, and need not be computed there.
    """
    module: Any = program.module()
    graph, values, derived = module.graph, {}, set()
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.op == "get_attr" and re.search(r"\b(time_steps|scheme)\.", str(node.target)):
            values[node] = operator.attrgetter(node.target)(module).detach()
            derived.add(node)
        elif node.op == "call_function" and all(each in values for each in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: values[each])
            values[node] = node.target(*args, **kwargs)
            derived |= {node} if derived.intersection(node.all_input_nodes) else set()
    for number, (node, value) in enumerate(values.items()):
        if node in derived and isinstance(value, Tensor) and any(user not in values for user in node.users):
            module.register_buffer(f"constant_{number}", value.clone())
            with graph.inserting_before(node):
                constant = graph.get_attr(f"constant_{number}")
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
    for node in reversed(values):
        if not node.users:
            graph.erase_node(node)
    module.recompile()
    return _traced(module, example, dynamic_batch)


def output_of(model: nn.Module, inputs: Arguments) -> Any:
    """The output of the model, without gradients."""
    with torch.no_grad():
        return model(*inputs.args, **inputs.kwargs)


def write_program(model: nn.Module, example: Arguments, folder: Path, *, dynamic_batch: bool) -> Runner:
    """Write model.pt2 for torch.export.load."""
    file = folder / "model.pt2"
    program = trace(model, example, dynamic_batch=dynamic_batch)
    with quiet():
        torch.export.save(program, file)
        module = torch.export.load(file).module()
    return lambda inputs: list(outputs(output_of(module, inputs)).values())
