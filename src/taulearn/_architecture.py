"""A network as a description in a manifest, and back.

A description names parts of this package and torch's activations, each by a name that is looked up in a table; nothing
that a file names is ever imported. Networks are rebuilt on torch's meta device, which allocates nothing, so that a
description can be compared with the tensors that came along before any memory is spent on it.
"""

import inspect
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import __version__
from ._deletion import prunable_of
from ._errors import unknown_name
from ._manifest import Host, Layer, Linear, Manifest, Named, Network, SkipMaps, Steps, Value, Wrapped, short
from .nn.activations import activation_names, make_activation
from .nn.builders import FlattenInput, FullyConnected
from .nn.network import TimeVariableNetwork
from .nn.schemes import SCHEMES, Scheme
from .nn.skips import ComposedSkips, IdentitySkips, PadSkips, Skips
from .nn.time_steps import TimeSteps
from .wrapping.host import wrapping_of

M = TypeVar("M", bound=nn.Module)


class _NoDescription(Exception):
    """A part that the schema has no words for."""


def describe(model: nn.Module, weights_sha256: str) -> Manifest:
    """The manifest of a model.

    Args:
        model: A model with time steps.
        weights_sha256: Digest of its weights file, 64 hexadecimal digits.

    Returns:
        A manifest whose ``model`` is a ``Wrapped`` for a wrapped model, a ``Network`` where :func:`build` gives the
        same network, else a ``Host``.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> describe(network, "0" * 64).model.kind
        'network'
    """
    prunable, wrapping = prunable_of(model), wrapping_of(model)
    steps = prunable.time_steps
    host = Host(saved_from=_class_name(model), because="")
    manifest = Manifest(
        taulearn=__version__,
        weights_sha256=weights_sha256,
        time_steps=Steps(
            origin=steps.origin, constraint=steps.constraint, horizon=steps.horizon, lower_bound=steps.lower_bound
        ),
        scheme=_scheme(prunable.scheme),
        model=host,
    )
    if wrapping is not None:
        wrapped = Wrapped(saved_from=host.saved_from, blocks=wrapping.names, shortened=tuple(sorted(wrapping.shorten)))
        return manifest.model_copy(update={"model": wrapped})
    try:
        manifest = manifest.model_copy(update={"model": _network(model)})
        other = differences(build(manifest).state_dict(), model.state_dict())
    except (_NoDescription, ValueError) as error:
        other = [str(error)]
    return manifest.model_copy(update={"model": host.model_copy(update={"because": other[0]})}) if other else manifest


def _scheme(scheme: nn.Module) -> Named:
    """A scheme of the package with its arguments; any other by the name of its class, which :func:`build` refuses."""
    try:
        return _named("scheme", scheme, _schemes())
    except _NoDescription:
        return Named(name=_class_name(scheme))


def build(manifest: Manifest) -> TimeVariableNetwork:
    """The network that a manifest describes, on the meta device.

    Args:
        manifest: Its ``model`` must be a ``Network``.

    Returns:
        The network, pruned as described, with tensors that have shape and type but no content.

    Raises:
        ValueError: If a name is unknown, or arguments do not fit each other.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> build(describe(network, "0" * 64)).layers[0].linear.weight
        Parameter containing:
        tensor(..., device='meta', size=(3, 2), requires_grad=True)
    """
    network, saved = manifest.model, manifest.time_steps
    if not isinstance(network, Network):
        because = network.because if isinstance(network, Host) else "it is wrapped"
        raise ValueError(f"{network.saved_from} can be rebuilt by its own code only: {because}")
    dtype = getattr(torch, network.dtype)
    scheme = _make("scheme", manifest.scheme, _schemes())
    if _scheme(scheme) != manifest.scheme:
        raise ValueError(f"scheme must have options {sorted(_scheme(scheme).options)}, got {manifest.scheme.options}")
    if any(a >= b for a, b in pairwise(saved.origin)):
        raise ValueError(f"time_steps.origin must increase, got {short(saved.origin)}")
    number = len(saved.origin)
    steps = TimeSteps(
        number,
        horizon=saved.horizon,
        constraint=saved.constraint,
        lower_bound=saved.lower_bound,
        init=max(saved.horizon / number, saved.lower_bound or 0.0),
        dtype=dtype,
        device="meta",
    )
    steps.origin = saved.origin
    known = _activations()
    layers = []
    for layer in network.layers:
        sigma = _make("activation", layer.activation, known)
        layers.append(FullyConnected(layer.in_features, layer.out_features, sigma, dtype=dtype, device="meta"))
    widths = [network.layers[0].in_features, *(layer.out_features for layer in network.layers)]
    skips: Skips
    match network.skips.kind:
        case "identity":
            skips = IdentitySkips(number, from_input=network.skips.from_input)
        case "pad":
            skips = PadSkips(widths, from_input=network.skips.from_input)
        case "composed":
            maps = [_make_linear(each, dtype) for each in network.skips.maps]
            skips = ComposedSkips(maps, from_input=network.skips.from_input)
    return TimeVariableNetwork(
        layers,
        _make_linear(network.head, dtype) or nn.Identity(),
        scheme,
        steps,
        skips,
        stem=nn.Identity() if network.stem is None else FlattenInput(widths[0]),
    )


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """How two state dicts differ in names, shapes and types.

    Args:
        expected: Tensors of the model, also on the meta device.
        found: Tensors that are to go there.

    Returns:
        One line per difference.

    Example:
        >>> differences({"a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(1)})
        ['a must be float32 (2,), got float32 (3,)', 'b is unexpected']
    """
    lines = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            lines.append(f"{name} is unexpected")
        elif (there := _look(expected[name])) != (here := _look(tensor)):
            lines.append(f"{name} must be {there}, got {here}")
    return lines


def _look(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _class_name(module: nn.Module) -> str:
    return type(module).__qualname__


def _schemes() -> dict[str, Scheme]:
    return {name: cls() for name, cls in SCHEMES.items()}


def _activations() -> dict[str, nn.Module]:
    return {name: make_activation(name) for name in activation_names()}


def _arguments(module: nn.Module) -> dict[str, Value]:
    """Arguments that a module was made with, as far as it keeps them as attributes of the same name."""
    return {name: vars(module)[name] for name in inspect.signature(type(module)).parameters if name in vars(module)}


def _named(part: str, module: nn.Module, known: Mapping[str, nn.Module]) -> Named:
    name = next((name for name, usual in known.items() if type(module) is type(usual)), None)
    if name is None:
        raise _NoDescription(f"{part} is a {_class_name(module)}")
    options = _arguments(module)
    for key, value in options.items():
        if type(value) not in (bool, int, float, str) or (isinstance(value, float) and not math.isfinite(value)):
            raise _NoDescription(f"{part} has {key}={short(value)}")
    return Named(name=name, options=options)


def _make(part: str, named: Named, known: Mapping[str, M]) -> M:
    """A module by its name in a table. Its options must be arguments of the usual one, and of their types."""
    usual = known.get(named.name)
    if usual is None:
        raise unknown_name(part, named.name, known)
    defaults = _arguments(usual)
    for key, value in named.options.items():
        if key not in defaults:
            raise unknown_name(f"option of {part} {named.name!r}", key, defaults)
        wanted = type(defaults[key])
        if type(value) is not wanted and (wanted, type(value)) != (float, int):
            raise ValueError(
                f"option {key} of {part} {named.name!r} must be of type {wanted.__name__}, got {short(value)}"
            )
    try:
        with torch.device("meta"):
            return type(usual)(**named.options)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{part} {named.name!r} cannot have options {short(named.options)}: {error}") from error


def _make_linear(linear: Linear | None, dtype: torch.dtype) -> nn.Linear | None:
    if linear is None:
        return None
    return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias, dtype=dtype, device="meta")


def _exactly(part: str, module: nn.Module, *types: type[nn.Module]) -> None:
    if type(module) not in types:
        raise _NoDescription(f"{part} is a {_class_name(module)}")


def _linear(part: str, module: nn.Module) -> Linear | None:
    _exactly(part, module, nn.Linear, nn.Identity)
    if not isinstance(module, nn.Linear):
        return None
    return Linear(in_features=module.in_features, out_features=module.out_features, bias=module.bias is not None)


def _network(model: nn.Module) -> Network:
    _exactly("the model", model, TimeVariableNetwork)
    assert isinstance(model, TimeVariableNetwork)
    _exactly("time_steps", model.time_steps, TimeSteps)
    _exactly("stem", model.stem, FlattenInput, nn.Identity)
    known, layers = _activations(), []
    for l, layer in enumerate(model.layers):
        _exactly(f"layers.{l}", layer, FullyConnected)
        assert isinstance(layer, FullyConnected)
        linear = _linear(f"layers.{l}.linear", layer.linear)
        if linear is None or not linear.bias:
            raise _NoDescription(f"layers.{l}.linear has no bias")
        sigma = _named(f"layers.{l}.activation", layer.activation, known)
        layers.append(Layer(in_features=linear.in_features, out_features=linear.out_features, activation=sigma))
    widths = (layers[0].in_features, *(layer.out_features for layer in layers))
    if isinstance(model.stem, FlattenInput) and model.stem.in_features != widths[0]:
        raise _NoDescription("stem has another width than the first layer")
    return Network(
        dtype=cast(Any, str(model.time_steps.values.dtype).removeprefix("torch.")),
        stem="flatten" if isinstance(model.stem, FlattenInput) else None,
        layers=tuple(layers),
        head=_linear("head", model.head),
        skips=_skips(model.skips, widths),
    )


def _skips(skips: Skips, widths: tuple[int, ...]) -> SkipMaps:
    _exactly("skips", skips, IdentitySkips, PadSkips, ComposedSkips)
    if isinstance(skips, PadSkips):
        if skips.widths != widths:
            raise _NoDescription(f"skips have widths {short(skips.widths)}, the layers {short(widths)}")
        return SkipMaps(kind="pad", from_input=skips.from_input)
    if isinstance(skips, ComposedSkips):
        maps = tuple(_linear(f"skips.maps.{l}", each) for l, each in enumerate(skips.maps))
        return SkipMaps(kind="composed", from_input=skips.from_input, maps=maps)
    return SkipMaps(kind="identity", from_input=skips.from_input)
