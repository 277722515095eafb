"""A network as a recipe, and back: {"builder": name, "keywords": its arguments}, whose values may be recipes again.

A network from a builder is its call (``resnet``, ``resnet_v2``, ..); one put together by hand of this package's parts
is a call of TimeVariableNetwork. Scheme and steps stand beside the recipe, in the manifest. A recipe is followed and
compared with the network before it is written, so that one that was changed since is never saved as if it were not.

Builders are looked up by name in the tables here; nothing that a file names is ever imported. They build on torch's
meta device, which allocates nothing, so that a manifest can be compared with the tensors that came along before any
memory is spent on it.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import unknown_name
from ..depth.truncate import cut
from ..nn.activations import activation_names, make_activation
from ..nn.builders import BUILDERS, FlattenInput, FullyConnected
from ..nn.constraints import Constraint
from ..nn.convolutional import ConvolutionalStem, PointwiseSkip, PooledHead, PreActivationBlock, resnet_v2
from ..nn.grid import Grid, regrow
from ..nn.integrators import INTEGRATORS
from ..nn.learned_order import FractionalLearned
from ..nn.network import TimeVariableNetwork
from ..nn.schemes import SCHEMES, Residual, Scheme
from ..nn.skips import ComposedSkips, IdentitySkips, Pad, PadSkips, Skips
from ..nn.time_steps import TimeSteps
from .manifest import COUNT, LAYERS, NAMED, RECIPE, check, short

M = TypeVar("M", bound=nn.Module)
_PARTS: dict[type[nn.Module], str] = {
    nn.Identity: "",
    nn.Linear: "in_features out_features bias",
    FlattenInput: "in_features",
    FullyConnected: "linear.in_features linear.out_features activation",
    ConvolutionalStem: "convolution.in_channels channels=convolution.out_channels convolution.stride",
    PreActivationBlock: (
        "convolution_1.in_channels convolution_1.out_channels convolution_1.stride activation=activation_1"
    ),
    PooledHead: "channels=norm.num_features num_classes=linear.out_features activation",
    PointwiseSkip: "convolution.in_channels convolution.out_channels stride",
    Pad: "width",
    IdentitySkips: "num_steps from_input",
    PadSkips: "widths from_input",
    ComposedSkips: "maps=maps._modules from_input",
    nn.Sequential: "parts=_modules",
    TimeVariableNetwork: "layers=layers._modules head skips stem",
}
"""For each part its arguments, by the attributes that keep them; ``argument=`` where these have another name."""


def _paths(part: type[nn.Module]) -> dict[str, str]:
    """The attribute behind each argument of a part."""
    paths = (each.rpartition("=") for each in _PARTS[part].split())
    return {argument or path.rpartition(".")[2]: path for argument, _, path in paths}


def _network(layers: Sequence[nn.Module], head: nn.Module, skips: Skips, stem: nn.Module) -> TimeVariableNetwork:
    return TimeVariableNetwork(layers, head, Residual(), TimeSteps(len(layers), device="meta"), skips, stem=stem)


_FULLY_CONNECTED = ("in_features", "width", "out_features", "hidden_layers", "activation", "skips")
_CONVOLUTIONAL = ("blocks_per_stage", "num_classes", "in_channels", "widths", "activation", "stem_stride")
_BUILDERS: dict[str, tuple[Callable[..., nn.Module], Sequence[str]]] = {
    **{part.__name__: (part, tuple(_paths(part))) for part in _PARTS},
    "Sequential": (lambda parts: nn.Sequential(*parts), ("parts",)),
    "TimeVariableNetwork": (_network, tuple(_paths(TimeVariableNetwork))),
    **{each.__name__: (partial(each, device="meta"), _FULLY_CONNECTED) for each in BUILDERS.values()},
    "resnet_v2": (partial(resnet_v2, device="meta"), _CONVOLUTIONAL),
}
_SHAPES: dict[str, Any] = {
    **dict.fromkeys(("bias", "from_input"), bool),
    **dict.fromkeys(("width", "widths"), (COUNT, [COUNT, ...])),
    **dict.fromkeys(("head", "stem"), RECIPE),
    **{key: [RECIPE, ...] for key in ("layers", "parts", "maps")},
    "skips": (str, RECIPE),
    "activation": (str, NAMED),
    "hidden_layers": LAYERS,
    "blocks_per_stage": [LAYERS, ...],
}
"""The JSON values of arguments, where they are not counts."""
_ELSEWHERE = {"training", "horizon", "lower_bound", "kernel_error"}
"""Attributes of schemes and constraints that are no options of theirs alone."""


class NoRecipe(Exception):
    """A part that there are no words for."""


def noted_recipe(network: nn.Module) -> dict[str, Any]:
    """The call of the builder that the network is from, which may have been changed since."""
    noted = network.recipe if isinstance(network, TimeVariableNetwork) else None
    if noted is None:
        raise NoRecipe(f"the {type(network).__name__} is from no builder")
    return {**noted, "keywords": {key: _json_value(key, key, value) for key, value in noted["keywords"].items()}}


def recipe_of_parts(part: nn.Module, where: str = "") -> dict[str, Any]:
    """The call that makes a part, or a network of parts."""
    if type(part) not in _PARTS:
        raise NoRecipe(f"{where or 'the model'} is a {type(part).__name__}")
    try:
        values = {key: attrgetter(path)(part) for key, path in _paths(type(part)).items()}
    except AttributeError as error:
        raise NoRecipe(f"{where} was changed: {error}") from error
    inside = f"{where}." if where else ""
    keywords = {key: _json_value(f"{inside}{key}", key, value) for key, value in values.items()}
    return {"builder": type(part).__name__, "keywords": keywords}


def _json_value(where: str, key: str, value: Any) -> Any:
    """An argument as JSON has it."""
    if key == "activation" and isinstance(value, nn.Module):
        return _name_of(where, value, _activations())
    if key == "bias":
        return value is not None
    if isinstance(value, dict):
        return [recipe_of_parts(each, f"{where.removesuffix('.parts')}.{name}") for name, each in value.items()]
    if isinstance(value, nn.Module):
        return recipe_of_parts(value, where)
    if isinstance(value, tuple):
        return value[0] if key == "stride" else list(_of_python(value))
    return _of_python(value)


def _name_of(where: str, module: nn.Module, known: Mapping[str, nn.Module]) -> dict[str, Any]:
    """A module by its name in a table, and its options."""
    name = next((name for name, usual in known.items() if type(module) is type(usual)), None)
    if name is None:
        raise NoRecipe(f"{where} is a {type(module).__qualname__}")
    options = _arguments(module)
    for option, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NoRecipe(f"{where} has {option}={value}")
    return {"name": name, "options": options}


def name_of_scheme(scheme: nn.Module) -> dict[str, Any]:
    """A scheme by its name and options; any other than this package's by its class, which is never built."""
    try:
        return _name_of("scheme", scheme, _schemes())
    except NoRecipe:
        return {"name": type(scheme).__qualname__, "options": plain_options(scheme)}


def plain_options(own: Scheme | Constraint | nn.Module) -> dict[str, Any]:
    """The public attributes of a scheme or constraint of the user's that JSON can hold, as it holds them."""
    options = {}
    for name, value in vars(own).items():
        if not name.startswith("_") and name not in _ELSEWHERE:
            try:
                text = json.dumps(_of_python(value))
                options[name] = json.loads(text, parse_constant=str)  # inf and nan as words
            except (TypeError, ValueError):
                continue
    return options


def build(manifest: Mapping[str, Any]) -> TimeVariableNetwork:
    """The network of a manifest, whose tensors have shape and type but no content.

    Raises:
        ValueError: If a name is unknown, or arguments do not fit each other.
    """
    saved, steps = manifest["model"], manifest["time_steps"]
    grid, dtype = Grid.from_plain(steps), getattr(torch, saved["dtype"])
    origin = list(grid.origin)
    if len(origin) > LAYERS[-1] and grid.parent:
        raise ValueError(f"time_steps.origin must have at most {LAYERS[-1]} layers, got {len(origin)}")
    if (orders := manifest["scheme"]["options"].get("layers", 0)) not in (0, len(origin)):
        raise ValueError(f"scheme must have one order for each of {len(origin)} layers, got {short(orders)}")
    scheme = _named("scheme", manifest["scheme"], _schemes())
    if (options := _arguments(scheme)).keys() != manifest["scheme"]["options"].keys():
        raise ValueError(f"scheme must have options {sorted(options)}, got {manifest['scheme']['options']}")
    settings = {key: steps[key] for key in ("constraint", "horizon", "lower_bound")}
    init = max(steps["horizon"] / len(origin), steps["lower_bound"] or 0.0)
    time_steps = TimeSteps(len(origin), **settings, init=init, dtype=dtype, device="meta")
    time_steps.take_grid_(grid)
    try:
        network = _made("model", {key: saved[key] for key in RECIPE})
        if type(network) is not TimeVariableNetwork:
            raise ValueError(f"model must be a network, got a {saved['builder']}")
        if network.recipe is not None:
            _follow(network, grid)
        if len(network.layers) != len(origin):
            raise ValueError(f"time_steps must have one step per layer, got {short(origin)} for {len(network.layers)}")
        network.scheme, network.time_steps = scheme, time_steps
        return network.to(dtype)
    except (ArithmeticError, AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"model cannot be built: {error}") from error


def _follow(network: TimeVariableNetwork, grid: Grid) -> None:
    """Let a network just built have the layers of a grid, as pruning, truncating and refining did."""
    last = grid.made_from(network.time_steps.origin)[0][-1]
    if last + 1 < len(network.layers):
        cut(network, last + 1)
    regrow(network, grid)


def _made(where: str, value: Any) -> Any:
    """An argument from its JSON value: recipes and names of activations are followed."""
    if isinstance(value, list):
        return [_made(f"{where}.{l}", each) for l, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value.keys() == NAMED.keys():
        return _named(where, value, _activations())
    name, keywords = value["builder"], value["keywords"]
    if name not in _BUILDERS:
        raise unknown_name(f"{where}.builder", name, _BUILDERS)
    builder, keys = _BUILDERS[name]
    check(f"{where}.keywords", keywords, {key: _SHAPES.get(key, COUNT) for key in keys})
    if (number := sum(keywords.get("blocks_per_stage", ()))) > LAYERS[-1]:
        raise ValueError(f"{where}.keywords.blocks_per_stage must sum to at most {LAYERS[-1]}, got {number}")
    made = {key: _made(f"{where}.{key}", each) for key, each in keywords.items()}
    with torch.device("meta") if isinstance(builder, type) else torch.device("cpu"):
        return builder(**made)


def _named(where: str, named: Mapping[str, Any], known: Mapping[str, M]) -> M:
    """A module by its name in a table; its options must be arguments of the usual one, and of their types."""
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


@cache
def _activations() -> dict[str, nn.Module]:
    """The activations as they are by default."""
    return {name: make_activation(name) for name in activation_names()}


@cache
def _schemes() -> dict[str, Scheme]:
    """The schemes as they are by default."""
    known: tuple[type[Scheme], ...] = (*SCHEMES.values(), *INTEGRATORS.values(), FractionalLearned)
    return {scheme.name: scheme() for scheme in known}


_signature: Callable[[type], inspect.Signature] = cache(inspect.signature)


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that a module was made with, as far as it keeps them as plain values of the same name."""
    values = {name: _of_python(getattr(module, name, ...)) for name in _signature(type(module)).parameters}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | tuple | None)}


def _of_python(value: Any) -> Any:
    """A number of numpy as one of Python's, also in lists and tuples."""
    if type(value) in (list, tuple):
        return type(value)(map(_of_python, value))
    return value.item() if isinstance(value, np.generic) else value


def classes_of(model: nn.Module) -> dict[str, str]:
    """The names of the classes of a model's modules but for its time steps, by the modules' names."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        name or "the model": type(each).__name__ for name, each in modules if name.partition(".")[0] != "time_steps"
    }


def modules_of(model: nn.Module) -> dict[str, Any]:
    """The classes of a model's modules and their arguments, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name or "the model"] = type(module)
        found |= {f"{name}.{key}": value for key, value in _arguments(module).items()}
    return found


def besides(model: nn.Module) -> dict[str, bool]:
    """Settings of single modules that neither their classes nor the state dict tell, named as an error names them."""
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        where, inside = name or "the model", f"{name}." if name else ""
        own = [key for key, value in vars(module).items() if not _is_ours(value)]
        found += [f"{inside}{key} of its own" for key in own if callable(getattr(type(module), key, None))]
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
        found += [f"a hook of {where}" for each in hooks for hook in each.values() if not _is_ours(hook)]
        found += [f"{inside}{buffer}, outside the state dict," for buffer in module._non_persistent_buffers_set]
    first: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            found.append(f"{name}, tied to {first[parameter]},")
    return dict.fromkeys(found, True)


def _is_ours(hook: object) -> bool:
    """Whether a hook is this package's, which watches and changes nothing."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == __name__.partition(".")[0]


def tensors_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The types and shapes of a state's tensors, by name."""
    return {name: f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}" for name, each in state.items()}


def tied_unlike(host: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Parameters that a host shares, and whose values among the tensors differ, so that it cannot hold them all."""
    first: dict[nn.Parameter, str] = {}
    found = []
    for name, parameter in host.named_parameters(remove_duplicate=False):
        other = name if name not in tensors else first.setdefault(parameter, name)
        if other != name and not torch.equal(tensors[other], tensors[name]):
            found.append(f"{name} must have values of its own, got one that is shared with {other}")
    return found


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """How values by name differ."""
    both = expected.keys() & found.keys()
    pairs = ((name, value, found[name]) for name, value in expected.items() if name in both)
    lines = [f"{name} must be {_shown(a)}, got {_shown(b)}" for name, a, b in pairs if a != b]
    lines += [f"{name} is missing" for name in expected if name not in both]
    return lines + [f"{name} is unexpected" for name in found if name not in both]


def _shown(value: object) -> str:
    return f"a {value.__name__}" if isinstance(value, type) else short(value)
