"""Whether data fit a model and a loss."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._batches import check_keys, leading, no_loss, with_labels
from .._calls import call
from .._counting import BY_SAMPLES, Counting, UnfitTargets, watched, watched_model
from .._errors import first_line
from .._undisturbed import undisturbed
from ..nn.time_steps import time_steps_of
from ..penalties import Penalty
from .batches import Batch, LoaderBatches, TensorBatches
from .objective import Loss, as_float, autocast_of, input_dtype

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Seen:
    """Properties of losses and network that a forward pass shows."""

    countings: list[Counting]  # how the loss counts, and those of the penalties
    # fewest samples that the network takes in training: two where batch normalisation sees one value of each channel
    # per sample
    least: int


def check_data(
    argument: str,
    model: nn.Module,
    loss: Loss | None,
    sample: Batch,
    batches: TensorBatches | LoaderBatches,
    *,
    differentiated: bool,
    precision: str = "float32",
    penalties: Iterable[Penalty] = (),
) -> "Seen":
    """One forward pass on a few samples, so that data that do not fit are named before training starts."""
    inputs, targets = as_float(sample[0], input_dtype(model)), sample[1]
    known = batches.targets if isinstance(batches, TensorBatches) else leading(sample)
    check_keys(model, inputs, argument)
    if isinstance(batches, TensorBatches):
        fault = bad_tensor_sample(batches)
        if fault is not None:
            raise ValueError(f"{argument} must hold finite numbers, but {fault}")
    least = [1]
    with undisturbed(model, sample):
        model.train()
        for norm in [each for each in model.modules() if isinstance(each, _BatchNorm) and each.training]:
            norm.register_forward_pre_hook(_watch_size(len(leading(sample)), least))
        model.eval()
        # with a gradient, like the steps: a loss may ask for one, or forget to have one
        with torch.set_grad_enabled(differentiated), autocast_of(precision, time_steps_of(model).values.device):
            if loss is None:
                output, value, counting = _own_loss(argument, model, sample)
            else:
                output = _output(argument, model, sample[0])
                value, counting = _loss_value(argument, loss, output, targets, known)
            chosen = [counting]
            for each in penalties:
                each.check(model, inputs, targets, output)
                own = None if each.loss is None else _loss_value(argument, each.loss, output, targets, known)[1]
                chosen.append(BY_SAMPLES if own is None else own)
        differentiable = differentiated and any(p.requires_grad for p in model.parameters())
        if differentiable and not value.requires_grad:
            raise ValueError(
                "loss must be differentiable, got a value that does not depend on the outputs: "
                "compute it with torch, without .item(), .detach() and argmax"
            )
    if isinstance(batches, LoaderBatches):
        batches.counting = chosen[0]
    elif (reason := nothing_counts(batches.targets, chosen[0])) is not None:
        raise ValueError(f"{argument} must hold a label that counts, got {reason}, for every sample")
    return Seen(chosen, max(least))


def _watch_size(samples: int, least: list[int]) -> Callable[[nn.Module, Any], None]:
    """A hook that notes how many samples it takes for two values per channel, which training asks for."""

    def hook(_: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim > 1 and args[0].numel():
            least.append(math.ceil(2 * samples * args[0].shape[1] / args[0].numel()))

    return hook


def _own_loss(argument: str, model: nn.Module, sample: Batch) -> tuple[Any, Tensor, Counting]:
    """The model's output and its loss of a few samples, and how that counts."""
    if not isinstance(sample[0], Mapping):
        raise no_loss(argument)
    try:
        output, value, counting = watched_model(model, sample, argument=argument, whole=leading(sample))
    except UnfitTargets:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = {name: tuple(each.shape) for name, each in with_labels(*sample).items()}
        raise ValueError(
            f"{argument} must hold batches that {type(model).__name__} takes, got tensors of the shapes {shapes} "
            f"({first_line(error)})"
        ) from error
    if value is None:
        raise no_loss(argument)
    return output, value, replace(counting, scores=None)


def _output(argument: str, model: nn.Module, inputs: Any) -> Any:
    """The network's output; where it fails for the inputs' type, an error that names the right one."""
    try:
        return call(model, as_float(inputs, input_dtype(model)))
    except (RuntimeError, TypeError, ValueError) as error:
        floating = isinstance(inputs, Tensor) and inputs.is_floating_point()
        for dtype in dict.fromkeys(p.dtype for p in model.parameters() if floating and p.is_floating_point()):
            if dtype == inputs.dtype:
                continue
            try:
                model(inputs.to(dtype))
            except (RuntimeError, TypeError, ValueError):
                continue
            raise TypeError(
                f"{argument} must hold inputs of the network's type {dtype}, got {inputs.dtype}: "
                f"convert them with inputs.to({dtype}), or build the network with that dtype"
            ) from error
        raise


def nothing_counts(targets: Tensor, counting: Counting) -> str | None:
    """The value of the labels, in words, where none of them counts in the mean that a loss takes; or None."""
    if counting.by != "labels" or counting.summed or bool(counting.of(targets) > 0):
        return None
    return f"{counting.ignored}, which losses ignore{'' if counting.weight is None else ', or of a class of weight 0'}"


def _loss_value(argument: str, loss: Loss, output: Any, targets: Tensor, known: Tensor) -> tuple[Tensor, Counting]:
    """The loss of a few samples and how it counts, or an error that names what does not fit."""
    try:
        with warnings.catch_warnings():  # torch warns of shapes that it broadcasts
            warnings.filterwarnings("error", message="Using a target size")
            value, counting = watched(loss, output, targets, argument=argument, whole=known)
    except UnfitTargets:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, UserWarning) as error:
        reason = first_line(error).rstrip(". ")
        shape = f", while outputs have the shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise ValueError(
            f"{argument} must hold targets that the loss can compare with outputs, got {targets.dtype} of shape "
            f"{tuple(targets.shape)} for {len(targets)} samples{shape} ({reason}){_remedy(output, targets)}"
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss must return a scalar tensor, got {type(value).__name__}: compute it with torch, without .item()"
        )
    if value.numel() != 1 or value.ndim:
        raise ValueError(
            f"loss must return a scalar, the mean over the batch, got shape {tuple(value.shape)} for "
            f"{len(targets)} samples: use reduction='mean'"
        )
    if not value.is_floating_point():
        raise TypeError(f"loss must return a floating point scalar, got {value.dtype}: it has no gradient")
    return value, replace(counting, scores=None)


def _remedy(output: Any, targets: Tensor) -> str:
    """The remedy, where shapes and types tell it; else nothing."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        return ""
    if targets.shape == output.shape:
        if targets.is_floating_point():
            return f": use targets.to({output.dtype})" if targets.dtype != output.dtype else ""
        return f": use targets.to({output.dtype}), or class numbers, targets.argmax(1)"
    if targets.ndim == 2 and targets.shape[1] == 1 and output.shape[1] > 1:
        return ": class numbers have the shape (n,) and the type int64; use targets.squeeze(1).long()"
    if targets.ndim == 1 and output.shape[1] > 1 and targets.dtype != torch.int64:
        return ": class numbers are int64; use targets.long()"
    if targets.ndim == 1 and output.shape[1] == 1:
        return f": use targets.unsqueeze(1).to({output.dtype})"
    return ""


def bad_tensor_sample(batches: TensorBatches) -> str | None:
    """The first sample of tensors that is not finite, in words, or None."""
    for name, tensor in (("inputs", batches.inputs), ("targets", batches.targets)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # One pass without temporaries settles the usual case; a sum that overflows is looked at again.
        if bool(tensor.sum(dtype=torch.complex128 if tensor.is_complex() else torch.float64).isfinite()):
            continue
        rows = max(1, _CHUNK // max(1, tensor[0].numel()))
        for start in range(0, len(tensor), rows):
            bad = ~tensor[start : start + rows].isfinite().reshape(len(tensor[start : start + rows]), -1).all(1)
            if bool(bad.any()):
                at = start + int(bad.nonzero()[0, 0])
                return fault_of(name, tensor[at], at)
    return None


def fault_of(name: str, sample: Tensor, at: int) -> str:
    """A number of a sample that is not finite, in words."""
    value = sample[~sample.isfinite()].flatten()[0].item() if sample.ndim else sample.item()
    return f"the {name} of sample {at} hold {value}: mend or drop it"
