"""Batches as users have them: pairs (inputs, targets), or dictionaries of keywords as models of transformers take them.

A dictionary holds its targets under "labels", and which tokens count under "attention_mask". A model that is called
with labels returns the loss itself.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ._calls import call

LABELS = "labels"
MASK = "attention_mask"


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


def on_device(batch: Any, like: Tensor) -> Any:
    """The batch with all its tensors where ``like`` is."""
    return tree_map(lambda each: each.to(like.device) if isinstance(each, Tensor) else each, batch)


def batches_of(data: Any, argument: str = "data") -> Iterable[Any]:
    """Batches to go through several times, from a DataLoader or whatever yields batches, or from one batch.

    A dictionary, and a pair with a tensor as targets, are one batch. An iterator, which yields once, is read now.

    Raises:
        TypeError: If it does not yield.
        ValueError: If it is known to be empty.
    """
    if isinstance(data, Mapping) or (isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)):
        return [data]
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"{argument} must be a DataLoader, a list of batches or one batch, got {type(data).__name__}: a batch is a "
            "pair (inputs, targets), or a dictionary"
        )
    found = list(data) if isinstance(data, Iterator) else data
    if isinstance(found, list | tuple) and not found:
        raise _no_batch(argument)
    return found


def each_batch(batches: Iterable[Any], model: nn.Module, like: Tensor, argument: str = "data") -> Iterator[Any]:
    """The batches, with their tensors where ``like`` is; refused where there is none, or keys do not fit the model."""
    batch = None
    for batch in batches:
        check_keys(model, batch, argument)
        yield on_device(batch, like)
    if batch is None:
        raise _no_batch(argument)


def _no_batch(argument: str) -> ValueError:
    return ValueError(
        f"{argument} must hold at least one batch, got none: an iterator that was used before is empty; hand over a "
        "list or a DataLoader"
    )


def check_keys(model: nn.Module, batch: Any, argument: str = "data") -> None:
    """Refuse a dictionary with keys that the model's forward does not take."""
    if not isinstance(batch, Mapping):
        return
    taken = inspect.signature(model.forward).parameters.values()
    names = {each.name for each in taken if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    unknown = sorted(str(key) for key in batch if key not in names and key != LABELS)
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in taken):
        raise TypeError(
            f"{argument} must have keys that {type(model).__name__} takes, got {', '.join(map(repr, unknown))}: leave "
            f"them out; it takes {', '.join(sorted(names))}"
        )


def loss_on(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None, argument: str = "data"
) -> tuple[Tensor, Any]:
    """The loss of a model on a batch, and its outputs; without a loss given it is the one that the model returns.

    Raises:
        ValueError: If there is no loss: none is given, and the model returns none for the batch.
    """
    if loss is not None:
        inputs, targets = inputs_and_targets(batch, argument)
        outputs = call(model, inputs)
        return loss(outputs, targets), outputs
    if isinstance(batch, Mapping):
        outputs = model(**batch)
        own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if isinstance(own, Tensor):
            return own, outputs
    raise ValueError(
        f"loss must be given with this {argument}, got None, and the model returns no loss of its own: give a function "
        "(outputs, targets) -> scalar, or batches that are dictionaries with 'labels'"
    )


def logits_of(outputs: Any, argument: str = "outputs") -> Tensor:
    """The logits that a model answers: a tensor, or what an output of transformers or a dictionary holds as such.

    Raises:
        TypeError: If there are none.
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        raise TypeError(f"{argument} must be a tensor or hold 'logits', got {type(outputs).__name__}")
    return found
