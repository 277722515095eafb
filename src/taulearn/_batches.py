"""Batches as users have them: pairs (inputs, targets), or dictionaries of keywords as models of transformers take them.

A dictionary holds its targets under "labels", and which tokens count under "attention_mask". A model that is called
with labels returns the loss itself.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ._calls import call

LABELS = "labels"
MASK = "attention_mask"
DECODER = "decoder_input_ids"
_EMPTY = (
    "data must hold at least one batch, got none: an iterator that was used before is empty; hand over a list or a "
    "DataLoader"
)


def inputs_and_targets(batch: Any, argument: str = "data") -> tuple[Any, Any]:
    """The model's arguments, and the targets; of a dictionary those are its labels, None where it has none."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != LABELS}, batch.get(LABELS)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"{argument} must yield pairs (inputs, targets) or dictionaries with 'labels', got {type(batch).__name__}: let "
        "each batch be one of them"
    )


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on a device."""
    return tree_map(lambda each: each.to(device, non_blocking=True) if isinstance(each, Tensor) else each, batch)


def batches_of(data: Any) -> Iterable[Any]:
    """Batches to go through several times, from a DataLoader or whatever yields batches, or from one batch.

    A dictionary, and a pair with a tensor as targets, are one batch. An iterator, which yields once, is read now.
    """
    if isinstance(data, Mapping) or (isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)):
        return [data]
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be a DataLoader, a list of batches or one batch, got {type(data).__name__}: a batch is a "
            "pair (inputs, targets), or a dictionary"
        )
    found = list(data) if isinstance(data, Iterator) else data
    if isinstance(found, list | tuple) and not found:
        raise ValueError(_EMPTY)
    return found


def each_batch(batches: Iterable[Any], model: nn.Module, like: Tensor) -> Iterator[Any]:
    """The batches, with their tensors where ``like`` is; refused where there is none, or keys do not fit the model."""
    batch = None
    for batch in batches:
        check_keys(model, batch)
        yield on_device(batch, like.device)
    if batch is None:
        raise ValueError(_EMPTY)


def check_keys(model: nn.Module, batch: Any, argument: str = "data") -> None:
    """Refuse a dictionary with keys that the model's forward does not take."""
    if not isinstance(batch, Mapping):
        return
    taken = inspect.signature(model.forward).parameters.values()
    names = {each.name for each in taken if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    for rest in (each.annotation for each in taken if each.kind is each.VAR_KEYWORD):
        named = [getattr(each, "__annotations__", None) for each in get_args(rest)]  # Unpack[of a TypedDict]
        if not named or named[0] is None:
            return  # it takes any
        names |= named[0].keys()
    if unknown := sorted(str(key) for key in batch if key not in names and key != LABELS):
        raise TypeError(
            f"{argument} must have keys that {type(model).__name__} takes, got {', '.join(map(repr, unknown))}: leave "
            f"them out; it takes {', '.join(sorted(names))}"
        )


def with_labels(inputs: Any, targets: Any) -> Any:
    """The keywords of a model that computes its loss itself; inputs that are no dictionary stay as they are."""
    return {**inputs, LABELS: targets} if isinstance(inputs, Mapping) and targets is not None else inputs


def with_decoder(model: nn.Module, inputs: Any, targets: Any) -> Any:
    """The inputs, with those of the decoder, which some models of transformers make of labels that they are not given.

    Where the model makes none, or they are there, the inputs stay as they are.
    """
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None or targets is None or not isinstance(inputs, Mapping) or DECODER in inputs:
        return inputs
    return {**inputs, DECODER: make(labels=targets)}


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a model returned, or None."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if isinstance(found, Tensor) else None


def no_loss(argument: str) -> ValueError:
    """The error where neither the caller nor the model has a loss."""
    return ValueError(
        f"loss must be given with this {argument}, got None, and the model returns no loss of its own: give a function "
        "(outputs, targets) -> scalar, or batches that are dictionaries with 'labels'"
    )


def check_loss(loss: Callable[[Any, Any], Tensor] | None) -> None:
    """Refuse what cannot be called."""
    if loss is None:  # the model has one
        return
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise TypeError(f"loss must be a function of (outputs, targets), got a class: pass {loss.__name__}()")
    if not callable(loss):
        names = [name for name in (loss, f"{loss}_loss") if isinstance(loss, str) and hasattr(nn.functional, name)]
        raise TypeError(
            f"loss must be a function of (outputs, targets), got {loss!r}: pass for instance "
            f"torch.nn.functional.{names[0] if names else 'cross_entropy'}"
        )


def check_scalar(value: Any) -> None:
    """Refuse a loss that is no scalar."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss must return a scalar tensor, got {value!r:.80}: take its mean over the batch")


def loss_on(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None, argument: str = "data"
) -> tuple[Tensor, Any]:
    """The loss of a model on a batch, and its outputs; without a loss given it is the one that the model returns.

    Raises:
        ValueError: If there is no loss: none is given, and the model returns none for the batch; or it is no scalar.
    """
    inputs, targets = inputs_and_targets(batch, argument)
    outputs = call(model, with_labels(inputs, targets) if loss is None else with_decoder(model, inputs, targets))
    value = own_loss(outputs) if loss is None else loss(outputs, targets)
    if value is None:
        raise no_loss(argument)
    check_scalar(value)
    return value, outputs


def leading(batch: Any) -> Tensor:
    """A tensor with one row a sample: the targets of (inputs, targets), or the first of the inputs' tensors."""
    inputs, targets = batch
    return next(each for each in (targets, *tree_leaves(inputs)) if isinstance(each, Tensor) and each.ndim)


def split(batch: Any, number: int) -> list[Any]:
    """A batch (inputs, targets) in parts along the samples; what has no row for each sample goes into all of them."""
    size = len(leading(batch))

    def parts(each: Any) -> list[Any]:
        rows = isinstance(each, Tensor) and each.ndim > 0 and len(each) == size
        return list(each.tensor_split(number)) if rows else [each] * number

    leaves, structure = tree_flatten(batch)
    return [tree_unflatten(part, structure) for part in zip(*map(parts, leaves), strict=True)]


def logits_of(outputs: Any, argument: str = "outputs") -> Tensor:
    """The logits that a model answers: a tensor, or what an output of transformers or a dictionary holds as such.

    Raises:
        TypeError: If there are none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        raise TypeError(f"{argument} must be a tensor or hold 'logits', got {type(outputs).__name__}")
    return found
