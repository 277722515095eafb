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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import soft_threshold
from ..nn.time_steps import time_steps_of
from ..penalties import Penalty
from .policies import THRESHOLD, iterations_of

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
