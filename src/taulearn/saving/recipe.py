"""A network as a description in a manifest, and back.

A description names parts of this package and torch's activations, each by a name that is looked up in a table; nothing
that a file names is ever imported. Networks are rebuilt on torch's meta device, which allocates nothing, so that a
description can be compared with the tensors that came along before any memory is spent on it.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import __version__
from ._architecture_parts import (
    NoDescription,
    class_name,
    describe_head,
    describe_layer,
    describe_named,
    describe_skips,
    describe_stem,
    exactly,
    make_head,
    make_layer,
    make_named,
    make_skips,
    make_stem,
    schemes,
    widths_of,
)
from ._manifest import Host, Manifest, Named, Network, Steps, Wrapped, short
from .adaptivity.transaction import prunable_of
from .nn.network import TimeVariableNetwork
from .nn.time_steps import TimeSteps
from .wrapping.wrapped_model import wrapping_of


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
    host = Host(saved_from=class_name(model), because="")
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
        wrapped = Wrapped(
            saved_from=host.saved_from,
            blocks=wrapping.names,
            shortened=tuple(sorted(wrapping.shorten)),
            states=wrapping.states(),
        )
        return manifest.model_copy(update={"model": wrapped})
    try:
        manifest = manifest.model_copy(update={"model": _network(model)})
        other = differences(build(manifest).state_dict(), model.state_dict())
    except (NoDescription, ValueError) as error:
        other = [str(error)]
    return manifest.model_copy(update={"model": host.model_copy(update={"because": other[0]})}) if other else manifest


def _scheme(scheme: nn.Module) -> Named:
    """A scheme of the package with its arguments; any other by the name of its class, which :func:`build` refuses."""
    try:
        return describe_named("scheme", scheme, schemes())
    except NoDescription:
        return Named(name=class_name(scheme))


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
    scheme = make_named("scheme", manifest.scheme, schemes())
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
    widths = widths_of(network.layers)
    return TimeVariableNetwork(
        [make_layer(layer, dtype) for layer in network.layers],
        make_head(network.tail, network.head, dtype),
        scheme,
        steps,
        make_skips(network.skips, widths, dtype),
        stem=make_stem(network.stem, widths[0], dtype),
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


def _network(model: nn.Module) -> Network:
    exactly("the model", model, TimeVariableNetwork)
    assert isinstance(model, TimeVariableNetwork)
    exactly("time_steps", model.time_steps, TimeSteps)
    stem, in_features = describe_stem(model.stem)
    layers = tuple(describe_layer(f"layers.{l}", layer) for l, layer in enumerate(model.layers))
    widths = widths_of(layers)
    if in_features not in (None, widths[0]):
        raise NoDescription("stem has another width than the first layer")
    tail, head = describe_head(model.head)
    return Network(
        dtype=cast(Any, str(model.time_steps.values.dtype).removeprefix("torch.")),
        stem=cast(Any, stem),
        layers=layers,
        tail=tail,
        head=head,
        skips=describe_skips(model.skips, widths),
    )
