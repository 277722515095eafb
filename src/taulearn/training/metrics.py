"""Figures of a model on data: the loss and any mean of a function of output and target."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import check_loss, leading, logits_of, no_loss
from .._calls import call
from .._counting import BY_SAMPLES, IGNORED, Counting, Mean, accuracy as accuracy, counted, watched, watched_model
from .._undisturbed import evaluation
from ..nn.time_steps import time_steps_of
from .batches import Batch, LoaderBatches, make_batches
from .check_arguments import Metric, check_metrics
from .objective import Loss, as_float, input_dtype


def accuracy_of_classes(target: Tensor, output: object = None) -> dict[str, Metric]:
    """The metric "accuracy" where targets are class numbers, and outputs, where they are given, scores of classes."""
    scores = output is None or (isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1)
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return {"accuracy": accuracy} if scores and integers and target.ndim == 1 else {}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    loss: Loss | None = None,
    metrics: str | Sequence[str] | Mapping[str, Metric] = "auto",
    batch_size: int = 1000,
) -> dict[str, float]:
    """Loss and metrics of a model on a data set, in evaluation mode.

    The modes of all modules and torch's global generator are put back, so that training goes on as before.

    Args:
        model: A model with time steps.
        data: A pair of tensors (uint8 images are scaled), a Dataset or a DataLoader, as ``fit`` takes them.
        loss: Maps (output, target) to a scalar. None: what the model itself returns for dictionaries with labels; else
            it is left out.
        metrics: "auto" (accuracy for class numbers, given two outputs or more; labels that the loss ignores do not
            count; perplexity for language models), a list of "accuracy" and "perplexity", or names with functions like
            ``loss``. Both go by what the loss compares: of a language model, each token with the next one.
        batch_size: Samples at a time, which bounds memory; a DataLoader has its own.

    Returns:
        By name what the whole data in one batch would give: torch's own losses are weighted by what they count (labels
        that are not ignored, class weights, elements), sums are added up, any other function is a mean over samples.
        Perplexity is exp of the mean loss of a token.

    Raises:
        ValueError: If a metric is unknown, or is asked for by name where the loss compares no class numbers; or
            dictionaries are without labels, and there is neither a loss nor a metric.

    Example:
        >>> from taulearn.nn import resnet
        >>> data = torch.zeros(5, 2), torch.zeros(5, 1)
        >>> evaluate(resnet(2, 3, 1, 2, init=0.5), data, loss=lambda output, target: (target - target).mean())
        {'loss': 0.0}
    """
    values, dtype = time_steps_of(model).values, input_dtype(model)
    check_loss(loss)
    check_metrics(metrics)
    batches = make_batches(data, batch_size, 0, values.device, shuffle=False, argument="data")
    means: dict[str, Mean] = {}
    strange, perplexed = torch.zeros((), dtype=torch.bool, device=values.device), False
    with evaluation(model), torch.random.fork_rng([]):  # a loader draws from the generator
        for inputs, targets in _in_order(batches):
            output, value, counting = _evaluated(model, loss, (as_float(inputs, dtype), targets), batches.argument)
            rows = leading((inputs, targets))
            if value is not None:
                means.setdefault("loss", Mean()).add(value, counting, rows)
            if isinstance(metrics, Mapping):
                functions = dict(metrics)
            elif metrics == "auto":
                functions = _auto(counting, output, rows)
                perplexed = _is_language(model, counting, output, rows)
                if functions and value is not None and counting.classes is None:  # they may be ranks or counts
                    strange = strange | (counted(rows) & ((rows < 0) | (rows >= output.shape[1]))).any()
            else:
                functions, perplexed = _by_name(metrics, counting), "perplexity" in metrics
            if value is None and not functions and isinstance(inputs, Mapping):
                raise no_loss(batches.argument)
            for name, function in functions.items():
                value, counting = watched(function, output, rows)
                means.setdefault(name, Mean()).add(value, counting, rows)
    if bool(strange):
        del means["accuracy"]
    figures = {name: float(mean.value()) for name, mean in means.items()}
    return figures | ({"perplexity": float(torch.tensor(figures["loss"]).exp())} if perplexed else {})


def _evaluated(model: nn.Module, loss: Loss | None, batch: Batch, argument: str) -> tuple[Any, Tensor | None, Counting]:
    """The output on a batch, its loss where there is one, and how that counts."""
    if loss is None and isinstance(batch[0], Mapping):
        return watched_model(model, batch, argument=argument, where="of a batch")
    output = call(model, batch[0])
    if loss is None:
        return output, None, BY_SAMPLES
    return output, *watched(loss, output, batch[1], argument=argument, where="of a batch")


def _auto(counting: Counting, output: Any, targets: Tensor) -> dict[str, Metric]:
    """Accuracy of what the loss compares with class numbers; where the loss is not known, of the outputs."""
    if not counting.known and counting.classes is None:
        return accuracy_of_classes(targets, output)
    scores = counting.scores
    if scores is None or scores.ndim != 2 or scores.shape[1] < 2 or not targets.numel() == len(targets) == len(scores):
        return {}
    return {"accuracy": _accuracy(counting, scores)}


def _accuracy(counting: Counting, scores: Tensor) -> Metric:
    """Of the scores that the loss compares with targets, whatever the outputs are."""
    known = IGNORED if counting.ignored is None else counting.ignored

    def of(_: Any, targets: Tensor) -> Tensor:
        picked = counting.pick(targets)
        return accuracy(scores, picked.flatten() if scores.ndim == 2 else picked, known)

    return of


def _is_language(model: nn.Module, counting: Counting, output: Any, targets: Tensor) -> bool:
    """Whether each token has scores of a vocabulary, which the loss compares with labels."""
    scores = counting.scores
    if scores is None or scores.ndim != 2 or counting.by != "labels" or counting.summed:
        return False
    try:
        logits = logits_of(output)
    except TypeError:
        return False
    embeddings = getattr(model, "get_output_embeddings", None)  # models of transformers that tag tokens have none
    tagging = embeddings is not None and embeddings() is None
    return logits.shape == (*targets.shape, scores.shape[1]) and targets.ndim == 2 and not tagging


def _by_name(metrics: Sequence[str], counting: Counting) -> dict[str, Metric]:
    """The functions of the names, or an error where the loss is none that they could go by."""
    scores = counting.scores
    if scores is None or ("perplexity" in metrics and (counting.by != "labels" or counting.summed)):
        raise ValueError(
            f"metrics must be functions of (output, target) here, got {list(metrics)}: these names go by the class "
            "numbers that a cross entropy compares, perplexity by its mean, and the loss is none that is known"
        )
    return {"accuracy": _accuracy(counting, scores)} if "accuracy" in metrics else {}


def _in_order(batches: Any) -> Any:
    if isinstance(batches, LoaderBatches):
        yield from batches.epoch(0)
        return
    size = batches.batch_size
    for start in range(0, len(batches.inputs), size):
        batch: Batch = (batches.inputs[start : start + size], batches.targets[start : start + size])
        yield batch
