"""Toy problems with a formula: the regressions peaks and sine, the classification of nested spheres.

The splits train, validation and test have 9,000, 1,000 and 1,000 samples. They are drawn with numpy's Philox generator,
the key being 0, 1 and 2 for the three: a split holds the same samples in every run. peaks takes two inputs, sine, which
is y = sin(x), takes one; both are uniform in (-3, 3).

References:
    Sizes and domain: the code published with Antil, Diaz, Herberg, "An optimal time variable learning framework for
    deep neural networks", 2022. Spheres: Dupont, Doucet, Teh, "Augmented neural ODEs", 2019.
"""

import numpy as np
import torch
from jaxtyping import Float

from .samples import Generated, Samples

_SAMPLES = {"train": 9000, "validation": 1000, "test": 1000}
_KEYS = {"train": 0, "validation": 1, "test": 2}
_HALF_WIDTH = 3.0
_BALL_RADIUS = 0.5
_SHELL_RADII = (1.0, 1.5)


def peaks(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 1"]:
    """MATLAB's `peaks`, a smooth function of the plane with three maxima and three minima.

    z(x, y) = 3 (1-x)^2 exp(-x^2 - (y+1)^2) - 10 (x/5 - x^3 - y^5) exp(-x^2 - y^2) - 1/3 exp(-(x+1)^2 - y^2)

    Example:
        >>> peaks(np.zeros((1, 2))).round(6)
        array([[0.981012]])
    """
    x, y = points[:, :1], points[:, 1:]
    z: np.ndarray = (
        3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
        - 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2)
        - np.exp(-((x + 1) ** 2) - y**2) / 3
    )
    return z


def nested_spheres(num_samples: int, *, dimension: int = 2, key: int = 0) -> Samples:
    """A ball (class 0) inside a shell (class 1), which no flow of an ODE in the same dimension can separate linearly.

    Every other sample is of class 1. The ball has radius 1/2, the shell lies between the radii 1 and 1.5; both are
    sampled uniformly in volume.

    Example:
        >>> inputs, targets = nested_spheres(4, dimension=3)
        >>> inputs.norm(dim=1) < 0.5, targets
        (tensor([ True, False,  True, False]), tensor([0, 1, 0, 1]))
    """
    for argument, value in (("num_samples", num_samples), ("dimension", dimension)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    generator = np.random.Generator(np.random.Philox(key=key))
    direction = generator.standard_normal((num_samples, dimension))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    classes = np.arange(num_samples) % 2
    inner = np.where(classes == 0, 0.0, _SHELL_RADII[0]) ** dimension
    outer = np.where(classes == 0, _BALL_RADIUS, _SHELL_RADII[1]) ** dimension
    radius = (inner + (outer - inner) * generator.random(num_samples)) ** (1 / dimension)
    return Samples(torch.from_numpy(radius[:, None] * direction).float(), torch.from_numpy(classes))


def _uniform(split: str, dimension: int) -> Float[np.ndarray, "n dimension"]:
    generator = np.random.Generator(np.random.Philox(key=_KEYS[split]))
    return _HALF_WIDTH * (2 * generator.random((_SAMPLES[split], dimension)) - 1)


def _peaks(split: str) -> Samples:
    x = _uniform(split, 2)
    return Samples(torch.from_numpy(x).float(), torch.from_numpy(peaks(x)).float())


def _sine(split: str) -> Samples:
    x = _uniform(split, 1)
    return Samples(torch.from_numpy(x).float(), torch.from_numpy(np.sin(x)).float())


def _nested_spheres(split: str) -> Samples:
    return nested_spheres(_SAMPLES[split], key=_KEYS[split])


PEAKS = Generated(name="peaks", kind="regression", samples=_SAMPLES, shape=(2,), generate=_peaks)
SINE = Generated(name="sine", kind="regression", samples=_SAMPLES, shape=(1,), generate=_sine)
NESTED_SPHERES = Generated(
    name="nested-spheres", kind="classification", samples=_SAMPLES, shape=(2,), classes=2, generate=_nested_spheres
)
