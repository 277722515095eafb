"""How gradients grow over the layers, with fixed and with learned steps, and the recursions for them (claim A7).

Small networks are trained on the digits from the same start, once with their steps fixed and once learned. Before and
after, the recursions of section 6 are compared with automatic differentiation, and the growth over the depth is
measured, in orders of magnitude:

    propagator   log10 of the largest singular value of d y_N / d y_1
    W, b, tau    log10 of norm(d y_N / d theta_1) / norm(d y_N / d theta_{N-1}), each part of theta on its own

Negative values are gradients that vanish towards the first layers, positive ones gradients that explode. Layer 0 is
wider than the others, so that its parameters are not compared. In the dense scheme both are recorded relative to the
growth 2^(N-j-2) that no tau >= 0 can damp, and judged with it and without.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 6.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .... import data
from ....diagnostics import gradient_propagation
from ....nn import TimeVariableNetwork, densenet, feedforward, fractional_dnn, resnet
from ....training import Diverged, fit
from ...suite import Member
from . import gradient_examples
from .gradient_recursions import errors, finite

PARTS = ("propagator", "W", "b", "tau")
STARTS = {"feedforward": ("1",), "residual": ("1", "1/N"), "dense": ("1",), "fractional": ("1", "1/N")}
"""The fixed steps, where the learned ones start. Steps of 1/N make a feedforward gradient vanish like N^-N and keep a
dense one at its structural growth, whatever the weights."""
KINDS = ("fixed", "learned")

DEPTHS, QUICK_DEPTHS = (8, 32, 128), (8, 32)
EPOCHS, QUICK_EPOCHS = 5, 2
WIDTH = 12
RATE = 0.01
"""Learning rate of Adam, as in the article's published code."""
PROBES = 3
"""Test images at which derivatives are taken; the median counts."""

EXAMPLES = "gradients/examples"

_BUILDERS: dict[str, Callable[..., TimeVariableNetwork]] = {
    "feedforward": feedforward,
    "residual": resnet,
    "dense": densenet,
    "fractional": fractional_dnn,
}


def members(quick: bool = False, seeds: int = 1) -> Iterator[Member]:
    """One member for each scheme and seed, and one for the article's examples.

    Args:
        quick: Without the deepest networks, and with fewer epochs.
        seeds: Number of seeds.

    Example:
        >>> [member.name for member in members(quick=True)][:2]
        ['gradients/examples/seed-0', 'gradients/feedforward/seed-0']
    """
    yield Member(EXAMPLES, 0, None, gradient_examples.measure)
    depths, epochs = (QUICK_DEPTHS, QUICK_EPOCHS) if quick else (DEPTHS, EPOCHS)
    for seed in range(seeds):
        for scheme in STARTS:
            of = partial(measure, scheme=scheme, seed=seed, depths=depths, epochs=epochs)
            yield Member(f"gradients/{scheme}", seed, None, of)


def measure(_: Path, *, scheme: str, seed: int, depths: tuple[int, ...], epochs: int) -> dict[str, Any]:
    """Networks of one scheme, trained with fixed and with learned steps.

    Args:
        _: The member's folder, which is not looked at.
        scheme: "feedforward", "residual", "dense" or "fractional".
        seed: Of the weights at the start and of the batches.
        depths: Numbers of layers.
        epochs: Of training.

    Returns:
        Rows with "start" (of the steps), "depth", "before" (growth), "errors before" and, for "fixed" and "learned",
        "growth", "errors" (of the recursions, relative), "loss" (of the last epoch) and "tau" (least, mean, largest).
        None stands for what is not finite: after a training that diverged, or where tanh is saturated in float64, so
        that derivatives by W and b are exactly zero.
    """
    train = data.load("digits")
    probes = data.load("digits", split="test").inputs[:PROBES].double()
    rows: list[dict[str, Any]] = []
    for start in STARTS[scheme]:
        for depth in depths:
            row: dict[str, Any] = {"start": start, "depth": depth}
            for kind in KINDS:
                network = build(scheme, start, kind, depth, seed)
                if kind == "fixed":
                    row |= {"before": growth(network, probes), "errors before": errors(network, probes[:1])}
                loss = _train(network, train, epochs, seed)
                tau = network.time_steps.tau.detach()
                row[kind] = {
                    "growth": growth(network, probes),
                    "errors": errors(network, probes[:1]),
                    "loss": loss,
                    "tau": [finite(value) for value in (tau.min(), tau.mean(), tau.max())],
                }
            rows.append(row)
    return {"rows": rows}


def build(scheme: str, start: str, kind: str, depth: int, seed: int) -> TimeVariableNetwork:
    """A network for the digits in float64, the same weights for fixed and learned steps.

    Example:
        >>> build("residual", "1/N", "fixed", 4, seed=0).time_steps.tau.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    torch.manual_seed(seed)
    init, constraint = 1.0 if start == "1" else 1.0 / depth, "fixed" if kind == "fixed" else "free"
    options: dict[str, Any] = {"activation": "tanh", "init": init, "constraint": constraint, "dtype": torch.float64}
    return _BUILDERS[scheme](64, WIDTH, 10, depth, **options)


def _train(network: TimeVariableNetwork, samples: data.Samples, epochs: int, seed: int) -> float | None:
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    pair = (samples.inputs.double(), samples.targets)
    options: dict[str, Any] = {"epochs": epochs, "seed": seed, "compile": "never", "progress": False}
    try:
        history = fit(network, pair, loss=cross_entropy, optimizer=optimizer, **options)
    except Diverged:
        return None
    return finite(history.epochs["train.loss"][-1])


def growth(network: TimeVariableNetwork, inputs: Tensor) -> dict[str, float | None]:
    """Orders of magnitude by which gradients grow from the last layer to the first, by part.

    Args:
        network: At least two layers.
        inputs: Samples, whose median counts.

    Example:
        With the dense scheme's structural growth taken out, steps that hardly act leave the propagator as it is:

        >>> network = densenet(2, 3, 1, 6, init=1e-9, dtype=torch.float64)
        >>> round(growth(network, torch.ones(1, 2, dtype=torch.float64))["propagator"], 6)
        0.0
    """
    found = gradient_propagation(network, inputs)
    values = {"propagator": found.largest, "W": found.weight, "b": found.bias, "tau": found.step}
    orders = {}
    for part, each in values.items():
        logs = (each.median(dim=1).values / found.structural_growth).log10()
        orders[part] = finite(logs[0 if part == "propagator" else 1] - logs[-1])
    return orders
