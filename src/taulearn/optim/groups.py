"""Parameter groups with the time steps apart, and the projection after each step."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adaptivity.optimizer_state import (
    LACKING,
    bare,
    check_current,
    check_holds,
    check_holds_steps,
    optimizers_in,
    parameters_held,
    with_inner,
)
from ..nn.time_steps import time_steps_of
from .projections import Projection, check_unattached, constrains_trials

if TYPE_CHECKING:
    from ..penalties import Penalty


def parameter_groups(
    model: nn.Module, lr: float, tau_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser, with the time steps apart: their own learning rate, and no weight decay.

    Args:
        model: A model with time steps.
        lr: Learning rate of everything else.
        tau_lr: Learning rate of tau. None: ``lr``.
        weight_decay: Of everything but tau.

    Returns:
        Two groups, named "weights" and "tau" (one, if tau does not train).

    Raises:
        TypeError: If the model has no time steps.

    Example:
        >>> from taulearn.nn import resnet
        >>> groups = parameter_groups(resnet(2, 3, 1, 4), lr=0.1, tau_lr=0.01, weight_decay=1e-4)
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('weights', 0.1, 0.0001), ('tau', 0.01, 0.0)]
    """
    values = time_steps_of(model).values
    others = [p for p in model.parameters() if p is not values and p.requires_grad]
    groups = [{"name": "weights", "params": others, "lr": lr, "weight_decay": weight_decay}]
    if isinstance(values, nn.Parameter) and values.requires_grad:
        groups.append({"name": "tau", "params": [values], "lr": lr if tau_lr is None else tau_lr, "weight_decay": 0.0})
    return groups


def group_of(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], parameter: Tensor
) -> dict[str, Any] | None:
    """The parameter group that holds a parameter, of optimisers or of one inside them; or None.

    Example:
        >>> w = nn.Parameter(torch.zeros(1))
        >>> group_of(torch.optim.SGD([w], lr=0.5), w)["lr"]
        0.5
    """
    groups = (group for each in with_inner(optimizers_in(optimizer)) for group in each.param_groups)
    return next((group for group in groups if any(p is parameter for p in group["params"])), None)


@torch.no_grad()
def constrain_(
    model: nn.Module, optimizer: torch.optim.Optimizer, penalties: "Sequence[Penalty]" = (), *, scaler: Any = None
) -> None:
    """The end of an optimiser step, in place: the penalties' proximal maps, then the projection onto the constraint.

    In a step that GradScaler lets a fused optimiser skip by itself, nothing moves, and frozen time steps never do.

    Args:
        model: A model with time steps.
        optimizer: Gives the current learning rate of tau.
        penalties: Those with a proximal map act, the others do not.
        scaler: The GradScaler that was handed to the step, where the optimiser's ``step`` takes one.

    Raises:
        ValueError: If the optimiser holds time steps from before a deletion of which it was not told.

    Example:
        >>> from taulearn import penalties
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> constrain_(network, torch.optim.SGD(network.parameters(), lr=1.0), [penalties.L1(0.25, proximal=True)])
        >>> network.time_steps.tau.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    steps = time_steps_of(model)
    group = group_of(optimizer, steps.values)
    if group is None:
        check_current(parameters_held([optimizer]))
        return
    values = steps.values
    if not values.requires_grad:
        return
    for penalty in penalties:
        values = penalty.proximal(values, group["lr"])
    values = steps.projected(values)
    if values is not steps.values:
        for found in overflows(optimizer, scaler):
            values = torch.where(found.to(values.device) != 0, steps.values, values)
        steps.values.copy_(values)


def overflows(optimizer: Any, scaler: Any = None) -> list[Tensor]:
    """Flags of a GradScaler for the step under way, which a fused optimiser skips by itself where one is not 0."""
    if scaler is not None:
        return list(scaler._found_inf_per_device(optimizer).values())
    found = getattr(optimizer, "found_inf", None)  # what GradScaler leaves there during a fused step
    return [found] if isinstance(found, Tensor) else []


def register_projection(
    optimizer: torch.optim.Optimizer, model: nn.Module, penalties: "Penalty | Sequence[Penalty]" = ()
) -> RemovableHandle:
    """Let every ``optimizer.step()`` of a hand-written loop end with :func:`constrain_`.

    In a :class:`SteepestDescent` it follows every trial of the line search instead. While ``fit`` trains with this
    optimiser, which does the same itself, it rests.

    Args:
        optimizer: The torch optimiser that holds the time steps, or one that accelerate or Lightning made of it.
        model: A model with time steps.
        penalties: The penalties of the loop; those with a proximal map act.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        TypeError: If it is no optimiser of torch, or several.
        ValueError: If it does not hold the model's parameters, or lacks time steps that train.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4, constraint="simplex")
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> handle = register_projection(optimizer, network)
        >>> network(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> round(network.time_steps.tau.sum().item(), 6)
        1.0
    """
    optimizer = bare(optimizer)
    check_holds(optimizer, model)
    check_holds_steps(optimizer, model, f"register on the one that holds them; else {LACKING}")
    check_unattached(optimizer, model)
    several = penalties if isinstance(penalties, Iterable) else [penalties]
    hook = Projection(model, several, lambda scaler: constrain_(model, optimizer, several, scaler=scaler))
    if constrains_trials(optimizer):
        return cast(Any, optimizer).register_constraint(hook)
    check_calls_hooks(optimizer, "call taulearn.optim.constrain_(model, optimizer, penalties) after each step")
    return optimizer.register_step_post_hook(hook)


def check_calls_hooks(optimizer: Any, remedy: str) -> None:
    """Refuse what calls no hooks after its step."""
    unmade = isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "_optimizer_step_post_hooks")
    if unmade or not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError(
            f"optimizer must be an optimiser of torch whose __init__ has run, got a {type(optimizer).__name__} that "
            f"calls no hooks after its step: {remedy}"
        )
