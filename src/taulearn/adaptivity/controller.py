"""Pruning inside the loop: what a policy asks for, carried out on model, optimiser and record together."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn.pruned_models import prunable_of
from ..optim import group_of
from .coarsen import PruneReport, check_prunable, layers_that_stay, prune, scores_without
from .estimate import Criterion, Power, as_criterion, scores_of, shares, shares_of
from .optimizer_state import check_follows, optimizers_in, with_inner
from .policies import Pruning
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
        self.window: tuple[int, int, int] | None = None  # of a target: first and last iteration, and looks
        self.every = policy.every if isinstance(policy.every, int) else None  # iterations; None: each epoch
        if policy.targeted:
            from .target import SteeredL1, check_penalised, window

            check_penalised(policy, self.prunable, optimizer)
            if policy.penalised != "none":
                self.penalty = SteeredL1(self.prunable.time_steps.values, policy.survivors)
            self.window = _, _, self.every = window(policy.by, policy.every, epochs, per_epoch)
        self.per_epoch = per_epoch
        named = "sensitivity" if policy.targeted and policy.criterion is None else policy.criterion
        loss, told = policy.loss or loss, {"watching": True, "recording": recording}
        self.criterion = as_criterion(named, model, data=policy.data, loss=loss, **told)
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
        """Find out what has to go, see ``target_for``; to be called once, before training."""
        if self.window is not None:
            from .target import target_for

            self.target = target_for(self.policy, self.model, self.window, sample, refined)

    @property
    def prunable(self) -> Prunable:
        """The model, or its wrapping, as it is now."""
        found: Prunable = prunable_of(self.model)
        return found

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
        learned = [*self.prunable.scheme.parameters()]  # an order, of which there is no record
        return not self.policy.targeted and self.criterion.power is not None and not learned

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
        if self.by_steps and self.criterion.mean is not None and self.idle(self.prunable.time_steps.tau.detach()[None]):
            return None  # a look at what several processes hold takes long
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
        origin = self.prunable.time_steps.origin
        return "" if self.target is None else self.target.shortfall(self.policy, origin, iteration)

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
        return Power(self.prunable.scheme) if self.criterion.unseen else self.criterion

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
