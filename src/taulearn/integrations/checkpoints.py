"""Checkpoints of other trainers that hold a model whose layers go while it trains.

A trainer saves ``state_dict()`` and loads it into a model that was built anew, with all layers. So the numbers of the
layers that are left travel among the tensors, and a model that is about to load such a state deletes the others first.
Where the trainer has no place for the record, it travels there, too.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..files import tensor_bytes
from ..penalties import time_steps_of
from ..pruning import prune

ORIGIN = "taulearn.origin"
"""The name under which the numbers of the layers travel."""
RECORD = "taulearn.record"
"""The name under which the record travels."""


def mark_(
    model: nn.Module,
    state: MutableMapping[str, Any],
    prefix: str = "",
    *,
    record: Mapping[str, Tensor] | None = None,
    lifted: bool = False,
) -> None:
    """Put the numbers of the model's layers into a state dict.

    Args:
        model: The model with time steps.
        state: The state dict of the model, or of something that contains it.
        prefix: What the names of the model's tensors begin with in it.
        record: What :attr:`Follower.record` is to be once the state is loaded.
        lifted: Whether all tensors get a dimension of size 1 in front, so that who does not know the mark cannot load
            them: transformers passes over names that it does not know.
    """
    state[prefix + ORIGIN] = torch.tensor(time_steps_of(model).origin)
    if record is not None:
        state[prefix + RECORD] = torch.frombuffer(bytearray(tensor_bytes(record, {})), dtype=torch.uint8)
    if lifted:
        state.update({name: value.unsqueeze(0) for name, value in state.items()})


class Follower:
    """Deletes the layers of a model that a marked state does not have, before the model loads it.

    Args:
        optimizer: The model's optimiser, which follows.

    Attributes:
        record: The record of the state that was loaded last, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer
        self.record: dict[str, Tensor] | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)(None)  # the optimiser is that of the model, not of its copy

    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        self.record = None
        origin, record = state.pop(prefix + ORIGIN, None), state.pop(prefix + RECORD, None)
        if not isinstance(origin, Tensor):
            return
        if origin.ndim > 1:
            state.update({name: value.squeeze(0) for name, value in state.items()})
        wanted, present = origin.reshape(-1).tolist(), time_steps_of(model).origin
        if not set(wanted) <= set(present):
            raise ValueError(
                f"model must have the layers {wanted} of the checkpoint, got {list(present)}: others were deleted "
                "since; build the model anew to load it (and set load_best_model_at_end=False where layers go)"
            )
        if len(wanted) < len(present):
            prune(model, keep=[present.index(layer) for layer in wanted], optimizer=self.optimizer)
        if isinstance(record, Tensor):
            self.record = safetensors.torch.load(record.cpu().numpy().tobytes())


def follow_states(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> RemovableHandle:
    """Let a model that loads a marked state delete the layers that the state does not have.

    Args:
        model: The model with time steps. What followed for it before no longer does.
        optimizer: Its optimiser, which follows.

    Returns:
        A handle whose ``remove()`` undoes it.

    Example:
        >>> from taulearn.nn import resnet
        >>> small, fresh = resnet(2, 3, 1, 4), resnet(2, 3, 1, 4)
        >>> report, handle = prune(small, keep=[0, 2]), follow_states(fresh)
        >>> state = small.state_dict()
        >>> mark_(small, state)
        >>> _ = fresh.load_state_dict(state)
        >>> fresh.time_steps.origin
        (0, 2)
    """
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", None), Follower)]:
        del hooks[key]
    return model.register_load_state_dict_pre_hook(Follower(optimizer))


def follower_of(model: nn.Module) -> Follower | None:
    """What :func:`follow_states` gave a model, or None."""
    found = (getattr(hook, "hook", None) for hook in model._load_state_dict_pre_hooks.values())
    return next((hook for hook in found if isinstance(hook, Follower)), None)
