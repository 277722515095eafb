"""The hooks on an optimiser that act on time steps: nobody does their work twice."""

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn

from ..adaptivity.optimizer_state import bare

if TYPE_CHECKING:
    from ..penalties import Penalty


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

    def __call__(self, optimizer: Any = None, _args: Any = (), options: Mapping[str, Any] | None = None) -> None:
        if steps_under_way(optimizer) < 2:
            self._act((options or {}).get("grad_scaler"))


class Attached:
    """A hook of ``taulearn.attach``."""


SESSIONS: WeakSet[Any] = WeakSet()
"""The sessions of ``taulearn.attach`` that are at work."""


def has_session(model: nn.Module) -> bool:
    """Whether a session of ``taulearn.attach`` trains the model; one that nobody holds any more is none."""
    if any(part is each.steps for each in SESSIONS for part in model.modules()):
        gc.collect()  # a session and its optimiser hold each other
    return any(part is each.steps for each in SESSIONS for part in model.modules())


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
