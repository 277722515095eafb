"""``attach``: the time steps of a model train in any loop, by hooks on torch's optimisers.

Of the optimisers, one or several, each steps once a round, which is an iteration:

    before each step         the penalties' gradients, of the parameters that it moves, join those of the loss
    after each               proximal step and projection, where the optimiser holds the time steps
    after the last           the record, and the layers that policies delete or let in
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .._distributed import refuse_distributed, several_processes, together
from .._errors import positive_integer
from ..adaptivity.adaptation import Adaptation
from ..adaptivity.optimizer_state import (
    LACKING,
    SESSIONS,
    check_holds,
    check_holds_steps,
    optimizers_in,
    parameters_held,
)
from ..adaptivity.policies import Pruning
from ..adaptivity.refiner import Refinement
from ..adaptivity.transaction import check_averaged
from ..nn.time_steps import time_steps_of
from ..optim.projections import (
    Attached,
    check_calls_hooks,
    check_unattached,
    projections_of,
    searches,
    steps_under_way,
)
from ..penalties import Penalty
from .check_arguments import check_policies
from .objective import as_penalties
from .session import Session, active_penalties


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    penalties: Penalty | Sequence[Penalty] = (),
    pruning: Pruning | None = None,
    refinement: Refinement | None = None,
    averaged: AveragedModel | None = None,
    iterations: int | None = None,
    iterations_per_epoch: int | None = None,
) -> Session:
    """Train a model's time steps in a loop of your own: from now on ``optimizer.step()`` does all they need.

    Before the step the gradients of the penalties join those of the loss. They come last: a loop that clips gradients
    clips those of the loss alone. After the step the proximal maps and the projection follow, then layers are deleted,
    in the model and in the optimiser, whose other state stays as it is. Gradients that are left over stay, too.

    A step that GradScaler skips is none. An iteration is a step of the optimiser, however many batches went into it;
    of several optimisers, one step of each, which gets the penalties' gradients of its own parameters right before its
    step. What layers are worth is measured in the forward passes that record gradients.

    Args:
        model: The model with time steps; torch.compile's wrapper around it will do.
        optimizer: The torch optimiser of its parameters, or a list of all of them where there are several; one that
            accelerate or Lightning's Fabric made of it will do.
        penalties: One or several, added to the loss; those that need the batch enter by :meth:`Session.loss`.
        pruning: When and which layers are deleted. None: none.
        refinement: When layers come in, and how many; without ``data`` it looks at the batch that :meth:`Session.loss`
            is told. None: none.
        averaged: torch's AveragedModel of the model, which the loop updates; its layers follow.
        iterations: Number of iterations of the whole training, which refinement and a target of pruning need.
        iterations_per_epoch: Number of iterations of an epoch, for policies with ``every="epoch"`` or an integer ``by``
            or ``until``, and for penalties that change with the epoch.

    Returns:
        The session: ``.history``, ``.loss(..)`` and ``.detach()``.

    Raises:
        TypeError: If it is handed in a wrapper of data parallel training, or the optimiser calls no hooks.
        ValueError: If an optimiser does not hold the model's parameters, none holds the time steps, one evaluates
            the loss several times a step (LBFGS, SAM) or has a registered projection, it or the model has a session,
            or a number is missing that the policy or a penalty needs.

    Example:
        >>> from taulearn import Pruning
        >>> from taulearn.nn import resnet
        >>> _ = torch.manual_seed(0)
        >>> network, x = resnet(1, 8, 1, 6), torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        >>> session = attach(network, optimizer, pruning=Pruning(target_blocks=4), iterations=40)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(network(x), x.sin()).backward()
        ...     optimizer.step()
        >>> session.detach()
        >>> network.time_steps.num_steps, len(session.history.deletions)
        (4, 2)
    """
    model = getattr(model, "_orig_mod", model)
    refuse_distributed("model", model)
    optimizers = list({id(each): each for each in optimizers_in(optimizer)}.values())
    for each in optimizers:
        _check_optimizer(each, model)
    check_holds_steps(optimizers, model, LACKING if len(optimizers) == 1 else f"hand over all of them; else {LACKING}")
    found = as_penalties(penalties)
    check_policies(pruning, refinement, found)
    if averaged is not None:
        check_averaged(averaged, model)
    _check_numbers(pruning, refinement, found, iterations, iterations_per_epoch)
    epochs, per_epoch = 1.0, iterations_per_epoch or iterations or 1
    if iterations is not None and iterations_per_epoch is not None:
        epochs = iterations / iterations_per_epoch
    shared = work_together(model, pruning, refinement, averaged)
    policies = Adaptation(pruning, refinement, model, optimizers, epochs, per_epoch, recording=True)
    policies.begin(None)
    if policies.pruner is not None and shared is not None:
        policies.pruner.criterion.mean = shared.mean
    session = Session(
        model,
        optimizers,
        active_penalties(found, policies),
        policies,
        epochs=epochs,
        averages=list if averaged is None else lambda: [averaged.module],
    )
    session.record_epoch()
    session.start_epoch(0)
    session.measure()
    hooks = _Hooks(session, iterations_per_epoch)
    for each in optimizers:
        session._hooks.callback(each.register_step_pre_hook(hooks.before).remove)
        session._hooks.callback(each.register_step_post_hook(hooks).remove)
    SESSIONS.add(session)
    session._hooks.callback(SESSIONS.discard, session)
    return session


class _Hooks(Attached):
    """The hooks of a session: ``before`` a step, and the call after it."""

    def __init__(self, session: Session, per_epoch: int | None) -> None:
        self.session, self.per_epoch = session, per_epoch

    def before(self, optimizer: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Add the penalties' gradients before a step, or behind those that the closure makes."""
        session = self.session
        if steps_under_way(optimizer) > 1:
            return None
        closure = options.get("closure", args[1] if len(args) > 1 else None)
        if callable(closure):
            if len(session.optimizers) > 1:
                raise ValueError(
                    "closure must be left out where several optimisers are attached, got one: compute the gradients "
                    "once, before the first of them steps"
                )
            evaluate = self._once(optimizer, closure)
            if "closure" in options:
                return args, options | {"closure": evaluate}
            return (args[0], evaluate, *args[2:]), options
        session.before_step(optimizer, self._scale(optimizer, options))
        return None

    def _once(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with the penalties' gradients, to be called once and where the step began."""
        held = parameters_held([optimizer])
        versions = [p._version for p in held]
        calls: list[int] = []

        def evaluate() -> Any:
            if calls or versions != [p._version for p in held]:
                raise ValueError(
                    f"optimizer must take one gradient a step, got {type(optimizer).__name__}, which calls the closure "
                    "again or elsewhere: use another optimiser, or train with taulearn.fit"
                )
            loss = closure()
            calls.append(1)
            self.session.before_step(optimizer)
            return loss

        return evaluate

    def _scale(self, optimizer: Any, options: Mapping[str, Any]) -> Any:
        """The scale of the gradients that a fused optimiser takes off in its step; None where nothing is added."""
        if not any(p.differentiated for p in self.session.penalties):
            return None
        if options.get("grad_scaler") is not None:
            raise ValueError(
                "optimizer must find the scale of the gradients in its grad_scale, as torch's own do, got a "
                f"{type(optimizer).__name__} that is handed the GradScaler: call scaler.unscale_(optimizer) and "
                "optimizer.step() yourself, or use proximal penalties"
            )
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None and any(p.dtype == torch.float16 for p in parameters_held([optimizer])):
            raise ValueError(
                "optimizer must hold no float16 parameters where a GradScaler leaves the scale to it, got some: scaled "
                "penalties would overflow unnoticed; keep the model in float32 and compute in torch.autocast"
            )
        return scale

    def __call__(self, optimizer: Any, _args: Any, options: Mapping[str, Any]) -> None:
        session = self.session
        if not session.after_step(optimizer, options.get("grad_scaler")):
            return
        iteration, per_epoch = session.iteration, self.per_epoch
        ends = per_epoch is not None and iteration % per_epoch == 0
        epoch = 1 if per_epoch is None else -(-iteration // per_epoch)
        if due := session.due(epoch_ends=ends):
            SESSIONS.discard(session)  # what the policy changes, the session follows
            try:
                session.change_grid(epoch, due)
            finally:
                SESSIONS.add(session)
        if ends:
            session.record_epoch()
            if epoch < session.epochs:
                session.start_epoch(epoch)
        session.measure()


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse what no session can be hung on."""
    check_holds(optimizer, model)
    check_calls_hooks(optimizer, "train with an optimiser that derives from torch.optim.Optimizer")
    check_unattached(optimizer, model)
    if projections_of(optimizer, model):
        raise ValueError(
            "optimizer must have no projection of register_projection, got one: attach takes the proximal step and "
            "projects itself; remove that handle, and hand its penalties to attach"
        )
    if searches(optimizer) or hasattr(optimizer, "second_step"):
        raise ValueError(
            f"optimizer must take one gradient a step, got {type(optimizer).__name__}, whose evaluations of the loss "
            "cannot be told from steps: use another one, or train with taulearn.fit"
        )


def _check_numbers(
    pruning: Pruning | None,
    refinement: Refinement | None,
    penalties: Sequence[Penalty],
    iterations: int | None,
    per_epoch: int | None,
) -> None:
    """Refuse a policy or a penalty that needs a number that is missing."""
    for name, number in (("iterations", iterations), ("iterations_per_epoch", per_epoch)):
        if number is not None:
            positive_integer(name, number)
    targeted = {"pruning": pruning is not None and pruning.targeted, "refinement": refinement is not None}
    for name in (name for name, has_target in targeted.items() if has_target and iterations is None):
        raise ValueError(
            f"iterations must be given where {name} has a target, got None: it is reached by a share of the training; "
            "write attach(.., iterations=epochs * len(loader))"
        )
    counts = {
        "every='epoch'": any(each is not None and each.every == "epoch" for each in (pruning, refinement)),
        f"by={getattr(pruning, 'by', None)}": pruning is not None and pruning.targeted and isinstance(pruning.by, int),
        f"until={getattr(refinement, 'until', None)}": refinement is not None and isinstance(refinement.until, int),
        **{f"the penalty {p.name!r}": p.scheduled for p in penalties},
    }
    for what in (name for name, counts_epochs in counts.items() if counts_epochs and per_epoch is None):
        raise ValueError(
            f"iterations_per_epoch must be given with {what}, got None: write attach(.., "
            "iterations_per_epoch=len(loader))"
        )
    if iterations is None and (scheduled := [p.name for p in penalties if p.scheduled]):
        raise ValueError(
            f"iterations must be given with the penalty {scheduled[0]!r}, which changes over the training, got None"
        )


def work_together(
    model: nn.Module, pruning: Pruning | None, refinement: Refinement | None, averaged: AveragedModel | None = None
) -> Any:
    """Prepare a model that several processes hold, and refuse what they cannot do together; returns what does it."""
    if pruning is not None and pruning.target_latency_ms is not None and several_processes():
        raise ValueError(
            "target_latency_ms must be None where several processes train, got one, which each would measure for "
            "itself: measure in one process (taulearn.summary), and give target_blocks"
        )
    shared = together(model)
    if shared is None or not shared.sharded:
        return shared
    for name, value in {"refinement": refinement, "averaged": averaged}.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None for a model that fully_shard sharded, got one: do so before sharding"
            )
    from .._together import average_gradient

    average_gradient(time_steps_of(model).values)
    return shared
