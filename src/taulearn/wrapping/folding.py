"""The steps of a wrapped model on their way out: plain ones from units of displacement, ones at the end of training."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._errors import is_number
from ..adaptivity.transaction import check_averaged
from ..nn.pruned_models import wrapping_of
from .wrapped_model import drop_units


@torch.no_grad()
def anneal_to_one(model: nn.Module, fraction: float, *, averaged: AveragedModel | None = None) -> None:
    """Bring every step of a wrapped model nearer to 1, tau <- tau + fraction (1 - tau), so that it can be unwrapped.

    Over the last E epochs, once what is to go has been pruned: fraction 1/E after the first of them, 1/(E-1) after the
    second, and 1 after the last, which leaves exact ones. The weights adapt meanwhile. Steps in units of displacement
    become plain ones first.

    Args:
        model: A wrapped model.
        fraction: Part of the way, in [0, 1].
        averaged: Averaged weights of the model, whose steps are brought nearer to 1 alike.

    Raises:
        TypeError: If ``averaged`` is no AveragedModel.
        ValueError: If the model is not wrapped, the fraction is no number in [0, 1], the constraint does not allow all
            steps to be 1, or ``averaged`` is of another model.

    Example:
        >>> import taulearn
        >>> model = taulearn.wrap(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), "0", init=0.5)
        >>> anneal_to_one(model, 0.5)
        >>> model.time_steps.tau.tolist()
        [0.75]
    """
    wrapping = wrapping_of(model)
    if wrapping is None:
        raise ValueError(f"model must be wrapped, got {type(model).__name__} without time steps of this kind")
    if not is_number(fraction) or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction!r}: it is a part of the way to 1")
    steps = wrapping.time_steps
    number = steps.num_steps
    if steps.rule.adds_up and not math.isclose(steps.horizon, number, rel_tol=1e-6):
        raise ValueError(
            f"the steps must be able to be 1 all at once, got constraint {steps.constraint!r} with horizon "
            f"{steps.horizon:g} for {number} blocks: wrap with constraint='free' to anneal"
        )
    fold_units(model, averaged=averaged)
    for values in (steps.values, *(() if averaged is None else (averaged.module.time_steps.values,))):
        values.copy_(torch.ones_like(values) if fraction == 1.0 else values + fraction * (1.0 - values))


@torch.no_grad()
def fold_units(model: nn.Module, *, averaged: AveragedModel | None = None) -> None:
    """Turn steps in units of displacement into plain ones, with which the model computes the same; others stay.

    Args:
        model: A wrapped model.
        averaged: Averaged weights of the model, folded alike, by units of their own. Those given to ``fit`` follow by
            themselves.

    Raises:
        TypeError: If ``averaged`` is no AveragedModel.
        ValueError: If the model is not wrapped, or ``averaged`` is of another one.

    Example:
        >>> import taulearn
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> model = taulearn.wrap(nn.Sequential(block), "0", units="displacement")
        >>> fold_units(model)
        >>> [name for name, _ in model.time_steps.named_buffers()]
        []
    """
    wrapping = wrapping_of(model)
    if wrapping is None:
        raise ValueError(f"model must be wrapped, got {type(model).__name__} without time steps of this kind")
    if averaged is not None:
        check_averaged(averaged, model)
    for each in (wrapping, None if averaged is None else wrapping_of(averaged.module)):
        if each is not None and each.units is not None:
            each.time_steps.values.copy_(each.plain_steps())
            drop_units(each)


def fold_average(model: nn.Module, averaged: AveragedModel) -> None:
    """Fold averaged weights whose model has plain steps by now, without which they cannot be updated."""
    ours, theirs = wrapping_of(model), wrapping_of(averaged.module)
    if ours is not None and ours.units is None and theirs is not None and theirs.units is not None:
        fold_units(averaged.module)


def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that a wrapped model would have with plain steps."""
    wrapping = wrapping_of(model)
    state = model.state_dict()
    if wrapping is not None and wrapping.units is not None:
        state = {name: value for name, value in state.items() if not name.startswith("time_steps.units.")}
        state["time_steps.values"] = wrapping.plain_steps()
    return state
