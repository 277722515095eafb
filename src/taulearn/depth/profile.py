"""How much of its depth a network uses: figures of the network cut after each layer, and what each layer adds.

References:
    Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet training.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._counting import Mean, counted, right_of, watched
from .._errors import is_number, positive_integer
from .._table import format_table
from .._undisturbed import evaluation
from ..adaptivity.criteria import moved_by_steps
from ..calibration import Statistics, check_calibration, statistics_of, using
from ..nn.early_exit import has_classes, tail_of
from ..nn.network import TimeVariableNetwork
from ..nn.time_steps import time_steps_of
from .cut_size_and_speed import parameters, times
from .layers_and_states import check_batch
from .states import check_has_stages, scalar, stage_outputs
from .wrapped_states import record_states

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DepthProfile:
    """Row k is the network cut after k layers; prints as a table.

    Attributes:
        depths: The numbers k: 1 .. N, or 0 .. N where the skips carry the input.
        loss: Loss of the cut networks, (len(depths),).
        accuracy: Share of samples with the right class, or None if the targets are no classes, or the network has no
            output for each.
        parameters: Numbers of variables of the cut networks.
        milliseconds: Median times of a forward pass of the cut networks, or None without example inputs.
        layers: Numbers of the layers at the start, (N,).
        contribution: Root mean square over the samples of what layer l adds, (N,): norm(y_{l+1} - y_l) where the step
            alone leads from the one to the other; norm(s_l f_l(y_l)), s_l = tau_l or tau_l^gamma Gamma(2-gamma), where
            it remembers earlier states or the skip is not the identity; for a wrapped block norm(tau_l (B(x) - x)).
        relative: The same divided by that of norm(y_{l+1}), (N,).
        distance: Root mean square of norm(y_k - y_N), divided by that of the first of these states, (len(depths),): 1
            at first, 0 at last; nan where y_k has not the shape of y_N. Where it hardly changes over many layers the
            state rests, as on a turnpike, and those layers could go.
    """

    depths: tuple[int, ...]
    loss: Tensor
    accuracy: Tensor | None
    parameters: tuple[int, ...]
    milliseconds: tuple[float, ...] | None
    layers: tuple[int, ...]
    contribution: Tensor
    relative: Tensor
    distance: Tensor

    def smallest(self, tolerance: float) -> int:
        """The smallest depth whose accuracy falls short of the whole network's by at most ``tolerance``.

        Without classes: whose loss exceeds that of the whole network by at most this share of it.

        Args:
            tolerance: A number >= 0; 0.002 are 0.2 points of accuracy.

        Returns:
            A number of layers >= 1.

        Raises:
            ValueError: If the tolerance is negative or not finite, or the loss of the whole network is not finite.

        Example:
            >>> empty = torch.zeros(3)
            >>> accuracy = torch.tensor([0.5, 0.898, 0.9])
            >>> profile = DepthProfile((1, 2, 3), empty, accuracy, (9, 12, 15), None, (0, 1, 2), *[empty] * 3)
            >>> profile.smallest(0.01), profile.smallest(0.0)
            (2, 3)
        """
        fits = within(self.loss if self.accuracy is None else self.accuracy, self.accuracy is not None, tolerance)
        return next(k for k, fit in zip(self.depths, fits, strict=True) if fit and k > 0)

    def __str__(self) -> str:
        blank = [None] if self.depths[0] == 0 else []
        columns: dict[str, list[object]] = {"depth": [*self.depths], "loss": [*self.loss.tolist()]}
        if self.accuracy is not None:
            columns["accuracy"] = [*self.accuracy.tolist()]
        columns["parameters"] = [*self.parameters]
        if self.milliseconds is not None:
            columns["ms"] = [*self.milliseconds]
        columns["distance"] = [None if math.isnan(each) else each for each in self.distance.tolist()]
        columns["last layer"] = [*blank, *self.layers]
        columns["contribution"] = [*blank, *self.contribution.tolist()]
        columns["relative"] = [*blank, *self.relative.tolist()]
        return format_table(columns)


def within(figures: Tensor, larger_is_better: bool, tolerance: float) -> list[bool]:
    """Which figures are as good as the last one, up to a tolerance: absolute in an accuracy, relative in a loss."""
    check_tolerance(tolerance)
    if not math.isfinite(figures[-1]):
        raise ValueError(
            f"the loss of the whole network must be finite, got {float(figures[-1])}: no depth can be compared with "
            "it; look for such numbers in inputs, targets and parameters"
        )
    figures, slack = figures.double(), 1e-9
    if larger_is_better:
        return (figures >= figures[-1] - tolerance - slack).tolist()
    last = figures[-1]
    return (figures <= last + tolerance * last.abs() * (1 + slack)).tolist()


def check_tolerance(tolerance: object) -> None:
    """Refuse what is no tolerance."""
    if not (is_number(tolerance) and 0.0 <= tolerance < math.inf):
        raise ValueError(
            f"tolerance must be a finite number >= 0, got {tolerance!r}: 0.002 allows to lose 0.2 points of accuracy"
        )


def depth_profile(
    network: nn.Module,
    inputs: Float[Tensor, "batch *features"],
    targets: Tensor,
    loss: Loss,
    *,
    calibration: Tensor | None = None,
    example_inputs: Any = None,
    batch_size: int = 250,
) -> DepthProfile:
    """Figures of the network cut after each layer, and the size of what each layer adds to the state.

    The cut network has tau_l = 0 for all l >= k: the state y_k is carried by the remaining skips to the head. All come
    from one forward pass, in evaluation mode.

    Args:
        network: A TimeVariableNetwork of any scheme, or a wrapped model.
        inputs: (batch, ...).
        targets: Class numbers (batch,), for which the accuracy is computed too if there are two outputs or more, or
            anything ``loss`` takes.
        loss: Maps (output, target) to a scalar; batches weigh what they count in it, as in
            :func:`taulearn.training.evaluate`.
        calibration: Inputs of some hundreds of training samples, on which batch normalisation in skips and head gets
            statistics of its own for each depth before the last (:func:`depth_statistics`). None: the running ones,
            which are those of the last state. Not for wrapped models.
        example_inputs: A batch on which forward passes of every cut network are timed. None: nothing is timed.
        batch_size: Samples at a time, which bounds memory: all states of a batch are there at once.

    Returns:
        The profile; its last row is the whole network as it is, with its running statistics.

    Raises:
        TypeError: If ``network`` is neither, or the loss returns no tensor.
        ValueError: If inputs and targets have different numbers of samples, the loss is not a scalar, or a wrapped
            model is to be calibrated, or the batch for it is empty or gives no finite statistics.

    References:
        Püttschneider, Heilig, Fischer, Faulwasser (2025), for the intermediate outputs.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 2, 3, init=[0.5, 0.25, 0.0])
        >>> profile = depth_profile(network, torch.ones(4, 2), torch.zeros(4, dtype=torch.long), cross_entropy)
        >>> profile.depths, bool(profile.loss[1] == profile.loss[2]), profile.contribution[2].item()
        ((1, 2, 3), True, 0.0)
    """
    check_has_stages(network, "network")
    check_batch(inputs)
    if len(targets) != len(inputs):
        raise ValueError(f"targets must have one entry per sample, got {len(targets)} for {len(inputs)} inputs")
    batch_size = positive_integer("batch_size", batch_size)
    if calibration is not None:
        check_calibration("calibration", calibration)
    classes = targets.ndim == 1 and not targets.is_floating_point()
    depths: tuple[int, ...] = ()
    mean, sums = Mean(), [torch.zeros(())] * 4
    with evaluation(network), torch.no_grad():
        own = {} if calibration is None else depth_statistics(network, calibration)
        for x, z in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            outputs, states, added = _pass(network, x, own)
            depths = tuple(outputs)
            classes = classes and has_classes(outputs[depths[-1]])
            found = [watched(loss, output, z) for output in outputs.values()]
            counting = found[-1][1]
            mean.add(torch.stack([scalar(value) for value, _ in found]), counting, z)
            right = [right_of(y, z, counting.ignored)[0] for y in outputs.values()] if classes else []
            number = counted(z, counting.ignored).sum()
            ends = states[-len(added) :]
            squares = [torch.stack([y.double().square().sum() for y in ys]) for ys in (added, ends)]
            rows = [states[k - len(added) - 1] for k in depths]
            new = (torch.stack([*right, number]).double(), *squares, squared_distances(rows))
            sums = [total.to(each) + each for total, each in zip(sums, new, strict=True)]
        timed = None if example_inputs is None else tuple(times(network, depths, example_inputs))
    counts, of_added, of_states, apart = (total.cpu() for total in sums)
    farthest = next((each for each in apart if not each.isnan()), apart[-1])
    return DepthProfile(
        depths=depths,
        loss=mean.value().cpu(),
        accuracy=counts[:-1] / counts[-1] if classes else None,
        parameters=tuple(parameters(network, k) for k in depths),
        milliseconds=timed,
        layers=time_steps_of(network).origin,
        contribution=(of_added / len(inputs)).sqrt(),
        relative=(of_added / of_states).sqrt(),
        distance=torch.where(apart == 0.0, apart, (apart / farthest).sqrt()),
    )


def squared_distances(states: Sequence[Tensor]) -> Tensor:
    """The squares of norm(y_k - y_N), summed over the samples; nan where the shapes differ.

    Args:
        states: Some y_k, (batch, ...), the last of them y_N.

    Returns:
        One number a state, float64.

    Example:
        >>> squared_distances([torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 1)]).tolist()
        [nan, 2.0, 0.0]
    """
    last = states[-1].double()
    nan = last.new_full((), math.nan)
    return torch.stack([(y.double() - last).square().sum() if y.shape == last.shape else nan for y in states])


@torch.no_grad()
def depth_statistics(network: nn.Module, inputs: Tensor) -> dict[int, list[Statistics]]:
    """Statistics for batch normalisation in skips and head, for each depth: those of a network that was cut there.

    In training with a stage cost each state is normalised by its own statistics, and the running ones are those of the
    last state. Early outputs want their own.

    Args:
        network: A TimeVariableNetwork.
        inputs: Some hundreds of training samples.

    Returns:
        For each number k of layers the statistics of the normalisations behind the state y_k; empty lists without any.
        Also for k = N, where early exit and profiles go by the running ones, as the network itself does.

    Raises:
        ValueError: If the model is a wrapped one, whose normalisations behind a block cannot be told from others, or
            the batch is empty or gives statistics that are not finite.

    Example:
        >>> from taulearn.nn import resnet_v2
        >>> network = resnet_v2((2, 2), 10, 1, (4, 8))
        >>> found = depth_statistics(network, torch.rand(50, 1, 8, 8))
        >>> sorted(found), [statistics.mean.shape for statistics in found[1]]
        ([0, 1, 2, 3, 4], [torch.Size([8])])
        >>> prediction = network.predict(torch.rand(5, 1, 8, 8), 0.9, statistics=found)
    """
    if not isinstance(network, TimeVariableNetwork):
        raise ValueError(
            "calibration must be None for a wrapped model, whose normalisations cannot be told from those of its "
            "blocks; cut it and call taulearn.calibration.recalibrate_"
        )
    check_calibration("inputs", inputs)
    with evaluation(network):
        states = network.states(inputs, initial=True)
        first = 0 if network.skips.from_input else 1
        return {k: statistics_of(tail_of(network, k), states[k]) for k in range(first, len(states))}


def _pass(
    network: nn.Module, x: Tensor, own: Mapping[int, Sequence[Statistics]]
) -> tuple[dict[int, Tensor], list[Tensor], list[Tensor]]:
    """Outputs yhat_k, states y_0 .. y_N, and what each layer adds."""
    if not isinstance(network, TimeVariableNetwork):
        arrivals: list[Tensor] = []
        output, states = record_states(network, x, arrivals=arrivals)
        added = [y - a for y, a in zip(states[1:], arrivals, strict=True)]
    else:
        values: dict[int, Tensor] = {}
        start, tau = network.stem(x), network.time_steps.tau
        # one layer may stand in several places
        recorded = [_Recorded(layer, values, l) for l, layer in enumerate(network.layers)]
        states = [start, *network.scheme.states(start, recorded, network.skips, tau)]
        output = network.head(states[-1])
        factors = network.scheme.factor(tau)
        moved = moved_by_steps(network)
        pairs = enumerate(pairwise(states))
        added = [z - y if l in moved else factors[l].to(values[l].dtype) * values[l] for l, (y, z) in pairs]
    return outputs_at(network, x, states, output, own), states, added


class _Recorded(nn.Module):
    """A layer that keeps what it answered last."""

    def __init__(self, layer: nn.Module, values: dict[int, Tensor], number: int) -> None:
        super().__init__()
        self.layer, self.values, self.number = layer, values, number

    def forward(self, y: Tensor) -> Tensor:
        value: Tensor = self.layer(y)
        self.values[self.number] = value
        return value


def outputs_at(
    network: nn.Module, x: Tensor, states: Sequence[Tensor], output: Tensor, own: Mapping[int, Sequence[Statistics]]
) -> dict[int, Tensor]:
    """Outputs yhat_k from states, before the last with statistics of their own if there are any; the last as it is."""
    number = time_steps_of(network).num_steps
    if not any(own.values()):
        return {**stage_outputs(network, x, states), number: output}
    assert isinstance(network, TimeVariableNetwork)
    outputs = {}
    for k in range(min(own), number):
        with using(own[k]):
            outputs[k] = nn.Sequential(*tail_of(network, k))(states[k - number - 1])
    return {**outputs, number: output}
