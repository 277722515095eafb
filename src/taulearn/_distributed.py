"""Wrappers of data parallel training around a model that is to be pruned, and sharded parameters.

DistributedDataParallel keeps a list of the parameters that it was made with. After a deletion it goes on without an
error, averages the gradients of the old list, and lets the processes' weights drift apart. fully_shard keeps such lists
too, and buffers laid out for them.
"""

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def refuse_distributed(argument: str, model: nn.Module, act: str = "prune") -> None:
    """Refuse a wrapper of data parallel training, and a model whose parameters are sharded."""
    model = getattr(model, "_orig_mod", model)
    remedies = {
        "prune": ", which would keep averaging the gradients of deleted layers: hand over wrapper.module on every "
        "process, and wrap it anew after a deletion. Or let taulearn.fit train the bare model: under torchrun it "
        "averages gradients itself",
        "wrap": ", which would not average the gradients of the time steps: wrap wrapper.module, then make the "
        "DistributedDataParallel anew",
    }
    if isinstance(model, DataParallel):
        raise TypeError(f"{argument} must be the model itself, got it in a DataParallel: hand over wrapper.module")
    if isinstance(model, DistributedDataParallel):
        remedy = remedies.get(act, f": {act} wrapper.module")
        raise TypeError(f"{argument} must be the model itself, got it in a DistributedDataParallel{remedy}")
    if dist.is_available() and dist.is_initialized() and (sharded := _sharded(model)) is not None:
        raise ValueError(
            f"{argument} must not be sharded, got {sharded}: {act} before fully_shard; or gather the weights "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load them into "
            f"a fresh model, and {act} that one{', then shard it' if act in ('prune', 'wrap') else ''}"
        )


def _sharded(model: nn.Module) -> str | None:
    """The signs that a model is sharded; classes that torch has not loaded cannot be in it."""
    fsdp, tensor = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            return f"the {type(module).__name__} {name!r}" if name else f"a {type(module).__name__}"
    for name, parameter in model.named_parameters():
        if tensor is not None and isinstance(parameter, tensor.DTensor):
            return f"the DTensor {name!r}"
    return None


def wrappers_around(model: nn.Module) -> list[nn.Module]:
    """Every DistributedDataParallel that there is around a model, for which all objects are gone through."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [each for each in wrappers if any(part is model for part in each.modules())]


def expire(wrappers: Iterable[nn.Module]) -> None:
    """Let wrappers around a model, of which layers were deleted, refuse to be called again."""
    for each in wrappers:
        each.register_forward_pre_hook(_refuse_call, prepend=True)


def _refuse_call(_module: nn.Module, _args: Any) -> None:
    raise RuntimeError(
        "this DistributedDataParallel was made before layers were deleted, and would let the processes' weights drift "
        "apart: wrap the pruned model anew, wrapper = DistributedDataParallel(wrapper.module)"
    )
