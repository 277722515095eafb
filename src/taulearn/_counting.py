"""How much a part of a batch counts in a loss, so that parts add up to the whole batch.

    loss(batch) = sum_p c_p loss(part p) / sum_p c_p

c_p is what torch divides by: for cross entropy and negative log likelihood the sum of the class weights of the labels
that are not ignored, for losses between elements their number. ``reduction="sum"`` losses add up as they are. Any other
function is taken for a mean over samples. Accumulated parts, the shares of several processes and the batches of an
evaluation all go by this.

What a loss does is seen while it is called: a call of torch's functional losses whose result the loss returns, or a
multiple of it, or a sum of several that count alike, and whose target has the elements of the data's targets, or the
same ones of each sample. That holds for the functions, torch's loss modules, ``functools.partial``, and functions like
``lambda output, labels: cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())``.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from ._batches import check_scalar, inputs_and_targets, leading, no_loss, own_loss, with_decoder, with_labels
from ._calls import call

IGNORED = -100
"""The label that torch's cross entropy passes over unless it is told another."""

_SAME_SHAPE = frozenset(
    ("clone", "contiguous", "cpu", "cuda", "detach", "double", "float", "int", "long", "to", "type", "type_as")
)
"""Functions whose result is their first argument, perhaps of another type or in another place."""
_SAME_ELEMENTS = frozenset(
    ("flatten", "movedim", "permute", "ravel", "reshape", "squeeze", "swapaxes", "t", "transpose", "unsqueeze", "view")
)
"""Functions whose result has the elements of their first argument, perhaps in another order."""
_TURNED = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]

_MULTIPLES = frozenset(("__mul__", "__rmul__", "__truediv__", "div", "divide", "mul", "multiply", "true_divide"))
_SUMS = frozenset(("__add__", "__radd__", "__sub__", "add", "sub", "subtract"))
_SAME_NUMBER = frozenset(("__neg__", "mean", "neg", "negative", "sum", *_SAME_SHAPE, *_SAME_ELEMENTS))
"""Functions that leave a single number what it is, but for its sign."""


def counted(targets: Tensor, ignored: int | None = None) -> Tensor:
    """Which labels count, as booleans."""
    return targets.long() != (IGNORED if ignored is None else ignored)  # as a byte, -100 is 156


def accuracy(output: Tensor, target: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Share of samples whose largest output is the target class.

    Args:
        output: (batch, classes), or (batch, classes, ...) where each sample has several labels.
        target: Class numbers, (batch,) or (batch, ...).
        ignore_index: Targets that do not count, as in torch's cross entropy.

    Returns:
        A scalar in [0, 1]; nan where no target counts.

    Example:
        >>> accuracy(torch.eye(2), torch.tensor([0, 0]))
        tensor(0.5000)
    """
    if has_torch_function_variadic(output, target):
        found: Tensor = handle_torch_function(accuracy, (output, target), output, target, ignore_index=ignore_index)
        return found
    right, number = right_of(output, target, ignore_index)
    return right / number


def right_of(output: Tensor, target: Tensor, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """The number of samples whose largest output is the target class, and of those that count."""
    counts = counted(target, ignored)
    return ((output.argmax(1) == target) & counts).sum(), counts.sum()


_LABELS = (F.cross_entropy, F.nll_loss, F.multi_margin_loss, accuracy)
_ELEMENTS = (
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.hinge_embedding_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
    F.soft_margin_loss,
)
_SAMPLES = (
    F.cosine_embedding_loss,
    F.ctc_loss,
    F.gaussian_nll_loss,
    F.margin_ranking_loss,
    F.multilabel_margin_loss,
    F.multilabel_soft_margin_loss,
    F.triplet_margin_loss,
    F.triplet_margin_with_distance_loss,
)
_KNOWN: dict[Callable[..., Any], inspect.Signature] = {
    each: inspect.signature(each) for each in (*_LABELS, *_ELEMENTS, *_SAMPLES)
}


class UnfitTargets(ValueError):
    """Targets are not what the loss is about to take them for."""


class _Padding(NamedTuple):
    """What stands around the targets of each sample: models of transformers shift labels so."""

    sizes: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Counting:
    """How a loss counts."""

    by: str = "samples"  # the mean is over "samples", "elements" of the targets, or "labels" that are not ignored
    summed: bool = False  # whether it is a sum instead, so that parts add up as they are
    classes: int | None = None  # number of classes, where the targets are class numbers
    ignored: int | None = None  # the label that does not count, where there is one
    weight: Tensor | None = None
    scores: Tensor | None = None  # what was compared with the class numbers when it was seen, (batch, classes, ...)
    known: bool = False  # whether the loss is one of torch's
    picked: tuple[Any, ...] = ()  # indices and paddings, one after the other, of the targets that it compares

    def pick(self, targets: Tensor) -> Tensor:
        """Those of the targets that the loss compares."""
        for step in self.picked:
            targets = F.pad(targets, step.sizes, value=step.value) if isinstance(step, _Padding) else targets[step]
        return targets

    def alike(self, other: "Counting") -> bool:
        """Whether another loss weighs all parts of a batch as this one does."""
        if self.summed or other.summed:
            return self.summed and other.summed
        if self.by != "labels" or other.by != "labels":
            return self.by != "labels" and other.by != "labels"
        return self.ignored == other.ignored and self.weight is other.weight and self.picked == other.picked

    def of(self, targets: Tensor, device: torch.device | None = None) -> Tensor:
        """The count c_p of a part with these targets, a scalar in double precision."""
        if self.summed or self.by != "labels":
            number = 1 if self.summed else targets.numel() if self.by == "elements" else len(targets)
            return torch.full((), number, dtype=torch.float64, device=targets.device if device is None else device)
        targets = self.pick(targets)
        counts = counted(targets, self.ignored)
        if self.weight is None:
            return counts.sum(dtype=torch.float64).to(device)
        weights = self.weight.detach()[targets.masked_fill(~counts, 0).long()]
        return weights.masked_fill(~counts, 0).sum(dtype=torch.float64).to(device)

    def empty(self, targets: Tensor) -> Tensor | None:
        """Whether no label of a part counts, so that its mean is 0/0, a boolean scalar; None: it has no labels."""
        if self.ignored is None or self.summed or targets.is_floating_point() or targets.is_complex():
            return None
        return replace(self, by="labels").of(targets) == 0

    def filled(self, targets: Tensor) -> Tensor:
        """The same targets, but class numbers that count where none of them does.

        Torch's loss of a part of which no label counts is 0/0, and weighs 0: any number will do instead.
        """
        empty = self.empty(targets)
        if empty is None:
            return targets
        some = targets.new_zeros(()) if self.weight is None else self.weight.argmax().to(targets.dtype)
        return torch.where(empty, some, targets)

    def check(self, argument: str, targets: Tensor, where: str = "") -> None:
        """Refuse class numbers that the network does not have; targets that are none pass."""
        if self.classes is None or targets.is_floating_point() or targets.is_complex():
            return
        targets = self.pick(targets)
        outside = (targets >= self.classes) | (targets < 0)
        if self.ignored is not None:
            outside &= counted(targets, self.ignored)
        if bool(outside.any()):
            at = outside.nonzero()[0]
            raise UnfitTargets(
                f"{argument} must hold labels in 0 .. {self.classes - 1}, got {int(targets[tuple(at)])} at sample "
                f"{int(at[0])}{where and f' {where}'}: renumber the classes, build the network with more outputs, or "
                "let the loss ignore that label (ignore_index)"
            )


BY_SAMPLES = Counting()
"""The counting of a function that is not one of torch's."""


class Mean:
    """A figure of the whole data from those of its batches, without a synchronisation."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count: Tensor | None = None
        self._summed = False

    def add(self, value: Any, counting: Counting, targets: Tensor) -> None:
        """Take the figure, or several of them, of a batch; one of which nothing counts has no mean, and adds none."""
        value = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        count = counting.of(targets, value.device)
        empty = counting.empty(targets)
        nothing = count == 0 if empty is None else empty.to(value.device)
        total = torch.where(nothing, 0.0, value.detach().double() * count)
        self._total = total if self._total is None else self._total + total
        self._count = count if self._count is None else self._count + count
        self._summed = counting.summed

    def value(self) -> Tensor:
        """The figure, in double precision; nan where nothing counts."""
        assert self._total is not None
        assert self._count is not None
        return self._total if self._summed else self._total / self._count


def watched(
    function: Callable[..., Any],
    output: Any,
    targets: Tensor,
    *,
    argument: str = "",
    where: str = "",
    whole: Tensor | None = None,
) -> tuple[Any, Counting]:
    """The value of a loss or metric, and how it counts."""
    # what is compiled would hide its calls
    compiles = "torch._dynamo" in sys.modules
    seen = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    with seen, _Watch(output, targets, argument, where, whole) as watch:
        value = function(output, targets)
    return value, watch.counting_of(value)


def watched_model(
    model: nn.Module, batch: tuple[Any, Any], *, argument: str, where: str = "", whole: Tensor | None = None
) -> tuple[Any, Tensor | None, Counting]:
    """The output of a model that computes its loss itself, that loss or None, and how it counts."""
    inputs, targets = batch
    outputs: list[Any] = []

    def run(_: Any, labels: Any) -> Tensor | None:
        outputs.append(call(model, with_labels(inputs, None if targets is None else labels)))
        return own_loss(outputs[0])

    value, counting = watched(run, None, leading(batch), argument=argument, where=where, whole=whole)
    return outputs[0], value, counting


def loss_counted(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None, argument: str = "data"
) -> tuple[Tensor, Counting, Tensor]:
    """The loss of a model on a batch, how it counts, and the targets; without a loss given it is the model's own."""
    inputs, targets = inputs_and_targets(batch, argument)
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"{argument} must hold targets for the loss, got {type(targets).__name__}: let batches be pairs "
            "(inputs, targets), or dictionaries with 'labels'"
        )
    if loss is None:
        _, value, counting = watched_model(model, (inputs, targets), argument=argument, where="of a batch")
        if value is None:
            raise no_loss(argument)
    else:
        outputs = call(model, with_decoder(model, inputs, targets))
        value, counting = watched(loss, outputs, targets, argument=argument, where="of a batch")
    check_scalar(value)
    return value, counting, targets


class _Watch(TorchFunctionMode):
    """Sees the calls of torch's functions on outputs and targets."""

    def __init__(self, output: Any, targets: Tensor, argument: str, where: str, whole: Tensor | None) -> None:
        super().__init__()
        self.output, self.targets, self.argument, self.where = output, targets, argument, where
        self.whole = whole
        self.same: list[tuple[Tensor, tuple[Any, ...], bool]] = [(targets, (), True)]  # what is picked; like the data?
        self.calls: list[tuple[Any, Counting]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counting = None
        if func in _KNOWN:
            given = _KNOWN[func].bind(*args, **kwargs)
            given.apply_defaults()
            counting = self._counting(func, given.arguments)
            self._check_labels(counting)
            if func not in _LABELS:
                self._check_shapes(args[:2])
        result = func(*args, **kwargs)
        if counting is None and isinstance(result, Tensor) and result.shape == (len(self.targets),) * 2:
            self._check_shapes(args[:2])
        if counting is None:
            counting = self._combined(func, args, kwargs)
        if counting is not None:
            self.calls.append((result, counting))
        elif args and (of_targets := self._picked(args[0])) is not None:
            self._follow(func, args, kwargs, of_targets, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, of_targets: tuple[tuple[Any, ...], bool], result: Any) -> None:
        """Know the targets again in what a function makes of them."""
        name, (picked, whole) = getattr(func, "__name__", ""), of_targets
        if name in _SAME_SHAPE:
            self.same.append((result, picked, whole))
        elif name in _SAME_ELEMENTS or func in _TURNED:
            self.same.append((result, picked, False))
        elif name == "__getitem__" and whole and _leaves_samples(args[1], args[0].ndim):
            self.same.append((result, (*picked, args[1]), True))
        elif func is F.pad and whole and kwargs.get("mode", "constant") == "constant":
            sizes = tuple(args[1] if len(args) > 1 else kwargs["pad"])
            if len(sizes) < 2 * args[0].ndim:  # of each sample
                self.same.append((result, (*picked, _Padding(sizes, kwargs.get("value") or 0)), True))

    def _combined(self, func: Any, args: Any, kwargs: Any) -> Counting | None:
        """How a multiple of a loss, or a sum of several, counts; None: nothing is known of it."""
        name = getattr(func, "__name__", "")
        if not args or kwargs or name not in _SAME_NUMBER | _MULTIPLES | _SUMS:
            return None
        known = [found for each in args[:2] if (found := self._found(each)) is not None]
        numbers = all(isinstance(each, int | float) or self._found(each) is not None for each in args[:2])
        if name in _SAME_NUMBER:
            return known[0] if known and known[0] is self._found(args[0]) else None
        if not known or not numbers or len(args) != 2:
            return None
        if len(known) == 2:
            return known[0] if name in _SUMS and known[0].alike(known[1]) else None
        if known[0].summed:  # divided by the number of samples, perhaps
            return (
                known[0] if name in _SUMS and not any(each for each in args if isinstance(each, int | float)) else None
            )
        return known[0] if "div" not in name or self._found(args[0]) is not None else None

    def _found(self, value: Any) -> Counting | None:
        """How a number counts that a loss gave before."""
        if not isinstance(value, Tensor) or value.ndim:
            return None
        return next((counting for result, counting in reversed(self.calls) if result is value), None)

    def counting_of(self, value: Any) -> Counting:
        """How the loss counts, given what it returned."""
        if (found := self._found(value)) is not None:
            return found
        labels = [counting for _, counting in self.calls if counting.classes is not None]
        return replace(labels[-1], by="samples", summed=False) if labels else BY_SAMPLES

    def _picked(self, value: Any) -> tuple[tuple[Any, ...], bool] | None:
        """The part of the targets that something is, and whether it has their shape but for what is left out."""
        return next(((picked, whole) for each, picked, whole in self.same if value is each), None)

    def _is_target(self, value: Any) -> bool:
        return self._picked(value) is not None

    def _counting(self, func: Any, given: Mapping[str, Any]) -> Counting:
        """How a call of one of torch's functions counts."""
        reduction = given.get("reduction", "mean")
        if given.get("size_average") is not None or given.get("reduce") is not None:
            legacy = torch.nn._reduction.legacy_get_string
            reduction = legacy(given["size_average"], given["reduce"], emit_warning=False)
        summed = reduction == "sum"
        scores, target = given.get("output" if func is accuracy else "input"), given.get("target")
        if func in _SAMPLES or not self._is_target(target):
            return Counting(summed=summed, known=True)
        assert isinstance(scores, Tensor)
        of_targets = self._picked(target)
        assert of_targets is not None
        if func in _ELEMENTS:
            return Counting("samples" if reduction == "batchmean" else "elements", summed, known=True)
        if scores.shape == getattr(target, "shape", None) or scores.ndim < 2:  # class probabilities
            return Counting("elements", summed, known=True)
        classes, ignored = scores.shape[1], given.get("ignore_index")
        by = "samples" if ignored is None else "labels"
        return Counting(by, summed, classes, ignored, given.get("weight"), scores, True, of_targets[0])

    def _check_labels(self, counting: Counting) -> None:
        """Refuse class numbers out of range before torch does; on a GPU only once, for it takes a synchronisation."""
        if self.argument and (self.whole is not None or self.targets.device.type == "cpu"):
            counting.check(self.argument, self.targets if self.whole is None else self.whole, self.where)

    def _check_shapes(self, pair: Sequence[Any]) -> None:
        """Refuse outputs (n, 1) that meet targets (n,), or the other way round: broadcasting makes n x n of them."""
        n = len(self.targets)
        if not self.argument or n < 2 or len(pair) < 2 or not all(isinstance(each, Tensor) for each in pair):
            return
        if {tuple(each.shape) for each in pair} != {(n,), (n, 1)}:
            return
        targets, others = ([each for each in pair if self._is_target(each) is is_one] for is_one in (True, False))
        if len(targets) == 1 and (others[0] is self.output or others[0].requires_grad):
            flat, data = targets[0].ndim == 1, self.targets if self.whole is None else self.whole
            raise UnfitTargets(
                f"{self.argument} must hold targets {'(n, 1)' if flat else '(n,)'} like the network's outputs, got "
                f"shape {tuple(data.shape)}: a loss would compare every sample with every other; "
                f"use targets.{'unsqueeze(1)' if flat else 'squeeze(1)'}"
            )


def _leaves_samples(index: Any, ndim: int) -> bool:
    """Whether an index takes the same of each sample."""
    if not isinstance(index, tuple) or not all(each is ... or isinstance(each, int | slice) for each in index):
        return False
    if index[:1] == (slice(None),):
        return True
    return index[:1] == (...,) and len(index) <= ndim
