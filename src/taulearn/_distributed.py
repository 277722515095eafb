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
    """Refuse a wrapper of data parallel training, and a model whose parameters are sharded.

    Args:
        argument: The caller's argument name.
        model: What was given.
        act: What was to be done with it: "prune", "wrap", "save" or "export".

    Raises:
        TypeError: If it is a wrapper.
        ValueError: If parameters are sharded.

    Example:
        >>> refuse_distributed("model", DataParallel(nn.Linear(1, 1)))
        Traceback (most recent call last):
        ...
        TypeError: model must be the model itself, got it in a DataParallel: hand over wrapper.module
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DataParallel):
        raise TypeError(f"{argument} must be the model itself, got it in a DataParallel: hand over wrapper.module")
    if isinstance(model, DistributedDataParallel) and act != "prune":
        why = ", which would not average the gradients of the time steps" if act == "wrap" else ""
        raise TypeError(
            f"{argument} must be the model itself, got it in a DistributedDataParallel{why}: {act} wrapper.module"
            f"{', then make the DistributedDataParallel anew' if act == 'wrap' else ''}"
        )
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"{argument} must be the model itself, got it in a DistributedDataParallel, which would keep averaging the "
            "gradients of deleted layers: hand over wrapper.module on every process, and wrap it anew after a "
            "deletion. Or let taulearn.fit train the bare model: under torchrun it averages gradients itself"
        )
    if not dist.is_available() or not dist.is_initialized():
        return
    sharded = _sharded(model)
    if sharded is not None:
        raise ValueError(
            f"{argument} must not be sharded, got {sharded}: {act} before fully_shard; or gather the weights "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load them into "
            f"a fresh model, and {act} that one{', then shard it' if act in ('prune', 'wrap') else ''}"
        )


def _sharded(model: nn.Module) -> str | None:
    """What shows that a model is sharded; classes that torch has not loaded cannot be in it."""
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
    """Every DistributedDataParallel that there is around a model.

    Args:
        model: The model.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [each for each in wrappers if any(part is model for part in each.modules())]


def expire(wrappers: Iterable[nn.Module]) -> None:
    """Let wrappers around a model, of which layers were deleted, refuse to be called again.

    Args:
        wrappers: What :func:`wrappers_around` found before.
    """
    for each in wrappers:
        each.register_forward_pre_hook(_refuse_call, prepend=True)


def expire_wrappers(model: nn.Module) -> None:
    """Let every DistributedDataParallel around this model, of which layers were deleted, refuse to be called again.

    Args:
        model: The pruned model.
    """
    expire(wrappers_around(model))


def _refuse_call(_module: nn.Module, _args: Any) -> None:
    raise RuntimeError(
        "this DistributedDataParallel was made before layers were deleted, and would let the processes' weights drift "
        "apart: wrap the pruned model anew, wrapper = DistributedDataParallel(wrapper.module)"
    )
