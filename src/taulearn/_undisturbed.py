"""Forward passes of a user's model that leave nothing behind.

Models change when they are called: buffers count, attention is switched to another kind, weights are rescaled in place,
caches grow. Attributes are compared with what they were. Values are copied when they are about to be written and not
before, so that a model which is left alone costs no memory: a dispatch mode looks at each operator that writes.
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import cache
from operator import is_
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

_SIMPLE = {bool, int, float, str, bytes, type(None), torch.dtype, torch.device}


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode, and back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(model: nn.Module, inputs: Any = None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is as it was, also after an error.

    Put back are: attributes of all modules, with the dictionaries, lists, sets, namespaces and dataclasses in them,
    and so modules that were replaced or taken out; values, memory and ``requires_grad`` of parameters, buffers and
    other tensors in attributes; generators of torch, of numpy, of ``random``, and those in attributes. Out of reach are
    other objects' own state, globals, and writes past torch's operators (by numpy in a tensor's memory). Parameters
    that the first call makes (lazy modules) stay made.
    """
    with Before(model, inputs).kept():
        yield


class Contents:
    """The present contents of the containers reached from some objects, to be put back into the same containers."""

    def __init__(self, objects: Iterable[Any]) -> None:
        objects = [*objects]
        self.units: list[Any] = [each for each in objects if hasattr(each, "reshard")]
        self._reshard()
        self.containers: list[tuple[Any, Any]] = []
        self.others: list[Any] = []  # tensors and generators, which are left as they are
        seen: dict[int, Any] = {}
        waiting = [*objects]
        while waiting:
            each = waiting.pop()
            if id(each) in seen or type(each) in _SIMPLE:
                continue
            seen[id(each)] = each
            if isinstance(each, Tensor | torch.Generator):
                self.others.append(each)
            elif isinstance(each, tuple):
                waiting.extend(each)
            elif (container := _contents(each)) is not None:
                self.containers.append((container, dict(container) if isinstance(container, dict) else [*container]))
                waiting.extend(container.values() if isinstance(container, dict) else container)

    def put_back(self) -> None:
        """Let every container hold what it held, in its order; one in which nothing changed is not touched."""
        self._reshard()
        for container, content in self.containers:
            now, then = ([*each, *(each.values() if isinstance(each, dict) else ())] for each in (container, content))
            if len(now) != len(then) or not all(map(is_, now, then)):
                container.clear()
                container.extend(content) if isinstance(container, list | deque) else container.update(content)

    def _reshard(self) -> None:
        """Let sharded modules hold their shards, whose places gathered parameters take in passes."""
        for unit in self.units:
            unit.reshard()


class Before:
    """All containers, tensors and generators of a model as they are now, to be put back after one or several passes."""

    def __init__(self, model: nn.Module, inputs: Any = None) -> None:
        self.model = model
        self.devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self.modes = [(module, module.training) for module in model.modules()]
        # of scripted modules the tensors lie in no attribute
        of_inputs = inputs.values() if isinstance(inputs, Mapping) else ()
        self.contents = Contents([model, inputs, *model.modules(), *model.parameters(), *model.buffers(), *of_inputs])
        tensors = [each for each in self.contents.others if isinstance(each, Tensor) and not is_lazy(each)]
        self.tensors = [(each, each.detach(), each.requires_grad) for each in tensors]
        generators = [each for each in self.contents.others if isinstance(each, torch.Generator)]
        self.generators = [(each, each.get_state()) for each in generators]
        self.watched = {_key(tensor): tensor for tensor in tensors}

    @contextmanager
    def kept(self, written: Collection[Hashable] | None = None) -> Iterator[Collection[Hashable]]:
        """See :func:`undisturbed`."""
        values = _KeepValues(self.watched)
        for key in written or ():
            values.keep(self.watched[key])
        of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  what hosts use
        try:
            with torch.no_grad(), torch.random.fork_rng(self.devices), values if written is None else nullcontext():
                torch.manual_seed(0)
                self.model.eval()
                yield values.undo
        finally:
            values.restore()
            self._restore()
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002

    def _restore(self) -> None:
        self.contents.put_back()
        for module, training in self.modes:
            module.training = training
        for generator, state in self.generators:
            generator.set_state(state)
        for tensor, alias, flag in self.tensors:
            if _memory(tensor) != _memory(alias):  # it was given other memory, tensor.data = ...
                tensor.data = alias
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)


def _contents(each: object) -> Any:
    """The container of what an object holds, or None where it is none of those that are put back."""
    if isinstance(each, nn.Module):
        lazy = any(p is not None and is_lazy(p) for p in (*each._parameters.values(), *each._buffers.values()))
        return each._modules if lazy else vars(each)
    if isinstance(each, SimpleNamespace) or (is_dataclass(each) and not isinstance(each, type)):
        return vars(each) if hasattr(each, "__dict__") else None
    return each if isinstance(each, dict | list | set | deque) else None


def _key(tensor: Tensor) -> Hashable:
    """A key of a tensor's memory, the same for all views of it."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse tensors, tensors made of several
        return "itself", id(tensor)


def _memory(tensor: Tensor) -> Hashable:
    """Where a tensor's entries lie."""
    if tensor.layout is not torch.strided or isinstance(_key(tensor), tuple):
        return None
    return _key(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


class _KeepValues(TorchDispatchMode):
    """Copies the memory of tensors when an operator is about to write into it."""

    supports_higher_order_operators = True

    def __init__(self, watched: Mapping[Hashable, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.undo: dict[Hashable, Callable[[], object]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, name in _written(func):
            value = args[position] if position < len(args) else kwargs.get(name)
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Tensor):
                    self.keep(each)
        return func(*args, **kwargs)

    def keep(self, tensor: Tensor) -> None:
        """Copy the memory of a tensor, if it is the model's."""
        key = _key(tensor)
        if key not in self.watched or key in self.undo:
            return
        if isinstance(key, tuple):
            copy = tensor.detach().clone()
            self.undo[key] = lambda: tensor.copy_(copy)
            return
        storage = tensor.untyped_storage()
        number = storage.nbytes()
        entries = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (number,), (1,)).clone()
        self.undo[key] = lambda: (
            torch.empty(0, dtype=torch.uint8, device=entries.device).set_(storage, 0, (number,), (1,)).copy_(entries)
        )

    @torch.no_grad()
    def restore(self) -> None:
        for undo in self.undo.values():
            undo()


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes into."""
    if not isinstance(func, torch._ops.OpOverload):
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        # batch normalisation does not say that it writes its statistics
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in ("running_mean", "running_var")
    )
