"""The single parts of a network in the words of :mod:`taulearn._manifest`, and back, on torch's meta device."""

import inspect
import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ._errors import unknown_name
from ._manifest import Block, Layer, Linear, Named, Padding, Pointwise, Pooled, SkipMaps, Stem, Value, short
from .nn.activations import activation_names, make_activation
from .nn.builders import FlattenInput, FullyConnected
from .nn.convolutional import ConvolutionalStem, PointwiseSkip, PooledHead, PreActivationBlock
from .nn.schemes import SCHEMES, Scheme
from .nn.skips import ComposedSkips, IdentitySkips, Pad, PadSkips, Skips

M = TypeVar("M", bound=nn.Module)
Map = Linear | Pointwise | Padding
"""The maps that skips are made of."""

_NORM = nn.BatchNorm2d(1)


class NoDescription(Exception):
    """A part that the schema has no words for."""


def class_name(module: nn.Module) -> str:
    """The name of a module's class, for messages.

    Example:
        >>> class_name(nn.ReLU())
        'ReLU'
    """
    return type(module).__qualname__


def schemes() -> dict[str, Scheme]:
    """The schemes of the package by name."""
    return {name: cls() for name, cls in SCHEMES.items()}


def exactly(part: str, module: nn.Module, *types: type[nn.Module]) -> None:
    """Refuse a module of any other class, subclasses among them.

    Raises:
        NoDescription: If it is of none of these classes.
    """
    if type(module) not in types:
        raise NoDescription(f"{part} is a {class_name(module)}")


def describe_named(part: str, module: nn.Module, known: Mapping[str, nn.Module]) -> Named:
    """A module as its name in a table, with the arguments it was made with.

    Raises:
        NoDescription: If it is not in the table, or an argument is no plain value.
    """
    name = next((name for name, usual in known.items() if type(module) is type(usual)), None)
    if name is None:
        raise NoDescription(f"{part} is a {class_name(module)}")
    options = _arguments(module)
    for key, value in options.items():
        if type(value) not in (bool, int, float, str) or (isinstance(value, float) and not math.isfinite(value)):
            raise NoDescription(f"{part} has {key}={short(value)}")
    return Named(name=name, options=options)


def make_named(part: str, named: Named, known: Mapping[str, M]) -> M:
    """A module by its name in a table. Its options must be arguments of the usual one, and of their types.

    Raises:
        ValueError: If they are not, or the name is unknown.
    """
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


def describe_stem(stem: nn.Module) -> tuple[Stem | str | None, int | None]:
    """A stem, and the width of the inputs where it flattens them."""
    exactly("stem", stem, FlattenInput, ConvolutionalStem, nn.Identity)
    if isinstance(stem, FlattenInput):
        return "flatten", stem.in_features
    if isinstance(stem, ConvolutionalStem):
        conv = stem.convolution
        return Stem(in_channels=conv.in_channels, channels=conv.out_channels, stride=conv.stride[0]), None
    return None, None


def make_stem(stem: Stem | str | None, width: int, dtype: torch.dtype) -> nn.Module:
    """The inverse; ``width`` is that of the first layer's inputs."""
    if isinstance(stem, Stem):
        return ConvolutionalStem(stem.in_channels, stem.channels, stem.stride, dtype=dtype, device="meta")
    return nn.Identity() if stem is None else FlattenInput(width)


def describe_layer(part: str, layer: nn.Module) -> Layer | Block:
    """A layer function."""
    exactly(part, layer, FullyConnected, PreActivationBlock)
    if isinstance(layer, PreActivationBlock):
        for name in ("norm_1", "norm_2"):
            _usual_norm(f"{part}.{name}", getattr(layer, name))
        sigma, other = (
            _activation(f"{part}.{name}", getattr(layer, name)) for name in ("activation_1", "activation_2")
        )
        if sigma != other:
            raise NoDescription(f"{part} has two activations")
        conv = layer.convolution_1
        return Block(
            in_channels=conv.in_channels, out_channels=conv.out_channels, stride=conv.stride[0], activation=sigma
        )
    assert isinstance(layer, FullyConnected)
    linear = _describe_linear(f"{part}.linear", layer.linear)
    if linear is None or not linear.bias:
        raise NoDescription(f"{part}.linear has no bias")
    sigma = _activation(f"{part}.activation", layer.activation)
    return Layer(in_features=linear.in_features, out_features=linear.out_features, activation=sigma)


def make_layer(layer: Layer | Block, dtype: torch.dtype) -> nn.Module:
    """The inverse."""
    sigma = make_named("activation", layer.activation, _activations())
    if isinstance(layer, Block):
        sizes = (layer.in_channels, layer.out_channels, layer.stride)
        return PreActivationBlock(*sizes, sigma, dtype=dtype, device="meta")
    return FullyConnected(layer.in_features, layer.out_features, sigma, dtype=dtype, device="meta")


def widths_of(layers: tuple[Layer | Block, ...]) -> tuple[int, ...]:
    """The widths n_0 .. n_N of the states that layers ask for."""
    pairs = [
        (each.in_features, each.out_features) if isinstance(each, Layer) else (each.in_channels, each.out_channels)
        for each in layers
    ]
    return pairs[0][0], *(m for _, m in pairs)


def describe_head(head: nn.Module) -> tuple[tuple[Map, ...], Linear | Pooled | None]:
    """A head: the skips past layers that were cut, and what comes after them."""
    *before, last = list(head) if type(head) is nn.Sequential and len(head) else [head]
    tail = [_describe_map(f"head.{l}", each) for l, each in enumerate(before)]
    if None in tail:
        raise NoDescription("head has an Identity in it")
    maps = tuple(each for each in tail if each is not None)
    if not isinstance(last, PooledHead):
        return maps, _describe_linear("head", last)
    exactly("head", last, PooledHead)
    _usual_norm("head.norm", last.norm)
    sigma = _activation("head.activation", last.activation)
    return maps, Pooled(channels=last.norm.num_features, num_classes=last.linear.out_features, activation=sigma)


def make_head(tail: tuple[Map, ...], head: Linear | Pooled | None, dtype: torch.dtype) -> nn.Module:
    """The inverse."""
    last: nn.Module
    if isinstance(head, Pooled):
        sigma = make_named("activation", head.activation, _activations())
        last = PooledHead(head.channels, head.num_classes, sigma, dtype=dtype, device="meta")
    else:
        last = _make_map(head, dtype) or nn.Identity()
    return nn.Sequential(*(_make_map(each, dtype) or nn.Identity() for each in tail), last) if tail else last


def describe_skips(skips: Skips, widths: tuple[int, ...]) -> SkipMaps:
    """Skips between states of these widths."""
    exactly("skips", skips, IdentitySkips, PadSkips, ComposedSkips)
    if isinstance(skips, PadSkips):
        if skips.widths != widths:
            raise NoDescription(f"skips have widths {short(skips.widths)}, the layers {short(widths)}")
        return SkipMaps(kind="pad", from_input=skips.from_input)
    if isinstance(skips, ComposedSkips):
        maps = [_describe_map(f"skips.maps.{l}", each) for l, each in enumerate(skips.maps)]
        return SkipMaps(
            kind="composed",
            from_input=skips.from_input,
            maps=tuple(each for each in maps if not isinstance(each, Padding)),
        )
    return SkipMaps(kind="identity", from_input=skips.from_input)


def make_skips(skips: SkipMaps, widths: tuple[int, ...], dtype: torch.dtype) -> Skips:
    """The inverse."""
    match skips.kind:
        case "identity":
            return IdentitySkips(len(widths) - 1, from_input=skips.from_input)
        case "pad":
            return PadSkips(widths, from_input=skips.from_input)
        case "composed":
            return ComposedSkips([_make_map(each, dtype) for each in skips.maps], from_input=skips.from_input)


def _activations() -> dict[str, nn.Module]:
    return {name: make_activation(name) for name in activation_names()}


def _activation(part: str, module: nn.Module) -> Named:
    return describe_named(part, module, _activations())


def _arguments(module: nn.Module) -> dict[str, Value]:
    """Arguments that a module was made with, as far as it keeps them as attributes of the same name."""
    return {name: vars(module)[name] for name in inspect.signature(type(module)).parameters if name in vars(module)}


def _usual_norm(part: str, norm: nn.Module) -> None:
    exactly(part, norm, nn.BatchNorm2d)
    for name in ("eps", "momentum", "affine", "track_running_stats"):
        if getattr(norm, name) != getattr(_NORM, name):
            raise NoDescription(f"{part} has {name}={short(getattr(norm, name))}")


def _describe_linear(part: str, module: nn.Module) -> Linear | None:
    exactly(part, module, nn.Linear, nn.Identity)
    if not isinstance(module, nn.Linear):
        return None
    return Linear(in_features=module.in_features, out_features=module.out_features, bias=module.bias is not None)


def _describe_map(part: str, module: nn.Module) -> Map | None:
    if isinstance(module, PointwiseSkip):
        exactly(part, module, PointwiseSkip)
        conv = module.convolution
        return Pointwise(in_channels=conv.in_channels, out_channels=conv.out_channels, stride=module.stride)
    if isinstance(module, Pad):
        exactly(part, module, Pad)
        return Padding(width=module.width)
    return _describe_linear(part, module)


def _make_map(each: Map | None, dtype: torch.dtype) -> nn.Module | None:
    if isinstance(each, Pointwise):
        return PointwiseSkip(each.in_channels, each.out_channels, each.stride, dtype=dtype, device="meta")
    if isinstance(each, Padding):
        return Pad(each.width)
    if each is None:
        return None
    return nn.Linear(each.in_features, each.out_features, bias=each.bias, dtype=dtype, device="meta")
