"""The members of the suite: networks on the Maxwell problem, finite elements beside them, toys, growth of gradients.

Setting of the paper (section 7): 12,000 samples, smoothed ReLU, J = 1/(2m) sum norm(y - u)^2, full-batch steepest
descent, bias ordering with beta = 10 or without. Not printed there, and chosen here: tau = 1 at the start, also the
fixed value (table 1 fits that start); gamma = 1/2; a line search; 1000 steps for every network, as printed for 5-10;
the fractional memory counts y_1 - 0, as P_0 = 0 (``memory_from=0``).
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

from taulearn.app.config import TrainConfig
from taulearn.app.members import Member

from ..suite import generalisation
from . import gradients, measurements, stability

SIZES = ("6-50", "2-50")
SCHEMES = ("resnet", "fractional")
STEPS = ("learned", "fixed")
ORDERS = ("plain", "ordered")
STARTS: dict[str, Any] = {"ones": 1.0, "uniform": "uniform"}
"""How tau starts in the network that is reduced: the article does not say, and the outcome depends on it."""
TOYS = ("peaks", "sine", "nested-spheres")
OPTIMIZERS = ("lbfgs", "adam")

MESHES = range(4, 32, 3)
"""Subdivisions per edge, for the article's "10 uniform refinements", which cannot be dyadic."""
QUICK_MESHES = range(4, 14, 3)
COARSER = (1, 2)
"""Meshes for the finite elements alone, as the article's "large h" may lie there."""

FULL_STEPS, QUICK_STEPS = 1000, 100
REDUCTION_STEPS = 1000  # printed for this network, and quick anyway
FURTHER_STEPS = 200
FULL_SEEDS, QUICK_SEEDS = 5, 2
SIDE_SEEDS = 3
"""Seeds of toys, other optimisers and the growth of gradients."""
TOY_EPOCHS, QUICK_TOY_EPOCHS = 1500, 20

BETA = 10.0


def setting(size: str, scheme: str, steps: str, order: str) -> str:
    """The name of a Maxwell setting.

    Example:
        >>> setting("6-50", "resnet", "learned", "plain")
        'maxwell/6-50/resnet/learned/plain'
    """
    return f"maxwell/{size}/{scheme}/{steps}/{order}"


def reduction(start: str) -> str:
    """The name of the setting in which the network 5-10 is reduced.

    Example:
        >>> reduction("ones")
        'reduction/ones'
    """
    return f"reduction/{start}"


def toy(data: str, scheme: str, steps: str) -> str:
    """The name of a toy problem's setting.

    Example:
        >>> toy("peaks", "resnet", "fixed")
        'toys/peaks/resnet/fixed'
    """
    return f"toys/{data}/{scheme}/{steps}"


def other(optimizer: str, steps: str) -> str:
    """The name of a setting with another optimiser, residual network 6-50.

    Example:
        >>> other("lbfgs", "learned")
        'optimisers/lbfgs/learned'
    """
    return f"optimisers/{optimizer}/{steps}"


def mesh(n: int) -> str:
    """The name of the setting that measures the finite elements on a mesh.

    Example:
        >>> mesh(4)
        'fem/n-04'
    """
    return f"fem/n-{n:02d}"


def members(quick: bool = False, seeds: int | None = None) -> list[Member]:
    """All members, seed by seed, so that every claim has its first seed early.

    Example:
        >>> len(members()), len(members(quick=True))
        (164, 64)
    """
    meshes = tuple(QUICK_MESHES if quick else MESHES)
    own = QUICK_SEEDS if quick else FULL_SEEDS
    few = seeds or (1 if quick else SIDE_SEEDS)
    found = [Member("stability", 0, None, stability.measure)]
    found += [
        Member(mesh(n), 0, None, partial(measurements.finite_elements, n=n)) for n in reversed((*COARSER, *meshes))
    ]
    for seed in range(seeds or own):
        found += _maxwell(seed, meshes, QUICK_STEPS if quick else FULL_STEPS)
        found += _reductions(seed)
        if seed < few:
            found += _optimizers(seed, meshes, quick)
            found += _toys(seed, QUICK_TOY_EPOCHS if quick else TOY_EPOCHS)
    return [*found, *gradients.gradient_trainings(quick, few)]


def network(size: str, scheme: str) -> dict[str, Any]:
    """The settings of a network of the article.

    Example:
        >>> network("2-50", "resnet")["hidden_layers"]
        2
    """
    layers, width = map(int, size.split("-"))
    common = {"network": scheme, "hidden_layers": layers, "width": width, "activation": "smooth_relu", "init": 1.0}
    return common | ({"memory_from": 0} if scheme == "fractional" else {})


def _descent(seed: int, steps: int) -> dict[str, Any]:
    return {
        "data": "maxwell",
        "loss": "half_mse",
        "optimizer": "steepest_descent",
        "lr": 1.0,
        "batch_size": "full",
        "epochs": steps,
        "compile": "always" if steps == FULL_STEPS else "never",  # a hundred steps take as long as compiling
        "checkpoint_every": 100,
        "threads": 1,
        "seed": seed,
    }


def _maxwell(seed: int, meshes: tuple[int, ...], steps: int) -> Iterator[Member]:
    measure = partial(measurements.surrogate, meshes=meshes)
    for size, scheme, kind, order in product(SIZES, SCHEMES, STEPS, ORDERS):
        options: dict[str, Any] = _descent(seed, steps) | network(size, scheme)
        if kind == "fixed":
            options["constraint"] = "fixed"
        if order == "ordered":
            options["bias_ordering"] = BETA
        yield Member(setting(size, scheme, kind, order), seed, TrainConfig(**options), measure)


def _reductions(seed: int) -> Iterator[Member]:
    measure = partial(measurements.reduction, further=FURTHER_STEPS)
    for name, init in STARTS.items():
        options = _descent(seed, REDUCTION_STEPS) | network("5-10", "resnet") | {"init": init, "bias_ordering": BETA}
        yield Member(reduction(name), seed, TrainConfig(**options), measure)


def _optimizers(seed: int, meshes: tuple[int, ...], quick: bool) -> Iterator[Member]:
    measure = partial(measurements.surrogate, meshes=meshes)
    steps = QUICK_STEPS if quick else FULL_STEPS
    of = {
        "lbfgs": {"optimizer": "lbfgs", "lr": 1.0},
        "adam": {"optimizer": "adam", "lr": 0.01, "batch_size": 500, "epochs": steps // 10},
    }
    for name, kind in product(OPTIMIZERS, STEPS):
        options: dict[str, Any] = _descent(seed, steps) | network("6-50", "resnet") | of[name]
        if kind == "fixed":
            options["constraint"] = "fixed"
        yield Member(other(name, kind), seed, TrainConfig(**options), measure)


def _toys(seed: int, epochs: int) -> Iterator[Member]:
    """As in the article's published code: Adam with learning rate 0.01, batches of 500, 1500 epochs."""
    for data, scheme, kind in product(TOYS, SCHEMES, STEPS):
        options: dict[str, Any] = {
            "data": data,
            "optimizer": "adam",
            "lr": 0.01,
            "batch_size": 500,
            "epochs": epochs,
            "checkpoint_every": 50,
            "trace": "thinned",
            "compile": "always" if epochs == TOY_EPOCHS else "never",
            "threads": 1,
            "seed": seed,
            **network("2-50", scheme),
        }
        if kind == "fixed":
            options["constraint"] = "fixed"
        yield Member(toy(data, scheme, kind), seed, TrainConfig(**options), generalisation)
