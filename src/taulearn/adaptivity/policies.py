"""When layers are deleted in training, and how many: the policy that ``fit`` takes; refinement's is in refiner.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import Tensor, nn

from .._batches import batches_of
from .estimate import Criterion, check_criterion, check_given

THRESHOLD = 0.01


@dataclass(frozen=True)
class Pruning:
    """The policy that ``fit`` takes: delete layers with small shares, or reach a target by a given epoch.

    Without a target every layer whose share lies below the threshold is deleted when the model is looked at. With a
    target the right layers and the right moment are found by a controller: from early in the run to epoch ``by`` layers
    go one after the other, the one with the smallest share first, each faded out before by a proximal l1 penalty on its
    step, whose weight alpha the controller steers so that the step is gone in time. Never more layers go than the
    target asks for, and after it the network trains on unpenalised.

    Args:
        threshold: Share of the sum of abs(tau), in (0, 1). None: 0.01; with a target it has no place.
        every: "epoch", or a number of iterations >= 1 (the paper: 1). None: each epoch, with a target a hundredth of
            the iterations until ``by``.
        criterion: What shares are taken of: "share", abs(tau); "power"; running means measured in some iterations of
            the training, in every twentieth or oftener, so that there are four between two looks: "contribution", the
            mean norm of what a layer adds to the state, "influence", the mean of 1 - cos of the states before and after
            it, "sensitivity", the mean over batches of abs(tau_l dJ/dtau_l), see ``taulearn.prune``; "loss", with a
            target, how much larger the loss on ``data`` is without it, in evaluation mode, taken when the first layer
            is chosen and again after each deletion; a function (tau, model) -> one score >= 0 per layer; or a
            :class:`taulearn.Criterion`. None: as for ``taulearn.prune``; with a target "loss" where ``data`` are given,
            else "sensitivity".
        data: Batches on which "loss" compares the layers, as for ``taulearn.prune``.
        loss: Maps (output, target) to a scalar, for "loss". None: that of ``fit``, else the one that the model returns.
        target_blocks: Number of layers to keep.
        target_latency_ms: Or milliseconds that a forward pass may take: time of the whole and of each layer are
            measured when training begins, in evaluation mode; layers go by their share per millisecond until the rest
            of them takes no longer.
        example_inputs: What the latency is measured on, as for ``taulearn.prune``. None: one training sample.
        by: When the target is reached: a number of epochs, or as a float the share of the run, in (0, 1].
        penalised: What the penalty acts on: "next", the layer to go; "all" layers alike; "none": layers are cut off
            without a penalty, tau need not train. "all" also shrinks the steps that stay, which have to grow again
            after the target is reached.
        survivors: "free": all steps train; "one": with a target only the step of the next layer to go moves, and all
            others are exactly 1 after each iteration, so that a wrapped model ends as a plain one. They must be 1 at
            the start.

    Raises:
        ValueError: If an argument lies outside its range or contradicts another one.

    Example:
        >>> Pruning(0.01, every=100).due(iteration=300, epoch_ends=False)
        True
        >>> Pruning(target_blocks=9, by=10).targeted
        True
    """

    threshold: float | None = None
    every: str | int | None = None
    criterion: str | Criterion | Callable[[Tensor, nn.Module], Tensor] | None = field(default=None, kw_only=True)
    data: Any = field(default=None, kw_only=True, compare=False, repr=False)
    loss: Callable[[Any, Any], Tensor] | None = field(default=None, kw_only=True)
    target_blocks: int | None = field(default=None, kw_only=True)
    target_latency_ms: float | None = field(default=None, kw_only=True)
    example_inputs: Any = field(default=None, kw_only=True, compare=False, repr=False)
    by: float | int = field(default=0.6, kw_only=True)
    penalised: str = field(default="next", kw_only=True)
    survivors: str = field(default="free", kw_only=True)

    def __post_init__(self) -> None:
        every = self.every
        check_every(every)
        self._check_criterion()
        if self.targeted:
            from .target import check_target

            check_target(self)
        else:
            self._check_without_target()
            object.__setattr__(self, "threshold", THRESHOLD if self.threshold is None else self.threshold)
            object.__setattr__(self, "every", "epoch" if every is None else every)
            assert self.threshold is not None
            check_threshold(self.threshold)

    @property
    def targeted(self) -> bool:
        """Whether there is a target."""
        return self.target_blocks is not None or self.target_latency_ms is not None

    def due(self, *, iteration: int, epoch_ends: bool) -> bool:
        """Whether to prune after this iteration, counted from 1; with a target the controller knows."""
        return epoch_ends if not isinstance(self.every, int) else iteration % self.every == 0

    def _check_criterion(self) -> None:
        if self.criterion is None and self.data is not None and self.targeted:
            object.__setattr__(self, "criterion", "loss")
        check_criterion(self.criterion)
        check_given(self.criterion, self.data, watching=True)
        if self.data is not None:
            object.__setattr__(self, "data", batches_of(self.data))
        if self.loss is not None and self.criterion != "loss":
            raise ValueError(
                f"loss must be left out with criterion {self.criterion!r}, which watches the training's own, got one"
            )
        if not self.targeted and (self.criterion == "loss" or getattr(self.criterion, "greedy", False)):
            raise ValueError(
                f"criterion must have a target where it is taken again after each deletion, got {self.criterion!r} "
                f"with threshold={self.threshold}: give target_blocks or target_latency_ms"
            )

    def _check_without_target(self) -> None:
        for name, default in _OF_TARGETS.items():
            given = getattr(self, name)
            if given is not default and not (isinstance(given, str | float) and given == default):
                raise ValueError(
                    f"{name} must be left out without a target, got {given!r}: give target_blocks or target_latency_ms"
                )


_OF_TARGETS = {"example_inputs": None, "by": 0.6, "penalised": "next", "survivors": "free"}


def check_every(every: Any) -> None:
    """Refuse what is no time between two looks."""
    if every not in ("epoch", None) and (not isinstance(every, int) or every is True or every < 1):
        raise ValueError(f"every must be 'epoch' or a number of iterations >= 1, got {every!r}")


def check_one_decides(threshold: float | None, **others: object) -> None:
    """Refuse a threshold beside something else that decides what is deleted."""
    for name, given in others.items():
        if threshold is not None and given is not None:
            raise ValueError(f"threshold must be left out where {name} is given, got {threshold}: one of them decides")


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is no share."""
    if not (isinstance(threshold, Real) and 0.0 < threshold < 1.0):
        raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}: it is a share of sum |tau|")
