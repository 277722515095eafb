"""The way of the states from block to block, seen in a forward pass in which every block returns its input.

With all steps at 0 the state must come out of each block, and out of whatever the host does with it, as it went in.
Where the host itself adds the output to the input, ``x = x + f(x)``, it would get x + x: f is a branch, not a block. To
see that, every operator of the pass is looked at: one that brings together what a module left and what was there before
it, and makes something else of them than that, shows a residual sum (or a gate) in the host. Parameters that are
constant have noise in their place: gates of zero would hide it. A module that adds something to its input itself is a
block all the same: what the host adds to it are skips across blocks, or sums of states.

Two tensors are on one path where one was made from the other by operators that keep the number of elements.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._calls import call as call_model, forwards
from .._undisturbed import undisturbed
from .observation import noise_for, put_noise
from .probe import Call

OUTSIDE = (
    "the model itself adds its output to its input, x + f(x), so that a step of 0 would give x + x: write the sum into "
    "the module, and wrap that"
)

_TOLERANCE = 1e-3
_FUSED = ("_transformer_encoder_layer_fwd",)
_SUMS = ("add", "add_", "sub", "sub_", "rsub", *_FUSED)
_SCALINGS = ("mul", "mul_", "div", "div_")
_PASSING = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "slice"),
    *("clone", "contiguous", "alias", "detach", "_to_copy", "native_dropout"),
    *("relu", "relu_", "gelu", "silu", "silu_", "elu", "leaky_relu", "hardswish", "tanh", "sigmoid"),
    *("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "native_group_norm"),
    *("batch_norm", "layer_norm", "group_norm", "_fused_rms_norm"),
)
"""Operators whose result still holds what was added to their first argument."""


@dataclass(frozen=True)
class StatePath:
    """The result of the pass: sets of modules, by their positions."""

    outside: frozenset[int]  # those whose output the host combines with their input, which they do not themselves
    adding: frozenset[int]  # those that add something to their input
    chains: tuple[frozenset[int], ...]  # sets of those that hand a state from one to the next


def follow_states(host: nn.Module, calls: Sequence[Call], inputs: Any) -> StatePath | None:
    """Run the host with every step at 0 and follow the states."""
    for noise in (noise_for(host), {}):
        watch = _Watch()
        passing = {call.module: watch.passing(l, call) for l, call in enumerate(calls)}
        try:
            with undisturbed(host, inputs), forwards(passing):
                put_noise(host, noise)
                with watch:
                    call_model(host, inputs)
        # hosts may raise anything where their blocks do nothing
        except Exception:  # noqa: BLE001
            continue
        outside = frozenset(watch.outside | watch.repeated()) - watch.adding
        return StatePath(outside, frozenset(watch.adding), _chains(len(calls), watch.links))
    return None


class _Watch(TorchDispatchMode):
    """Looks at all operators of a pass, and follows the states through them.

    Each tensor has a number; one that is changed in place gets another. Its path are the numbers of the tensors that it
    was made from by the host's operators that keep the number of elements, its own among them. A module begins a new
    path; the history of a tensor goes on behind the modules.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # the answers, by position of the module
        self.outside: set[int] = set()
        self.adding: set[int] = set()
        self.links: set[tuple[int, int]] = set()
        self.branches: list[frozenset[int]] = []
        # by number of the tensor; the tensors are kept alive, so that identities are not used again
        self.number: dict[int, int] = {}
        self.values: list[Tensor] = []
        self.paths: list[frozenset[int]] = []
        self.histories: list[frozenset[int]] = []
        # by position of the module: number of the state that it left, path and history of the one that it got
        self.left: dict[int, int] = {}
        self.path_before: dict[int, frozenset[int]] = {}
        self.history_before: dict[int, frozenset[int]] = {}
        self.inside: _Inside | None = None  # the module that runs
        self.resting = False

    def passing(self, l: int, call: Call) -> Callable[..., Any]:
        """The forward of a module at tau = 0."""
        forward = call.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            x = call.form.arriving(args, kwargs)
            assert x is not None
            came = self._number(x)
            self.path_before[l], self.history_before[l] = self.paths[came], self.histories[came]
            self.links |= {(m, l) for m, state in self.left.items() if state in self.path_before[l]}
            self.inside = _Inside(x)
            output = forward(*args, **kwargs)
            y, inside = call.form.leaving(output), self.inside
            self.inside = None
            assert y is not None
            if id(y) in inside.sums:
                self.adding.add(l)
            self.resting = True
            state = x.to(y.dtype, copy=True)
            self.resting = False
            self.left[l] = self._add(state, frozenset(), self.history_before[l])
            return call.form.replaced(output, state)

        return run

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and look at what it brings together."""
        kwargs = kwargs or {}
        if self.resting:
            return func(*args, **kwargs)
        came = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if self.inside is not None:
            result = func(*args, **kwargs)
            self.inside.look(func._schema.name.rpartition("::")[2], came, result)
            return result
        numbers = [self._number(each) for each in came]
        for each, argument in zip(args, func._schema.arguments, strict=False):
            if isinstance(each, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                self.values[self._number(each)] = each.clone()
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._look(made, [n for n in numbers if self.values[n].numel() == made.numel()], func)
        return result

    def _look(self, made: Tensor, numbers: list[int], func: Any) -> None:
        """Look at a tensor that the host made from others with as many elements."""
        self.outside |= self._brought_together(made, numbers, self.paths, self.path_before)
        branch = self._brought_together(made, numbers, self.histories, self.history_before)
        if branch:
            self.branches.append(branch)
        handed_on = self.number.get(id(made)) in numbers and not func._schema.is_mutable
        if numbers and not handed_on:
            self._add(made, *(frozenset[int]().union(*(of[n] for n in numbers)) for of in (self.paths, self.histories)))

    def _brought_together(
        self, made: Tensor, numbers: list[int], paths: Sequence[frozenset[int]], before: Mapping[int, frozenset[int]]
    ) -> frozenset[int]:
        """The modules whose output was brought together with what was there before them, and became something else."""
        found = set[int]()
        for l, state in self.left.items():
            after = [n for n in numbers if state in paths[n]]
            beside = [paths[n] & before[l] for n in numbers if state not in paths[n]]
            shared = frozenset[int]().union(*beside)
            if after and shared and not any(_same(made, self.values[n]) for n in shared):
                found.add(l)
        return frozenset(found)

    def repeated(self) -> set[int]:
        """The modules in branches of several, x + g(f(x)), if there are several such sums.

        A single one may be a skip across all blocks.
        """
        return {l for each in self.branches if any(not each & other for other in self.branches) for l in each}

    def _number(self, tensor: Tensor) -> int:
        """The number of a tensor as it is now."""
        if id(tensor) not in self.number:
            self._add(tensor, frozenset(), frozenset())
        return self.number[id(tensor)]

    def _add(self, tensor: Tensor, path: frozenset[int], history: frozenset[int]) -> int:
        """Give a tensor a new number."""
        number = self.number[id(tensor)] = len(self.values)
        self.values.append(tensor)
        self.paths.append(path | {number})
        self.histories.append(history | {number})
        return number


class _Inside:
    """Looks at the operators in a module: which tensors are its state plus something made from the state?"""

    def __init__(self, x: Tensor) -> None:
        self.kept = [x]  # so that identities are not used again
        self.made = {id(x)}  # from the state, in whatever way
        self.states = {id(x)}  # the state, or a sum with it in it, perhaps scaled, normalised or activated
        self.sums = set[int]()  # those that are a sum

    def look(self, name: str, came: list[Tensor], result: Any) -> None:
        """Look at an operator."""
        result = next((each for each in tree_leaves(result) if isinstance(each, Tensor)), None)
        if result is None:
            return
        self.kept.append(result)
        ours = [each for each in came if id(each) in self.made]
        by_a_number = name in _SCALINGS and sum(each.numel() > 1 for each in came) == 1
        # arguments in which the result still holds the state
        held = ours if name in _SUMS else came[:1] if name in _PASSING or by_a_number else []
        held = [each for each in held if id(each) in self.states and each.numel() == result.numel()]
        if ours:
            self.made.add(id(result))
        if held:
            self.states.add(id(result))
        if held and (len(ours) > 1 or name in _FUSED or any(id(each) in self.sums for each in held)):
            self.sums.add(id(result))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.is_complex() != b.is_complex():
        return False
    tolerance = min(_TOLERANCE, 20 * torch.finfo(a.dtype).eps) if a.is_floating_point() else _TOLERANCE
    a, b = ((torch.view_as_real(each) if each.is_complex() else each).double() for each in (a, b))
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * float(b.abs().nan_to_num().amax()), equal_nan=True)


def _chains(number: int, links: set[tuple[int, int]]) -> tuple[frozenset[int], ...]:
    """The connected sets."""
    chains = [frozenset({l}) for l in range(number)]
    for link in links:
        joined = [chain for chain in chains if chain & set(link)]
        chains = [chain for chain in chains if chain not in joined] + [frozenset().union(*joined)]
    return tuple(chains)
