"""Scores of the layers, of which the rules take shares: powers of the steps, contributions, or a user's function.

The contribution is the mean over samples of norm(tau_l^p f_l(y_l)), by which the state changes in a layer. A step
says little about a layer whose function is large or small; in a network with normalisation the one makes up for the
other. The contribution is what the next layers see. In a wrapped block it is norm(tau (B(x) - x)).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import call
from .._errors import unknown_name
from .._undisturbed import undisturbed
from ..nn.pruned_models import prunable_of, wrapping_of
from ..nn.time_steps import TimeSteps
from ..wrapping.state_argument import Form

NAMES = ("power", "share", "contribution")

_FORGETTING = 0.2


@torch.no_grad()
def shares(steps: TimeSteps, power: float = 1.0) -> Tensor:
    """Each layer's share abs(tau_l)^power / sum_j abs(tau_j)^power.

    Args:
        steps: The time steps.
        power: 1 for the residual scheme, gamma for the fractional one.

    Returns:
        Shares (num_steps,), float64, with sum 1 (all 0 where every step is 0).

    Raises:
        ValueError: If a step is not finite.

    Example:
        >>> shares(TimeSteps(2, init=[3.0, -1.0])).tolist()
        [0.75, 0.25]
    """
    if not bool(torch.isfinite(steps.tau).all()):
        raise ValueError(
            f"tau must be finite, got {steps.tau.tolist()}: training has diverged; lower the learning rate"
        )
    return shares_of(steps.tau, power)


def shares_of(tau: Tensor, power: float) -> Tensor:
    """The shares of any numbers of steps.

    Args:
        tau: Steps (..., num_steps).
        power: As for :func:`shares`.

    Returns:
        Shares (..., num_steps), float64.
    """
    magnitude = tau.double().abs() ** power
    return magnitude / magnitude.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


class Criterion(ABC):
    """What each layer is worth: deletions take those with the smallest shares of the scores.

    One of your own defines :meth:`scores`; and ``measuring`` and :meth:`keep_`, where it watches the training.

    Attributes:
        power: The exponent p where the scores are abs(tau)^p, which follow the steps while layers go; else None.
        measuring: A method without arguments that returns a context. Forward passes in it are watched: in ``fit`` whole
            iterations, every twentieth or so; otherwise all that happens between two steps, evaluation included. None:
            nothing is watched.
        unseen: Positions of the layers of which nothing is known yet; while there are some, deletions wait.
        number: Number of measurements.

    Example:
        >>> from taulearn import prune
        >>> from taulearn.nn import resnet
        >>> class Norms(Criterion):
        ...     def scores(self, model):
        ...         return torch.stack([layer.linear.weight.norm() for layer in model.layers])
        >>> prune(resnet(2, 3, 1, 4), criterion=Norms(), budget=3).layers_after
        3
    """

    power: float | None = None
    measuring: Callable[[], AbstractContextManager[None]] | None = None
    unseen: Sequence[int] = ()
    number: int = 0

    @abstractmethod
    def scores(self, model: nn.Module) -> Tensor:
        """One number >= 0 for each layer that the model has now."""

    def keep_(self, indices: Sequence[int]) -> None:  # noqa: B027  most have nothing to do
        """Told after a deletion which layers stayed, by their positions before it."""

    def state(self) -> dict[str, Any]:
        """What a resumed training needs, plain data and tensors by name."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from :meth:`state`; other names are passed over."""

    def average_(self, mean: Callable[[Tensor], Tensor]) -> None:  # noqa: B027
        """Take means over the processes of what each has measured."""


class Power(Criterion):
    """abs(tau_l)^p."""

    def __init__(self, power: float = 1.0) -> None:
        self.power: float = power

    def scores(self, model: nn.Module) -> Tensor:
        return prunable_of(model).time_steps.tau.detach().double().abs() ** self.power


class Function(Criterion):
    """What a function (tau, model) -> scores answers."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        self.function = function

    def scores(self, model: nn.Module) -> Tensor:
        return self.function(prunable_of(model).time_steps.tau.detach(), model)


def as_criterion(
    given: str | Criterion | Callable[[Tensor, nn.Module], Tensor] | None,
    model: nn.Module,
    *,
    in_training: bool = False,
    recording: bool = False,
) -> Criterion:
    """A criterion, as ``prune`` and ``Pruning`` take it, as an object; recording as for :class:`Contribution`."""
    check_criterion(given, NAMES if in_training or given == "contribution" else NAMES[:2])
    if isinstance(given, Criterion):
        return given
    if given == "contribution":
        if in_training:
            return Contribution(model, recording=recording)
        raise ValueError(
            "criterion must be taulearn.contribution(inputs), got 'contribution', which has no data outside fit: "
            "give a batch of inputs"
        )
    if callable(given):
        return Function(given)
    return Power(1.0 if given == "share" else prunable_of(model).scheme.step_power)


def check_criterion(given: Any, names: Sequence[str] = NAMES) -> None:
    """Refuse what is no criterion."""
    if isinstance(given, str):
        if given not in names:
            raise unknown_name("criterion", given, names)
    elif not (given is None or isinstance(given, Criterion) or callable(given)) or isinstance(given, type):
        raise TypeError(
            f"criterion must be a name or a function (tau, model) -> scores, got {given!r}: use 'share', 'power' or "
            "'contribution', an object of taulearn.Criterion, or leave it out"
        )


def scores_of(criterion: Criterion, model: nn.Module) -> tuple[list[float] | None, float]:
    """The checked scores of all layers; or None and the power of the steps, which change while layers go."""
    if criterion.power is not None:
        return None, criterion.power
    number, given = prunable_of(model).time_steps.num_steps, criterion.scores(model)
    try:
        scores = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"criterion must return {number} finite scores >= 0, one per layer, got {given!r}: return a tensor "
            "shaped like tau"
        ) from error
    if scores.shape != (number,) or not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(
            f"criterion must return {number} finite scores >= 0, one per layer, got "
            f"{scores.tolist() if scores.numel() < 50 else f'shape {tuple(scores.shape)}'}"
        )
    return scores.tolist(), 1.0


def normalised(scores: Sequence[float]) -> list[float]:
    """Scores over their sum.

    Example:
        >>> normalised([3.0, 1.0])
        [0.75, 0.25]
    """
    total = sum(scores) or 1.0
    return [score / total for score in scores]


def contribution(example_inputs: Any) -> Callable[[Tensor, nn.Module], Tensor]:
    """A criterion for ``taulearn.prune``: the mean norm of what each layer adds to the state, on these inputs.

    Args:
        example_inputs: A batch, or a tuple of arguments, or a dictionary of keywords; a few hundred samples do.

    Returns:
        A function (tau, model) -> one score per layer, from one forward pass in evaluation mode. It raises
        ValueError if a layer is not called on any sample, as nothing is known of what it contributes.

    Example:
        >>> from taulearn import prune
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> with torch.no_grad():
        ...     _ = network.layers[2].linear.weight.zero_(), network.layers[2].linear.bias.zero_()
        >>> [d.layer for d in prune(network, criterion=contribution(torch.ones(8, 2)), budget=3).deleted]
        [2]
    """

    def criterion(_tau: Tensor, model: nn.Module) -> Tensor:
        running = Contribution(model)
        with undisturbed(model, example_inputs), running.measuring():
            call(model, example_inputs)
        if running.unseen:
            raise ValueError(
                f"example_inputs must be such that every layer is called on at least one sample, got inputs on which "
                f"{running.unseen} of {len(running.counts)} layers are not: what those contribute is unknown; give "
                "inputs that reach all layers, or another criterion, such as 'share'"
            )
        return running.values

    return criterion


class Contribution(Criterion):
    """A running mean of the contributions of all layers, measured in forward passes that take place anyway.

    The figures stay on the device. A measured forward pass reads each layer's values once more. A layer that it skips
    keeps what is known of it.

    Args:
        model: A network with time steps, or a wrapped model.
        recording: Whether only forward passes count that record gradients.

    Attributes:
        values: Contributions, (num_steps,), float32; 0 before the first measurement.
        number: Number of measured forward passes.
        counts: In how many of them each layer was called.
    """

    def __init__(self, model: nn.Module, *, recording: bool = False) -> None:
        self.model, self.recording = model, recording
        steps = prunable_of(model).time_steps
        self.values = torch.zeros(steps.num_steps, dtype=torch.float32, device=steps.values.device)
        self.number = 0
        self.counts = [0] * steps.num_steps

    @property
    def unseen(self) -> list[int]:  # type: ignore[override]
        return [l for l, count in enumerate(self.counts) if count == 0]

    def scores(self, model: nn.Module) -> Tensor:
        return self.values

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the forward passes of the body."""
        layers, found = prunable_of(self.model).layers, dict[int, Tensor]()
        hooks = [layer.register_forward_hook(self._hook(l, found), with_kwargs=True) for l, layer in enumerate(layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._take(found)

    def _hook(self, l: int, found: dict[int, Tensor]) -> "_Hook":
        prunable, wrapping = prunable_of(self.model), wrapping_of(self.model)
        form = Form() if wrapping is None else wrapping.forms[l]

        def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.is_grad_enabled() or not self.recording:
                with torch.no_grad():
                    take(args, kwargs, output)

        def take(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = form.leaving(output)
            if value is None or value.numel() == 0:
                return
            if wrapping is not None:
                x = form.arriving(args, kwargs)
                size = _mean_norm(value if x is None else value - x.to(value.dtype))
            else:
                size = _mean_norm(value) * prunable.scheme.factor(prunable.time_steps.tau[l].float())
            found[l] = size

        return _Hook(measure)

    def _take(self, found: dict[int, Tensor]) -> None:
        if not found:
            return
        self.number += 1
        for l in found:
            self.counts[l] += 1
        seen, device = sorted(found), self.values.device
        weights = torch.tensor([max(_FORGETTING, 1.0 / self.counts[l]) for l in seen], device=device)
        index = torch.tensor(seen, device=device)
        now = torch.stack([found[l] for l in seen])
        self.values = self.values.index_copy(0, index, torch.lerp(self.values[index], now, weights.to(now.dtype)))

    def keep_(self, indices: Sequence[int]) -> None:
        self.values = self.values[torch.tensor(list(indices), dtype=torch.long, device=self.values.device)]
        self.counts = [self.counts[i] for i in indices]

    def state(self) -> dict[str, Any]:
        return {"contributions": self.values, "measurements": self.number, "counts": self.counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.values, self.number = state["contributions"], state["measurements"]
        self.counts = list(state.get("counts") or [self.number] * len(self.values))

    def average_(self, mean: Callable[[Tensor], Tensor]) -> None:
        if self.number:
            self.values = mean(self.values)


class _Hook:
    """A hook that measures; in a copy of the model, pickled or not, one that does nothing."""

    def __init__(self, measure: Callable[..., None] | None = None) -> None:
        self.measure = measure

    def __call__(self, *args: Any) -> None:
        if self.measure is not None:
            self.measure(*args)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()


def _mean_norm(values: Tensor) -> Tensor:
    """The mean over the batch of the norms of the samples."""
    samples = values.float().reshape(len(values), -1) if values.ndim > 1 else values.float().reshape(1, -1)
    return torch.linalg.vector_norm(samples, dim=1).mean()
