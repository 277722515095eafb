"""A network as a recipe, and back: {"builder": name, "keywords": its arguments}, whose values may be recipes again.

A network from a builder is its call (``resnet``, ``resnet_v2``, ..); one put together by hand of this package's parts
is the call of TimeVariableNetwork. Its scheme and steps stand beside the recipe, in the manifest. Whether a recipe
gives the network is not taken on trust: it is followed and compared, before it is written. So a network that was
changed after it was built is never saved as if it had not been.

Builders are looked up by name in the tables here; nothing that a file names is ever imported. They build on torch's
meta device, which allocates nothing, so that a manifest can be compared with the tensors that came along before any
memory is spent on it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import unknown_name
from ..depth.truncate import cut
from ..nn.activations import activation_names, make_activation
from ..nn.builders import FlattenInput, FullyConnected, densenet, feedforward, fractional_dnn, resnet
from ..nn.convolutional import ConvolutionalStem, PointwiseSkip, PooledHead, PreActivationBlock, resnet_v2
from ..nn.network import TimeVariableNetwork
from ..nn.schemes import SCHEMES, Residual
from ..nn.skips import ComposedSkips, IdentitySkips, Pad, PadSkips
from ..nn.time_steps import TimeSteps
from .manifest import COUNT, LAYERS, OPTIONS, check, short

_PARTS: dict[type[nn.Module], dict[str, str]] = {
    nn.Identity: {},
    nn.Linear: {"in_features": "in_features", "out_features": "out_features", "bias": "bias"},
    FlattenInput: {"in_features": "in_features"},
    FullyConnected: {
        "in_features": "linear.in_features",
        "out_features": "linear.out_features",
        "activation": "activation",
    },
    ConvolutionalStem: {
        "in_channels": "convolution.in_channels",
        "channels": "convolution.out_channels",
        "stride": "convolution.stride",
    },
    PreActivationBlock: {
        "in_channels": "convolution_1.in_channels",
        "out_channels": "convolution_1.out_channels",
        "stride": "convolution_1.stride",
        "activation": "activation_1",
    },
    PooledHead: {"channels": "norm.num_features", "num_classes": "linear.out_features", "activation": "activation"},
    PointwiseSkip: {
        "in_channels": "convolution.in_channels",
        "out_channels": "convolution.out_channels",
        "stride": "stride",
    },
    Pad: {"width": "width"},
    IdentitySkips: {"num_steps": "num_steps", "from_input": "from_input"},
    PadSkips: {"widths": "widths", "from_input": "from_input"},
    ComposedSkips: {"maps": "maps", "from_input": "from_input"},
    nn.Sequential: {"parts": ""},
    TimeVariableNetwork: {"layers": "layers", "head": "head", "skips": "skips", "stem": "stem"},
}
"""The arguments of each part, and where it keeps them."""


def _assembled(layers: Sequence[nn.Module], head: nn.Module, skips: Any, stem: nn.Module) -> TimeVariableNetwork:
    steps = TimeSteps(len(layers), device="meta")
    return TimeVariableNetwork(layers, head, Residual(), steps, skips, stem=stem)


_FULLY_CONNECTED = ("in_features", "width", "out_features", "hidden_layers", "activation", "skips")
_CONVOLUTIONAL = ("blocks_per_stage", "num_classes", "in_channels", "widths", "activation", "stem_stride")
_BUILDERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    **{part.__name__: (part, tuple(paths)) for part, paths in _PARTS.items()},
    **{each.__name__: (each, _FULLY_CONNECTED) for each in (feedforward, resnet, densenet, fractional_dnn)},
    "resnet_v2": (resnet_v2, _CONVOLUTIONAL),
    "Sequential": (lambda parts: nn.Sequential(*parts), ("parts",)),
    "TimeVariableNetwork": (_assembled, tuple(_PARTS[TimeVariableNetwork])),
}
_RECIPE = {"builder": str, "keywords": dict}
_SHAPES: dict[str, Any] = {
    "activation": (str, OPTIONS),
    "bias": bool,
    "from_input": bool,
    "hidden_layers": LAYERS,
    "blocks_per_stage": [LAYERS, ...],
    "width": (COUNT, [COUNT, ...]),
    "widths": (COUNT, [COUNT, ...]),
    "layers": [_RECIPE, ...],
    "parts": [_RECIPE, ...],
    "maps": [_RECIPE, ...],
    "head": _RECIPE,
    "stem": _RECIPE,
    "skips": (frozenset(("pad", "learned")), _RECIPE),
}
"""The JSON values of arguments that are not counts."""


class NoRecipe(Exception):
    """A part that there are no words for."""


def recipes(network: nn.Module) -> Iterator[dict[str, Any]]:
    """Recipes that might give this network: that of its builder, and that of its parts.

    Raises:
        NoRecipe: Where a part has none.
    """
    noted = getattr(network, "recipe", None)
    if noted is not None:
        keywords = {key: _word(key, key, value) for key, value in noted["keywords"].items()}
        yield {"builder": noted["builder"], "keywords": keywords}
    yield _recipe("", network)


def build(manifest: Mapping[str, Any]) -> TimeVariableNetwork:
    """The network of a manifest, whose tensors have shape and type but no content.

    Raises:
        ValueError: If a name is unknown, or arguments do not fit each other.
    """
    saved, steps, dtype = manifest["model"], manifest["time_steps"], getattr(torch, manifest["model"]["dtype"])
    origin, number = steps["origin"], len(steps["origin"])
    if any(a >= b for a, b in pairwise(origin)):
        raise ValueError(f"time_steps.origin must increase, got {short(origin)}")
    scheme = _named("scheme", manifest["scheme"], {name: cls() for name, cls in SCHEMES.items()})
    if (found := describe_scheme(scheme)) != manifest["scheme"]:
        raise ValueError(f"scheme must have options {sorted(found['options'])}, got {manifest['scheme']['options']}")
    start = max(steps["horizon"] / number, steps["lower_bound"] or 0.0)
    options = {key: steps[key] for key in ("constraint", "horizon", "lower_bound")}
    time_steps = TimeSteps(number, **options, init=start, dtype=dtype, device="meta")
    time_steps.origin = tuple(origin)
    try:
        network = _make("model", {key: saved[key] for key in _RECIPE})
        if type(network) is not TimeVariableNetwork:
            raise ValueError(f"model must be a network, got a {saved['builder']}")
        if network.recipe is not None:
            _delete(network, origin)
        if len(network.layers) != number:
            raise ValueError(f"time_steps must have one step per layer, got {number} for {len(network.layers)} layers")
        network.scheme, network.time_steps = scheme, time_steps
        return network.to(dtype)
    except (ArithmeticError, AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"model cannot be built: {error}") from error


def describe_scheme(scheme: nn.Module) -> dict[str, Any]:
    """The name of a scheme and its arguments; any other than this package's by the name of its class."""
    name = next((name for name, cls in SCHEMES.items() if type(scheme) is cls), None)
    return {"name": name or class_name(scheme), "options": _arguments(scheme) if name else {}}


def other_modules(expected: nn.Module, found: nn.Module) -> list[str]:
    """How the modules of two models differ: in names, classes and arguments."""
    there, here = (dict(each.named_modules(remove_duplicate=False)) for each in (expected, found))
    lines = [f"{name} is missing" for name in there if name not in here]
    for name, module in here.items():
        if name not in there:
            lines.append(f"{name} is unexpected")
        elif type(module) is not type(there[name]):
            lines.append(f"{name or 'the model'} must be a {class_name(there[name])}, got a {class_name(module)}")
        else:
            wanted, given = _arguments(there[name]), _arguments(module)
            for key in dict.fromkeys([*wanted, *given]):
                if (a := wanted.get(key)) != (b := given.get(key)):
                    lines.append(f"{name}.{key} must be {short(a)}, got {short(b)}")
    return lines


def other_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """How two state dicts, perhaps on the meta device, differ in names, shapes and types.

    Example:
        >>> other_tensors({"a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(1)})
        ['a must be float32 (2,), got float32 (3,)', 'b is unexpected']
    """
    lines = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            lines.append(f"{name} is unexpected")
        elif (there := _look(expected[name])) != (here := _look(tensor)):
            lines.append(f"{name} must be {there}, got {here}")
    return lines


def class_name(module: nn.Module) -> str:
    """The name of a module's class, for messages."""
    return type(module).__qualname__


def _recipe(where: str, part: nn.Module) -> dict[str, Any]:
    """The call that makes a part."""
    paths = _PARTS.get(type(part))
    if paths is None:
        raise NoRecipe(f"{where or 'the model'} is a {class_name(part)}")
    try:
        values = {key: attrgetter(path)(part) if path else list(part) for key, path in paths.items()}  # type: ignore[call-overload]
    except AttributeError as error:
        raise NoRecipe(f"{where} was changed: {error}") from error
    keywords = {key: _word(f"{where}.{key}" if where else key, key, value) for key, value in values.items()}
    return {"builder": type(part).__name__, "keywords": keywords}


def _word(where: str, key: str, value: Any) -> Any:
    """The JSON value of an argument."""
    if key == "activation" and isinstance(value, nn.Module):
        name = next((name for name, usual in _activations().items() if type(value) is type(usual)), None)
        if name is None:
            raise NoRecipe(f"{where} is a {class_name(value)}")
        options = _arguments(value)
        for option, given in options.items():
            if isinstance(given, float) and not math.isfinite(given):
                raise NoRecipe(f"{where} has {option}={given}")
        return {"name": name, "options": options}
    if key == "bias":
        return value is not None
    if key == "stride":
        return value[0] if isinstance(value, tuple) else value
    if isinstance(value, nn.ModuleList) or key == "parts":
        return [_recipe(f"{where}.{number}", each) for number, each in enumerate(value)]
    if isinstance(value, nn.Module):
        return _recipe(where, value)
    return list(value) if isinstance(value, tuple) else value


def _make(where: str, recipe: dict[str, Any]) -> nn.Module:
    """What a recipe gives."""
    if recipe["builder"] not in _BUILDERS:
        raise unknown_name(f"{where}.builder", recipe["builder"], _BUILDERS)
    builder, keys = _BUILDERS[recipe["builder"]]
    keywords = recipe["keywords"]
    check(f"{where}.keywords", keywords, {key: _SHAPES.get(key, COUNT) for key in keys})
    if sum(keywords.get("blocks_per_stage", ())) not in range(LAYERS.stop):
        raise ValueError(f"{where}.blocks_per_stage must sum to at most {LAYERS[-1]}")
    made = {key: _made(f"{where}.{key}", value) for key, value in keywords.items()}
    if inspect.isclass(builder):
        with torch.device("meta"):
            return builder(**made)
    return builder(**made, device="meta") if "in_features" in keys or "in_channels" in keys else builder(**made)


def _made(where: str, value: Any) -> Any:
    """An argument from its JSON value."""
    if isinstance(value, list):
        return [_made(f"{where}.{number}", each) for number, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return _named(where, value, _activations()) if value.keys() == OPTIONS.keys() else _make(where, value)


def _named(where: str, named: dict[str, Any], known: Mapping[str, nn.Module]) -> nn.Module:
    """A module by its name in a table. Its options must be arguments of the usual one, and of their types."""
    usual = known.get(named["name"])
    if usual is None:
        raise unknown_name(where, named["name"], known)
    defaults = _arguments(usual)
    for key, value in named["options"].items():
        if key not in defaults:
            raise unknown_name(f"option of {where} {named['name']!r}", key, defaults)
        check(f"option {key} of {where} {named['name']!r}", value, type(defaults[key]))
    try:
        with torch.device("meta"):
            return type(usual)(**named["options"])
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} {named['name']!r} cannot have options {short(named['options'])}: {error}") from error


def _delete(network: TimeVariableNetwork, origin: Sequence[int]) -> None:
    """Delete the layers of a freshly built network that are not in ``origin``, as pruning and truncating did."""
    if origin[-1] >= len(network.layers):
        raise ValueError(f"time_steps.origin must number {len(network.layers)} layers, got {short(origin)}")
    if origin[-1] + 1 < len(network.layers):
        cut(network, origin[-1] + 1)
    network.keep_layers_(origin)


def _arguments(module: nn.Module) -> dict[str, bool | int | float | str | None | tuple[Any, ...]]:
    """The arguments that a module was made with, as far as it keeps them as plain values of the same name."""
    values = {name: getattr(module, name, ...) for name in _parameters(type(module))}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | tuple | None)}


@cache
def _parameters(module: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(module).parameters)


@cache
def _activations() -> dict[str, nn.Module]:
    """The activations as they are by default."""
    return {name: make_activation(name) for name in activation_names()}


def _look(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
