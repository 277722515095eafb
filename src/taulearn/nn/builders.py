"""Networks of the papers: fully connected layers f_l(y) = sigma(W_l y + b_l) on one of the four schemes."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, SupportsFloat, TypedDict, Unpack

import torch
from torch import Tensor, nn

from .._errors import positive_integer
from .activations import make_activation
from .constraints import Constraint
from .network import TimeVariableNetwork
from .schemes import Dense, Feedforward, Fractional, Scheme, make_scheme
from .skips import IdentitySkips, PadSkips, Skips, learned_skips
from .time_steps import TimeSteps

if TYPE_CHECKING:
    from .learned_order import LearnedOrder


class FullyConnected(nn.Module):
    """One layer function f(y) = sigma(W y + b).

    Args:
        in_features: Width of y.
        out_features: Width of f(y).
        activation: sigma, by name or as a module.
        dtype: Floating point type.
        device: Where the parameters live.

    Raises:
        TypeError: In the forward pass, if y has another floating point type than the parameters (outside autocast).

    Example:
        >>> FullyConnected(3, 2, "tanh")(torch.zeros(1, 3)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str | nn.Module = "relu",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, dtype=dtype, device=device)
        self.activation = make_activation(activation).to(device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        expected = self.linear.weight.dtype
        if y.dtype != expected and not torch.is_autocast_enabled(y.device.type):
            raise TypeError(
                f"inputs must have the network's type {expected}, got {y.dtype}: convert them with "
                f"inputs.to({expected}), or build the network with dtype={y.dtype}"
            )
        f: Tensor = self.activation(self.linear(y))
        return f


class FlattenInput(nn.Module):
    """Flattens inputs (batch, ...) to (batch, in_features) and says clearly what does not fit.

    Args:
        in_features: Number of values per sample.

    Example:
        >>> FlattenInput(4)(torch.zeros(3, 2, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"inputs must be floating point, got {x.dtype}: convert them (images: inputs.float() / 255)"
            )
        if x.ndim < 2 or x.shape[1:].numel() != self.in_features:
            raise ValueError(
                f"inputs must have shape (batch, ...) with {self.in_features} values per sample, got {tuple(x.shape)}: "
                "build the network with in_features for your data"
            )
        return x if x.ndim == 2 else x.flatten(1)

    def extra_repr(self) -> str:
        return f"{self.in_features}"


class FractionalOptions(TypedDict, total=False):
    """Optional arguments that all builders share.

    Attributes:
        activation: sigma by its torch.nn.functional name, "smooth_relu", or any module (copied for each layer).
        horizon: Time horizon T > 0.
        constraint: On the steps: "free", "fixed", "dependent" or "simplex" (see TimeSteps).
        init: Initial steps, a number or one per layer; None: horizon / hidden_layers.
        skips: Between layers of different width: "pad" (zeros or truncation) or "learned" (linear maps without bias).
        dtype: Floating point type.
        device: Where the parameters live.
    """

    activation: str | nn.Module
    horizon: float
    constraint: str | Constraint
    init: float | Sequence[float] | Tensor | None
    skips: str
    dtype: torch.dtype | None
    device: torch.device | str | None


class Options(FractionalOptions, total=False):
    """Optional arguments of the other builders.

    Attributes:
        lower_bound: Smallest step after each optimiser step, or None.
    """

    lower_bound: float | None


def _build(
    builder: str,
    scheme: Scheme,
    in_features: int,
    width: int | Sequence[int],
    out_features: int,
    hidden_layers: int,
    *,
    activation: str | nn.Module = "relu",
    horizon: float = 1.0,
    constraint: str | Constraint = "free",
    lower_bound: float | None = None,
    init: float | Sequence[float] | Tensor | None = None,
    skips: str = "pad",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> TimeVariableNetwork:
    in_features = positive_integer("in_features", in_features)
    out_features = positive_integer("out_features", out_features)
    hidden_layers = positive_integer("hidden_layers", hidden_layers)
    hidden = list(width) if isinstance(width, Iterable) else [width] * hidden_layers
    if len(hidden) != hidden_layers:
        raise ValueError(f"width must be one integer or {hidden_layers} integers (hidden_layers), got {hidden}")
    widths = [in_features, *(positive_integer("width", n) for n in hidden)]
    steps = TimeSteps(
        hidden_layers,
        horizon=horizon,
        constraint=constraint,
        lower_bound=lower_bound,
        init=init,
        dtype=dtype,
        device=device,
    )
    maps: Skips
    if skips not in ("pad", "learned"):
        raise ValueError(f"skips must be 'pad' or 'learned', got {skips!r}")
    if len(set(hidden)) == 1:
        maps = IdentitySkips(hidden_layers, from_input=False)
    else:
        unused = not scheme.uses_skips
        maps = PadSkips(widths) if skips == "pad" or unused else learned_skips(widths, dtype=dtype, device=device)
    layers = [FullyConnected(n, m, activation, dtype=dtype, device=device) for n, m in pairwise(widths)]
    head = nn.Linear(widths[-1], out_features, bias=False, dtype=dtype, device=device)
    network = TimeVariableNetwork(layers, head, scheme, steps, maps, stem=FlattenInput(in_features))
    keywords = {
        "in_features": in_features,
        "width": widths[1] if len(set(hidden)) == 1 else widths[1:],
        "out_features": out_features,
        "hidden_layers": hidden_layers,
        "activation": activation,
        "skips": skips,
    }
    network.recipe = {"builder": builder, "keywords": keywords}
    return network


def resnet(
    in_features: int,
    width: int | Sequence[int],
    out_features: int,
    hidden_layers: int,
    *,
    scheme: str | Scheme = "residual",
    **options: Unpack[Options],
) -> TimeVariableNetwork:
    """A residual network with learned time steps, y_{l+1} = P y_l + tau_l sigma(W_l y_l + b_l), output W_N y_N.

    Args:
        in_features: Values per sample; inputs (batch, ...) are flattened to (batch, in_features).
        width: Width of the hidden layers, one integer or one per layer.
        out_features: Width of the output layer W_N, which has neither bias nor time step.
        hidden_layers: Number N >= 1 of hidden layers.
        scheme: How a layer f_l takes the state on: "residual", the Euler step above; "midpoint", "heun", "rk4",
            "momentum" or "verlet" (:mod:`taulearn.nn.integrators`), which need hidden layers of one width; or a scheme.
        **options: See :class:`Options`: ``activation="relu"``, ``horizon=1.0``, ``constraint="free"``,
            ``lower_bound=None``, ``init=None``, ``skips="pad"``, ``dtype=None``, ``device=None``.

    Returns:
        The network.

    Raises:
        ValueError: If an argument lies outside its range; the message names it.

    References:
        Antil, Diaz, Herberg (2022), section 5; Herberg, Herzog, Koehne (2023), equation (2.1).

    Example:
        >>> network = resnet(784, 100, 10, 6)
        >>> sum(p.numel() for p in network.parameters())
        130006
    """
    return _build("resnet", make_scheme(scheme), in_features, width, out_features, hidden_layers, **options)


def feedforward(
    in_features: int, width: int | Sequence[int], out_features: int, hidden_layers: int, **options: Unpack[Options]
) -> TimeVariableNetwork:
    """A feedforward network with learned time steps, y_{l+1} = tau_l sigma(W_l y_l + b_l), output W_N y_N.

    Arguments, errors and source are those of :func:`resnet`; ``skips`` has no effect.

    Example:
        >>> feedforward(8, [16, 4], 2, 2, activation="tanh").time_steps.num_steps
        2
    """
    return _build("feedforward", Feedforward(), in_features, width, out_features, hidden_layers, **options)


def densenet(
    in_features: int, width: int | Sequence[int], out_features: int, hidden_layers: int, **options: Unpack[Options]
) -> TimeVariableNetwork:
    """A dense network with learned time steps, y_{l+1} = sum_{k<=l} P y_k + tau_l sigma(W_l y_l + b_l), output W_N y_N.

    Arguments, errors and source are those of :func:`resnet`.

    Example:
        >>> densenet(8, 4, 2, 3).scheme.name
        'dense'
    """
    return _build("densenet", Dense(), in_features, width, out_features, hidden_layers, **options)


def fractional_dnn(
    in_features: int,
    width: int | Sequence[int],
    out_features: int,
    hidden_layers: int,
    *,
    gamma: "float | LearnedOrder" = 0.5,
    memory_from: int = 1,
    memory: str = "auto",
    tolerance: float = 1e-6,
    lower_bound: float | None = 1e-4,
    **options: Unpack[FractionalOptions],
) -> TimeVariableNetwork:
    """A fractional network: the L1 scheme for the Caputo derivative of order gamma, remembering all earlier states.

    Args:
        in_features: Values per sample; inputs (batch, ...) are flattened to (batch, in_features).
        width: Width of the hidden layers, one integer or one per layer.
        out_features: Width of the output layer.
        hidden_layers: Number N >= 1 of hidden layers.
        gamma: Order of the derivative, in (0, 1), or a :class:`~taulearn.nn.LearnedOrder`.
        memory_from: First difference remembered, 1 or 0 (see :class:`~taulearn.nn.Fractional`).
        memory: "exact", "fast" (an approximation for deep networks) or "auto", which decides by the number of layers.
        tolerance: Largest relative error of the weights with fast memory.
        lower_bound: Smallest step; the scheme needs tau > 0.
        **options: As for :func:`resnet`.

    Returns:
        The network.

    Raises:
        ValueError: If an argument lies outside its range, or ``lower_bound`` is not positive.

    References:
        Antil, Diaz, Herberg (2022), section 5.2; Herberg, Herzog, Koehne (2023), equation (2.2).

    Example:
        >>> fractional_dnn(8, 4, 2, 3, gamma=0.8).scheme
        Fractional(gamma=0.8, memory_from=1)
    """
    if lower_bound is None or not lower_bound > 0:
        raise ValueError(
            f"lower_bound must be positive for a fractional network, got {lower_bound!r}: tau enters as tau^gamma and "
            "1/tau; take the default 1e-4"
        )
    if isinstance(gamma, SupportsFloat):
        scheme = Fractional(gamma=gamma, memory_from=memory_from, memory=memory, tolerance=tolerance)
    else:
        from .learned_order import scheme_of

        layers = positive_integer("hidden_layers", hidden_layers)
        scheme = scheme_of(gamma, layers, memory_from, memory, options.get("dtype"), options.get("device"))
    return _build(
        "fractional_dnn", scheme, in_features, width, out_features, hidden_layers, lower_bound=lower_bound, **options
    )


BUILDERS: dict[str, Callable[..., TimeVariableNetwork]] = {
    "feedforward": feedforward,
    "resnet": resnet,
    "densenet": densenet,
    "fractional": fractional_dnn,
}
