"""Layer functions whose Jacobian is antisymmetric or symmetric, for networks that neither explode nor vanish.

    antisymmetric   f(y) = sigma((K - K^T - g I) y + b)    eigenvalues near the imaginary axis: states rotate
    symmetric       f(y) = -K^T sigma(K y + b)             y' = f(y) is a gradient flow (parabolic), y'' = f(y) a wave
                                                           equation (hyperbolic), for the schemes of integrators.py

K is a matrix, or with ``kernel_size`` a convolution, whose transpose is the transposed convolution.

With Verlet's scheme and one symmetric layer in all places the energy norm(v)^2 / 2 + sum S(K y + b), S' = sigma, stays
bounded if tau norm(K) sqrt(sup sigma') < 2 where sigma is linear. Where it is not, much smaller steps are needed: with
tanh it stays within some per cent at tau norm(K) = 0.5, and drifts from about 1 on.

References:
    Haber, Ruthotto (2017), Stable architectures for deep neural networks. Ruthotto, Haber (2018), Deep neural networks
    motivated by partial differential equations.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._errors import is_number, positive_integer
from .activations import make_activation


class _Structured(nn.Module):
    """K and its transpose, as a matrix or a convolution."""

    def __init__(
        self,
        width: int,
        activation: str | nn.Module = "tanh",
        *,
        kernel_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        width = positive_integer("width", width)
        if kernel_size is None:
            self.linear = nn.Linear(width, width, dtype=dtype, device=device)
        else:
            kernel_size = positive_integer("kernel_size", kernel_size)
            if kernel_size % 2 == 0:
                raise ValueError(f"kernel_size must be odd, got {kernel_size}: the state keeps its size")
            half = kernel_size // 2
            self.convolution = nn.Conv2d(width, width, kernel_size, padding=half, dtype=dtype, device=device)
        self.activation = make_activation(activation).to(device=device, dtype=dtype)

    def _K(self, y: Tensor) -> Tensor:
        """K y + b."""
        found: Tensor = self.linear(y) if hasattr(self, "linear") else self.convolution(y)
        return found

    def _KT(self, y: Tensor) -> Tensor:
        if hasattr(self, "linear"):
            return y @ self.linear.weight
        return functional.conv_transpose2d(y, self.convolution.weight, padding=self.convolution.kernel_size[0] // 2)


class Antisymmetric(_Structured):
    """A layer f(y) = sigma((K - K^T - g I) y + b).

    Args:
        width: Width n of the state, (batch, n); with ``kernel_size`` its channels, (batch, n, height, width).
        activation: sigma, by name or as a module.
        shift: g >= 0, which damps.
        kernel_size: Of a convolution K, odd; None: K is a matrix.
        dtype: Floating point type.
        device: Where the parameters live.

    Raises:
        ValueError: If an argument lies outside its range.

    References:
        Haber, Ruthotto (2017), equation (4.12).

    Example:
        >>> Antisymmetric(3, shift=0.1)(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        width: int,
        activation: str | nn.Module = "tanh",
        shift: float = 0.0,
        *,
        kernel_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(width, activation, kernel_size=kernel_size, dtype=dtype, device=device)
        if not (is_number(shift) and 0.0 <= shift < float("inf")):
            raise ValueError(f"shift must be >= 0, got {shift!r}: it is subtracted from the diagonal and damps")
        self.shift = float(shift)

    def forward(self, y: Tensor) -> Tensor:
        f: Tensor = self.activation(self._K(y) - self._KT(y) - self.shift * y)
        return f

    def extra_repr(self) -> str:
        return f"shift={self.shift:g}"


class Symmetric(_Structured):
    """A layer f(y) = -K^T sigma(K y + b).

    Args:
        width: Width n of the state, (batch, n); with ``kernel_size`` its channels, (batch, n, height, width).
        activation: sigma, by name or as a module; nondecreasing for a decaying gradient flow.
        kernel_size: Of a convolution K, odd; None: K is a matrix.
        dtype: Floating point type.
        device: Where the parameters live.

    Raises:
        ValueError: If an argument lies outside its range.

    References:
        Ruthotto, Haber (2018), equation (9).

    Example:
        >>> Symmetric(3)(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def forward(self, y: Tensor) -> Tensor:
        return -self._KT(self.activation(self._K(y)))
