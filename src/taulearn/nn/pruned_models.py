"""Marks on models whose grid changes, and their state dicts: a model built anew takes the layers that a state has.

The state must say which layers there are; the integrations mark those that trainers save. The mark travels among the
tensors, so that whatever saves and loads these carries it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._distributed import together

if TYPE_CHECKING:
    from ..wrapping.wrapped_model import Wrapping
    from .grid import Grid

ORIGIN = "taulearn.origin"
"""The name under which the numbers of the layers travel."""
PARENTS = "taulearn.parents"
"""The name under which (0, the next number) travels and, for each layer that was new, (its number, its parent's)."""
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


def refuse_inference_mode(done: str) -> None:
    """Refuse to change a model where it would get parameters that never train."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"model must be {done} outside torch.inference_mode(), got it inside, where no parameter is made that "
            "trains: take torch.no_grad(), or do it before"
        )


def wrapping_of(model: nn.Module) -> "Wrapping | None":
    """The wrapping of a model, or None.

    Example:
        >>> wrapping_of(nn.Linear(1, 1)) is None
        True
    """
    found: Wrapping | None = vars(model).get(WRAPPING)
    return found


class Follower:
    """A hook before ``load_state_dict``: lets a model have the layers of a marked state.

    Layers that the state does not have are deleted; layers that were new are copies of those that they were made from.
    """

    def __init__(self) -> None:
        self.record: bytes | None = None  # that came with the state that was loaded last

    def __call__(self, model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Change layers, and take the mark off."""
        self.record = None
        origin, record = state.pop(prefix + ORIGIN, None), state.pop(prefix + RECORD, None)
        parents = state.pop(prefix + PARENTS, None)
        if not isinstance(origin, Tensor):
            return
        from .grid import Grid

        if origin.ndim > 1:  # all tensors have a dimension of size 1 in front
            state.update({name: value.squeeze(0) for name, value in state.items()})
        wanted, present = origin.reshape(-1).tolist(), model.time_steps.origin
        first, *pairs = [[0, 0]] if parents is None else parents.reshape(-1, 2).tolist()
        grid = Grid.from_plain({"origin": wanted, "next_number": first[1], "parents": pairs})
        try:
            grid.made_from(present)
        except ValueError as error:
            raise ValueError(
                f"model must have the layers {wanted} of the checkpoint, got {list(present)}: others were deleted "
                "since; load it into a model that was built anew, and go on with that one"
            ) from error
        if grid.origin != present:
            self.follow(model, grid)
        if isinstance(record, Tensor):
            self.record = record.cpu().numpy().tobytes()

    def follow(self, model: Any, grid: "Grid") -> None:
        """Let the model have the layers of a grid; there is no optimiser that could follow."""
        from .grid import regrow

        replaced = model.time_steps.values
        regrow(prunable_of(model), grid)
        if model.time_steps.values is not replaced:
            retire(replaced)
        if (shared := together(model)) is not None:
            shared.follow((), model.time_steps.values, replaced)


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
