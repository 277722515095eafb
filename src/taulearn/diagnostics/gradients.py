"""Propagation of gradients: how y_N depends on each state y_j and on each layer's parameters.

For narrow states the Jacobians are built row by row and decomposed. For wide ones they are only multiplied with: their
singular values by the Golub-Kahan-Lanczos bidiagonalisation, whose k-th step makes one product with J and one with J^T,
their Frobenius norms by products with random signs w, since E norm(J^T w)^2 = norm(J)_F^2.

References:
    Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks, section 6.
    Golub, Kahan (1965), Calculating the singular values and pseudo-inverse of a matrix.
    Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._errors import positive_integer, unknown_name
from .._table import format_table
from .._undisturbed import evaluation
from ..depth.layers_and_states import check_batch, differentiable, layers_of, scheme_of, states_of
from ..nn.pruned_models import prunable_of
from ..nn.time_steps import time_steps_of
from .jacobian_products import Graph, by_matrices, by_products

METHODS = ("auto", "exact", "products")
# Widths up to it: "exact". A decomposition then takes milliseconds, and the rows fit into memory.
_EXACT_WIDTH = 128
_FIELDS = ("largest", "smallest", "state", "weight", "bias", "step")


@dataclass(frozen=True)
class GradientPropagation:
    """Row l is layer l (its output is y_{l+1}), column s is sample s; prints as a table of medians over the samples.

    Attributes:
        scheme: Name of the scheme.
        layers: Numbers of the layers at the start.
        tau: Effective steps, (N,).
        largest: Largest singular value of d y_N / d y_{l+1}, (N, samples).
        smallest: Its smallest singular value; from products an upper bound of it.
        state: Its Frobenius norm.
        weight: Frobenius norm of d y_N / d W_l, over all matrices and kernels of layer l.
        bias: Frobenius norm of d y_N / d b_l, over all vectors of layer l.
        step: Norm of d y_N / d tau_l, tau being the effective steps, before their constraint.
        method: "exact" or "products".
        growth: The scheme's :attr:`~taulearn.nn.Scheme.growth`.
    """

    scheme: str
    layers: tuple[int, ...]
    tau: Tensor
    largest: Tensor
    smallest: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor
    step: Tensor
    method: str
    growth: float = 1.0

    @property
    def structural_growth(self) -> Tensor:
        """The factor of d y_N / d y_{l+1} that no tau >= 0 can damp: 2^(N-l-2) in the dense scheme, else 1; (N,)."""
        N = len(self.layers)
        return self.growth ** torch.arange(N - 2, -2, -1, dtype=torch.float64).clamp(min=0)

    def __str__(self) -> str:
        medians = [getattr(self, name).median(dim=1).values.tolist() for name in _FIELDS]
        headings = ("s_max", "s_min", "norm", "norm W", "norm b", "norm tau")
        columns: dict[str, Sequence[object]] = {"layer": self.layers, "tau": self.tau.tolist()}
        columns.update(zip(headings, medians, strict=True))
        how = "" if self.method == "exact" else "; estimated from products, s_min is an upper bound"
        title = f"{self.scheme}: derivatives of y_N, medians over {self.largest.shape[1]} samples{how}"
        return f"{title}\n{format_table(columns)}"


def gradient_propagation(
    network: nn.Module,
    inputs: Float[Tensor, "batch *features"],
    *,
    method: str = "auto",
    steps: int = 24,
    probes: int = 32,
    seed: int = 0,
) -> GradientPropagation:
    """Norms and singular values of d y_N / d y_{l+1}, and norms of d y_N / d theta_l, for every layer and sample.

    The model is differentiated in evaluation mode and comes back as it was.

    Args:
        network: A TimeVariableNetwork of any scheme, or any model with ``time_steps``, ``layers`` and ``states(x)``,
            whose states are the tensors that its later layers are computed from.
        inputs: A few samples, (samples, ...); each is passed through on its own.
        method: "exact" (Jacobians are built), "products" (only multiplied with: for wide states), or "auto": exact up
            to 128 values per state.
        steps: Products with J and J^T per Jacobian; as many as the state has values make the singular values exact.
        probes: Random products for the norms, whose relative error is at most about 1/sqrt(2 probes); those with
            respect to tau are exact.
        seed: Of the random products.

    Returns:
        The norms, in float64; NaN or inf where the derivatives leave the range of the network's type.

    Raises:
        TypeError: If ``network`` has no time steps, layers or states.
        ValueError: If the method is unknown, ``inputs`` is no batch, or the states are copies that later layers do not
            depend on.

    References:
        Antil, Diaz, Herberg (2022), section 6.

    Example:
        With zero weights a residual layer passes everything on:

        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> for parameter in network.layers.parameters():
        ...     _ = nn.init.zeros_(parameter)
        >>> gradient_propagation(network, torch.ones(2, 2)).largest[:, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    for name, value in {"steps": steps, "probes": probes}.items():
        positive_integer(name, value)
    states = states_of(network)
    check_batch(inputs)
    layers = layers_of(network)
    weights: list[list[Tensor]] = [[p for p in layer.parameters() if p.ndim > 1] for layer in layers]
    biases: list[list[Tensor]] = [[p for p in layer.parameters() if p.ndim <= 1] for layer in layers]
    values = []
    with evaluation(network), differentiable(network) as tau:
        for s in range(len(inputs)):
            graph = Graph(states(inputs[s : s + 1]), weights, biases, tau)
            if method == "auto":
                method = "exact" if max(y.numel() for y in graph.states) <= _EXACT_WIDTH else "products"
            if method == "exact":
                values.append(by_matrices(graph))
            else:
                values.append(by_products(graph, steps, probes, torch.Generator().manual_seed(seed + s)))
    time_steps = time_steps_of(network)
    return GradientPropagation(
        scheme=scheme_of(network)[0],
        layers=time_steps.origin,
        tau=time_steps.tau.detach().double().cpu(),
        method=method,
        growth=getattr(getattr(prunable_of(network), "scheme", None), "growth", 1.0),
        **dict(zip(_FIELDS, torch.stack(values, dim=-1).detach().cpu(), strict=True)),
    )
