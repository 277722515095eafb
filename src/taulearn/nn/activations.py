"""Activations by name, and the papers' smoothed ReLU."""

import copy
import functools

import torch
from torch import Tensor, nn

from .. import functional
from .._errors import unknown_name


class SmoothReLU(nn.Module):
    """The ReLU with a parabola on abs(y) <= eta, see :func:`taulearn.functional.smooth_relu`.

    Args:
        eta: Half width of the smoothed interval, > 0.

    Raises:
        ValueError: If eta is not positive.

    References:
        Antil, Diaz, Herberg (2022), section 7.

    Example:
        >>> SmoothReLU(eta=0.5)(torch.tensor([0.0]))
        tensor([0.1250])
    """

    def __init__(self, eta: float = 1e-4) -> None:
        super().__init__()
        if not eta > 0:
            raise ValueError(f"eta must be positive, got {eta!r}: for the plain ReLU take activation='relu'")
        self.eta = eta

    def forward(self, y: Tensor) -> Tensor:
        return functional.smooth_relu(y, self.eta)

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}"


_NOT_ELEMENTWISE = {"GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax", "Threshold"}


@functools.cache
def _classes() -> dict[str, type[nn.Module]]:
    """Elementwise activations by torch.nn.functional's spelling."""
    spelled = {"".join(name.lower().split("_")): name for name in dir(nn.functional) if name.strip("_") == name}
    classes: dict[str, type[nn.Module]] = {"smooth_relu": SmoothReLU, "identity": nn.Identity}
    for name in torch.nn.modules.activation.__all__:
        if name not in _NOT_ELEMENTWISE:
            classes[spelled.get(name.lower(), name.lower())] = getattr(nn, name)
    return classes


def activation_names() -> list[str]:
    """The names that the builders take.

    Example:
        >>> "leaky_relu" in activation_names()
        True
    """
    return sorted(_classes())


def make_activation(activation: str | nn.Module) -> nn.Module:
    """A fresh activation module for one layer.

    Args:
        activation: An elementwise activation by the name torch.nn.functional or torch.nn gives it, "smooth_relu", or
            any module (copied).

    Returns:
        A module that belongs to the caller alone.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> make_activation("LeakyReLU")
        LeakyReLU(negative_slope=0.01)
    """
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    folded = {name.replace("_", ""): cls for name, cls in _classes().items()}
    cls = folded.get(str(activation).lower().replace("_", ""))
    if cls is None:
        raise unknown_name("activation", activation, _classes())
    return cls()
