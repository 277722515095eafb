"""The maps P_j^l that carry the state of layer j to the width of layer l (Antil, Diaz, Herberg 2022, section 2).

A skip map is asked with two state numbers 0 <= source < target <= N and answers the carried state, or None where the
map is zero. By default the first layer changes the space (inputs to features), so P_0^l = 0.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Skips(nn.Module):
    """The base class of a scheme's skip maps.

    Args:
        num_steps: Number N of layers; states are numbered 0 (the input) to N.
        from_input: Whether the input state is carried along; False is the papers' P_0^l = 0.
    """

    def __init__(self, num_steps: int, *, from_input: bool) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.from_input = from_input

    def forward(self, y: Tensor, source: int, target: int) -> Tensor | None:
        """P_source^target y, or None where the map is zero."""
        if source == 0 and not self.from_input:
            return None
        return self.carry(y, source, target)

    def is_identity(self, layer: int) -> bool:
        """Whether the skip past ``layer`` is the identity, so that a zero step deletes the layer."""
        return (layer > 0 or self.from_input) and self.unchanged(layer)

    @abstractmethod
    def carry(self, y: Tensor, source: int, target: int) -> Tensor:
        """The nonzero map from state ``source`` to state ``target``."""

    def past(self, layer: int) -> nn.Module:
        """The map of :meth:`carry` from ``layer`` to ``layer + 1`` as a module."""
        return _Past(self, layer)

    @abstractmethod
    def unchanged(self, layer: int) -> bool:
        """Whether :meth:`carry` from ``layer`` to ``layer + 1`` returns its argument."""

    @abstractmethod
    def keep_(self, layers: Sequence[int]) -> None:
        """Forget the maps past all layers but ``layers``; those forgotten must be identities."""

    def grow_(self, sources: Sequence[int], new: Collection[int]) -> None:
        """Let the maps past layers that are new be identities.

        Args:
            sources: For each of the layers then the position now, its own or its parent's, in order.
            new: Positions then of those that are new.

        Raises:
            ValueError: If they do not say how.
        """
        raise ValueError(
            f"skips must say what they are past new layers, got {type(self).__name__}, which does not: define "
            f"{type(self).__name__}.grow_(sources, new)"
        )


class _Past(nn.Module):
    """The map past one layer."""

    def __init__(self, skips: Skips, layer: int) -> None:
        super().__init__()
        self.skips = skips
        self.layer = layer

    def forward(self, y: Tensor) -> Tensor:
        return self.skips.carry(y, self.layer, self.layer + 1)


class IdentitySkips(Skips):
    """States of one shape: every skip is the identity, but for the first, which is zero unless ``from_input``.

    Args:
        num_steps: Number of layers.
        from_input: Whether the input state is carried along (layers that all preserve the shape).

    Example:
        >>> IdentitySkips(2, from_input=False)(torch.ones(1), 1, 2)
        tensor([1.])
    """

    def carry(self, y: Tensor, source: int, target: int) -> Tensor:
        return y

    def unchanged(self, layer: int) -> bool:
        return True

    def keep_(self, layers: Sequence[int]) -> None:
        self.num_steps = len(layers)

    def grow_(self, sources: Sequence[int], new: Collection[int]) -> None:
        self.num_steps = len(sources)


def pad(y: Tensor, width: int) -> Tensor:
    """A vector of another width: truncated, or padded with zeros."""
    change = width - y.shape[-1]
    return y if change == 0 else torch.nn.functional.pad(y, (0, change)) if change > 0 else y[..., :change]


class Pad(nn.Module):
    """:func:`pad` as a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, y: Tensor) -> Tensor:
        return pad(y, self.width)

    def extra_repr(self) -> str:
        return f"{self.width}"


class PadSkips(Skips):
    """Vectors of different widths: a longer one is truncated, a shorter one padded with zeros.

    Directly from source to target, without parameters.

    Args:
        widths: Widths n_0 .. n_N of the states.
        from_input: Whether the input is carried along, by padding or truncation.

    Example:
        >>> PadSkips([3, 2, 4])(torch.ones(1, 2), 1, 2)
        tensor([[1., 1., 0., 0.]])
    """

    def __init__(self, widths: Sequence[int], *, from_input: bool = False) -> None:
        super().__init__(len(widths) - 1, from_input=from_input)
        self.widths = tuple(widths)

    def carry(self, y: Tensor, source: int, target: int) -> Tensor:
        return pad(y, self.widths[target])

    def past(self, layer: int) -> nn.Module:
        return Pad(self.widths[layer + 1])

    def unchanged(self, layer: int) -> bool:
        return self.widths[layer] == self.widths[layer + 1]

    def keep_(self, layers: Sequence[int]) -> None:
        self.widths = (self.widths[0], *(self.widths[layer + 1] for layer in layers))
        self.num_steps = len(layers)

    def grow_(self, sources: Sequence[int], new: Collection[int]) -> None:
        self.keep_(sources)  # a new layer's state is as wide as its parent's

    def extra_repr(self) -> str:
        return f"widths={self.widths}, from_input={self.from_input}"


class ComposedSkips(Skips):
    """One module per layer, composed along the layers: P_j^l = P_{l-1}^l .. P_j^{j+1}.

    Learned linear maps, or the 1x1 convolutions of a ResNet.

    Args:
        maps: For each layer the module past it; None (or ``torch.nn.Identity``) is the identity.
        from_input: Whether the input is carried along, through ``maps[0]``.

    Example:
        >>> ComposedSkips([None, nn.Linear(2, 4, bias=False)])(torch.ones(1, 2), 1, 2).shape
        torch.Size([1, 4])
    """

    def __init__(self, maps: Iterable[nn.Module | None], *, from_input: bool = False) -> None:
        modules = [nn.Identity() if module is None else module for module in maps]
        super().__init__(len(modules), from_input=from_input)
        self.maps = nn.ModuleList(modules)

    def carry(self, y: Tensor, source: int, target: int) -> Tensor:
        for layer in range(source, target):
            y = self.maps[layer](y)
        return y

    def past(self, layer: int) -> nn.Module:
        return self.maps[layer]

    def unchanged(self, layer: int) -> bool:
        return isinstance(self.maps[layer], nn.Identity)

    def keep_(self, layers: Sequence[int]) -> None:
        self.grow_(layers, ())

    def grow_(self, sources: Sequence[int], new: Collection[int]) -> None:
        maps = (nn.Identity().train(self.training) if i in new else self.maps[l] for i, l in enumerate(sources))
        self.maps = nn.ModuleList(maps)
        self.maps.training = self.training
        self.num_steps = len(sources)


def learned_skips(
    widths: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> ComposedSkips:
    """Linear maps without bias wherever the width changes between hidden layers, identities elsewhere.

    Args:
        widths: Widths n_0 .. n_N of the states; the first map stays zero.
        dtype: Floating point type of the maps.
        device: Where they live.

    Returns:
        The composed skips.

    Example:
        >>> sum(p.numel() for p in learned_skips([9, 4, 4, 2]).parameters())
        8
    """
    maps: list[nn.Module | None] = [None]
    for n, m in pairwise(widths[1:]):
        maps.append(None if n == m else nn.Linear(n, m, bias=False, dtype=dtype, device=device))
    return ComposedSkips(maps)
