"""Early exit: each sample stops at the first intermediate output that is confident, and leaves the batch."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import Statistics, using

if TYPE_CHECKING:
    from .network import TimeVariableNetwork


class Prediction(NamedTuple):
    """What early exit answers.

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
    if not 0.0 < confidence <= 1.0:
        raise ValueError(f"confidence must lie in (0, 1], got {confidence!r}: it is a probability")
    looks = range(first, N) if depths is None else depths
    strangers = [k for k in looks if k not in range(first, N + 1)]
    if strangers:
        raise ValueError(f"depths must be numbers of layers in {first} .. {N}, got {sorted(strangers)}")
    if confidence == 1.0:
        looks = ()
    statistics = {} if statistics is None else statistics
    if not network.training:
        return _predict(network, inputs, confidence, frozenset(looks), statistics)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        return _predict(network, inputs, confidence, frozenset(looks), statistics)
    finally:
        for module, training in modes:
            module.training = training


def _predict(
    network: "TimeVariableNetwork",
    inputs: Tensor,
    confidence: float,
    looks: frozenset[int],
    statistics: Mapping[int, Sequence[Statistics]],
) -> Prediction:
    N = len(network.layers)
    maps = [(l, network.skips.past(l)) for l in range(N) if not network.skips.unchanged(l)]
    step = network.scheme.stepper(network.skips, network.time_steps.tau)
    states = [network.stem(inputs)]
    left = torch.arange(len(inputs), device=inputs.device)
    outputs: Tensor | None = None
    found = torch.full((len(inputs),), N, device=inputs.device)
    for k in range(N + 1):
        if k in looks or k == N:
            output = states[-1]
            with using(statistics.get(k, ()) if k < N else ()):
                for l, past in maps:
                    output = past(output) if l >= k else output
                output = network.head(output)
            if output.ndim != 2:
                raise ValueError(
                    f"outputs must have shape (batch, classes) for early exit, got {tuple(output.shape)}: use forward"
                )
            if outputs is None:
                outputs = output.new_empty(len(inputs), output.shape[1])
            done = confident(output, confidence) if k < N else torch.ones_like(left, dtype=torch.bool)
            gone = left[done]
            outputs[gone], found[gone] = output[done], k
            if len(gone):
                left = left[~done]
                states = [y[~done] for y in states]
        if k == N or (len(left) == 0 and outputs is not None and len(inputs) > 0):
            break
        y = step(k, network.layers[k], states)
        states = [*states, y] if network.scheme.remembers else [y]
    assert outputs is not None
    return Prediction(outputs, found)


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


def tail_of(network: "TimeVariableNetwork", depth: int) -> list[nn.Module]:
    """What lies between a state and its output: the remaining skips that are no identities, and the head.

    Args:
        network: The network.
        depth: Number k of layers before the state.

    Example:
        >>> from taulearn.nn import resnet_v2
        >>> [type(module).__name__ for module in tail_of(resnet_v2((1, 1), 10, widths=(4, 8)), 1)]
        ['PointwiseSkip', 'PooledHead']
    """
    skips = network.skips
    maps = [skips.past(l) for l in range(depth, len(network.layers)) if not skips.unchanged(l)]
    return [*maps, network.head]
