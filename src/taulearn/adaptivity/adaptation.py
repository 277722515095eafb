"""The policies at work on one model: pruning, refinement, both of them, or none.

A training loop asks after each iteration which of them are due, and lets those change the grid: deletions come first.
Scores, penalties and the target of pruning go on with the layers that came.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.time_steps import time_steps_of
from .coarsen import PruneReport, prune
from .controller import Pruner
from .estimate import Criterion
from .policies import Pruning
from .transaction import all_or_nothing

if TYPE_CHECKING:
    from .refine import RefineReport
    from .refiner import Refinement, Refiner


class Changed(NamedTuple):
    """A change of the grid: its report, and positions before it, of those that stayed or of those that were refined."""

    report: "PruneReport | RefineReport"
    positions: list[int]


class Adaptation:
    """The policies at work on one model, with the arguments of ``Pruner``; false without any."""

    pruner: Pruner | None = None
    refiner: "Refiner | None" = None

    def __init__(
        self,
        pruning: Pruning | None,
        refinement: "Refinement | None",
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        epochs: float = 1,
        per_epoch: int = 1,
        *,
        recording: bool = False,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        if refinement is not None:
            from .refiner import Refiner

            self.refiner = Refiner(refinement, model, optimizer, epochs, per_epoch, loss=loss)
        if pruning is not None:
            self.pruner = Pruner(pruning, model, optimizer, epochs, per_epoch, recording=recording, loss=loss)

    def __bool__(self) -> bool:
        return bool(self._policies)

    @property
    def _policies(self) -> "tuple[Pruner | Refiner, ...]":
        return tuple(each for each in (self.pruner, self.refiner) if each is not None)

    @property
    def targeted(self) -> bool:
        """Whether there is a target."""
        return self.refiner is not None or (self.pruner is not None and self.pruner.target is not None)

    def begin(self, sample: Any) -> None:
        """Find out what has to come and to go; to be called once, before training."""
        refined = None
        if self.refiner is not None:
            window = None if self.pruner is None else self.pruner.window
            self.refiner.begin(None if window is None else window[1])
            refined = self.refiner.policy.target_blocks, self.refiner.rounds.end + self.refiner.rest
        if self.pruner is not None:
            self.pruner.begin(sample, refined)

    def due(self, iteration: int, *, epoch_ends: bool) -> "tuple[Pruner | Refiner, ...]":
        """Those that look at the layers after this iteration, counted from 1, in their order."""
        return tuple(each for each in self._policies if each.due(iteration, epoch_ends=epoch_ends))

    def change(
        self,
        iteration: int,
        due: "Sequence[Pruner | Refiner]",
        averages: Sequence[nn.Module],
        batch: Callable[[], Any],
    ) -> list[Changed]:
        """Let those that are due change the grid, in the model, its optimisers and its averages, or in none of them.

        ``batch`` makes the batch that an indicator looks at, where the policy has no data.
        """
        changes: list[Changed] = []
        with all_or_nothing([self.model, *averages], self.optimizer) if averages else nullcontext():
            self._rest(iteration)
            for each in due:
                number = time_steps_of(self.model).num_steps
                if isinstance(each, Pruner):
                    report = each.prune(iteration)
                    found = None if report is None else Changed(report, list(report.kept))
                else:
                    found = each.refine(iteration, averages, batch)
                if found is not None:
                    changes.append(found)
                    self._others_follow(found, number, averages)
            self._rest(iteration)
        return changes

    def follow(self, changes: Sequence[Changed], state: Mapping[str, Any], averages: Sequence[nn.Module]) -> None:
        """Do what another process's :meth:`change` did, and take over its :meth:`decisions`."""
        for change in changes:
            number = time_steps_of(self.model).num_steps
            if isinstance(change.report, PruneReport):
                assert self.pruner is not None
                self.pruner.follow(change.positions)
            else:
                assert self.refiner is not None
                self.refiner.carry_out(dict.fromkeys(change.positions, math.nan), averages)
            self._others_follow(change, number, averages)
        self.aim(state)

    def decisions(self) -> dict[str, Any]:
        """How far the policies are, for other processes."""
        target = None if self.pruner is None or self.pruner.target is None else self.pruner.target.state()
        return {"target": target, "refiner": None if self.refiner is None else self.refiner.state()}

    def aim(self, state: Mapping[str, Any]) -> None:
        """Take over the decisions of another process."""
        if self.pruner is not None:
            self.pruner.aim(state["target"])
        if self.refiner is not None:
            self.refiner.load_state(state["refiner"])
            self._rest(self.refiner.done)

    def state(self) -> dict[str, Any]:
        """Plain data and tensors for a checkpoint."""
        found = {} if self.pruner is None else self.pruner.state()
        return found if self.refiner is None else {**found, "refiner": self.refiner.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, of a run whose layers the model has now."""
        if (self.refiner is None) != ("refiner" not in state):
            raise ValueError("refinement must be as at the start of the run, got one where there was none, or none")
        if self.refiner is not None:
            self.refiner.load_state(state["refiner"])
            self._rest(self.refiner.done)
        if self.pruner is not None:
            self.pruner.load_state({name: value for name, value in state.items() if name != "refiner"})

    def follow_grid(self, iteration: int, before: Sequence[int]) -> None:
        """Go on with the layers that somebody else left, who found those of these numbers."""
        kept, sources, copies = time_steps_of(self.model).grid.made_from(before)
        if self.pruner is not None:
            if (target := self.pruner.target) is not None:
                left = set(time_steps_of(self.model).origin)
                target.gone += sum(target.costs[number] for number in before if number not in left)
            self.pruner.keep(kept)
            self.pruner.grow(sources, copies)
        if (indicator := self._indicator) is not None:
            indicator.keep_(kept)
            indicator.grow_(sources, copies)
        self._rest(iteration)

    def shortfall(self, iteration: int) -> list[str]:
        """How far targets are missed where training ends, and what to do."""
        return [said for each in reversed(self._policies) if (said := each.shortfall(iteration))]

    def end(self) -> None:
        """Leave the model to others."""
        if self.refiner is not None:
            time_steps_of(self.model).rest_(None)

    def _others_follow(self, change: Changed, number: int, averages: Sequence[nn.Module]) -> None:
        """Let averages follow a deletion, and scores the deletion or the refinement of so many layers."""
        if isinstance(change.report, PruneReport):
            for average in averages:
                prune(average, keep=change.positions)
            if self._indicator is not None:
                self._indicator.keep_(change.positions)
            return
        from ..nn.grid import twice

        if self.pruner is not None:
            self.pruner.grow(*twice(number, change.positions))
        if self._indicator is not None:
            self._indicator.grow_(*twice(number, change.positions))

    @property
    def _indicator(self) -> Criterion | None:
        """That of refinement, where it is an object that follows the grid, and none that pruning tells."""
        found = None if self.refiner is None else self.refiner.policy.indicator
        told = self.pruner is not None and found is self.pruner.criterion
        return found if isinstance(found, Criterion) and not told else None

    def _rest(self, iteration: int) -> None:
        if self.refiner is not None:
            time_steps_of(self.model).rest_(self.refiner.resting(iteration))
