"""Models that several processes hold: in a DistributedDataParallel, or sharded by fully_shard; what is refused of them.

Both keep lists of the parameters that they were made with. What a change of the layers means for them is in
:mod:`taulearn._together`, which is loaded where there are any.
"""

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_SHARDED = {
    "wrap": "wrap it before fully_shard",
    "refine": "refine it before fully_shard, as new layers have no place in the lists that it keeps",
    "export": "save it with taulearn.save_model, load that in one process, and export what is loaded",
    "branch": "delete single branches before fully_shard, or both branches of a block at once",
    "unwrap": "save it with taulearn.save_model, load that in one process, and unwrap what is loaded",
}


def refuse_distributed(argument: str, model: nn.Module, act: str = "prune") -> None:
    """Refuse a wrapper of data parallel training, and a sharded model where it does not allow the act."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        name = DistributedDataParallel.__name__ if isinstance(model, DistributedDataParallel) else "DataParallel"
        remedy = "hand over wrapper.module"
        if act == "wrap":
            remedy += ", and make the wrapper anew, which would not average the gradients of the time steps"
        raise TypeError(f"{argument} must be the model itself, got it in a {name}: {remedy}")
    if act in _SHARDED and (found := sharded(model)) is not None:
        raise ValueError(f"{argument} must not be sharded, got {found}: {_SHARDED[act]}")


def several_processes() -> bool:
    """Whether this process is one of several, of one alone perhaps, that torch.distributed knows."""
    return dist.is_available() and dist.is_initialized()


def sharded(model: nn.Module) -> str | None:
    """The sign that a model is sharded, or None."""
    kinds = {"FSDPModule", "FullyShardedDataParallel"} if several_processes() else set[str]()
    for name, module in model.named_modules() if kinds else ():
        if kinds & {kind.__name__ for kind in type(module).__mro__}:
            return f"the {type(module).__name__} {name!r}" if name else f"a {type(module).__name__}"
    for name, parameter in model.named_parameters() if kinds else ():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):  # a DTensor, or DeepSpeed's
            return f"the {type(parameter).__name__} {name!r}"
    return None


def alike(model: nn.Module, values: list[float]) -> list[float]:
    """Figures of the layers, or their means over the processes that hold the model, equal in all of them."""
    found = together(model)
    return values if found is None else found.mean(values)


def together(model: nn.Module) -> Any:
    """The :class:`~taulearn._together.Together` of a model that several processes hold, else None."""
    if not several_processes():
        return None
    from ._together import Together, wrappers_around

    wrappers, shards = wrappers_around(model), sharded(model)
    return Together(model, wrappers, shards) if wrappers or shards is not None else None
