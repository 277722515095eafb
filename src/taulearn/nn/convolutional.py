"""Pre-activation residual networks (ResNet-v2) with a time step on every block, for images.

    y_0     = conv(x)                                               the stem, 3x3
    y_{l+1} = S_l y_l + tau_l F_l(y_l)                              a block
    F_l(y)  = conv(sigma(norm(conv(sigma(norm(y))))))               3x3 convolutions, each after normalisation and sigma
    output  = W mean(sigma(norm(y_N))) + b                          the mean is taken over the pixels

Blocks form stages. The first block of each stage but the first halves the resolution and changes the number of
channels, and its skip S_l is a 1x1 convolution with stride 2; all other skips are identities. tau = 1 is the network of
He et al.

How block counts map to the depths of the papers, which count layers with weights: 2 per block, stem and output.

    blocks_per_stage   blocks   depth
    (3, 3, 3)               9      20
    (9, 9, 9)              27      56
    (18, 18, 18)           54     110
    (n, n, n)              3n    6n+2

The "ResNet-54" of Püttschneider et al. is read as 54 blocks, since they count the residual blocks that are kept.

References:
    He, Zhang, Ren, Sun (2016), Identity mappings in deep residual networks.
    He, Zhang, Ren, Sun (2015), Delving deep into rectifiers, for the initial weights.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._calls import transforming
from .._errors import positive_integer
from .activations import make_activation
from .constraints import Constraint
from .network import TimeVariableNetwork
from .pooled_head import PooledHead as PooledHead
from .schemes import Scheme, make_scheme
from .skips import ComposedSkips
from .time_steps import TimeSteps

Placed = torch.device | str | None


def _convolution(
    n: int, m: int, size: int, stride: int, *, dtype: torch.dtype | None = None, device: Placed = None
) -> nn.Conv2d:
    """A convolution without bias that keeps the resolution but for its stride, with the initial weights of He et al."""
    conv = nn.Conv2d(n, m, size, stride=stride, padding=size // 2, bias=False, dtype=dtype, device=device)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class ConvolutionalStem(nn.Module):
    """A 3x3 convolution on images, which says clearly what does not fit.

    Args:
        in_channels: Channels of the images.
        channels: Channels of the state y_0.
        stride: 1 keeps the resolution.
        dtype: Floating point type.
        device: Where the parameters live.

    Raises:
        TypeError: In the forward pass, if the inputs are not floating point, or of another type than the parameters
            (outside autocast).
        ValueError: In the forward pass, if they are not (batch, in_channels, height, width).

    Example:
        >>> ConvolutionalStem(1, 16, stride=2)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 16, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: Placed = None,
    ) -> None:
        super().__init__()
        self.convolution = _convolution(in_channels, channels, 3, stride, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"inputs must be floating point, got {x.dtype}: convert them (images: inputs.float() / 255)"
            )
        expected = self.convolution.weight.dtype
        if x.dtype != expected and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"inputs must be {expected} as the parameters of the network, got {x.dtype}: convert them with "
                f"inputs.to({expected}), or the network with network.to({x.dtype})"
            )
        channels = self.convolution.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"inputs must have shape (batch, {channels}, height, width), got {tuple(x.shape)}: build the network "
                "with in_channels for your images"
            )
        y: Tensor = self.convolution(x)
        if transforming() and not torch.compiler.is_compiling():  # torch.func.vmap has no formats
            return y
        return y.contiguous(memory_format=torch.channels_last)  # all that follows is about twice as fast on a CPU


class PointwiseSkip(nn.Module):
    """The skip at the start of a stage: a 1x1 convolution of every ``stride``-th pixel.

    Args:
        in_channels: Channels of y.
        out_channels: Channels of S y.
        stride: Distance of the pixels that are taken, in both directions.
        dtype: Floating point type.
        device: Where the parameters live.

    Example:
        >>> PointwiseSkip(16, 32, stride=2)(torch.zeros(5, 16, 28, 28)).shape
        torch.Size([5, 32, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: Placed = None,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.convolution = _convolution(in_channels, out_channels, 1, 1, dtype=dtype, device=device)

    def forward(self, y: Tensor) -> Tensor:
        carried: Tensor = self.convolution(self._taken(y))
        return carried

    def each(self, states: Sequence[Float[Tensor, "batch channels height width"]]) -> list[Tensor]:
        """S y for several states: only the pixels that are taken are put together.

        Args:
            states: States of one shape.

        Returns:
            One tensor per state.
        """
        carried: Tensor = self.convolution(torch.cat([self._taken(y) for y in states]))
        return list(carried.split([len(y) for y in states]))  # a single length could not be 0

    def _taken(self, y: Tensor) -> Tensor:
        # means of single pixels: y[..., ::stride, ::stride] with a backward pass that is three times as fast
        return nn.functional.avg_pool2d(y, 1, self.stride) if self.stride > 1 else y

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class PreActivationBlock(nn.Module):
    """F(y) = conv(sigma(norm(conv(sigma(norm(y)))))), what a block adds to its skip.

    Args:
        in_channels: Channels of y.
        out_channels: Channels of F(y).
        stride: Of the first convolution.
        activation: sigma, by name or as a module.
        dtype: Floating point type.
        device: Where the parameters live.

    Example:
        >>> PreActivationBlock(16, 32, stride=2)(torch.zeros(5, 16, 28, 28)).shape
        torch.Size([5, 32, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        activation: str | nn.Module = "relu",
        *,
        dtype: torch.dtype | None = None,
        device: Placed = None,
    ) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(in_channels, dtype=dtype, device=device)
        self.activation_1 = make_activation(activation).to(device=device, dtype=dtype)
        self.convolution_1 = _convolution(in_channels, out_channels, 3, stride, dtype=dtype, device=device)
        self.norm_2 = nn.BatchNorm2d(out_channels, dtype=dtype, device=device)
        self.activation_2 = make_activation(activation).to(device=device, dtype=dtype)
        self.convolution_2 = _convolution(out_channels, out_channels, 3, 1, dtype=dtype, device=device)

    def forward(self, y: Tensor) -> Tensor:
        y = self.convolution_1(self.activation_1(self.norm_1(y)))
        f: Tensor = self.convolution_2(self.activation_2(self.norm_2(y)))
        return f


def resnet_v2(
    blocks_per_stage: int | Sequence[int],
    num_classes: int,
    in_channels: int = 3,
    widths: int | Sequence[int] = (16, 32, 64),
    *,
    scheme: str | Scheme = "residual",
    activation: str | nn.Module = "relu",
    stem_stride: int = 1,
    horizon: float | None = None,
    constraint: str | Constraint = "free",
    lower_bound: float | None = None,
    init: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: Placed = None,
) -> TimeVariableNetwork:
    """A pre-activation residual network for images with a time step on every block.

    Args:
        blocks_per_stage: Number of blocks of each stage, one integer for all or one for each of ``widths``.
        num_classes: Number of outputs.
        in_channels: Channels of the images (batch, in_channels, height, width), of any size.
        widths: Channels of each stage. A single integer: constant width and resolution throughout, without stages, so
            that all skips are identities and each block can be pruned.
        scheme: See :func:`taulearn.nn.resnet`; other schemes than the residual one need a constant width.
        activation: sigma, by its torch.nn.functional name or as any elementwise module.
        stem_stride: 1; 2 or more computes on smaller images, at a fraction of the cost.
        horizon: Time horizon T. None: the number of blocks.
        constraint: On the steps: "free", "fixed", "dependent" or "simplex" (see TimeSteps).
        lower_bound: Smallest step after each optimiser step, or None.
        init: Initial steps, a number or one per block. None: horizon / number of blocks, which is 1 unless a horizon is
            given: the network of He et al.
        dtype: Floating point type.
        device: Where the parameters live.

    Returns:
        The network; its states are (batch, channels, height, width).

    Raises:
        ValueError: If an argument lies outside its range; the message names it.

    References:
        He, Zhang, Ren, Sun (2016), Identity mappings in deep residual networks.

    Example:
        >>> network = resnet_v2((3, 3, 3), 10)
        >>> sum(p.numel() for p in network.parameters()) - network.time_steps.num_steps
        272282
        >>> sorted(network.fixed_layers())
        [3, 6]
    """
    constant = not isinstance(widths, Iterable)
    stages = [positive_integer("widths", n) for n in (widths if isinstance(widths, Iterable) else [widths])]
    counts = list(blocks_per_stage) if isinstance(blocks_per_stage, Iterable) else [blocks_per_stage] * len(stages)
    counts = [positive_integer("blocks_per_stage", n) for n in counts]
    if not stages:
        raise ValueError("widths must be an integer or one for each stage, got none: give at least one")
    if constant and counts:
        counts = [sum(counts)]
    if len(counts) != len(stages):
        raise ValueError(
            f"blocks_per_stage must be one integer or one for each of the {len(stages)} widths, got {counts}: change "
            "one of the two"
        )
    num_classes = positive_integer("num_classes", num_classes)
    in_channels = positive_integer("in_channels", in_channels)
    stem_stride = positive_integer("stem_stride", stem_stride)
    number = sum(counts)
    steps = TimeSteps(
        number,
        horizon=float(number) if horizon is None else horizon,
        constraint=constraint,
        lower_bound=lower_bound,
        init=init,
        dtype=dtype,
        device=device,
    )
    stem = ConvolutionalStem(in_channels, stages[0], stem_stride, dtype=dtype, device=device)
    layers: list[nn.Module] = []
    maps: list[nn.Module | None] = []
    n = stages[0]
    for s, (count, m) in enumerate(zip(counts, stages, strict=True)):
        for b in range(count):
            stride = 2 if s > 0 and b == 0 else 1
            layers.append(PreActivationBlock(n, m, stride, activation, dtype=dtype, device=device))
            changed = stride > 1 or n != m
            maps.append(PointwiseSkip(n, m, stride, dtype=dtype, device=device) if changed else None)
            n = m
    head = PooledHead(n, num_classes, activation, dtype=dtype, device=device)
    network = TimeVariableNetwork(
        layers, head, make_scheme(scheme), steps, ComposedSkips(maps, from_input=True), stem=stem
    )
    keywords = {
        "blocks_per_stage": counts,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "widths": n if constant else stages,
        "activation": activation,
        "stem_stride": stem_stride,
    }
    network.recipe = {"builder": "resnet_v2", "keywords": keywords}
    return network
