"""Batches as users have them: pairs (inputs, targets), or dictionaries of keywords as models of transformers take them.

A dictionary holds its targets under "labels", and which tokens count under "attention_mask". A model that is called
with labels returns the loss itself.
"""

from collections.abc import Callable, Mapping
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
