"""A Maxwell problem with a known solution, and samples of the map that a network is to learn.

On the cylinder Omega = {x1^2 + x2^2 <= 1, 0 <= x3 <= 1}, with r^2 = x1^2 + x2^2 and e_theta = (-x2, x1, 0)/r:

    curl(phi curl u) = f,  div u = 0        phi = (r^2 + 1)/2
    u = I_1(r) e_theta                      curl u = I_0(r) e_z,  curl curl u = -u
    f = -r I_0(r) e_theta - phi u

I_0, I_1 are modified Bessel functions. All fields are smooth in x on the whole space, the axis r = 0 included, since
I_1(r)/r is a power series in r^2. The network maps (x, f(x), phi(x)) in R^7 to u(x) in R^3.

Samples are uniform in the cylinder, from numpy's Philox generator; the key is 0 for the split train (12,000 samples)
and 1 for test (2,000).

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 7.1.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._errors import positive_integer
from .samples import Generated, Samples

NUM_SAMPLES = 12_000
_SAMPLES = {"train": NUM_SAMPLES, "test": 2000}
_KEYS = {"train": 0, "test": 1}
_SERIES_BELOW = 0.01
# I_1(r)/r = sum_k (r^2/4)^k / (2 k! (k+1)!); the next term is below 1e-20 where the series is used.
_SERIES = (1 / 2, 1 / 16, 1 / 384, 1 / 18432, 1 / 1474560, 1 / 176947200)
_ROUNDING = 1e-6  # by which points of a cylinder in float32 may lie outside


def solution(points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    """The exact solution u = I_1(r) e_theta.

    Args:
        points: x, (..., 3), anywhere; differentiable as often as one likes.

    Returns:
        u(x), (..., 3).

    Example:
        >>> solution(torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.5]]))
        tensor([[-0.0000, 0.5652, 0.0000],
                [-0.0000, 0.0000, 0.0000]])
    """
    return _bessel_ratio(_squared_radius(points)) * _rotation(points)


def curl(points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    """The curl of the solution, I_0(r) e_z.

    Args:
        points: x, (..., 3).

    Returns:
        curl u(x), (..., 3).

    Example:
        >>> curl(torch.tensor([[0.0, 0.0, 0.5]]))
        tensor([[0., 0., 1.]])
    """
    zero = torch.zeros_like(points[..., 2:])
    return torch.cat([zero, zero, _bessel_0(_squared_radius(points))], dim=-1)


def coefficient(points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 1"]:
    """The coefficient phi = (r^2 + 1)/2, the inverse of the permeability.

    Args:
        points: x, (..., 3).

    Returns:
        phi(x), (..., 1).

    Example:
        >>> coefficient(torch.tensor([[1.0, 0.0, 0.5]]))
        tensor([[1.]])
    """
    return (_squared_radius(points) + 1) / 2


def source(points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    """The right-hand side f = -r I_0(r) e_theta - phi u.

    Args:
        points: x, (..., 3).

    Returns:
        f(x), (..., 3).

    Example:
        >>> source(torch.tensor([[1.0, 0.0, 0.5]]))
        tensor([[ 0.0000, -1.8312, -0.0000]])
    """
    s = _squared_radius(points)
    return -(_bessel_0(s) + coefficient(points) * _bessel_ratio(s)) * _rotation(points)


def inside(points: Float[Tensor, "*n 3"]) -> Bool[Tensor, "*n"]:
    """Whether points lie in the cylinder Omega, its boundary included.

    Args:
        points: x, (..., 3).

    Returns:
        One truth value per point.

    Example:
        >>> inside(torch.tensor([[0.6, 0.8, 0.5], [0.9, 0.9, 0.5]]))
        tensor([ True, False])
    """
    height = points[..., 2]
    in_height = (height >= -_ROUNDING) & (height <= 1 + _ROUNDING)
    return in_height & (_squared_radius(points)[..., 0] <= 1 + 2 * _ROUNDING)


def inputs_at(points: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 7"]:
    """The network's inputs at each point: x, f(x), phi(x).

    Args:
        points: x, (..., 3), anywhere: outside the cylinder the network extrapolates.

    Returns:
        (..., 7).

    Raises:
        ValueError: If the points have no three finite coordinates.

    Example:
        >>> inputs_at(torch.tensor([[1.0, 0.0, 0.5]]))
        tensor([[ 1.0000,  0.0000,  0.5000,  0.0000, -1.8312, -0.0000,  1.0000]])
    """
    if points.ndim == 0 or points.shape[-1] != 3:
        raise ValueError(
            f"points must have shape (..., 3), got {tuple(points.shape)}: x1, x2, x3 in the last dimension"
        )
    if not bool(points.isfinite().all()):
        raise ValueError("points must be finite, got inf or nan")
    return torch.cat([points, source(points), coefficient(points)], dim=-1)


def samples_at(points: Float[Tensor, "n 3"], *, extrapolate: bool = False) -> Samples:
    """Inputs and targets at given points, in the type of the points.

    Args:
        points: x, (n, 3), in the cylinder.
        extrapolate: Allow points outside the cylinder, where the same formulas hold.

    Returns:
        Inputs (n, 7) and targets u(x), (n, 3).

    Raises:
        ValueError: If a point lies outside the cylinder and ``extrapolate`` is False, or is not finite.

    Example:
        >>> samples_at(torch.tensor([[0.9, 0.9, 0.5]]))
        Traceback (most recent call last):
        ...
        ValueError: points must lie in the cylinder x1^2 + x2^2 <= 1, 0 <= x3 <= 1, got 1 of 1 outside, the first ...
    """
    inputs = inputs_at(points)
    outside = points[~inside(points)]
    if len(outside) and not extrapolate:
        first = ", ".join(f"{value:g}" for value in outside[0].tolist())
        raise ValueError(
            "points must lie in the cylinder x1^2 + x2^2 <= 1, 0 <= x3 <= 1, "
            f"got {len(outside)} of {len(points)} outside, the first at ({first}): pass extrapolate=True to allow them"
        )
    return Samples(inputs, solution(points))


def sample_points(num_samples: int = NUM_SAMPLES, *, key: int = 0) -> Float[Tensor, "num_samples 3"]:
    """Points drawn uniformly from the cylinder.

    Args:
        num_samples: At least 1.
        key: Key (seed) of the Philox generator, >= 0.

    Returns:
        (num_samples, 3), float64.

    Raises:
        ValueError: If num_samples < 1 or key < 0.

    Example:
        >>> points = sample_points(1000)
        >>> points.shape, bool(inside(points).all())
        (torch.Size([1000, 3]), True)
    """
    num_samples = positive_integer("num_samples", num_samples)
    if key < 0:
        raise ValueError(f"key must be an integer >= 0, got {key}")
    area, angle, height = np.random.Generator(np.random.Philox(key=key)).random((num_samples, 3)).T
    r, theta = np.sqrt(area), 2 * np.pi * angle
    return torch.from_numpy(np.stack([r * np.cos(theta), r * np.sin(theta), height], axis=1))


def samples(num_samples: int = NUM_SAMPLES, *, key: int = 0) -> Samples:
    """Training data of any size: :func:`samples_at` points drawn uniformly from the cylinder, in float32.

    Args:
        num_samples: At least 1; the paper takes 12,000.
        key: Key (seed) of the Philox generator, >= 0.

    Returns:
        Inputs (num_samples, 7) and targets (num_samples, 3), float32.

    Raises:
        ValueError: If num_samples < 1 or key < 0.

    Example:
        >>> inputs, targets = samples(100, key=7)
        >>> inputs.shape, targets.shape, float(targets[:, 2].abs().max())
        (torch.Size([100, 7]), torch.Size([100, 3]), 0.0)
    """
    inputs, targets = samples_at(sample_points(num_samples, key=key))
    return Samples(inputs.float(), targets.float())


def _squared_radius(points: Tensor) -> Tensor:
    return points[..., :2].square().sum(-1, keepdim=True)


def _rotation(points: Tensor) -> Tensor:
    """r e_theta = (-x2, x1, 0)."""
    return torch.stack([-points[..., 1], points[..., 0], torch.zeros_like(points[..., 2])], dim=-1)


def _bessel_ratio(s: Tensor) -> Tensor:
    """I_1(r)/r as a smooth function of s = r^2; near the axis by its series, as the root has no derivative at 0."""
    series = torch.zeros_like(s)
    for term in reversed(_SERIES):
        series = series * s + term
    near = s < _SERIES_BELOW
    r = torch.where(near, torch.ones_like(s), s).sqrt()
    return torch.where(near, series, torch.special.i1(r) / r)


def _bessel_0(s: Tensor) -> Tensor:
    """I_0(r) as a smooth function of s = r^2; term k of its series is 2 (k+1) times that of I_1(r)/r."""
    series = torch.zeros_like(s)
    for k, term in reversed(list(enumerate(_SERIES))):
        series = series * s + 2 * (k + 1) * term
    near = s < _SERIES_BELOW
    r = torch.where(near, torch.ones_like(s), s).sqrt()
    return torch.where(near, series, torch.special.i0(r))


def _split(split: str) -> Samples:
    return samples(_SAMPLES[split], key=_KEYS[split])


MAXWELL = Generated(name="maxwell", kind="regression", samples=_SAMPLES, shape=(7,), generate=_split)
