"""The tensors in the output of a host, and those with which its modules are called, compared between two passes.

Constant parameters have noise in their place meanwhile: gates and heads that are zero at the start, and normalisations
that scale by one, would hide what a host does with its modules.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .._calls import call, forwards

_TOLERANCE = 0.03


@torch.no_grad()
def noise_for(host: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Values in place of constant parameters: of their size and sign, but such that none is small or like another."""
    generator = torch.Generator().manual_seed(0)
    noise: dict[nn.Parameter, Tensor] = {}
    for parameter in host.parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or not _constant(parameter):
            continue
        value, shape = float(parameter.flatten()[0]), parameter.shape
        drawn = torch.rand(shape, generator=generator)
        if abs(value) > 0.1:
            drawn = value * (0.5 + drawn)
        elif parameter.ndim < 2:
            drawn = 0.1 + 0.4 * drawn
        else:
            drawn = (2.0 * drawn - 1.0) * (3.0 * shape[0] / parameter.numel()) ** 0.5
        noise[parameter] = drawn.to(parameter)
    return noise


def put_noise(host: nn.Module, noise: Mapping[nn.Parameter, Tensor]) -> None:
    """Let a host have noise in place of parameters, until its modules' dictionaries are put back."""
    # copies, as the host may write into them
    others = {p: nn.Parameter(each.clone(), requires_grad=p.requires_grad) for p, each in noise.items()}
    for module in host.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in others:
                module._parameters[name] = others[parameter]


def _constant(values: Tensor) -> bool:
    if values.is_meta or values.numel() == 0:
        return False
    flat = values.flatten()
    return bool((flat[:8] == flat[0]).all()) and bool((flat == flat[0]).all()) and bool(torch.isfinite(flat[0]))


@dataclass
class Observation:
    """One forward pass."""

    output: dict[str, Tensor] = field(default_factory=dict)  # all tensors in the output, by their place in it
    calls: dict[nn.Module, list[dict[str, Tensor]]] = field(default_factory=dict)  # tensors among their arguments


def observe(host: nn.Module, inputs: Any, watched: Collection[nn.Module], memories: Collection[str]) -> Observation:
    """Run a host and keep what is seen.

    After each watched module random numbers are drawn from the start again, so that they do not depend on which modules
    were called before.
    """
    seen = Observation()
    devices = sorted({p.device.index or 0 for p in host.parameters() if p.device.type == "cuda"})
    generators = [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def copy(tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.clone()
        key = (id(tensor), tensor._version)
        if key not in copies:
            copies[key] = tensor, tensor.detach().clone()  # the tensor too, so that its identity is not used again
        return copies[key][1]

    def watching(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = [(str(i), each) for i, each in enumerate(args)] + [*kwargs.items()]
            tensors = {name: copy(each) for name, each in arguments if isinstance(each, Tensor)}
            seen.calls.setdefault(module, []).append(tensors)
            output = forward(*args, **kwargs)
            for generator in generators:
                generator.manual_seed(0)
            return output

        return run

    with forwards({module: watching(module) for module in watched}):
        output = call(host, inputs)
    seen.output = {place: each.detach().clone() for place, each in tensors_in(output, memories)}
    return seen


def tensors_in(value: Any, memories: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """All tensors (and arrays of numpy) in a value: in containers, registered pytrees and attributes of objects."""
    yield from _walk(value, "", memories, frozenset(), set())


def _walk(
    value: Any, place: str, memories: Collection[str], around: frozenset[int], objects: set[int]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fciub":
        yield place, torch.from_numpy(np.ascontiguousarray(value))
    elif id(value) not in around:  # else a cycle
        for name, text, inner in _held(value, objects):
            if name not in memories or isinstance(inner, Tensor):
                yield from _walk(inner, place + text, memories, around | {id(value)}, objects)


def _held(value: Any, objects: set[int]) -> Iterator[tuple[Any, str, Any]]:
    """The entries and attributes of a value: name, name as written in code, and the thing itself."""
    if isinstance(value, str | bytes | int | float | complex | type | nn.Module | ModuleType | None):
        return
    if isinstance(value, Mapping):
        yield from ((key, f"[{key!r}]", value[key]) for key in value)
    elif isinstance(value, tuple | list):
        yield from ((None, f"[{i}]", each) for i, each in enumerate(value))
    else:
        children, _ = _pytree.tree_flatten(value, is_leaf=lambda each: each is not value)
        if len(children) != 1 or children[0] is not value:
            yield from ((None, f"[{i}]", each) for i, each in enumerate(children))
            return
    if type(value) in (dict, tuple, list) or callable(value) or id(value) in objects:
        return
    objects.add(id(value))  # once is enough: they may refer to each other
    names = dict.fromkeys(getattr(value, "__dict__", ()))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names |= dict.fromkeys([slots] if isinstance(slots, str) else slots)
    for name in names:
        if not name.startswith("__") and hasattr(value, name):
            yield name, f".{name}", getattr(value, name)


def difference(expected: Observation, found: Observation, without: Collection[nn.Module] = ()) -> str | None:
    """The first difference between two passes of a host, or None where there is none.

    A module that is called several times may be called less often: between two blocks, say, of which one is gone.
    """
    missing = expected.output.keys() ^ found.output.keys()
    if missing:
        number = f"{len(found.output)} tensors for {len(expected.output)}"
        return f"gives another output ({number}, such as output{min(missing)})"
    for place in expected.output:
        if not _close(found.output[place], expected.output[place]):
            return f"gives another output{place}"
    for module in {**expected.calls, **found.calls}:
        if module in without:
            continue
        now, rest = found.calls.get(module, []), iter(expected.calls.get(module, []))
        if not now or not all(any(_same(each, other) for other in rest) for each in now):
            return f"calls a {type(module).__name__} {'with something else' if now else 'no more'}"
    return None


def answers(bare: Observation, changed: Observation, blocks: Collection[nn.Module]) -> bool:
    """Whether the output, or where it holds no floating-point tensor what modules are called with, is another."""
    if any(each.is_floating_point() or each.is_complex() for each in bare.output.values()):
        return difference(Observation(bare.output), Observation(changed.output)) is not None
    return difference(bare, changed, blocks) is not None


def finite(seen: Observation) -> bool:
    """Whether all numbers in the output are finite."""
    return all(bool(torch.isfinite(_dense(each)).all()) for each in seen.output.values())


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_close(a[name], b[name]) for name in a)


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_nested:
        tensor = torch.nested.to_padded_tensor(tensor, 0.0)
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, measured by each entry and by what is usual among them (not by masks of -1e9)."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.is_nested != b.is_nested:
        return False
    a, b = _dense(a), _dense(b)
    if a.shape != b.shape or a.device != b.device:
        return False
    if a.is_meta or torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    size = b.abs()[torch.isfinite(b) & (b != 0)].float()
    tolerance = min(1e3 * torch.finfo(a.dtype).eps, _TOLERANCE)
    usual = float(size.median()) if size.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * usual, equal_nan=True)
