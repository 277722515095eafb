"""Marks on models that are pruned, and their state dicts: a model built anew deletes the layers that a state lacks.

The state must say which layers are left; the integrations mark those that trainers save. The mark travels among the
tensors, so that whatever saves and loads these carries it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._distributed import expire, wrappers_around

if TYPE_CHECKING:
    from ..wrapping.wrapped_model import Wrapping

ORIGIN = "taulearn.origin"
"""The name under which the numbers of the layers travel."""
RECORD = "taulearn.record"
"""The name under which a record travels, where a trainer has no other place for it."""
REPLACED = "_taulearn_replaced"
"""The mark of time steps that a deletion has replaced: an optimiser that still holds them was not handed to it."""


WRAPPING = "_time_step_wrapping"
"""The attribute in which a wrapped model keeps its wrapping."""


def prunable_of(model: nn.Module) -> Any:
    """The object that pruning works on: the model, or its wrapping; out of torch.compile's wrapper."""
    inner = getattr(model, "_orig_mod", model)
    return vars(inner).get(WRAPPING, inner)


def wrapping_of(model: nn.Module) -> "Wrapping | None":
    """The wrapping of a model, or None.

    Example:
        >>> wrapping_of(nn.Linear(1, 1)) is None
        True
    """
    found: Wrapping | None = vars(model).get(WRAPPING)
    return found


class Follower:
    """A hook before ``load_state_dict``: deletes the layers of a model that a marked state does not have."""

    def __init__(self) -> None:
        self.record: bytes | None = None  # that came with the state that was loaded last

    def __call__(self, model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Delete layers, and take the mark off."""
        self.record = None
        origin, record = state.pop(prefix + ORIGIN, None), state.pop(prefix + RECORD, None)
        if not isinstance(origin, Tensor):
            return
        if origin.ndim > 1:  # all tensors have a dimension of size 1 in front
            state.update({name: value.squeeze(0) for name, value in state.items()})
        wanted, present = origin.reshape(-1).tolist(), model.time_steps.origin
        if not set(wanted) <= set(present):
            raise ValueError(
                f"model must have the layers {wanted} of the checkpoint, got {list(present)}: others were deleted "
                "since; load it into a model that was built anew, and go on with that one"
            )
        if len(wanted) < len(present):
            self.delete(model, [present.index(layer) for layer in wanted])
        if isinstance(record, Tensor):
            self.record = record.cpu().numpy().tobytes()

    def delete(self, model: Any, kept: Sequence[int]) -> None:
        """Delete all layers but those at these positions; there is no optimiser that could follow."""
        replaced = model.time_steps.values
        prunable_of(model).keep_layers_(kept)
        retire(replaced)
        expire(wrappers_around(model))


def retire(values: Tensor) -> None:
    """Mark time steps that others replace, so that an optimiser that still holds them is known."""
    setattr(values, REPLACED, True)


def set_follower(model: nn.Module, follower: Follower | None) -> None:
    """Let a model follow marked states in this way alone, or in none."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", None), Follower)]:
        del hooks[key]
    if follower is not None:
        model.register_load_state_dict_pre_hook(follower)


def follower_of(model: nn.Module) -> Follower | None:
    """The follower of a model, or None."""
    found = (getattr(hook, "hook", None) for hook in model._load_state_dict_pre_hooks.values())
    return next((hook for hook in found if isinstance(hook, Follower)), None)
