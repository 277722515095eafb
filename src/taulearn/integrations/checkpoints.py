"""Checkpoints of other trainers that hold a model whose layers go while it trains.

A trainer saves ``state_dict()`` and loads it into a model that was built anew, with all layers. So the numbers of the
layers that are left travel among the tensors, and a model that is about to load such a state deletes the others first.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..penalties import time_steps_of
from ..pruning import prune

ORIGIN = "taulearn.origin"
"""The name under which the numbers of the layers travel."""


def mark_(model: nn.Module, state: MutableMapping[str, Any], prefix: str = "", *, lifted: bool = False) -> None:
    """Put the numbers of the model's layers into a state dict.

    Args:
        model: The model with time steps.
        state: The state dict of the model, or of something that contains it.
        prefix: What the names of the model's tensors begin with in it.
        lifted: Whether all tensors get a dimension of size 1 in front, so that who does not know the mark cannot load
            them: transformers passes over names that it does not know.
    """
    state[prefix + ORIGIN] = torch.tensor(time_steps_of(model).origin)
    if lifted:
        state.update({name: value.unsqueeze(0) for name, value in state.items()})


def follow_states(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> RemovableHandle:
    """Let a model that loads a marked state delete the layers that the state does not have.

    Args:
        model: The model with time steps.
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

    def follow(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        origin = state.pop(prefix + ORIGIN, None)
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
            prune(model, keep=[present.index(layer) for layer in wanted], optimizer=optimizer)

    return model.register_load_state_dict_pre_hook(follow)
