"""Which modules of a model are blocks: those that a user names, or from the calls that a forward pass showed.

A module can get a time step if it owns parameters, is called once, returns a state of its input's shape and leaves its
input as it is. Of those, the outermost are taken, with two exceptions: a layer of torch.nn, a normalisation and a
scaling are parts of a block, not blocks; and a module that only calls other modules in turn (an encoder, a stage) is a
list of blocks, so that those inside it are taken.

What the host does with them is seen in a second pass (:mod:`taulearn.wrapping.state_path`): where it adds the output
of a module to its input itself, the module is none; and one that is alone of its kind on its path of states is a block
only if it adds something to its input, and holds no blocks: an encoder that adds positions, say, holds its layers.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .block import IN_PLACE
from .probe import Call, Key, Probe, kind
from .state_path import OUTSIDE, follow_states

_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
SCRIPTED = "it is compiled by TorchScript, whose modules cannot be changed: use the module that it was made from"
_HOLDS = "it is alone of its kind and holds several modules of one kind: name it in blocks if it is a block"
_ALONE = (
    "it is alone of its kind on its way through the model and does not add to its input, as embeddings and gates are: "
    "name it in blocks if it is one"
)
_SCALES = "it has scales and shifts alone and does not add to its input, as a normalisation is"


def blocks_of(result: Probe, refused: Mapping[str, str], inputs: Any) -> tuple[list[Call], dict[str, str]]:
    """The blocks of a model, and why the other modules are none."""
    calls, reasons = _settled(result, refused, inputs)
    while True:
        kinds = [kind(call.module) for call in calls]
        for call in calls:
            if kinds.count(kind(call.module)) == 1:
                inner = _settled(result, {**refused, call.name: _HOLDS}, inputs)
                if _holds_blocks(result.host, call, *inner, inputs):
                    refused = {**refused, call.name: _HOLDS}
                    calls, reasons = inner
                    break
        else:
            return calls, reasons


def _holds_blocks(host: nn.Module, outer: Call, calls: list[Call], reasons: Mapping[str, str], inputs: Any) -> bool:
    """Whether a module is a list of blocks, or of branches that it adds to its state, rather than a block."""
    inside = f"{outer.name}."
    calls = [call for call in calls if call.name.startswith(inside)]
    path = follow_states(host, calls, inputs) if len(calls) > 1 else None
    blocks = [] if path is None else [kind(calls[l].module) for l in path.adding]
    branches = []
    for name, why in reasons.items():
        if name.startswith(inside) and why == OUTSIDE:
            holders = (host.get_submodule(each) for each in _outer(name) if each.startswith(inside))
            if any(isinstance(each, nn.ModuleList) for each in holders):
                branches.append(kind(host.get_submodule(name)))
    return any(each.count(some) > 1 for each in (blocks, branches) for some in each)


def _settled(result: Probe, refused: Mapping[str, str], inputs: Any) -> tuple[list[Call], dict[str, str]]:
    """The blocks, without those that turn out to be none when states are followed."""
    none = dict(refused)
    while True:
        calls, reasons = _outermost(result, none)
        found = _no_blocks(result, calls, inputs)
        if not found:
            return calls, reasons
        none |= found


def _no_blocks(result: Probe, calls: list[Call], inputs: Any) -> dict[str, str]:
    """Which of the modules found turn out to be no blocks when their states are followed."""
    path = follow_states(result.host, calls, inputs)
    if path is None:
        return {}
    none = {call.name: _SCALES for l, call in enumerate(calls) if _only_scales(call.module) and l not in path.adding}
    none |= {calls[l].name: OUTSIDE for l in path.outside}
    if none:
        return none
    accepted = {kind(calls[l].module) for l in path.adding}
    for chain in path.chains:
        kinds = [kind(calls[l].module) for l in chain]
        accepted |= {each for each in kinds if kinds.count(each) > 1}
    return {call.name: _ALONE for call in calls if kind(call.module) not in accepted}


def refusal(calls: list[Call], *, named: bool = False) -> str | None:
    """Why a module cannot get a time step, or None if it can."""
    if not calls:
        return "it was not called"
    first = calls[0]
    if len(calls) > 1:
        return f"it was called {len(calls)} times: a block used in several places has no single time step"
    if not any(True for _ in first.module.parameters()):
        return "it has no parameters"
    reason = None if named else _part(first.module)
    if reason is not None:
        return reason
    if first.pair is None:
        came, left = first.shapes()
        if came is None or left is None:
            return f"it has no tensor as its {'input' if came is None else 'output'}"
        if came != left:
            return f"its output {left} has another shape than its input {came}"
        return "its input and output are no floating point numbers"
    return IN_PLACE if first.pair[0] in first.changed else None


def _part(module: nn.Module) -> str | None:
    """Why a module is a part of a block rather than a block, by what it is; None if it may be one."""
    leaf = not any(True for _ in module.children())
    if leaf and type(module).__module__.startswith("torch.nn"):
        return "it is a layer of torch.nn, a part of a block"
    if isinstance(module, _NORMALISATIONS) or (leaf and "norm" in type(module).__name__.lower()):
        return "it is a normalisation"
    return None


def _only_scales(module: nn.Module) -> bool:
    return all(p.numel() == max((1, *p.shape)) for p in module.parameters())


def _outermost(result: Probe, refused: Mapping[str, str]) -> tuple[list[Call], dict[str, str]]:
    """The outermost modules that may be blocks, in the order of their calls, and why the others are none."""
    found: list[Call] = []
    reasons: dict[str, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            name = f"{prefix}.{child_name}" if prefix else child_name
            calls = result.calls.get(name, [])
            if isinstance(child, torch.jit.ScriptModule):
                reasons[name] = SCRIPTED
                continue
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
    made = {each.departed for each in inner} | {call.arrived}
    by_input: dict[Key | None, list[Call]] = {}
    for each in sorted(inner, key=lambda each: each.name.count(".")):
        by_input.setdefault(each.arrived, []).append(each)
    state, passed = call.arrived, 0
    while state != call.departed:
        following = [each for each in by_input.get(state, []) if each.departed != state]
        if not following or following[0].others & made or passed > len(inner):
            return False
        state, passed = following[0].departed, passed + 1
    return passed > 0


def matching(argument: str, patterns: str | Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that match, in their own order; a wildcard stays within a part: ``h.*`` is ``h.0``, never ``h.0.x``."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if not wanted or not all(isinstance(each, str) for each in wanted):
        raise ValueError(f"{argument} must be a name or pattern, or several of them, got {patterns!r}")
    found: set[str] = set()
    for pattern in wanted:
        hits = {name for name in names if _matches(name, pattern)}
        if not hits:
            there = ", ".join(map(repr, names[:5])) + ", .." * (len(names) > 5)
            hint = nearest_names(pattern, names) or f": there are {there}" * bool(names)
            raise ValueError(f"{argument} must match names of the model, got {pattern!r}, which matches none{hint}")
        found |= hits
    return [name for name in names if name in found]


def nearest_names(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name."""
    nearest = difflib.get_close_matches(name, [each for each in known if each], n=3, cutoff=0.3)
    return f": did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
