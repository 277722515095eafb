"""How many layers a trained network needs: the smallest depth that is as good as the whole, up to a tolerance.

Whole: the network is cut after its first k layers. By stage, in networks whose skips are not all identities: each stage
is cut after its first layers, the last stage first, each as far as the tolerance allows with what was cut before.

The figures are those of the network as it is, and of the network as :meth:`DepthDecision.apply_` leaves it.

References:
    Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet training.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._counting import Mean, right_of, watched
from .._undisturbed import evaluation
from ..adaptivity.coarsen import PruneReport, prune
from ..calibration import recalibrate_
from ..nn.network import TimeVariableNetwork
from ..nn.pruned_models import prunable_of
from ..nn.time_steps import time_steps_of
from .layers_and_states import layers_of
from .profile import DepthProfile, Loss, check_tolerance, depth_profile, within
from .states import check_has_stages, scalar
from .truncate import check_cuts, truncate


@dataclass(frozen=True)
class DepthDecision:
    """Which layers to keep.

    Attributes:
        keep: Positions of the layers.
        by_stage: Whether each stage was cut on its own.
        figure: "accuracy", or "loss" where there are no classes, or fewer than two outputs.
        whole: The figure of the whole network.
        reached: The figure of the network with these layers alone.
        profile: The figures at all depths.
    """

    keep: tuple[int, ...]
    by_stage: bool
    figure: str
    whole: float
    reached: float
    profile: DepthProfile

    def __str__(self) -> str:
        number = len(self.profile.layers)
        first = f"the first {len(self.keep)} layers" if len(self.keep) > 1 else "the first layer"
        which = f"layers {', '.join(map(str, self.keep))}" if self.by_stage else first
        return f"{which} of {number}: {self.figure} {self.whole:.4f} -> {self.reached:.4f}"

    def apply_(self, model: nn.Module, calibration: Tensor | None = None) -> PruneReport:
        """Cut a model so.

        Args:
            model: The model that was looked at.
            calibration: What :func:`choose_layers` was given.

        Returns:
            What was deleted.
        """
        return _cut(model, self.keep, self.by_stage, calibration)


def choose_layers(
    network: nn.Module,
    inputs: Float[Tensor, "batch *features"],
    targets: Tensor,
    loss: Loss,
    *,
    tolerance: float = 0.002,
    by_stage: bool = False,
    calibration: Tensor | None = None,
    example_inputs: Any = None,
    batch_size: int = 250,
) -> DepthDecision:
    """The smallest depth whose figure is that of the whole network, up to a tolerance.

    Args:
        network: A TimeVariableNetwork, or a wrapped model; it stays as it is.
        inputs: Data that the network was not trained on, (batch, ...).
        targets: As for :func:`~taulearn.diagnostics.depth_profile`.
        loss: Likewise.
        tolerance: Loss of accuracy that is allowed, 0.002 being 0.2 points; without classes the share by which the loss
            may grow.
        by_stage: Whether each stage is cut on its own: its first layers stay, and so do all stages.
        calibration: As for :func:`~taulearn.diagnostics.depth_profile`; by stage all normalisations get new statistics.
        example_inputs: For the times in the profile. None: nothing is timed.
        batch_size: Samples at a time.

    Returns:
        The layers to keep, with the figures.

    Raises:
        ValueError: If the tolerance is negative, the constraint on the steps is "dependent", or, by stage, the scheme
            is one whose layers cannot be deleted; and as for :func:`~taulearn.diagnostics.depth_profile`.
        TypeError: As for :func:`~taulearn.diagnostics.depth_profile`.

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 2, 4, init=[0.5, 0.25, 0.0, 0.0])
        >>> x, z = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        >>> len(choose_layers(network, x, z, cross_entropy, tolerance=0.0).keep) <= 2
        True
    """
    check_has_stages(network, "network")
    check_tolerance(tolerance)
    steps = time_steps_of(network)
    check_cuts("network", steps, 1)
    profile = depth_profile(
        network,
        inputs,
        targets,
        loss,
        calibration=calibration,
        example_inputs=example_inputs,
        batch_size=batch_size,
    )
    figures = profile.loss if profile.accuracy is None else profile.accuracy
    name = "loss" if profile.accuracy is None else "accuracy"
    whole = float(figures[-1])

    def figure(keep: Sequence[int]) -> float:
        cut = copy.deepcopy(network)
        _cut(cut, keep, by_stage, calibration)
        return _figure(cut, inputs, targets, loss, batch_size, accuracy=profile.accuracy is not None)

    def good(found: float) -> bool:
        return within(torch.tensor([found, whole], dtype=torch.float64), name == "accuracy", tolerance)[0]

    if not by_stage:
        depth, reached = _depth(network, profile, tolerance, figure, good)
        return DepthDecision(tuple(range(depth)), False, name, whole, reached, profile)
    kept, reached = [list(stage) for stage in stages_of(network)], whole
    for s in reversed(range(len(kept))):
        for number in range(1, len(kept[s])):
            keep = [l for i, stage in enumerate(kept) for l in (stage[:number] if i == s else stage)]
            found = figure(keep)
            if good(found):
                kept[s], reached = kept[s][:number], found
                break
    return DepthDecision(tuple(l for stage in kept for l in stage), True, name, whole, reached, profile)


def _depth(
    network: nn.Module,
    profile: DepthProfile,
    tolerance: float,
    figure: Callable[[Sequence[int]], float],
    good: Callable[[float], bool],
) -> tuple[int, float]:
    """The smallest depth at which the network can be cut, and its figure.

    The profile tells, unless the cut changes the steps that are left: on a simplex they are projected, so that networks
    are cut and looked at.
    """
    figures = profile.loss if profile.accuracy is None else profile.accuracy
    whole, number = float(figures[-1]), len(profile.layers)
    fixed = () if isinstance(network, TimeVariableNetwork) else prunable_of(network).fixed_layers()
    least = 1 + max(fixed, default=0)
    if not time_steps_of(network).rule.deletion_note:
        fits = within(figures, profile.accuracy is not None, tolerance)
        depth = next(k for k, fit in zip(profile.depths, fits, strict=True) if fit and k >= least)
        return depth, float(figures[profile.depths.index(depth)])
    for depth in range(least, number):
        found = figure(range(depth))
        if good(found):
            return depth, found
    return number, whole


def _cut(model: nn.Module, keep: Sequence[int], by_stage: bool, calibration: Tensor | None) -> PruneReport:
    report = prune(model, keep=keep) if by_stage else truncate(model, len(keep))
    if report and calibration is not None:
        recalibrate_(model, calibration, within=None if by_stage else getattr(model, "head", None))
    return report


def stages_of(network: nn.Module) -> list[range]:
    """The stages of a network: layers in a row of which only the first may have a skip that is no identity."""
    number = len(layers_of(network))
    if isinstance(network, TimeVariableNetwork):
        starts = [l for l in range(1, number) if not network.skips.unchanged(l)]
    else:
        starts = [l for l in sorted(prunable_of(network).fixed_layers()) if l > 0]
    return [range(a, b) for a, b in pairwise([0, *starts, number])]


@torch.no_grad()
def _figure(
    network: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, batch_size: int, *, accuracy: bool
) -> float:
    mean, right, number = Mean(), 0.0, 0.0
    with evaluation(network):
        for x, z in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            output = network(x)
            value, counting = watched(loss, output, z)
            mean.add(scalar(value), counting, z)
            if accuracy:
                of_batch = right_of(output, z, counting.ignored)
                right, number = right + float(of_batch[0]), number + float(of_batch[1])
    return right / number if accuracy else float(mean.value())
