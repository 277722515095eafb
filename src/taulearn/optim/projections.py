"""The projection after each step, and the hooks on an optimiser that act on time steps: nobody acts twice."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adaptivity.optimizer_state import (
    LACKING,
    PROJECTIONS,
    bare,
    check_current,
    check_holds,
    check_holds_steps,
    has_session,
    optimizers_in,
    parameters_held,
    with_inner,
)
from ..nn.time_steps import time_steps_of

if TYPE_CHECKING:
    from ..penalties import Penalty


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
        values = steps.sparing(values, penalty.proximal(values, group["lr"]))
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


_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__  # of every step that calls hooks


def steps_under_way(optimizer: Any) -> int:
    """How many steps of an optimiser are under way: two in the hooks of a ``super().step()``, which torch may call."""
    if torch.compiler.is_compiling():
        return 1  # there are no frames to be looked at
    frames = (frame for frame, _ in traceback.walk_stack(None))
    return sum(frame.f_code is _STEP and frame.f_locals.get("self") is optimizer for frame in frames)


def constrains_trials(optimizer: Any) -> bool:
    """Whether the constraint follows every trial of a line search, as in SteepestDescent, and not the step alone."""
    return hasattr(optimizer, "register_constraint")


def searches(optimizer: Any) -> bool:
    """Whether an optimiser evaluates the objective several times per step, and gets a closure for it."""
    return isinstance(optimizer, torch.optim.LBFGS) or constrains_trials(optimizer)


class Projection:
    """A hook of ``register_projection``."""

    def __init__(self, model: nn.Module, penalties: "Sequence[Penalty]", act: Callable[[Any], None]) -> None:
        self.model, self.penalties, self._act = model, tuple(penalties), act
        PROJECTIONS.add(self)

    def __call__(self, optimizer: Any = None, _args: Any = (), options: Mapping[str, Any] | None = None) -> None:
        if steps_under_way(optimizer) < 2:
            self._act((options or {}).get("grad_scaler"))


class Attached:
    """A hook of ``taulearn.attach``."""


def check_unattached(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimiser, and a model, that have a session of ``taulearn.attach``."""
    hooks = getattr(bare(optimizer), "_optimizer_step_post_hooks", {})
    if any(isinstance(hook, Attached) for hook in hooks.values()):
        raise ValueError(
            "optimizer must have no session of taulearn.attach, got one that has: its steps would end twice with the "
            "proximal step and the projection; call session.detach() before"
        )
    if has_session(model):
        raise ValueError(
            "model must have no session of taulearn.attach, got one that has: call session.detach() before; several "
            "optimisers are handed to attach as one list"
        )


def check_projections(optimizer: torch.optim.Optimizer, model: nn.Module, penalties: "Sequence[Penalty]") -> None:
    """Refuse a registered projection that does more than ``fit`` would with these penalties."""
    check_unattached(optimizer, model)
    for _, _, hook in projections_of(optimizer, model):
        for penalty in hook.penalties:
            if not penalty.differentiated and all(penalty is not each for each in penalties):
                raise ValueError(
                    f"penalties must contain those given to register_projection, whose {penalty.name!r} is missing: "
                    "fit takes the proximal step itself; hand it the same object, or remove the handle"
                )


@contextmanager
def suspended_projections(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[None]:
    """Let registered projections rest meanwhile: who trains inside takes the proximal step and projects himself."""
    resting = projections_of(optimizer, model)
    for hooks, key, _ in resting:
        del hooks[key]
    try:
        yield
    finally:
        for hooks, key, hook in resting:
            hooks[key] = hook


def projections_of(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> list[tuple[MutableMapping[int, Any], int, Projection]]:
    """Where they hang, under which key, and they."""
    places = [getattr(bare(optimizer), name, {}) for name in ("_optimizer_step_post_hooks", "_constraints")]
    return [
        (hooks, key, hook)
        for hooks in places
        for key, hook in hooks.items()
        if isinstance(hook, Projection) and hook.model is model
    ]
