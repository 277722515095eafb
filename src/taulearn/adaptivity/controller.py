"""Pruning inside the loop: what a policy asks for, carried out on model, optimiser and record together."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._milliseconds import layer_milliseconds
from ..nn.pruned_models import prunable_of
from ..optim import group_of
from .coarsen import PruneReport, check_prunable, layers_that_stay, prune, scores_without
from .estimate import Criterion, Power, as_criterion, scores_of, shares, shares_of
from .optimizer_state import check_follows, optimizers_in, with_inner
from .policies import TARGET_CRITERION, Pruning
from .transaction import Prunable

if TYPE_CHECKING:
    from .target import SteeredL1, Target

_MEASURE_EVERY = 20
"""Most iterations between two measurements of a criterion; one of contributions costs a thirtieth of an iteration."""
_ENOUGH = 20
"""Number of measurements after which a layer that was never called is worth a warning."""


class Pruner:
    """A policy at work on one model; recording, only forward passes are measured that record gradients.

    The loss is that of the training, where it is known.
    """

    def __init__(
        self,
        policy: Pruning,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        epochs: float,
        per_epoch: int,
        *,
        recording: bool = False,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.policy, self.model, self.optimizer = policy, model, optimizer
        check_prunable(model)
        self._check_optimizer()
        self.penalty: "SteeredL1 | None" = None
        self.target: Target | None = None
        self.every = policy.every if isinstance(policy.every, int) else None  # iterations; None: each epoch
        if policy.targeted:
            from .target import SteeredL1, window

            check_penalised(policy, self.prunable, optimizer)
            if policy.penalised != "none":
                self.penalty = SteeredL1(self.prunable.time_steps.values, policy.survivors)
            self._window = window(policy.by, policy.every, epochs, per_epoch)
            self.every = self._window[2]
        self.per_epoch = per_epoch
        named = TARGET_CRITERION if policy.targeted and policy.criterion is None else policy.criterion
        loss = loss if policy.loss is None else policy.loss
        self.criterion = as_criterion(named, model, data=policy.data, loss=loss, watching=True, recording=recording)
        self._warned = False
        self.least: float | None = None  # smallest share at the last look, where the policy goes by the steps

    def _check_optimizer(self) -> None:
        """Refuse now, rather than at the first deletion, an optimiser that could not follow it."""
        layers, fixed = self.prunable.layers, self.prunable.fixed_layers()
        gone = {id(p) for l, layer in enumerate(layers) if l not in fixed for p in layer.parameters()}
        gone.add(id(self.prunable.time_steps.values))
        named = {p: name for name, p in self.model.named_parameters()}
        for each in with_inner(optimizers_in(self.optimizer)):
            check_follows(each, named, gone)

    def begin(self, sample: Any, refined: tuple[int, int] | None = None) -> None:
        """Find out what has to go; to be called once, before training.

        Args:
            sample: An input, for times.
            refined: The number of layers that refinement leads to, and the iteration after which the last new one has
                had its rest.
        """
        if not self.policy.targeted:
            return
        steps, fixed = self.prunable.time_steps, self.prunable.fixed_layers()
        if self.policy.survivors == "one":
            check_survivors(self.prunable)
        number, wanted, whole = steps.num_steps, self.policy.target_blocks, 0.0
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
            costs, whole = self._measure(sample)
            excess = self._excess(costs, whole, fixed, grows=refined is not None)
        if refined is not None:
            self._wait_for(refined[1])
        from .target import Target

        by_number = dict(zip(steps.origin, costs, strict=True))
        numbers = range(steps.next_number)
        self.target = Target(
            self.policy.penalised, *self._window, [by_number.get(l, 0.0) for l in numbers], excess, whole
        )

    def _wait_for(self, rested: int) -> None:
        """Let deletions begin when refinement is over."""
        begin, deadline, every = self._window
        if rested >= deadline:
            raise ValueError(
                f"by must leave room behind refinement, whose last layers have had their rest after iteration "
                f"{rested}, got {self.policy.by!r}, which is iteration {deadline}: choose a later by, or Refinement "
                "with an earlier until or a shorter rest"
            )
        self._window = max(begin, rested), deadline, every

    def _measure(self, sample: Any) -> tuple[tuple[float, ...], float]:
        inputs = sample if self.policy.example_inputs is None else self.policy.example_inputs
        if inputs is None:
            raise ValueError(
                "example_inputs must be given with target_latency_ms outside fit, which knows the data: write "
                "Pruning(target_latency_ms=.., example_inputs=inputs)"
            )
        return layer_milliseconds(self.model, tuple(self.prunable.layers), inputs)

    def _excess(self, costs: tuple[float, ...], whole: float, fixed: Mapping[int, str], *, grows: bool) -> float:
        limit = self.policy.target_latency_ms
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

    @property
    def prunable(self) -> Prunable:
        """The model, or its wrapping, as it is now."""
        found: Prunable = prunable_of(self.model)
        return found

    @property
    def deadline(self) -> int | None:
        """The iteration after which the target is reached; None without one."""
        return self._window[1] if self.policy.targeted else None

    @property
    def measure_every(self) -> int | None:
        """Iterations between two measurements of the criterion, or None."""
        often = max(1, min((self.every or self.per_epoch) // 4, _MEASURE_EVERY))
        return None if self.criterion.measuring is None else often

    @property
    def over(self) -> bool:
        """Whether nothing can go any more, or nothing has to."""
        single = self.prunable.time_steps.num_steps == 1
        return single or (self.target is not None and self.target.reached)

    def due(self, iteration: int, *, epoch_ends: bool) -> bool:
        """Whether to look at the layers after this iteration, counted from 1."""
        return not self.over and (epoch_ends if self.every is None else iteration % self.every == 0)

    @property
    def by_steps(self) -> bool:
        """Whether the steps alone decide, by a threshold: a record of them tells when a layer had to go."""
        return not self.policy.targeted and self.criterion.power is not None

    def idle(self, tau: Tensor) -> bool:
        """Whether, as the policy goes by the steps, no layer has to go with any of these."""
        assert self.policy.threshold is not None
        assert self.criterion.power is not None
        fixed = layers_that_stay(self.prunable)
        found = shares_of(tau.cpu(), self.criterion.power)[:, [i for i in range(tau.shape[1]) if i not in fixed]]
        self.least = float(found[-1].min()) if found.numel() else None
        return bool((found >= float(self.policy.threshold)).all())

    def measuring(self, iteration: int) -> AbstractContextManager[None] | None:
        """The context of the iteration of this number (from 0), where the criterion measures in it."""
        every, measuring = self.measure_every, self.criterion.measuring
        return None if measuring is None or every is None or iteration % every or self.over else measuring()

    def prune(self, iteration: int) -> PruneReport | None:
        """Look at the layers: delete what has to go, and let the target steer the penalty."""
        if self._waits(iteration):
            return None
        options: dict[str, Any] = {"optimizer": self.optimizer}
        origin = self.prunable.time_steps.origin
        if self.target is None:
            assert self.policy.threshold is not None
            report: PruneReport | None = prune(self.model, self.policy.threshold, criterion=self._criterion, **options)
        else:
            report = self._reach(iteration, options)
        if report:
            self.keep([origin.index(l) for l in self.prunable.time_steps.origin])
        if self.target is not None:
            self._steer(iteration)
        return report or None

    @property
    def advice(self) -> str:
        """The advice where a share of the steps was compared with a threshold, and nothing was ever deleted."""
        if self.least is None or self.policy.threshold is None:
            return ""
        remedy = "; Pruning(target_blocks=..) finds the weight of a penalty by itself"
        return (
            f"no layer was deleted: the smallest share was {self.least:.3g}, the threshold {self.policy.threshold:g}"
            f"{remedy if self.prunable.time_steps.values.requires_grad else ''}"
        )

    def shortfall(self, iteration: int) -> str:
        """How far a target is missed where training ends, and what to do; empty where it is reached."""
        target, policy = self.target, self.policy
        origin = self.prunable.time_steps.origin
        if target is None or target.reached:
            return ""
        if policy.target_blocks is not None:
            reached, number = len(origin) <= policy.target_blocks, len(origin)
            left = f"{number} {'block is' if number == 1 else 'blocks are'} left, target_blocks={policy.target_blocks}"
        else:
            assert policy.target_latency_ms is not None
            now = target.whole - sum(target.costs) + sum(target.costs[layer] for layer in origin)
            reached = now <= policy.target_latency_ms
            left = f"{now:.3g} of {target.whole:.3g} ms are left, target_latency_ms={policy.target_latency_ms:g}"
        when = f"; training ended after iteration {iteration}, and layers go until iteration {target.deadline}"
        remedy = "train longer, choose an earlier by, or delete more with prune"
        if iteration >= target.deadline:
            when, remedy = "", "the other layers must stay, or nothing was known of them: choose another target"
        return "" if reached else f"the target of pruning is not reached: {left} asked for{when}: {remedy}"

    def follow(self, kept: Sequence[int]) -> None:
        """Do what another process's :meth:`prune` did."""
        prune(self.model, keep=kept, optimizer=self.optimizer)
        self.keep(kept)

    def aim(self, target: Mapping[str, Any] | None) -> None:
        """Take over the target of another process, or of a checkpoint."""
        if target is not None:
            from .target import Target

            self.target = Target(**target)
            if self.penalty is not None:
                self._set_penalty()

    def _reach(self, iteration: int, options: Mapping[str, Any]) -> PruneReport | None:
        """Delete what the target wants gone now."""
        assert self.target is not None
        if iteration < self.target.begin:
            return None
        steps, greedy = self.prunable.time_steps, self._criterion.greedy
        fixed, left = layers_that_stay(self.prunable), list(range(steps.num_steps))
        first = scores = self._scores()
        while found := self.target.deletions(
            iteration,
            [steps.origin[i] for i in left],
            scores,
            [place for place, i in enumerate(left) if i in fixed],
            most=1 if greedy else None,
        ):
            gone_now = [left[place] for place in found]
            left = [i for i in left if i not in gone_now]
            if not greedy or len(left) == 1 or self.target.reached:
                break
            scores = scores_without(self.criterion, self.model, [i for i in range(steps.num_steps) if i not in left])
        if iteration == self.target.deadline and not self.target.reached:
            warnings.warn(
                f"the target of pruning is not reached at its time, iteration {iteration}: {self.target.gone:g} of "
                f"{self.target.excess:g} went, and the layers that are left must stay",
                stacklevel=2,
            )
        if len(left) == steps.num_steps:
            return None
        return prune(self.model, keep=left, criterion=lambda *_: torch.tensor(first, dtype=torch.float64), **options)

    def _waits(self, iteration: int) -> bool:
        """Whether to put off deletions, since nothing is known yet of what some layers are worth."""
        running = self.criterion
        if not running.unseen:
            return False
        late = self.target is not None and iteration >= self.target.deadline
        if late or (running.number >= _ENOUGH and not self._warned):
            self._warned = True
            otherwise = "shares of abs(tau) take its place" if late else "nothing is deleted before it is known"
            layers = [self.prunable.time_steps.origin[l] for l in running.unseen]
            warnings.warn(
                f"layers {layers} were called in none of {running.number} measured iterations, so that what they "
                f"contribute is unknown: {otherwise}",
                stacklevel=2,
            )
        return not late

    def _steer(self, iteration: int) -> None:
        """Let the target move alpha."""
        if self.penalty is None or self.target is None:
            return
        steps, fixed = self.prunable.time_steps, list(layers_that_stay(self.prunable))
        group = group_of(self.optimizer, steps.values)
        assert group is not None
        tau = steps.tau.detach().double().tolist()
        steers = iteration >= self.target.begin and not self.target.reached
        scores = self._scores() if steers else [0.0] * steps.num_steps
        self.target.steer(iteration, steps.origin, tau, scores, fixed, float(group["lr"]))
        self._set_penalty()

    def _set_penalty(self) -> None:
        assert self.penalty is not None
        assert self.target is not None
        self.penalty.set(self.target.alpha, self.target.penalised_among(self.prunable.time_steps.origin))

    @property
    def _criterion(self) -> Criterion:
        """The criterion; a power of the steps where something is not known in the end."""
        return Power(self.prunable.scheme.step_power) if self.criterion.unseen else self.criterion

    def _scores(self) -> list[float]:
        """The numbers of which shares are taken, one per layer."""
        scores, power = scores_of(self._criterion, self.model)
        found: list[float] = shares(self.prunable.time_steps, power).tolist() if scores is None else scores
        return found

    def grow(self, sources: Sequence[int], new: Collection[int]) -> None:
        """Follow a refinement, see :meth:`Criterion.grow_`."""
        self.criterion.grow_(sources, new)
        if self.target is not None:
            self.target.grow(self.prunable.time_steps.next_number, self.prunable.time_steps.parent)
        if self.penalty is not None:
            self.penalty.resize_(self.prunable.time_steps.values)
            self._set_penalty()

    def keep(self, kept: Sequence[int]) -> None:
        """Follow a deletion, see :meth:`Criterion.keep_`."""
        self.criterion.keep_(kept)
        if self.penalty is not None:
            self.penalty.resize_(self.prunable.time_steps.values)

    def state(self) -> dict[str, Any]:
        """Plain data and tensors for a checkpoint."""
        return {"target": None if self.target is None else self.target.state(), "criterion": self.criterion.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, of a run whose layers the model has now."""
        if "criterion" in state:
            saved = state["criterion"]
        else:  # of earlier versions
            saved = {name: value for name, value in state.items() if name != "target" and value is not None}
            if "contributions" not in saved:
                saved.pop("measurements", None)
        kinds = [set(each) - {"counts"} for each in (saved, self.criterion.state())]
        if (state["target"] is None) == self.policy.targeted or kinds[0] != kinds[1]:
            raise ValueError("pruning must be as at the start of the run, got another kind of target or criterion")
        self.criterion.load_state(saved)
        if self.penalty is not None:
            self.penalty.resize_(self.prunable.time_steps.values)
        self.aim(state["target"])
        if self.target is not None:
            self.every = self.target.every


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
