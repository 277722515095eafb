"""A forward pass that records the calls of a model's modules: it runs in evaluation mode and leaves no trace.

The state of a block is the tensor that the block before it left. Blocks of a class take theirs from the same argument
and leave it in the same entry of the output; where several would do, an argument that is the same for all blocks (a
context) and an entry that is an argument handed on are not it.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import call as call_model, forwards
from .._undisturbed import undisturbed
from .state_argument import CUSTOMARY, Form, entries, parameter_names

Key = tuple[int, int]
"""A tensor at one moment: its identity, and the number of in-place changes so far."""

Pair = tuple[str | int, Any]
"""An argument, and an entry of the output (None: the output itself) of the same shape."""


@dataclass
class Call:
    """One call of a module: its arguments, its output, and which of them are the state."""

    name: str  # the module's name in the host
    module: nn.Module
    order: int  # position of the call's start among all calls
    arguments: dict[str | int, Tensor]  # the tensors among the arguments at the start, by name or position
    keys: dict[str | int, Key]
    output: Any = None  # what was returned: its type, and its entries
    left: dict[Any, Key] = field(default_factory=dict)  # of the tensors in it, at the end; itself is under None
    changed: set[str | int] = field(default_factory=set)  # the arguments that were changed in place
    form: Form = field(default_factory=Form)  # where the state is
    pair: Pair | None = None  # the argument and the entry of the output that are the state; None: it has none

    def pairs(self) -> list[Pair]:
        """Arguments and entries of the output that could be the state before and after."""
        tensors: dict[Any, Any] = {None: self.output} if isinstance(self.output, Tensor) else dict(entries(self.output))
        return [
            (argument, entry)
            for argument, x in self.arguments.items()
            for entry, y in tensors.items()
            if isinstance(y, Tensor) and x.shape == y.shape and _numbers(x) and _numbers(y)
        ]

    @property
    def arrived(self) -> Key | None:
        """The state at the start, else the first tensor."""
        return next(iter(self.keys.values()), None) if self.pair is None else self.keys[self.pair[0]]

    @property
    def departed(self) -> Key | None:
        """The state at the end, else the first tensor."""
        return next(iter(self.left.values()), None) if self.pair is None else self.left[self.pair[1]]

    @property
    def others(self) -> set[Key]:
        """All other tensors among the arguments."""
        return set(self.keys.values()) - {self.arrived}

    def shapes(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Shapes of the first tensors among arguments and output, for messages."""
        x, y = next(iter(self.arguments.values()), None), Form().leaving(self.output)
        return None if x is None else tuple(x.shape), None if y is None else tuple(y.shape)


def _numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass
class Probe:
    """The calls of one forward pass."""

    host: nn.Module  # the model
    calls: dict[str, list[Call]] = field(default_factory=dict)  # by module name, in the order of their start


def probe(host: nn.Module, example_inputs: Any) -> Probe:
    """Run the model once and record the calls of its modules."""
    result, running, count = Probe(host), [], 0

    def start(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        names = parameter_names(module.forward)
        given: list[tuple[str | int, Any]] = [(names[i] if i < len(names) else i, each) for i, each in enumerate(args)]
        given += kwargs.items()
        arguments = {argument: value for argument, value in given if isinstance(value, Tensor)}
        call = Call(name, module, count, arguments, {argument: _key(value) for argument, value in arguments.items()})
        count += 1
        result.calls.setdefault(name, []).append(call)
        running.append(call)

    def stop(output: Any) -> None:
        call = running.pop()
        call.output, held = output, [(None, output)] if isinstance(output, Tensor) else entries(output)
        call.left = {entry: _key(value) for entry, value in held if isinstance(value, Tensor)}
        call.changed = {name for name, value in call.arguments.items() if _key(value) != call.keys[name]}

    def watched(name: str, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            start(name, module, args, kwargs)
            output = forward(*args, **kwargs)
            stop(output)
            return output

        return run

    modules = {
        name: each for name, each in host.named_modules() if name and not isinstance(each, torch.jit.ScriptModule)
    }
    with (
        undisturbed(host, example_inputs),
        forwards({module: watched(name, module) for name, module in modules.items()}),
    ):
        call_model(host, example_inputs)
    _find_states(result)
    return result


def _key(tensor: Tensor) -> Key:
    """Calls keep the tensors, so that identities are not used again."""
    return id(tensor), tensor._version


def kind(module: nn.Module) -> Any:
    """A key that is equal for blocks of one sort: their class, of a Sequential the classes of its members."""
    return (nn.Sequential, *map(type, module.children())) if type(module) is nn.Sequential else type(module)


def _find_states(result: Probe) -> None:
    """Which of the arguments and of the entries of the output are the state, for all calls of one kind alike."""
    alike: dict[Any, list[Call]] = {}
    for calls in result.calls.values():
        for call in calls:
            alike.setdefault(kind(call.module), []).append(call)
    for calls in alike.values():
        pairs = {id(call): call.pairs() for call in calls}
        left = {key: (call, entry) for call in calls for entry, key in call.left.items()}
        handed: Counter[Pair] = Counter()
        for call in calls:
            for argument, entry in pairs[id(call)]:
                before, from_entry = left.get(call.keys[argument], (call, None))
                handed[argument, entry] += before is not call and from_entry == entry
        seen: dict[str | int, list[Key]] = {}
        for call in calls:
            for argument, key in call.keys.items():
                seen.setdefault(argument, []).append(key)
        for call in calls:
            _choose(call, pairs[id(call)], handed, {a for a, keys in seen.items() if len(keys) > len(set(keys))})


def _choose(call: Call, pairs: list[Pair], handed: Counter[Pair], constant: set[str | int]) -> None:
    if not pairs:
        return

    def rank(pair: Pair) -> tuple[bool | int, ...]:
        argument, entry = pair
        customary = -CUSTOMARY.index(argument) if argument in CUSTOMARY else -len(CUSTOMARY)
        return handed[pair], call.left[entry] not in call.keys.values(), argument not in constant, customary

    argument, entry = call.pair = max(pairs, key=rank)
    call.form = Form.taking(argument, call.module.forward)
    if entry is not None:
        call.form = replace(call.form, kind=type(call.output), key=entry, size=len(call.output))
