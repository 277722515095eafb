"""Parameter groups with the time steps apart."""

from typing import Any

from torch import nn

from ..nn.time_steps import time_steps_of


def parameter_groups(
    model: nn.Module, lr: float, tau_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser, with the time steps apart: their own learning rate, and no weight decay.

    What a scheme learns, as an order, is with the time steps.

    Args:
        model: A model with time steps.
        lr: Learning rate of everything else.
        tau_lr: Learning rate of tau. None: ``lr``.
        weight_decay: Of everything but tau. Give it here: the optimiser's own, AdamW's 0.01, does not reach them.

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
    scheme = getattr(model, "scheme", None)
    learned = scheme.parameters() if isinstance(scheme, nn.Module) else ()
    apart = [p for p in (time_steps_of(model).values, *learned) if p.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is each for each in apart)]
    groups = [{"name": "weights", "params": others, "lr": lr, "weight_decay": weight_decay}]
    if apart:
        groups.append({"name": "tau", "params": apart, "lr": lr if tau_lr is None else tau_lr, "weight_decay": 0.0})
    return groups
