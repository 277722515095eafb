"""Faults of the published code of Herberg et al., imitated, so that a reader sees what they changed.

Herberg, Herzog, Koehne (2023) printed their curves from a program that differs from their formulas. Imitated is what
changes how a network trains. A training with the hooks :data:`AS_PUBLISHED` differs from one without in these points,
and in no other:

    fixed        in the residual network the first step alone is fixed, the others train
    dependent    the last step is copied after each update: no gradient flows through T - sum of the others
    fractional   the weights a_{l,j} are computed without gradient, so that tau's gradient lacks their part; the memory
                 starts at the first difference (``memory_from = 0``)
    pruning      once an epoch; the smallest magnitude decides whether a layer goes, but the layer with the most
                 negative step is the one that does

Not imitated is what changes a figure or a file but no training, or what no training here meets:

    test loss    contains the penalties there, in a record never; the table ``as-published`` of the suite
                 ``herberg2023`` adds them
    record       shows T - sum of the others for a bounded dependent step, not the step that is used; here both are
                 kept, as ``raw_tau`` and ``tau``
    projection   of the fractional steps to at least 1e-4 before each forward pass; here after each update, by formulas
                 and as published, so that every forward pass sees the same steps
    state dict   lacks a fixed step; here it is there
    start        an initial step of 0.0 becomes random; here it is 0.0, and no setting of the suite starts there

The outputs of a network do not depend on any of this: what is saved is an ordinary network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from taulearn import caputo, functional
from taulearn.adaptivity.policies import Pruning
from taulearn.app.config import TrainConfig
from taulearn.app.train import Hooks
from taulearn.nn.network import TimeVariableNetwork
from taulearn.nn.schemes import Fractional
from taulearn.nn.skips import Skips
from taulearn.nn.time_steps import TimeSteps


class PublishedSteps(TimeSteps):
    """Time steps whose first or whose dependent last one lets no gradient through.

    Example:
        >>> steps = PublishedSteps(TimeSteps(3, constraint="dependent"))
        >>> torch.autograd.grad(steps.tau[2], steps.values, allow_unused=True, materialize_grads=True)
        (tensor([0., 0.]),)
    """

    def __init__(self, steps: TimeSteps, *, first_fixed: bool = False) -> None:
        super().__init__(constraint=steps.constraint, init=steps.tau.detach(), **_common(steps))
        self.first_fixed = first_fixed

    @property
    def raw_tau(self) -> Float[Tensor, " num_steps"]:
        """The steps before a dependent last one is bounded."""
        if self.first_fixed:
            return torch.cat([self.values[:1].detach(), self.values[1:]])
        if self.constraint == "dependent":
            return torch.cat([self.values, (self.horizon - self.values.detach().sum()).unsqueeze(0)])
        return self.values

    @property
    def tau(self) -> Float[Tensor, " num_steps"]:
        """The steps that the network uses."""
        raw = self.raw_tau
        if self.constraint != "dependent" or self.lower_bound is None:
            return raw
        return torch.cat([raw[:-1], raw[-1:].clamp(min=self.lower_bound)])


def _common(steps: TimeSteps) -> dict[str, Any]:
    """What other steps have in common with these: all but constraint and values."""
    of_tensor = {"dtype": steps.values.dtype, "device": steps.values.device}
    return {"num_steps": steps.num_steps, "horizon": steps.horizon, "lower_bound": steps.lower_bound, **of_tensor}


class PublishedFractional(Fractional):
    """The fractional scheme with weights that do not depend on tau for autograd.

    Example:
        >>> PublishedFractional(gamma=0.5, memory_from=0).memory_from
        0
    """

    def prepare(self, tau: Tensor) -> Any:
        return tau, caputo.l1_weights(tau.detach(), self.gamma, validate=False)

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        tau, weights = coefficients
        states = (*carry[0], y)
        memory = self._memory(weights[l], states, skips) if l else None
        carried = skips(y, l, l + 1)
        return functional.fractional_step(carried, memory, f(y), tau[l], self.gamma), (states, None)


@dataclass(frozen=True)
class AsPublished(Hooks):
    """Hooks of :func:`taulearn.experiments.train` that imitate the published program.

    Example:
        >>> AS_PUBLISHED.check(TrainConfig(constraint="dependent", proximal=True, l1=0.01))
        Traceback (most recent call last):
        ValueError: proximal must be left out with as_published: that program takes subgradients
    """

    name: str = "as_published"

    def check(self, config: TrainConfig) -> None:
        """Refuse settings that the faults do not touch, or that the program does not have."""
        for reason in _never_published(config):
            raise ValueError(reason)

    def adapt_(self, network: TimeVariableNetwork, config: TrainConfig) -> None:
        """Put the published steps and weights into a freshly made network."""
        steps = network.time_steps
        first_fixed = config.constraint == "fixed" and config.network == "resnet"
        if first_fixed:
            steps = TimeSteps(init=steps.tau.detach(), **_common(steps))
        network.time_steps = PublishedSteps(steps, first_fixed=first_fixed)
        scheme = network.scheme
        if isinstance(scheme, Fractional):
            network.scheme = PublishedFractional(scheme.gamma, scheme.memory_from)

    def pruning(self, config: TrainConfig) -> Pruning | None:
        """The published rule, once an epoch, where there is to be pruning."""
        return None if config.prune is None else pruning(config.prune)

    def restore_(self, network: TimeVariableNetwork) -> None:
        """Put ordinary steps and weights into a trained network; its outputs stay what they are."""
        published, scheme = network.time_steps, network.scheme
        ordinary = TimeSteps(constraint=published.constraint, **_common(published))
        ordinary.origin = published.origin
        with torch.no_grad():
            ordinary.values.copy_(published.values)
        network.time_steps = ordinary
        if isinstance(scheme, Fractional):
            network.scheme = Fractional(scheme.gamma, scheme.memory_from)


AS_PUBLISHED = AsPublished()


def _never_published(config: TrainConfig) -> Iterator[str]:
    """Why settings do not go with the published program, one reason at a time."""
    faulty = config.network == "fractional" or config.constraint in ("fixed", "dependent") or config.prune is not None
    if config.network not in ("resnet", "fractional") or config.constraint == "simplex" or not faulty:
        yield (
            "as_published must be left out with these settings, which its faults do not touch: they are about fixed "
            "and dependent steps and pruning in network 'resnet', and about network 'fractional'"
        )
    if config.network == "fractional" and config.memory_from != 0:
        yield "memory_from must be 0 with as_published, as in that program"
    if config.network == "fractional" and config.prune is not None:
        yield "prune must be left out with as_published and network 'fractional', which that program does not prune"
    if config.prune_every != "epoch":
        yield "prune_every must be left out with as_published: that program looks once an epoch"
    if config.proximal:
        yield "proximal must be left out with as_published: that program takes subgradients"
    if config.prune_blocks is not None:
        yield "prune_blocks must be left out with as_published, in which layers go by their steps; or use prune"
    if config.refine is not None:
        yield "refine must be left out with as_published, in which no layers come"


def pruning(threshold: float) -> Pruning:
    """The published rule, once an epoch.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4, init=[1.0, 0.001, -0.5, 0.3])
        >>> pruning(0.01).criterion(network.time_steps.tau.detach(), network).tolist()
        [1.0, 1.0, 0.0, 1.0]
    """

    def scores(tau: Tensor, _: nn.Module) -> Tensor:
        # one layer has the share 0 and goes; the others then have equal shares, which are above any threshold
        kept = torch.ones_like(tau)
        magnitude = tau.abs()
        if bool((magnitude < threshold * magnitude.sum()).any()):
            kept[tau.argmin()] = 0.0
        return kept

    return Pruning(threshold, criterion=scores)
