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
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 6:
        theorems 6.1, 6.4 and 6.6, examples 6.3 and 6.8.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from taulearn import data
from taulearn._undisturbed import evaluation
from taulearn.app.members import Member
from taulearn.caputo import l1_weights
from taulearn.depth.layers_and_states import differentiable
from taulearn.diagnostics import gradient_propagation
from taulearn.diagnostics.jacobian_products import Graph
from taulearn.nn import TimeVariableNetwork, densenet, feedforward, fractional_dnn, resnet
from taulearn.nn.builders import FullyConnected
from taulearn.nn.schemes import Fractional
from taulearn.training import Diverged, fit

from .recursions import (
    dense_gradients,
    feedforward_gradients,
    fractional_gradients,
    memory_terms,
    residual_gradients,
)

PARTS = ("propagator", "W", "b", "tau")
GRADIENT_STARTS = {"feedforward": ("1",), "residual": ("1", "1/N"), "dense": ("1",), "fractional": ("1", "1/N")}
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


def gradient_trainings(quick: bool = False, seeds: int = 1) -> Iterator[Member]:
    """One member for each scheme and seed, and one for the article's examples.

    Example:
        >>> [member.name for member in gradient_trainings(quick=True)][:2]
        ['gradients/examples/seed-0', 'gradients/feedforward/seed-0']
    """
    yield Member(EXAMPLES, 0, None, measure_examples)
    depths, epochs = (QUICK_DEPTHS, QUICK_EPOCHS) if quick else (DEPTHS, EPOCHS)
    for seed in range(seeds):
        for scheme in GRADIENT_STARTS:
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
    for start in GRADIENT_STARTS[scheme]:
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


_RECURSIONS: dict[str, Callable[..., dict[int, Tensor]]] = {
    "feedforward": feedforward_gradients,
    "residual": residual_gradients,
    "dense": dense_gradients,
    "fractional": fractional_gradients,
}


def errors(network: TimeVariableNetwork, x: Tensor) -> dict[str, float | None]:
    """Relative errors of the recursions for d y_N, the larger of those for layers 0 and N/2, by part.

    Args:
        network: Fully connected layers with tanh, in float64.
        x: One sample, (1, ...).

    Returns:
        Frobenius norms of the differences to automatic differentiation over those of the derivatives; in the fractional
        scheme "tau, as printed" besides, which leaves out what a step does through the weights of the memory.
    """
    N = len(network.layers)
    exact = by_autograd(network, x)
    found: dict[str, Tensor] = {}
    for j in (0, N // 2):
        for part, value in by_recursion(network, x, j).items():
            expected = exact[part.removesuffix(", as printed")][j]
            difference = (value - expected).norm()
            error = difference / expected.norm() if difference > 0 else difference  # 0 / 0 where tanh is saturated
            found[part] = torch.maximum(error, found.get(part, error))
    return {part: finite(error) for part, error in found.items()}


def finite(value: Any) -> float | None:
    """A number as JSON holds it: None for what is not finite.

    Example:
        >>> finite(2), finite(math.nan)
        (2.0, None)
    """
    return float(value) if math.isfinite(value) else None


def by_autograd(network: TimeVariableNetwork, x: Tensor) -> dict[str, list[Tensor]]:
    """d y_N / d y_{j+1}, d y_N / d W_j, d y_N / d b_j, d y_N / d tau_j for all j, each (width, entries)."""
    layers = [cast(FullyConnected, layer).linear for layer in network.layers]
    with evaluation(network), differentiable(network) as tau:
        graph = Graph(network.states(x), [[one.weight] for one in layers], [[one.bias] for one in layers], tau)
        states, others = graph.transposed(torch.eye(layers[-1].out_features))
    return {
        "propagator": states,
        "W": [others[one.weight].flatten(1) for one in layers],
        "b": [others[one.bias] for one in layers],
        "tau": list(others[tau].unsqueeze(-1).unbind(1)),
    }


@torch.no_grad()
def by_recursion(network: TimeVariableNetwork, x: Tensor, j: int) -> dict[str, Tensor]:
    """The same for one j by the recursions, started from the closed form of tanh layers; no graph is differentiated."""
    scheme, tau = network.scheme, network.time_steps.tau
    layers = [cast(FullyConnected, layer) for layer in network.layers]
    states = network.states(x, initial=True)
    f = [layer(y) for layer, y in zip(layers, states[:-1], strict=True)]
    D = [(1 - each**2).T * layer.linear.weight for each, layer in zip(f, layers, strict=True)]
    p = cast(float, scheme.step_power)
    size = tau[j] ** p * math.gamma(2 - p)
    slopes = torch.diag(1 - f[j][0] ** 2)
    starts = {
        "propagator": torch.eye(len(slopes)).to(tau),
        "W": size * torch.kron(slopes, states[j]),
        "b": size * slopes,
    }
    of_tau = p * tau[j] ** (p - 1) * math.gamma(2 - p) * f[j].T
    options: dict[str, Any] = {}
    if isinstance(scheme, Fractional):
        options = {"gamma": scheme.gamma, "memory_from": scheme.memory_from}
    recursion = partial(_RECURSIONS[scheme.name], jacobians=D, tau=tau, layer=j, **options)
    N = len(layers)
    together = recursion(torch.cat(list(starts.values()), dim=1))[N]
    found = dict(zip(starts, together.split([each.shape[1] for each in starts.values()], dim=1), strict=True))
    if not options:
        return found | {"tau": recursion(of_tau)[N]}
    carried = [torch.zeros_like(states[1][0]), *(y[0] for y in states[1:])]
    memory = memory_terms(carried, tau, j, **options)
    return found | {"tau": recursion(of_tau, memory=memory)[N], "tau, as printed": recursion(of_tau)[N]}


SLOPE = 99.0
EXAMPLE_STEPS = (1.0, 0.01)
"""tau_1 of example 6.3: one that lets the gradient explode, and one that keeps 1 + tau_1 SLOPE near 2."""
GAMMA = 0.5


def measure_examples(_: Path) -> dict[str, Any]:
    """Both examples.

    Args:
        _: The member's folder, which is not looked at.

    Returns:
        "6.3": for each tau_1 the W-, b- and tau-parts of layer 0 ("far") and of layer 1 ("near"); "6.8": relative
        differences between recursion and closed form, by scheme.
    """
    return {"6.3": {str(tau): example_63(tau) for tau in EXAMPLE_STEPS}, "6.8": example_68()}


def example_63(tau: float) -> dict[str, list[float]]:
    """d y_2 / d theta_0 and d y_2 / d theta_1 in the residual scheme, one node per layer.

    Args:
        tau: tau_1. Besides, tau_0 = 1, f_0 = f_1 = 2 with y_0 = y_1 = 1 and sigma' = 1, and the slope of f_1 is 99.

    Returns:
        The derivatives by W, b and tau of layer 0, "far", (1 + 99 tau) (1, 1, 2), and of layer 1, "near",
        (tau, tau, 2).

    Example:
        >>> example_63(1.0)["far"]
        [100.0, 100.0, 200.0]
    """
    steps = torch.tensor([1.0, tau], dtype=torch.float64)
    D = [torch.full((1, 1), slope, dtype=torch.float64) for slope in (0.0, SLOPE)]
    starts = [torch.tensor([[step, step, 2.0]], dtype=torch.float64) for step in steps.tolist()]
    far, near = (residual_gradients(start, D, steps, j)[2][0].tolist() for j, start in enumerate(starts))
    return {"far": far, "near": near}


def example_68() -> dict[str, float]:
    """d y_3 / d theta_0 by the recursions against the closed forms, with a_{l-1,k} where the article prints a_{l,k}.

    Example:
        >>> max(example_68().values()) < 1e-14
        True
    """
    generator = torch.Generator().manual_seed(0)
    D0, D1, D2, start = torch.randn(4, 2, 2, dtype=torch.float64, generator=generator)
    D = [D0, D1, D2]
    tau = torch.tensor([0.3, 0.2, 0.7], dtype=torch.float64)
    I, a = torch.eye(2, dtype=torch.float64), l1_weights(tau, GAMMA)
    _, t1, t2 = tau
    both = t1 * D1 + t2 * D2 + t1 * t2 * D2 @ D1
    s = tau**GAMMA * math.gamma(2 - GAMMA)

    first = (1 - a[1, 0]) * I + s[1] * D1
    fractional = ((1 - a[2, 1]) * I + s[2] * D2) @ first + (a[2, 1] - a[2, 0]) * I
    found = {
        "feedforward": (feedforward_gradients(start, D, tau, 0), t2 * D2 @ (t1 * D1)),
        "residual": (residual_gradients(start, D, tau, 0), I + both),
        "dense": (dense_gradients(start, D, tau, 0), 2 * I + both),
        "fractional": (fractional_gradients(start, D, tau, 0, gamma=GAMMA, memory_from=0), fractional),
    }
    return {name: _error(G[3], matrix @ start) for name, (G, matrix) in found.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
