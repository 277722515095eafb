"""Whether a network fits into memory, from its shape alone, before any of it is made."""

from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from .config import TrainConfig

_BYTES = {"float32": 4, "float64": 8, "bf16": 4}
_BYTES_PER_LAYER = 9_000
"""Bytes that the modules of a layer take beside their numbers; measured: 9.4 KiB."""

_GIB = 2**30


def parameters(config: TrainConfig, in_features: int, out_features: int) -> int:
    """The number of weights, biases and time steps of a network; learned skips come on top.

    Of a resnet-v2, only the convolutions of its blocks are counted.

    Example:
        >>> parameters(TrainConfig(), 784, 10)
        130006
    """
    if config.network == "resnet-v2":
        channels = (16, 32, 64) if config.channels is None else config.channels
        channels = channels if isinstance(channels, tuple) else (channels,)
        blocks = 3 if config.blocks_per_stage is None else config.blocks_per_stage
        numbers = blocks if isinstance(blocks, tuple) else (blocks,) * len(channels)
        return sum(number * 2 * 9 * n * n for number, n in zip(numbers, channels, strict=False))
    if isinstance(config.width, int):
        inner = (config.hidden_layers - 1) * (config.width + 1) * config.width
        first, last = config.width, config.width
    else:
        inner = sum((n + 1) * m for n, m in pairwise(config.width))
        first, last = config.width[0], config.width[-1]
    return (in_features + 1) * first + inner + last * out_features + config.hidden_layers


def least_bytes(config: TrainConfig, in_features: int, out_features: int) -> int:
    """Bytes that training takes at least: weights, their gradients, the states of one sample, the modules."""
    layers = config.hidden_layers
    states = layers * config.width if isinstance(config.width, int) else sum(config.width)
    states = 0 if config.network == "resnet-v2" else states
    copies = 2 + bool(config.momentum) + config.average_weights
    numbers = copies * parameters(config, in_features, out_features) + states
    return numbers * _BYTES[config.precision] + layers * _BYTES_PER_LAYER


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([psutil.virtual_memory().available, *_of_the_group()])


def check_memory(config: TrainConfig, in_features: int, out_features: int, device: torch.device) -> None:
    """Refuse a network that cannot fit."""
    needed, free = least_bytes(config, in_features, out_features), free_bytes(device)
    if needed <= free:
        return
    number = parameters(config, in_features, out_features)
    # of integers of any size
    size, there, much = (f"{Decimal(n):.3g}" for n in (Decimal(needed) / _GIB, Decimal(free) / _GIB, number))
    names = ("channels", "blocks_per_stage") if config.network == "resnet-v2" else ("width", "hidden_layers")
    given = " and ".join(f"{name} = {_short(getattr(config, name))}" for name in names)
    raise ValueError(
        f"{names[0]} must be smaller, or {names[1]} fewer: with {given} the network has {much} parameters and needs "
        f"at least {size} GiB, of which {there} GiB are free on {device}"
    )


def _short(numbers: int | tuple[int, ...] | None) -> str:
    """A number, or some of many."""
    if isinstance(numbers, tuple):
        return ",".join(map(_short, numbers[:4])) + (",..." if len(numbers) > 4 else "")
    return f"{numbers}" if numbers is None or numbers < 10**20 else f"{Decimal(numbers):.3g}"


def _of_the_group() -> list[int]:
    """The memory left within the limit of a container."""
    folder = Path("/sys/fs/cgroup")
    try:
        return [int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())]
    except (OSError, ValueError):
        return []
