"""Scores of the layers, of which the rules take shares: powers of the steps, contributions, or a user's function.

The contribution is the mean over samples of norm(tau_l^p f_l(y_l)), by which the state changes in a layer. A step
says little about a layer whose function is large or small; in a network with normalisation the one makes up for the
other. The contribution is what the next layers see. In a wrapped block it is norm(tau (B(x) - x)).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import call
from .._errors import unknown_name
from .._undisturbed import undisturbed
from ..nn.following import prunable_of, wrapping_of
from ..nn.time_steps import TimeSteps
from ..wrapping.state_argument import Form
from .transaction import Prunable

Criterion = Callable[[Tensor, nn.Module], Tensor]

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


def scores_of(
    criterion: str | Criterion | None, prunable: Prunable, model: nn.Module
) -> tuple[list[float] | None, float]:
    """What shares are taken of: scores of a user's function, or a power of abs(tau).

    Args:
        criterion: As ``prune`` takes it.
        prunable: The model, or its wrapping.
        model: The model.

    Returns:
        The scores, None for abs(tau); and its exponent.

    Raises:
        ValueError: If the name is unknown, or the function returns something else than scores.
    """
    power = prunable.scheme.step_power
    if criterion is None or criterion == "power":
        return None, power
    if isinstance(criterion, str):
        if criterion == "contribution":
            raise ValueError(
                "criterion must be taulearn.contribution(inputs), got 'contribution', which has no data outside fit: "
                "give a batch of inputs"
            )
        if criterion != "share":
            raise unknown_name("criterion", criterion, ("power", "share"))
        return None, 1.0
    if not callable(criterion):
        raise TypeError(f"criterion must be a name or a function (tau, model) -> scores, got {criterion!r}")
    tau = prunable.time_steps.tau.detach()
    given = criterion(tau, model)
    try:
        scores = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"criterion must return {len(tau)} finite scores >= 0, one per layer, got {given!r}: return a tensor "
            "shaped like tau"
        ) from error
    if scores.shape != tau.shape or not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(
            f"criterion must return {len(tau)} finite scores >= 0, one per layer, got "
            f"{scores.tolist() if scores.numel() < 50 else f'shape {tuple(scores.shape)}'}"
        )
    return scores.tolist(), power


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
        running = RunningContribution(model)
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


class RunningContribution:
    """A running mean of the contributions of all layers, measured in forward passes that take place anyway.

    The figures stay on the device. A measured forward pass reads each layer's values once more. A layer that it skips
    keeps what is known of it.

    Args:
        model: A network with time steps, or a wrapped model.

    Attributes:
        values: Contributions, (num_steps,), float32; 0 before the first measurement.
        number: Number of measured forward passes.
        counts: In how many of them each layer was called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        steps = prunable_of(model).time_steps
        self.values = torch.zeros(steps.num_steps, dtype=torch.float32, device=steps.values.device)
        self.number = 0
        self.counts = [0] * steps.num_steps

    @property
    def unseen(self) -> list[int]:
        """Positions of the layers of which nothing is known."""
        return [l for l, count in enumerate(self.counts) if count == 0]

    @contextmanager
    def measuring(self, *, recording: bool = False) -> Iterator[None]:
        """Measure the forward passes of the body; or, recording, those alone that record gradients."""
        layers, found = prunable_of(self.model).layers, dict[int, Tensor]()
        hooks = [
            layer.register_forward_hook(self._hook(l, found, recording), with_kwargs=True)
            for l, layer in enumerate(layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._take(found)

    def _hook(self, l: int, found: dict[int, Tensor], recording: bool) -> Callable[..., None]:
        prunable, wrapping = prunable_of(self.model), wrapping_of(self.model)
        form = Form() if wrapping is None else wrapping.forms[l]
        power = prunable.scheme.step_power
        gain = math.gamma(2.0 - power)

        def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.is_grad_enabled() or not recording:
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
                size = _mean_norm(value) * gain * prunable.time_steps.tau[l].abs().float() ** power
            found[l] = size

        return measure

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
        """Forget all layers but those at ``indices``."""
        self.values = self.values[torch.tensor(list(indices), dtype=torch.long, device=self.values.device)]
        self.counts = [self.counts[i] for i in indices]


def _mean_norm(values: Tensor) -> Tensor:
    """The mean over the batch of the norms of the samples."""
    samples = values.float().reshape(len(values), -1) if values.ndim > 1 else values.float().reshape(1, -1)
    return torch.linalg.vector_norm(samples, dim=1).mean()
