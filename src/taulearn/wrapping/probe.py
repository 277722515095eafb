"""A forward pass that shows which modules of a model are blocks: it runs in evaluation mode and leaves no trace.

A module can get a time step if it owns parameters, is called once, returns a state of its input's shape and leaves its
input as it is. Of those, the outermost are taken, with two exceptions: a layer of torch.nn is a part of a block, not a
block; and a module that only calls other modules in turn (an encoder, a stage) is a list of blocks, so that those
inside it are taken.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import call as call_model
from .blocks import IN_PLACE
from .state import Form, state_in, state_out

Key = tuple[int, int]
"""A tensor at one moment: its identity, and the number of in-place changes so far."""


@dataclass
class Call:
    """What one call of a module showed.

    Attributes:
        name: The module's name in the host.
        module: The module.
        order: Position of the call's start among all calls.
        arrived: The input state at the start, or None.
        others: All other tensors among the arguments.
        left: The output state at the end, or None.
        shapes: Shapes of both, for messages.
        form: How the output holds the state.
        in_place: Whether the input was changed.
    """

    name: str
    module: nn.Module
    order: int
    arrived: Key | None
    others: frozenset[Key]
    left: Key | None = None
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    form: Form = field(default_factory=Form)
    in_place: bool = False


@dataclass
class Probe:
    """The calls of one forward pass.

    Attributes:
        host: The model.
        calls: By module name, in the order of their start.
    """

    host: nn.Module
    calls: dict[str, list[Call]] = field(default_factory=dict)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random generators are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def probe(host: nn.Module, example_inputs: Any) -> Probe:
    """Run the model once and record the calls of its modules.

    Args:
        host: The model.
        example_inputs: A tensor, a tuple of arguments or a dictionary of keywords.

    Returns:
        The calls.
    """
    result, alive, running, count = Probe(host), [], [], 0

    def key(tensor: Tensor) -> Key:
        alive.append(tensor)
        return id(tensor), tensor._version

    def start(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        x = state_in(args, kwargs)
        others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not x]
        call = Call(name, module, count, None if x is None else key(x), frozenset(map(key, others)))
        count += 1
        result.calls.setdefault(name, []).append(call)
        running.append((call, x))

    def stop(output: Any) -> None:
        call, x = running.pop()
        y = state_out(output)
        call.in_place = x is not None and call.arrived is not None and x._version != call.arrived[1]
        call.shapes = (None if x is None else tuple(x.shape), None if y is None else tuple(y.shape))
        if y is not None:
            call.left, call.form = key(y), Form.of(output)

    with undisturbed(host), ExitStack() as hooks:
        for name, module in host.named_modules():
            if name:
                before = module.register_forward_pre_hook(
                    lambda m, a, k, name=name: start(name, m, a, k), with_kwargs=True, prepend=True
                )
                after = module.register_forward_hook(lambda _m, _a, output: stop(output))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        call_model(host, example_inputs)
    return result


def refusal(calls: list[Call], *, named: bool = False) -> str | None:
    """Why a module cannot get a time step, or None if it can.

    Args:
        calls: Its calls in the probe.
        named: Whether the user named it, so that it need not look like a block.

    Returns:
        The reason.
    """
    if not calls:
        return "it was not called"
    first = calls[0]
    if len(calls) > 1:
        return f"it was called {len(calls)} times: a block used in several places has no single time step"
    if not any(True for _ in first.module.parameters()):
        return "it has no parameters"
    leaf = not any(True for _ in first.module.children())
    if not named and leaf and type(first.module).__module__.startswith("torch.nn"):
        return "it is a layer of torch.nn, a part of a block"
    if not named and leaf and "norm" in type(first.module).__name__.lower():
        return "it is a normalisation"
    came, left = first.shapes
    if came is None or left is None:
        return f"it has no tensor as its {'input' if came is None else 'output'}"
    if came != left:
        return f"its output {left} has another shape than its input {came}"
    return IN_PLACE if first.in_place else None


def find(result: Probe, refused: Mapping[str, str]) -> tuple[list[Call], dict[str, str]]:
    """The blocks of a model, and why the other modules are none.

    Args:
        result: The probe.
        refused: Names of modules that must not be taken, with reasons.

    Returns:
        The blocks in the order of their calls, and the reasons by name.
    """
    found: list[Call] = []
    reasons: dict[str, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}" if prefix else child_name
            calls = result.calls.get(name, [])
            reason = refusal(calls) or refused.get(name)
            inside = len(found)
            if reason is None and not _only_calls_others(name, calls[0], result):
                found.append(calls[0])
                continue
            visit(name, child)
            if reason is None and len(found) == inside:
                found.append(calls[0])
                for inner in [n for n in reasons if n.startswith(f"{name}.")]:
                    del reasons[inner]
            elif reason is not None and calls:
                reasons[name] = reason

    visit("", result.host)
    kinds = {type(call.module) for call in found} - {nn.Sequential}
    modules = dict(result.host.named_modules())
    blocks = []
    for call in sorted(found, key=lambda call: call.order):
        outer = [name for name in _outer(call.name) if type(modules[name]) in kinds]
        if outer:
            reasons[call.name] = f"it is a part of {outer[0]!r}, which is of the class of another block"
        else:
            blocks.append(call)
    return blocks, reasons


def _outer(name: str) -> Iterator[str]:
    """Names of the modules that contain this one, the outermost first, without the host."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i])


def _only_calls_others(name: str, call: Call, result: Probe) -> bool:
    """Whether the state passes through the module by calls alone, each of which sees nothing else made inside it.

    So it is in an encoder or a stage; a block adds its input in between (arithmetic) or hands it on (an argument).
    """
    inner = [each for inner_name, calls in result.calls.items() if inner_name.startswith(f"{name}.") for each in calls]
    made = {each.left for each in inner} | {call.arrived}
    by_input: dict[Key | None, list[Call]] = {}
    for each in sorted(inner, key=lambda each: each.name.count(".")):
        by_input.setdefault(each.arrived, []).append(each)
    state, passed = call.arrived, 0
    while state != call.left:
        following = [each for each in by_input.get(state, []) if each.left != state]
        if not following or following[0].others & made or passed > len(inner):
            return False
        state, passed = following[0].left, passed + 1
    return passed > 0
