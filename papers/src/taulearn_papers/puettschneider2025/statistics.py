"""Figures of finished members: accuracies of first blocks, what deeper ones still do, both sides of the bound."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from taulearn.app.results import NotMeasured, Results

from .trainings import TREATMENTS, setting

_NAME = re.compile(r"(?P<data>[^/]+)/(?P<kind>.+)-(?P<depth>\d+)/(?P<treatment>[^/]+)")

Vector = Float[np.ndarray, " n"]


class Pair(NamedTuple):
    """A deep network that was trained with and without stage cost.

    Attributes:
        data: The data set.
        kind: The kind of network.
        depth: Number of its layers.
    """

    data: str
    kind: str
    depth: int

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.data}, {self.kind}-{self.depth}"

    def name(self, treatment: str) -> str:
        """The setting of one of the two."""
        return setting(self.data, self.kind, self.depth, treatment)


def pairs(results: Results) -> list[Pair]:
    """The deep networks that are finished in both ways."""
    found = [
        Pair(match["data"], match["kind"], int(match["depth"]))
        for match in map(_NAME.fullmatch, results.settings)
        if match is not None and match["treatment"] == "plain"
    ]
    complete = [pair for pair in found if {pair.name(each) for each in TREATMENTS} <= set(results.settings)]
    if not complete:
        raise NotMeasured("no network is finished with and without stage cost")
    return sorted(complete, key=lambda pair: (pair.kind, pair.data != "mnist", pair.data))


def per_layer(results: Results, name: str, seed: int, figure: str) -> Vector:
    """A figure of each layer: "contribution", "relative", "weights"."""
    return np.asarray(results.measurements(name, seed)[figure], dtype=np.float64)


def at_depth(results: Results, name: str, seed: int, figure: str) -> dict[int, float]:
    """A figure of the cut networks by their depth."""
    measured = results.measurements(name, seed)
    return dict(zip(measured["depths"], measured[figure], strict=True))


class Sides(NamedTuple):
    """Both sides of the bound.

    Attributes:
        left: What the deep network reached.
        right: What the network of M blocks allows.
    """

    left: float
    right: float


def sides(results: Results, deep: str, shallow: str, M: int, seed: int) -> Sides:
    """Both sides of the bound (MATH, section 8), on the training data in evaluation mode.

        (w sum_{k<N} l_k + l_N) / (1 + w n)
            <=  L_M + [w sum_{k<M} (l_k^M - L_M) + (lambda/2) sum ||w^M||^2] / (1 + w n)

    n is the number of intermediate outputs of the deep network, N where the input counts and N - 1 else; the weights on
    the right are all those of the shallow network that decay.

    Args:
        results: The records.
        deep: Setting of the network of N blocks.
        shallow: Setting of a network of M blocks, or the deep one itself, of which the first M blocks are taken: any
            network of M blocks bounds the minimum.
        M: Number of blocks.
        seed: The seed of both.
    """
    losses, of_shallow = at_depth(results, deep, seed, "train.loss"), at_depth(results, shallow, seed, "train.loss")
    w, N = float(results.measurements(deep, seed)["stage_cost"]), max(losses)
    scale = 1.0 + w * (len(losses) - 1)
    left = (w * sum(l for k, l in losses.items() if k < N) + losses[N]) / scale
    L = of_shallow[M]
    spread = sum(l - L for k, l in of_shallow.items() if k < M)
    return Sides(left, L + (w * spread + at_depth(results, shallow, seed, "decay")[M]) / scale)


def bounds(results: Results) -> Iterator[tuple[str, int, bool, list[Sides]]]:
    """Both sides for all that is finished."""
    for pair in pairs(results):
        deep = pair.name("stage")
        trained = sorted(
            int(match["depth"])
            for match in map(_NAME.fullmatch, results.settings)
            if match is not None and (match["data"], match["kind"]) == (pair.data, pair.kind)
            if int(match["depth"]) < pair.depth
        )
        for M in trained:
            shallow = setting(pair.data, pair.kind, M, "stage")
            yield pair.title, M, True, [sides(results, deep, shallow, M, s) for s in results.seeds(deep, shallow)]
        if not trained:
            from .trainings import kept

            for M in kept(pair.depth):
                yield pair.title, M, False, [sides(results, deep, deep, M, s) for s in results.seeds(deep)]
