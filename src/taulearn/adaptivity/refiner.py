"""Refinement while training: the policy that ``fit`` takes, and what it does to model, optimisers and averages.

There are R rounds, ``every`` iterations apart, the last one at the iteration ``end``. In a round where M layers are
missing, with R' rounds left, itself among them, the

    n = min(M, max(w, ceil(M / R')))

layers with the largest indicators are refined; w is what the policy asks for: a number, or the size of Dörfler's set.
So the target is reached in the last round at the latest, whatever was deleted on the way.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import batches_of
from .._errors import is_number, positive_integer
from ..nn.time_steps import TimeSteps, time_steps_of
from .adaptation import Changed
from .estimate import Criterion
from .indicators import NotFinite, check_indicator, indicators, not_refined
from .mark_to_refine import bulk as smallest_set, largest
from .optimizer_state import check_follows, optimizers_in, with_inner
from .policies import check_every
from .refine import RefineReport, carry_out, check_refinable, check_way, closed_layers
from .target import check_time, iterations_of
from .transaction import all_or_nothing


@dataclass(frozen=True)
class Refinement:
    """The policy that ``fit`` takes: layers come in until there are so many, at the latest at a given time.

    In each round the layers with the largest indicators are refined, see :func:`taulearn.refine`. With a
    ``Pruning(threshold)`` both go on, layers come and go; with a ``Pruning(target_blocks=...)`` that one's target is
    the final number of layers, and its deletions begin when refinement is over.

    Args:
        target_blocks: Number of layers to reach, more than there are.
        every: "epoch", or a number of iterations >= 1 between two rounds. None: as many rounds as it takes, at equal
            distances, the last one at ``until``.
        number: Layers a round. None: one, or as many as ``every`` forces.
        bulk: Or the smallest set whose indicators sum to at least this share of the total, in (0, 1].
        by: "split": layers become two; "insert": new ones with step 0 come in.
        indicator: As for ``taulearn.refine``.
        data: Batches for a named indicator, as for ``taulearn.refine``. None: the batch of the iteration; in
            ``attach`` what ``session.loss`` was given.
        loss: Maps (output, target) to a scalar, for a named indicator. None: that of ``fit``, else the one that the
            model returns.
        theta: Share of the first half of a split, in (0, 1).
        layer: What an inserted layer is, as for ``taulearn.refine``.
        until: When the target is reached: a number of epochs, or as a float the share of the run, in (0, 1].
        rest: Iterations in which a new layer is neither deleted nor penalised by what acts on the steps (L1, L2,
            ElasticNet, TimeHorizon, proximal maps). None: ``every``, as it was given or found; with a target of pruning
            at most half of the time that is left for deletions.

    Raises:
        ValueError, TypeError: If an argument lies outside its range or contradicts another one.

    Example:
        >>> Refinement(12, number=2, until=10).by
        'split'
    """

    target_blocks: int
    every: str | int | None = field(default=None, kw_only=True)
    number: int | None = field(default=None, kw_only=True)
    bulk: float | None = field(default=None, kw_only=True)
    by: str = field(default="split", kw_only=True)
    indicator: str | Criterion | Callable[[Any, Any], Tensor] | None = field(default=None, kw_only=True)
    data: Any = field(default=None, kw_only=True, compare=False, repr=False)
    loss: Callable[[Any, Any], Tensor] | None = field(default=None, kw_only=True)
    theta: float = field(default=0.5, kw_only=True)
    layer: Callable[[nn.Module], nn.Module] | None = field(default=None, kw_only=True)
    until: float | int = field(default=0.5, kw_only=True)
    rest: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        positive_integer("target_blocks", self.target_blocks, "so many layers are reached")
        check_every(self.every)
        if self.number is not None and self.bulk is not None:
            raise ValueError(f"bulk must be left out with number, got {self.bulk!r}: one of them says how many come")
        if self.number is not None:
            positive_integer("number", self.number, "so many layers come in a round")
        if self.bulk is not None and not (is_number(self.bulk) and 0.0 < self.bulk <= 1.0):
            raise ValueError(f"bulk must lie in (0, 1], got {self.bulk!r}: it is a share of the indicators' sum")
        check_way(self.by, self.theta, self.layer)
        self._check_indicator()
        check_time("until", self.until)
        if self.rest is not None and (isinstance(self.rest, bool) or not isinstance(self.rest, int) or self.rest < 0):
            raise ValueError(f"rest must be a number of iterations >= 0, got {self.rest!r}")

    @property
    def named(self) -> str | None:
        """The indicator that looks at batches with a loss; None: an object or a function."""
        if self.indicator is None:
            return "dual-weighted" if self.by == "split" else "sensitivity"
        return self.indicator if isinstance(self.indicator, str) else None

    def _check_indicator(self) -> None:
        if self.indicator is not None:
            check_indicator(self.indicator)
            if isinstance(self.indicator, Criterion) and self.indicator.measuring is not None:
                raise ValueError(
                    "indicator must not watch the training, which nothing asks it to do before a round, got a "
                    f"{type(self.indicator).__name__} with measuring: take a name, a function, or scores of the model"
                )
        if self.loss is not None and self.named is None:
            raise ValueError("loss must be left out with an indicator of your own, which is called without one")
        if self.data is not None:
            if isinstance(self.indicator, Criterion):
                raise ValueError("data must be left out with a Criterion, which looks at the model alone")
            object.__setattr__(self, "data", batches_of(self.data))


@dataclass(frozen=True)
class Rounds:
    """The iterations after which there is a round."""

    end: int  # the last one
    every: int
    number: int

    @property
    def first(self) -> int:
        """The first one."""
        return self.end - (self.number - 1) * self.every

    def left(self, iteration: int) -> int:
        """The number of rounds left, that after this iteration among them; 0 where there is none after it."""
        inside = self.first <= iteration <= self.end and (self.end - iteration) % self.every == 0
        return (self.end - iteration) // self.every + 1 if inside else 0

    def next(self, iteration: int) -> int | None:
        """The first one behind an iteration."""
        if iteration >= self.end:
            return None
        return max(self.first, self.end - (self.end - iteration - 1) // self.every * self.every)


def rounds_for(missing: int, end: int, every: int | None, number: int | None) -> Rounds:
    """Rounds in which so many layers can come, until an iteration.

    Args:
        missing: Number of layers to come, >= 1.
        end: The iteration by which they are there.
        every: Iterations between two rounds. None: as many rounds as it takes, at equal distances.
        number: Layers a round. None: at least one.

    Raises:
        ValueError: If there is no room for them.

    Example:
        >>> rounds_for(4, 50, None, 2), rounds_for(4, 50, 15, None)
        (Rounds(end=50, every=25, number=2), Rounds(end=45, every=15, number=3))
    """
    needed = -(-missing // (number or 1))
    found = Rounds(end, end // needed, needed) if every is None else Rounds(end // every * every, every, end // every)
    if found.every == 0 or found.number == 0:
        wanted = f"{needed} rounds" if every is None else f"a round every {every} iterations"
        raise ValueError(
            f"until must leave room for {wanted}, got iteration {end}: set until later, or more layers a round (number)"
        )
    if number is not None and number * found.number < missing:
        raise ValueError(
            f"number must be at least {-(-missing // found.number)}, so that {missing} layers come in {found.number} "
            f"rounds until iteration {end}, got {number}: leave it out, or set every lower"
        )
    return found


class Refiner:
    """A policy of refinement at work on one model. The loss is that of the training, where it is known."""

    def __init__(
        self,
        policy: Refinement,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        epochs: float,
        per_epoch: int,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.policy, self.model, self.optimizer = policy, model, optimizer
        self.loss = loss if policy.loss is None else policy.loss
        check_refinable(model)
        named = {p: name for name, p in model.named_parameters()}
        for each in with_inner(optimizers_in(optimizer)):
            check_follows(each, named, {id(self.steps.values)})
        self._until = iterations_of("until", policy.until, epochs, per_epoch)
        self._every = policy.every if isinstance(policy.every, int) else per_epoch if policy.every else None
        self.rounds, self.rest = Rounds(0, 1, 0), 0  # until begin; iterations in which a new layer is left alone
        self.done = 0  # the last iteration after which something was looked at
        self.missing = 0  # layers that could not be had in the last round
        self._born: dict[int, int] = {}  # iterations after which layers came that still rest, by their numbers

    @property
    def steps(self) -> TimeSteps:
        """The model's time steps."""
        return time_steps_of(self.model)

    @property
    def needs_batch(self) -> bool:
        """Whether the indicator looks at the batch of the iteration."""
        return self.policy.named is not None and self.policy.data is None

    def begin(self, deadline: int | None = None) -> None:
        """Lay out the rounds; to be called once, before training.

        Args:
            deadline: The iteration after which pruning has reached its target, where it has one.
        """
        present, target = self.steps.num_steps, self.policy.target_blocks
        if target <= present:
            raise ValueError(
                f"target_blocks must be more than {present}, the number of layers of the model, got {target}: nothing "
                "would come; train without refinement"
            )
        steps = self.steps
        if steps.rule.adds_up and target * (bound := steps.lower_bound or 0.0) > steps.horizon * (1.0 + 1e-9):
            raise ValueError(
                f"target_blocks must leave each step its lower bound {bound:g} in the horizon {steps.horizon:g} of "
                f"constraint {steps.constraint!r}, got {target}: take fewer layers, or lower the bound"
            )
        closed = self._closed()
        if len(closed) == present:
            layer, reason = max(closed.items())
            raise ValueError(
                f"model must have a layer that can be refined with by={self.policy.by!r}, got none: layer {layer} "
                f"cannot: {reason}"
            )
        self.rounds = rounds_for(target - present, self._until, self._every, self.policy.number)
        most = self.rounds.every if deadline is None else max(0, (deadline - self.rounds.end) // 2)
        self.rest = min(self.rounds.every, most) if self.policy.rest is None else self.policy.rest
        open_, missing, left = present - len(closed), target - present, self.rounds.number
        while missing:  # each round refines a layer once
            number = self._number(missing, left, self.policy.number or 1)
            if number > open_:
                raise ValueError(
                    f"every must leave more rounds until iteration {self.rounds.end}, got {self.rounds.number}, in "
                    f"which {target} layers cannot be reached: a round refines each of {open_} layers at most once"
                )
            open_, missing, left = open_ + number, missing - number, left - 1

    def due(self, iteration: int, *, epoch_ends: bool = False) -> bool:
        """Whether there is a round after this iteration, counted from 1, or the rest of a layer ends."""
        ends = any(born + self.rest == iteration for born in self._born.values())
        return iteration > self.done and (ends or self.rounds.left(iteration) > 0)

    def next(self, iteration: int) -> int | None:
        """The first iteration behind this one after which something is due."""
        times = [self.rounds.next(iteration), *(born + self.rest for born in self._born.values())]
        return min((time for time in times if time is not None and time > iteration), default=None)

    def resting(self, iteration: int) -> set[int]:
        """Numbers of the layers that rest after an iteration."""
        return {number for number, born in self._born.items() if iteration < born + self.rest}

    def refine(self, iteration: int, averages: Sequence[nn.Module], batch: Any) -> Changed | None:
        """Refine what is to be refined after an iteration.

        Args:
            iteration: Its number, counted from 1.
            averages: Averages of the model, which are refined alike.
            batch: Makes the batch that the indicator looks at, where the policy has no data.
        """
        self.done, left = iteration, self.rounds.left(iteration)
        self._born = {number: born for number, born in self._born.items() if iteration < born + self.rest}
        missing = max(0, self.policy.target_blocks - self.steps.num_steps) if left else 0
        try:
            chosen = self._choose(missing, left, batch, averages) if missing else {}
        except NotFinite as error:
            if not self.needs_batch:
                raise
            chosen = {}
            warnings.warn(
                f"no layer comes after iteration {iteration}, where the indicators of its batch are not finite "
                f"({error}): Refinement(.., data=batches) looks at other ones",
                stacklevel=2,
            )
        if left == 1 and (short := missing - len(chosen)):
            self.missing = short
            warnings.warn(self.shortfall(iteration), stacklevel=2)
        if not chosen:
            return None
        report = self.carry_out(chosen, averages)
        self._born |= {new.layer: iteration for new in report.new}
        return Changed(report, list(chosen))

    def carry_out(self, chosen: Mapping[int, float], averages: Sequence[nn.Module]) -> RefineReport:
        """Refine layers, by their positions with indicators, of the model and of its averages, or of none of them."""
        policy, models = self.policy, [self.model, *averages]
        with all_or_nothing(models, self.optimizer):
            optimizers = optimizers_in(self.optimizer)
            return carry_out(models, optimizers, chosen, by=policy.by, theta=policy.theta, layer=policy.layer)

    def shortfall(self, iteration: int) -> str:
        """How far the target is missed where training ends, and what to do; empty where it was reached."""
        target, number, end = self.policy.target_blocks, self.steps.num_steps, self.rounds.end
        said = f"the target of refinement is not reached: {number} layers, target_blocks={target} asked for"
        if iteration < end and number < target:
            return (
                f"{said}; training ended after iteration {iteration}, and layers come until iteration {end}: train "
                "longer, or choose an earlier until"
            )
        remedy = "the others could not be refined in the last round; choose another target"
        return f"{said}: {remedy}" if self.missing else ""

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint, or another process."""
        born = [list(each) for each in self._born.items()]
        plain = {"rest": self.rest, "done": self.done, "missing": self.missing}
        indicator = self.policy.indicator.state() if isinstance(self.policy.indicator, Criterion) else {}
        return {"rounds": asdict(self.rounds), "born": born, "indicator": indicator, **plain}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.rounds, self.rest = Rounds(**state["rounds"]), state["rest"]
        self.done, self.missing = state["done"], state["missing"]
        self._born = dict(state["born"])
        if isinstance(self.policy.indicator, Criterion):
            self.policy.indicator.load_state(state.get("indicator", {}))

    def _closed(self, averages: Sequence[nn.Module] = ()) -> dict[int, str]:
        """Positions that cannot be refined now, in the model or in an average, with the reasons."""
        policy, closed = self.policy, dict[int, str]()
        for each in (self.model, *averages):
            closed |= closed_layers(check_refinable(each), policy.by, policy.theta, policy.layer)
        if policy.named is not None:
            closed = not_refined(self.model, policy.named, policy.layer) | closed
        return closed

    @staticmethod
    def _number(missing: int, left: int, wanted: int) -> int:
        """How many layers are refined in a round."""
        return min(missing, max(wanted, math.ceil(missing / left)))

    def _choose(self, missing: int, left: int, batch: Any, averages: Sequence[nn.Module]) -> dict[int, float]:
        """Positions of the layers that are refined now, in order, with their indicators."""
        policy, closed = self.policy, self._closed(averages)
        grids = [time_steps_of(each) for each in (self.model, *averages)]
        room = min(each.rule.room(each.values.detach()) for each in grids) if policy.by == "insert" else math.inf
        if len(closed) == self.steps.num_steps or room < 1:
            return {}
        data = batch() if self.needs_batch else policy.data
        given = policy.named if policy.named is not None else policy.indicator
        assert given is not None
        eta = indicators(self.model, given, data, self.loss, theta=policy.theta, layer=policy.layer).cpu()
        eta[list(closed)] = math.nan
        wanted = (policy.number or 1) if policy.bulk is None else len(smallest_set(eta, policy.bulk, closed))
        number = int(min(self._number(missing, left, wanted), int((~eta.isnan()).sum()), room))
        return {l: float(eta[l]) for l in largest(eta, number, closed)} if number else {}
