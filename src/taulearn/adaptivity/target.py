"""A target instead of a penalty weight: which layers go when, and the weight alpha of the l1 penalty that prepares it.

What is to go, the excess E, is a number of layers, or of milliseconds; layer l counts c_l, 1 or its time. Between the
iterations t_0 and t_1 the layers with the smallest scores per cost go one after the other. With the progress
p = (t - t_0)/(t_1 - t_0) and G gone by now, the layer l may go once its share is below the threshold and G <= E p, and
goes at the latest when G + c_l <= E p (the penalty acting on the next layer, or on none) or G + c_l <= E (2p - 1) (on
all, which takes longer to part them). So deletions are at least as far apart as the schedule says, and the target is
reached at t_1, whatever happens.

alpha is found by dual ascent. The sum s of the steps to go, one or all, shall reach 0 at the time when they go at the
latest, r iterations from now: its rate of change shall be s/r for the v that is seen. The proximal step of size lr
takes lr alpha off each of n steps in an iteration, so that the violation of that constraint moves alpha by

    alpha <- max(0, alpha + (s/r - v) / (2 n lr)),    at most what takes a quarter of the mean step between two looks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import positive_integer, unknown_name
from .._milliseconds import layer_milliseconds
from ..functional import soft_threshold
from ..nn.pruned_models import prunable_of
from ..nn.time_steps import time_steps_of
from ..optim import group_of
from ..penalties import Penalty
from .policies import THRESHOLD, Pruning
from .transaction import Prunable

PENALISED = ("next", "all", "none")
SURVIVORS = ("free", "one")
_LOOKS = 100
_QUIET = 0.1
_LARGEST = 0.25
_SLACK = 1e-9


class SteeredL1(Penalty):
    """sum_l alpha_l abs(tau_l), a proximal penalty whose weights a controller changes.

    The weights are tensors that are changed in place, so that compiled steps see it.

    Args:
        values: The parameter of the time steps.
        survivors: "one": the steps that alpha does not act on are put back to 1; "free": they are left alone.
    """

    name = "l1"
    differentiated = False
    columns: Mapping[str, str] = {"weight.l1": "number"}

    def __init__(self, values: Tensor, survivors: str = "free") -> None:
        self.survivors = survivors
        self.alpha = torch.zeros((), dtype=values.dtype, device=values.device)  # the largest, for the record
        self.resize_(values)

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return (self.weights * time_steps_of(model).values.abs()).sum(), {"weight.l1": self.alpha}

    def proximal(self, values: Tensor, lr: float | Tensor) -> Tensor:
        values = soft_threshold(values, lr * self.weights)
        return values if self.survivors == "free" else torch.where(self.fading, values, 1.0)

    def set(self, alpha: float, positions: Sequence[int]) -> None:
        """Let alpha act on the steps at these positions, but for a dependent last one, and nothing on the others."""
        self.alpha.fill_(alpha)
        penalised = [i for i in positions if i < len(self.weights)]
        self.weights.zero_()
        self.weights[penalised] = alpha
        self.fading.zero_()
        self.fading[penalised] = True

    def resize_(self, values: Tensor) -> None:
        """Follow a deletion; nothing is penalised until :meth:`set` is called."""
        self.weights = torch.zeros_like(values, requires_grad=False)
        self.fading = torch.zeros_like(values, dtype=torch.bool, requires_grad=False)


@dataclass
class Target:
    """The controller: plain numbers, so that a resumed run goes on with the same ones."""

    penalised: str  # as in :class:`taulearn.Pruning`
    begin: int  # iteration t_0 before which nothing is penalised or deleted
    deadline: int  # iteration t_1 at which the target is reached
    every: int  # iterations between two looks
    costs: list[float]  # by number of the layer at the start
    excess: float  # the costs that have to go, E
    whole: float = 0.0  # milliseconds of a forward pass at the start; 0 for a number of layers
    gone: float = 0.0  # the costs that went, G
    alpha: float = 0.0  # the weight now
    chosen: tuple[int, ...] = ()  # numbers of the layers whose steps shall vanish, in the order in which they go
    size: float = 0.0  # sum of their steps at the last look

    def state(self) -> dict[str, Any]:
        """All numbers, for a checkpoint."""
        return asdict(self)

    def grow(self, next_number: int, parent: Mapping[int, int]) -> None:
        """Follow a refinement: a new layer counts what its parent does, and so much more has to go."""
        for number in range(len(self.costs), next_number):
            cost = self.costs[parent[number]] if number in parent else 0.0
            self.costs.append(cost)
            self.excess += cost
            self.whole += cost if self.whole else 0.0

    @property
    def reached(self) -> bool:
        """Whether nothing has to go any more."""
        return self.gone >= self.excess * (1.0 - _SLACK)

    def shortfall(self, policy: Pruning, origin: Sequence[int], iteration: int) -> str:
        """How far it is missed where training ends with these layers, and what to do; empty where it is reached."""
        if self.reached:
            return ""
        if policy.target_blocks is not None:
            reached, number = len(origin) <= policy.target_blocks, len(origin)
            left = f"{number} {'block is' if number == 1 else 'blocks are'} left, target_blocks={policy.target_blocks}"
        else:
            assert policy.target_latency_ms is not None
            now = self.whole - sum(self.costs) + sum(self.costs[layer] for layer in origin)
            reached = now <= policy.target_latency_ms
            left = f"{now:.3g} of {self.whole:.3g} ms are left, target_latency_ms={policy.target_latency_ms:g}"
        when = f"; training ended after iteration {iteration}, and layers go until iteration {self.deadline}"
        remedy = "train longer, choose an earlier by, or delete more with prune"
        if iteration >= self.deadline:
            when, remedy = "", "the other layers must stay, or nothing was known of them: choose another target"
        return "" if reached else f"the target of pruning is not reached: {left} asked for{when}: {remedy}"

    def progress(self, iteration: int) -> float:
        """p, in [0, 1]."""
        return min(1.0, max(0.0, (iteration - self.begin) / (self.deadline - self.begin)))

    def order(self, origin: Sequence[int], scores: Sequence[float], fixed: Sequence[int]) -> list[int]:
        """Positions in the order in which they would go, until the target is reached.

        At least one stays, and where all could go that is one cheap enough for the target to be reached.
        """
        free = [i for i in range(len(origin)) if i not in fixed]
        rank = {layer: place for place, layer in enumerate(self.chosen)} if self.penalised == "next" else {}
        costs = [self.costs[layer] for layer in origin]
        spare = self.gone + sum(costs) - self.excess * (1.0 - _SLACK)  # what may stay
        free.sort(key=lambda i: (rank.get(origin[i], len(rank)), scores[i] / self.costs[origin[i]], i))
        result: list[int] = []
        gone = self.gone
        for i in free:
            if gone >= self.excess * (1.0 - _SLACK) or len(result) + 1 == len(origin):
                break
            rest = [costs[j] for j in range(len(origin)) if j != i and j not in result]
            if len(free) == len(origin) and costs[i] <= spare < min(rest):
                continue  # the last one that may be the one that stays
            result.append(i)
            gone += self.costs[origin[i]]
        return result

    def deletions(
        self,
        iteration: int,
        origin: Sequence[int],
        scores: Sequence[float],
        fixed: Sequence[int],
        most: int | None = None,
    ) -> list[int]:
        """The positions of the layers that go now, of which there are at most so many."""
        if iteration < self.begin:
            return []
        p, total = self.progress(iteration), sum(scores)
        result: list[int] = []
        for i in self.order(origin, scores, fixed)[:most]:
            cost = self.costs[origin[i]]
            latest = 2.0 * p - 1.0 if self.penalised == "all" else p
            late = p >= 1.0 or self.gone + cost <= self.excess * latest * (1.0 + _SLACK)
            small = scores[i] < THRESHOLD * total
            if not (late or (small and self.gone <= self.excess * p)):
                break
            result.append(i)
            self.gone += cost
            total -= scores[i]
        return result

    def steer(
        self,
        iteration: int,
        origin: Sequence[int],
        tau: Sequence[float],
        scores: Sequence[float],
        fixed: Sequence[int],
        lr: float,
    ) -> None:
        """Choose the layers whose steps shall vanish next, and move alpha."""
        if self.penalised == "none" or iteration < self.begin or self.reached:
            self.alpha, self.chosen = 0.0, ()
            return
        order = self.order(origin, scores, fixed)
        doomed = order[:1] if self.penalised == "next" else order
        chosen = tuple(origin[i] for i in doomed)
        size = sum(abs(tau[i]) for i in doomed)
        if doomed and lr > 0.0:
            end = self.deadline
            if self.penalised == "next":
                share = (self.gone + self.costs[chosen[0]]) / self.excess
                end = self.begin + round(min(1.0, share) * (self.deadline - self.begin))
            wanted = size / max(self.every, end - iteration)
            if set(chosen) == set(self.chosen):
                seen = (self.size - size) / self.every
                self.alpha += 0.5 * (wanted - seen) / (len(doomed) * lr)
            else:
                self.alpha = max(self.alpha, wanted / (len(doomed) * lr))
            mean = sum(abs(t) for t in tau) / len(tau)
            self.alpha = min(max(0.0, self.alpha), _LARGEST * mean / (self.every * lr))
        self.chosen, self.size = chosen, size

    def penalised_among(self, origin: Sequence[int]) -> list[int]:
        """The positions that alpha acts on."""
        everywhere = self.penalised == "all"
        return [i for i, layer in enumerate(origin) if self.chosen and (everywhere or layer in self.chosen)]


def window(by: float | int, every: str | int | None, epochs: float, per_epoch: int) -> tuple[int, int, int]:
    """From when to when layers go, and how often the controller looks, in iterations."""
    end = iterations_of("by", by, epochs, per_epoch)
    look = per_epoch if every == "epoch" else max(1, end // _LOOKS) if every is None else int(every)
    deadline = end // look * look
    if deadline == 0:
        raise ValueError(
            f"by must leave room for one look at the layers, got {by!r}, which is {end} iterations, with a look every "
            f"{look}: set by later, or every lower"
        )
    return min(round(_QUIET * deadline), deadline - 1), deadline, look


def check_target(policy: Pruning) -> None:
    """Refuse a target that contradicts itself or other options."""
    if policy.target_blocks is not None and policy.target_latency_ms is not None:
        raise ValueError("target_latency_ms must be left out with target_blocks: give the one that matters")
    name = "target_blocks" if policy.target_latency_ms is None else "target_latency_ms"
    if policy.threshold is not None:
        raise ValueError(
            f"threshold must be left out with {name}, got {policy.threshold!r}: the target says how many layers go"
        )
    if policy.target_blocks is not None:
        positive_integer("target_blocks", policy.target_blocks, "at least one layer stays")
        if policy.example_inputs is not None:
            raise ValueError("example_inputs must be left out with target_blocks: they are for measuring a latency")
    limit = policy.target_latency_ms
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, int | float) or not 0.0 < limit < math.inf
    ):
        raise ValueError(
            f"target_latency_ms must be a positive number of milliseconds, got {limit!r}: give a float such as 4.0"
        )
    check_time("by", policy.by)
    if policy.penalised not in PENALISED:
        raise unknown_name("penalised", policy.penalised, PENALISED)
    if policy.survivors not in SURVIVORS:
        raise unknown_name("survivors", policy.survivors, SURVIVORS)
    if policy.survivors == "one" and policy.penalised != "next":
        raise ValueError(
            f"survivors must be 'free' with penalised={policy.penalised!r}, got 'one': it goes with "
            "penalised='next', where one step after the other fades"
        )


def check_time(name: str, time: Any) -> None:
    """Refuse what is neither a number of epochs nor a share of the run."""
    if isinstance(time, bool) or not isinstance(time, int | float):
        raise ValueError(f"{name} must be a number of epochs, or a share of the run in (0, 1], got {time!r}")
    if isinstance(time, int):
        positive_integer(name, time, "the target is reached after so many epochs")
    elif not 0.0 < time <= 1.0:
        raise ValueError(
            f"{name} must lie in (0, 1] as a float, got {time!r}: it is a share of the run; a number of epochs is an "
            "integer"
        )


def iterations_of(name: str, time: float | int, epochs: float, per_epoch: int) -> int:
    """A time as a policy has it, a number of epochs or a share of the run, in iterations."""
    if isinstance(time, int) and time > epochs:
        raise ValueError(
            f"{name} must be at most {epochs:g}, the number of epochs, got {time}: layers change during training"
        )
    return time * per_epoch if isinstance(time, int) else round(time * epochs * per_epoch)


def target_for(
    policy: Pruning,
    model: nn.Module,
    times: tuple[int, int, int],
    sample: Any,
    refined: tuple[int, int] | None,
) -> Target:
    """The target of a policy for a model as it is before training.

    Args:
        policy: One that has a target.
        model: The model.
        times: Of :func:`window`.
        sample: An input, for milliseconds.
        refined: The number of layers that refinement leads to, and the iteration after which the last new one has had
            its rest; None: there is none.
    """
    prunable: Prunable = prunable_of(model)
    steps, fixed = prunable.time_steps, prunable.fixed_layers()
    if policy.survivors == "one":
        check_survivors(prunable)
    number, wanted, whole = steps.num_steps, policy.target_blocks, 0.0
    if wanted is not None:
        most = number if refined is None else refined[0]
        if wanted >= most:
            whose = "of the model" if refined is None else "that refinement leads to"
            raise ValueError(
                f"target_blocks must be less than {most}, the number of layers {whose}, got {wanted}: "
                "nothing would go; train without pruning"
            )
        if wanted < len(fixed):
            layer, reason = next(iter(fixed.items()))
            raise ValueError(
                f"target_blocks must be at least {len(fixed)}, the number of layers that must stay, got {wanted}: "
                f"layer {layer} stays because {reason}"
            )
        costs, excess = (1.0,) * number, float(number - wanted)
    else:
        costs, whole = _measured(policy, model, prunable, sample)
        excess = _too_many(policy, costs, whole, fixed, grows=refined is not None)
    begin, deadline, every = times
    if refined is not None and refined[1] >= deadline:
        raise ValueError(
            f"by must leave room behind refinement, whose last layers have had their rest after iteration "
            f"{refined[1]}, got {policy.by!r}, which is iteration {deadline}: choose a later by, or Refinement with an "
            "earlier until or a shorter rest"
        )
    begin = begin if refined is None else max(begin, refined[1])
    by_number = dict(zip(steps.origin, costs, strict=True))
    by_numbers = [by_number.get(l, 0.0) for l in range(steps.next_number)]
    return Target(policy.penalised, begin, deadline, every, by_numbers, excess, whole)


def _measured(policy: Pruning, model: nn.Module, prunable: Prunable, sample: Any) -> tuple[tuple[float, ...], float]:
    """Milliseconds of each layer, and of a forward pass."""
    inputs = sample if policy.example_inputs is None else policy.example_inputs
    if inputs is None:
        raise ValueError(
            "example_inputs must be given with target_latency_ms outside fit, which knows the data: write "
            "Pruning(target_latency_ms=.., example_inputs=inputs)"
        )
    return layer_milliseconds(model, tuple(prunable.layers), inputs)


def _too_many(
    policy: Pruning, costs: tuple[float, ...], whole: float, fixed: Mapping[int, str], *, grows: bool
) -> float:
    """The milliseconds that have to go, less than none where layers are still to come."""
    limit = policy.target_latency_ms
    assert limit is not None
    free = sorted(costs[i] for i in range(len(costs)) if i not in fixed)
    smallest = whole - sum(free[1:] if not fixed else free)
    if limit >= whole and not grows:
        raise ValueError(
            f"target_latency_ms must be less than the {whole:.3g} ms that a forward pass takes now on this "
            f"machine, got {limit:g}: nothing would go; train without pruning"
        )
    if limit < smallest:
        raise ValueError(
            f"target_latency_ms must be at least {smallest:.3g}, what a forward pass takes on this machine with "
            f"all layers gone that can go (now {whole:.3g} ms), got {limit:g}"
        )
    return whole - limit


def check_penalised(
    policy: Pruning, prunable: Prunable, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
) -> None:
    """Refuse a policy whose penalty on the steps could not lead to its target."""
    steps = prunable.time_steps
    if policy.penalised == "none":
        return
    remedy = "or cut layers off without a penalty, penalised='none'"
    if not steps.rule.trains:
        raise ValueError(
            f"constraint must not be {steps.constraint!r} where a penalty on the steps leads to the target: they do "
            f"not change; use 'free', {remedy}"
        )
    if policy.penalised == "all" and steps.rule.adds_up and steps.values.numel() == steps.num_steps:
        raise ValueError(
            f"constraint must not be {steps.constraint!r} with penalised='all': the sum of the steps is constant; "
            "use penalised='next', or constraint 'free'"
        )
    if not steps.values.requires_grad or group_of(optimizer, steps.values) is None:
        raise ValueError(
            "optimizer must hold the time steps where a penalty on them leads to the target, got one that does "
            f"not: make it from taulearn.parameter_groups(model, lr), {remedy}"
        )


def check_survivors(prunable: Prunable) -> None:
    """Refuse a model whose steps are not all 1, or cannot stay so."""
    steps, units = prunable.time_steps, getattr(prunable, "units", None)
    if units is not None:
        raise ValueError(
            "survivors must be 'free' with units of displacement, got 'one': there a step of 1 is no plain one; wrap "
            "with units='steps'"
        )
    ones = torch.ones_like(steps.tau)
    if steps.rule.adds_up or not torch.equal(steps.projected(ones), ones):
        raise ValueError(
            f"survivors must be 'free' with constraint {steps.constraint!r}, got 'one': the steps that are left could "
            "not all be 1; use constraint 'free'"
        )
    if not torch.equal(steps.tau, ones):
        raise ValueError(
            f"survivors must be 'free' where not all steps are 1 at the start, got 'one' with {steps.tau.tolist()}: "
            "wrap with init=1.0"
        )
