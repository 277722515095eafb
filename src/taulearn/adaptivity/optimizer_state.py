"""Optimisers as callers give them: several, in wrappers, one inside another; and how they follow a change of the grid.

An optimiser's state follows where it is kept by parameter, as torch's own optimisers do in ``optimizer.state[p]``. What
does not fit the parameter entry by entry is dropped, for the optimiser to make anew, and the report says so. What is
kept in the order of the parameters somewhere else, as flat buffers are, cannot follow: such an optimiser is refused.
"""

import copy
import gc
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..nn.pruned_models import REPLACED

_KNOWN = {"state", "param_groups", "defaults"}
"""Attributes of every optimiser."""

LACKING = (
    "make it after wrap, from taulearn.parameter_groups(model, lr); or freeze them, "
    "model.time_steps.values.requires_grad_(False)"
)
"""The remedy where the only optimiser lacks the time steps."""

SESSIONS: WeakSet[Any] = WeakSet()
"""The sessions of ``taulearn.attach`` that are at work."""

PROJECTIONS: WeakSet[Any] = WeakSet()
"""The hooks of ``register_projection``, until they are removed."""


_PREPARING = frozenset(("accelerate", "lightning", "lightning_fabric", "pytorch_lightning", "transformers"))
"""Packages whose wrappers have a step of their own that does what is left to the loop."""


def has_session(model: nn.Module) -> bool:
    """Whether a session of ``taulearn.attach`` trains the model; one that nobody holds any more is none."""
    if any(part is each.steps for each in SESSIONS for part in model.modules()):
        gc.collect()  # a session and its optimiser hold each other
    return any(part is each.steps for each in SESSIONS for part in model.modules())


def bare(optimizer: Any) -> Any:
    """The optimiser itself, out of a wrapper that hands everything on to it, as those of accelerate and Lightning do.

    A wrapper with a step of its own, as Lookahead or SAM may be written, is an optimiser and stays.
    """
    while (inner := _handed_on_to(optimizer)) is not None:
        optimizer = inner
    return optimizer


def _handed_on_to(optimizer: Any) -> Any:
    """The optimiser to which a wrapper without groups, state and hooks of its own hands everything on, or None."""
    inner = getattr(optimizer, "optimizer", None)
    if inner is optimizer or not isinstance(inner, torch.optim.Optimizer):
        return None
    steps = [kind.__module__ for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    if steps and steps[0].partition(".")[0] not in _PREPARING:
        return None
    shown = all(getattr(optimizer, name, None) is getattr(inner, name) for name in ("param_groups", "state"))
    hooks = vars(optimizer).get("_optimizer_step_post_hooks")
    return inner if shown and (hooks is None or hooks is vars(inner).get("_optimizer_step_post_hooks")) else None


def optimizers_in(optimizer: Any) -> list[Any]:
    """The optimisers that ``prune`` was given, out of their wrappers."""
    if optimizer is None:
        return []
    if not isinstance(optimizer, list | tuple):
        return [bare(optimizer)]
    if not optimizer:
        raise ValueError("optimizer must be an optimiser or a list of them, got an empty list: leave it out")
    return [bare(each) for each in optimizer]


def with_inner(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Optimisers, and those that they keep in their attributes, each once."""
    found: list[Any] = []
    waiting = [bare(each) for each in optimizers]
    while waiting:
        each = waiting.pop(0)
        if all(each is not other for other in found):
            found.append(each)
            yield each
            kept = [value for name, value in vars(each).items() if name not in _KNOWN]
            waiting += [o for value in _leaves(kept) if isinstance(o := bare(value), torch.optim.Optimizer)]


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in nested lists, tuples, sets and dictionaries, keys included."""
    if isinstance(value, Mapping):
        yield from value
        value = value.values()
    elif not isinstance(value, list | tuple | set | frozenset | deque):
        yield value
        return
    for each in value:
        yield from _leaves(each)


def parameters_held(optimizers: Iterable[Any]) -> list[Tensor]:
    """All parameters that optimisers hold, and those inside them."""
    return [p for each in with_inner(optimizers) for group in each.param_groups for p in group["params"]]


def check_holds(optimizer: Any, model: nn.Module) -> None:
    """Refuse what is no optimiser, and one that does not hold the model's parameters as they are now."""
    if isinstance(optimizer, list | tuple):
        raise TypeError(
            f"optimizer must be one optimiser here, got a {type(optimizer).__name__} of {len(optimizer)}: make one "
            "with parameter groups, taulearn.parameter_groups(model, lr); or write the loop yourself, with "
            "taulearn.attach(model, [...]), which takes them all"
        )
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else repr(optimizer)
        name = optimizer.__name__ if isinstance(optimizer, type) else "torch.optim.SGD"
        raise TypeError(
            f"optimizer must be an optimiser of the model's parameters, got {given}: "
            f"write {name}(model.parameters(), lr=0.01)"
        )
    own, held = {id(p) for p in model.parameters()}, parameters_held([optimizer])
    check_current(held)
    if held and all(id(p) not in own for p in held):  # one that holds nothing has lost its layers
        raise ValueError(
            "optimizer must hold the model's parameters, got one that holds none of them: make it from this model, "
            "and hand it to every call of prune and refine"
        )


def check_current(held: Iterable[Tensor]) -> None:
    """Refuse time steps from before a change of the layers among the parameters of an optimiser."""
    if any(getattr(p, REPLACED, False) for p in held):
        raise ValueError(
            "optimizer must hold the model's time steps, got one that holds those from before layers came or went "
            "without it, so that tau would not train: make a new one from this model, and hand it to every call of "
            "prune and refine"
        )


def check_holds_steps(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: nn.Module, remedy: str = LACKING
) -> None:
    """Refuse optimisers that leave time steps that train as they are, as one made before ``wrap`` does."""
    values = getattr(getattr(model, "time_steps", None), "values", None)
    if not isinstance(values, nn.Parameter) or not values.requires_grad:
        return
    given = optimizers_in(optimizer)
    if all(p is not values for p in parameters_held(given)):
        got = "one that does not" if len(given) == 1 else f"{len(given)} that do not"
        raise ValueError(
            f"optimizer must hold the model's time steps, got {got}, so that tau would not train: {remedy}"
        )


@dataclass(frozen=True, eq=False)
class Change:
    """How a change of the grid changed the parameters of a model."""

    old: Tensor  # the time steps before
    new: Tensor  # the time steps after
    index: Tensor  # for each entry of ``new`` that of ``old`` that it continues; what is none: it is new
    before: Mapping[Any, str]  # the parameters before, with their names
    after: Mapping[Any, str]  # the parameters after, with their names
    kin: Mapping[Any, Any] = field(default_factory=dict)  # of new layers, each with the one whose groups it joins
    inherit: bool = False  # whether it takes that one's state, too

    def successor(self, parameter: Tensor) -> Tensor | None:
        """The parameter that replaces another one, or is that one still; None: it was deleted."""
        if parameter is self.old:
            return self.new
        return None if parameter in self.before and parameter not in self.after else parameter

    def touches(self, parameter: Tensor) -> bool:
        """Whether what is laid out as this parameter and others changes its layout."""
        return self.successor(parameter) is not parameter or any(parameter is each for each in self.kin.values())

    def entries(self, value: Any) -> Any:
        """State of the old time steps as that of the new ones; 0 for what is new."""
        if isinstance(value, Tensor):
            if value.shape == self.old.shape:
                return gathered(value, self.index)
            if value.numel() == 1:
                return value
        elif value is None or isinstance(value, Number | str):
            return value
        elif type(value) in (list, tuple):
            return type(value)(self.entries(each) for each in value)
        elif isinstance(value, dict):
            followed = copy.copy(value)
            followed.update({key: self.entries(each) for key, each in value.items()})
            return followed
        raise _Unlike


def gathered(value: Tensor, index: Tensor) -> Tensor:
    """The entries of a vector at an index; 0 where there is none.

    Example:
        >>> gathered(torch.tensor([3.0, 4.0]), torch.tensor([0, 0, -1, 1]))
        tensor([3., 3., 0., 4.])
    """
    index = index.to(value.device)
    there = (index >= 0) & (index < len(value))
    if bool(there.all()):
        return value[index]
    return torch.cat([value, value.new_zeros(1)])[index.where(there, len(value))]


class _Unlike(Exception):
    """State that does not have the shape of its parameter."""


def follow(optimizers: Sequence[Any], change: Change) -> list[str]:
    """Let optimisers, and those inside them, hold the parameters after a change of the grid, with their state."""
    said: list[str] = []
    seen: set[int] = set()  # wrappers share groups and state with what they wrap
    gone = {id(p) for p in change.before if change.successor(p) is not p}
    for optimizer in with_inner(optimizers):
        by_group = _sizes_by_group(optimizer.param_groups, change)
        for group in optimizer.param_groups:
            if id(group) not in seen:
                _follow_in_group(optimizer, group, change)
            seen.add(id(group))
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.state.clear()
            said.append("the optimiser keeps no state per parameter and was reset")
        if getattr(optimizer, "_numel_cache", None) is not None:
            optimizer._numel_cache = None
        for mapping in [getattr(optimizer, "state", {}), *_attributes_by_parameter(optimizer, change.before)]:
            if id(mapping) not in seen:
                said += _follow_in_state(mapping, change, by_group)
            seen.add(id(mapping))
        check_follows(optimizer, {**change.before, **change.after}, gone)
    return list(dict.fromkeys(said))


def _follow_in_group(optimizer: Any, group: dict[str, Any], change: Change) -> None:
    """Let a group hold what is left of its parameters, under the names that they have now."""
    followed = [(p, change.successor(p)) for p in group["params"]]
    left = [now for _, now in followed if now is not None]
    joining = [q for q, p in change.kin.items() if any(p is each for each in group["params"])]
    if (left or joining) and any(change.touches(p) for p in group["params"]):
        options = [value for key, value in group.items() if key not in ("params", "param_names")]
        like_steps = any(isinstance(each, Tensor) and each.shape == change.old.shape for each in _leaves(options))
        if like_steps or _is_of_several(options, [[p.numel() for p, _ in followed]]):
            raise _cannot_follow(optimizer, "the options of a parameter group")
    names = None
    if "param_names" in group:  # of an optimiser made from named parameters: layers have new numbers
        names = [
            change.after[now] if name == change.before.get(p) else name
            for (p, now), name in zip(followed, group["param_names"], strict=True)
            if now is not None
        ]
        group["param_names"] = names
    places = {p: i for i, p in enumerate(change.after)}
    for q in joining:  # behind all that come before it in the model
        at = 1 + max((i for i, p in enumerate(left) if places.get(p, len(places)) < places[q]), default=-1)
        left.insert(at, q)
        if names is not None:
            names.insert(at, change.after[q])
    group["params"][:] = left


def _sizes_by_group(groups: Sequence[Mapping[str, Any]], change: Change) -> list[list[int]]:
    """Numbers of entries of the parameters of each group that the change touches, and of those of all groups."""
    changed = [group["params"] for group in groups if any(map(change.touches, group["params"]))]
    if changed:
        changed.append([p for group in groups for p in group["params"]])
    return [[p.numel() for p in parameters] for parameters in changed]


def _is_of_several(value: Any, by_group: Sequence[Sequence[int]], own: torch.Size | None = None) -> bool:
    """Whether something in a value is laid out as all parameters of a group: one flat vector, or a list of tensors.

    A tensor of the shape ``own`` is that of one parameter, whatever its size.
    """
    several = [sizes for sizes in by_group if len(sizes) > 1]
    if isinstance(value, Tensor):
        return value.ndim == 1 and value.shape != own and any(value.numel() == sum(sizes) for sizes in several)
    if isinstance(value, list | tuple) and all(isinstance(each, Tensor) for each in value):
        return [each.numel() for each in value] in several or any(_is_of_several(t, several, own) for t in value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_is_of_several(each, several, own) for each in parts)


def _follow_in_state(state: MutableMapping[Any, Any], change: Change, by_group: Sequence[Sequence[int]]) -> list[str]:
    """Let a dictionary by parameter follow; returns what was reset, in words."""
    said: list[str] = []
    followed: dict[Any, Any] = {}  # under new keys, which may be old ones of others
    for key in list(state):
        value, parameter = state[key], _parameter_of_key(key, change.before, change.old)
        if parameter is None:
            # a name of the optimiser's own: tensors under it are those of no single parameter
            if not isinstance(key, Tensor) and any(isinstance(t, Tensor) and t.numel() > 1 for t in _leaves(value)):
                state.pop(key)
                said.append(f"the optimiser's state {key!r}, which is that of no single parameter, was reset")
        elif _is_of_several(value, by_group, parameter.shape):
            state.pop(key)
            said.append("the optimiser's state of several parameters together was reset")
        elif (successor := change.successor(parameter)) is None:
            state.pop(key)
        elif parameter is change.old:
            state.pop(key)
            try:
                followed[_key_like(key, successor, change.after)] = change.entries(value)
            except _Unlike:
                said.append("the optimiser's state of the time steps, which does not have their shape, was reset")
        else:
            for q in (q for q, p in change.kin.items() if change.inherit and p is parameter):
                followed[_key_like(key, q, change.after)] = copy.deepcopy(value)
            if isinstance(key, str) and change.after[parameter] != key:  # its layer has another number now
                followed[change.after[parameter]] = state.pop(key)
    for key, value in followed.items():
        state[key] = value
    return said


def _parameter_of_key(key: Any, named: Mapping[Any, str], steps: Tensor | None = None) -> Tensor | None:
    """The parameter that an optimiser means by a key: the parameter itself, its id or its name; None: none of them."""
    if isinstance(key, Tensor):
        return key if key is steps or key in named else None
    if isinstance(key, bool) or not isinstance(key, int | str):
        return None
    return next((p for p, name in named.items() if key in (id(p), name)), None)


def _key_like(key: Any, parameter: Tensor, named: Mapping[Any, str]) -> Any:
    """The key of a parameter, of the same kind as another one."""
    if isinstance(key, Tensor):
        return parameter
    return id(parameter) if isinstance(key, int) else named[parameter]


def _attributes_by_parameter(optimizer: Any, named: Mapping[Any, str]) -> list[MutableMapping[Any, Any]]:
    """Dictionaries other than the state whose keys are parameters, their ids or their names."""
    return [
        value
        for name, value in vars(optimizer).items()
        if name not in _KNOWN
        and isinstance(value, dict)
        and any(_parameter_of_key(key, named) is not None for key in value)
    ]


def check_follows(
    optimizer: Any, named: Mapping[Any, str], gone: Collection[int], *, by_parameter: bool = True
) -> None:
    """Refuse an optimiser that keeps something of its parameters neither in its groups nor by parameter."""
    lists = [group["params"] for group in optimizer.param_groups]
    held = {id(p) for each in lists for p in each} | {id(p) for p in named}
    allowed = _attributes_by_parameter(optimizer, named) if by_parameter else []
    for name, value in vars(optimizer).items():
        if name not in _KNOWN and all(value is not each for each in (*lists, *allowed)):
            tensors = [each for leaf in _leaves(value) for each in _inside(leaf) if isinstance(each, Tensor)]
            if any(id(each) in gone or (each.numel() > 1 and id(each) not in held) for each in tensors):
                raise _cannot_follow(optimizer, f"its attribute {name!r}")


def _inside(value: Any) -> Iterator[Any]:
    """The contents of an optimiser's object, such as an average of the weights; modules and functions are others'."""
    others = (nn.Module, torch.optim.Optimizer, type)
    if hasattr(value, "__dict__") and not isinstance(value, (Tensor, *others)) and not callable(value):
        yield from _leaves(vars(value))
    else:
        yield value


def _cannot_follow(optimizer: Any, place: str) -> ValueError:
    return ValueError(
        f"optimizer must keep its state by parameter, optimizer.state[p], got {type(optimizer).__name__} with "
        f"tensors in {place}, which cannot follow a change of the layers: go without it, optimizer=None, and make a "
        "new one"
    )
