"""Early exit: each sample stops at the first intermediate output that is confident, and leaves the batch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._errors import is_number
from .._undisturbed import evaluation
from ..calibration import Statistics, norms_in, using
from .schemes import Scheme, pair_of

if TYPE_CHECKING:
    from .network import TimeVariableNetwork


class Prediction(NamedTuple):
    """The answer of early exit.

    Attributes:
        outputs: The output each sample stopped at, (batch, classes).
        depths: The number of layers that were computed for it, (batch,).

    Example:
        >>> Prediction(torch.eye(2), torch.tensor([1, 3])).classes
        tensor([0, 1])
    """

    outputs: Tensor
    depths: Tensor

    @property
    def classes(self) -> Tensor:
        """The class with the largest output, (batch,)."""
        return self.outputs.argmax(1)


@torch.no_grad()
def predict(
    network: "TimeVariableNetwork",
    inputs: Tensor,
    confidence: float,
    *,
    depths: Collection[int] | None = None,
    statistics: Mapping[int, Sequence[Statistics]] | None = None,
) -> Prediction:
    """See :meth:`TimeVariableNetwork.predict`; the network's mode is put back.

    Each look at the samples that are left waits for the device.
    """
    N, first = len(network.layers), 0 if network.skips.from_input else 1
    check_confidence("confidence", confidence)
    if depths is not None and not (isinstance(depths, Iterable) and not isinstance(depths, str)):
        raise TypeError(f"depths must be a collection of numbers of layers, got {depths!r}: write for instance [2, 4]")
    looks = list(range(first, N) if depths is None else depths)
    strangers = [k for k in looks if k not in range(first, N + 1)]
    if strangers:
        raise ValueError(
            f"depths must be numbers of layers in {first} .. {N}, got {sorted(strangers, key=repr)}: leave those out"
        )
    looks = [] if confidence == 1.0 else [int(k) for k in looks]
    statistics = {} if statistics is None else statistics
    _check_statistics(network, statistics, range(first, N + 1))
    with evaluation(network) if any(module.training for module in network.modules()) else nullcontext():
        return _predict(network, inputs, confidence, frozenset(looks), statistics)


def _predict(
    network: "TimeVariableNetwork",
    inputs: Tensor,
    confidence: float,
    looks: frozenset[int],
    statistics: Mapping[int, Sequence[Statistics]],
) -> Prediction:
    N = len(network.layers)
    maps = [(l, network.skips.past(l)) for l in range(N) if not network.skips.unchanged(l)]
    scheme, tau, y = network.scheme, network.time_steps.tau, network.stem(inputs)
    whole = scheme.states(y, network.layers, network.skips, tau) if scheme.runs_whole else None
    carry, coefficients = scheme.init(y), scheme.prepare(tau)
    left = torch.arange(len(inputs), device=inputs.device)
    outputs: Tensor | None = None
    found = torch.full((len(inputs),), N, device=inputs.device)
    for k in range(N + 1):
        if k in looks or k == N:
            output = y
            with using(statistics.get(k, ()) if k < N else ()):
                for l, past in maps:
                    output = past(output) if l >= k else output
                output = network.head(output)
            check_classes(output)
            if outputs is None:
                outputs = output.new_empty(len(inputs), output.shape[1])
            done = confident(output, confidence) if k < N else torch.ones_like(left, dtype=torch.bool)
            gone = left[done]
            outputs[gone], found[gone] = output[done], k
            if len(gone) and k < N:
                stay = (~done).nonzero().squeeze(1)
                left, y, carry = tree_map(partial(_samples, scheme, len(left), stay), (left, y, carry))
        if k == N or (len(left) == 0 and outputs is not None and len(inputs) > 0):
            break
        if whole is None:
            y, carry = pair_of(scheme, scheme.step(k, network.layers[k], y, carry, network.skips, coefficients))
        else:
            y = whole[k][left]
    assert outputs is not None
    return Prediction(outputs, found)


def _samples(scheme: Scheme, number: int, index: Tensor, leaf: Any) -> Any:
    """Some of a number of samples in a part of a carry, which must have one entry for each of them first."""
    if leaf is None:
        return None
    shape = getattr(leaf, "shape", (number,))  # a fractional memory has none
    if not hasattr(leaf, "index_select") or shape[:1] != (number,):
        found = f"one of shape {tuple(shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise ValueError(
            f"the carry of {type(scheme).__name__} must hold tensors with the batch first, here ({number}, ...), "
            f"got {found}: early exit drops samples from it; what all samples share belongs into prepare"
        )
    return leaf.index_select(0, index)


def check_confidence(argument: str, value: object) -> None:
    """Refuse what is no confidence."""
    if not (is_number(value) and 0.0 < value <= 1.0):
        raise ValueError(f"{argument} must lie in (0, 1], got {value!r}: it is a probability, such as 0.9")


def has_classes(output: object) -> bool:
    """Whether outputs are figures of two classes or more for each sample."""
    return isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] >= 2


def check_classes(output: object) -> None:
    """Refuse outputs that have no probabilities of classes."""
    if not has_classes(output):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"outputs must have shape (batch, classes) for early exit, got {found}: it goes by the "
            "softmax over two classes or more; use forward, or give the network an output for each class"
        )


def confident(output: Tensor, confidence: float) -> Tensor:
    """Which outputs have a class whose softmax probability reaches the confidence.

    Args:
        output: (batch, classes).
        confidence: A probability; 1 is never reached, as a probability may round to 1.

    Returns:
        (batch,), bool.

    Example:
        >>> confident(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), 0.9)
        tensor([False, True])
    """
    if confidence >= 1.0:
        return torch.zeros(len(output), dtype=torch.bool, device=output.device)
    dtype = torch.float32 if output.dtype in (torch.float16, torch.bfloat16) else output.dtype
    return output.softmax(1, dtype=dtype).amax(1) >= confidence


def _check_statistics(network: "TimeVariableNetwork", statistics: object, depths: range) -> None:
    """Refuse statistics that would have no effect, or that of another depth: another network's, or older ones."""
    remedy = "call taulearn.diagnostics.depth_statistics on it again"
    if not isinstance(statistics, Mapping):
        raise TypeError(
            f"statistics must map numbers of layers to statistics, got {type(statistics).__name__}: take those of "
            "taulearn.diagnostics.depth_statistics"
        )
    strangers = [k for k in statistics if k not in depths]
    if strangers:
        raise ValueError(
            f"statistics must be those of this network as it is now, with {depths[-1]} layers, got some for "
            f"{strangers[0]!r} layers: {remedy}"
        )
    skips, norms = network.skips, set(norms_in([network.head]))
    for k in reversed(depths):
        if k < depths[-1] and not skips.unchanged(k):
            norms |= set(norms_in([skips.past(k)]))
        found = statistics.get(k, ())
        several = isinstance(found, Iterable) and all(isinstance(each, Statistics) for each in found)
        if not several or {each.norm for each in found} - norms:
            raise ValueError(
                f"statistics must be those of normalisations of this network behind {k} layers, got others (a copy "
                f"of the network has its own): {remedy}"
            )


def tail_of(network: "TimeVariableNetwork", depth: int) -> list[nn.Module]:
    """The modules between a state and its output: the remaining skips that are no identities, and the head."""
    skips = network.skips
    maps = [skips.past(l) for l in range(depth, len(network.layers)) if not skips.unchanged(l)]
    return [*maps, network.head]
