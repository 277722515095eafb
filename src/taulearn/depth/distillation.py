"""Distillation: a trained model, the teacher, tells the model what to answer.

    weight T^2 KL(p || q) + hidden mean_l mean (y_l - t_l)^2,        p = softmax(z_teacher / T),  q = softmax(z / T)

Both are means over samples, or over the tokens that count where each token has logits. T^2 keeps the gradient,
weight T (q - p) over the number of samples, of one size for all temperatures. y_l is the state after the layer that had
the number l at the start, t_l that of the teacher.

References:
    Hinton, Vinyals, Dean (2015), Distilling the knowledge in a neural network, equation (2).
    Sanh, Debut, Chaumond, Wolf (2019), DistilBERT (the hidden states).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import MASK, inputs_and_targets, logits_of, with_decoder
from .._calls import call
from .._counting import IGNORED, counted
from .._errors import is_number
from .._undisturbed import evaluation
from ..nn.time_steps import TimeSteps, time_steps_of
from ..penalties.base import Penalty, non_negative
from .states import check_has_stages, forward_with_states

_NEXT_TOKEN = re.compile("CausalLM|LMHead")
"""In the names of classes of transformers whose logits at a token are compared with the label of the next one."""


def divergence(logits: Tensor, teachers: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of softmax(teachers / temperature) and softmax(logits / temperature), along the last dimension.

    Args:
        logits: (..., classes).
        teachers: The teacher's, of the same shape.
        temperature: T > 0.

    Returns:
        (...), in single precision at least.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]))
        tensor([0.6931])
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p, q = (torch.log_softmax(each.to(wide) / temperature, -1) for each in (teachers, logits))
    return (p.exp() * (p - q)).sum(-1)


class Distillation(Penalty):
    """weight T^2 KL(teacher || model) of the logits, and the mean square between hidden states.

    The teacher gets the inputs of each batch, without labels, in evaluation mode and without gradients. It stays as it
    is, and is no part of the model: neither its state dict nor checkpoints hold it. A resumed run is given it again.

    Logits are (batch, classes), a mean over samples, or (batch, tokens, vocabulary), a mean over the tokens that count:
    those whose label is not -100, or, without labels of tokens, those in the attention mask. Of models of transformers
    that predict the next token, the label is that of the next token.

    Args:
        teacher: A trained model that answers as the model does: a tensor of logits, or an output with ``logits``.
        weight: Weight >= 0 of the logits' divergence.
        temperature: T > 0, which both logits are divided by.
        hidden: Weight >= 0 of the mean square between the states of model and teacher after the same layers, by their
            numbers at the start: deleted layers are left out. Both models must have time steps, as a copy of the model
            that is made before training has. 0: the states are not looked at.

    Raises:
        ValueError: If a weight is negative or the temperature not positive. At the first call, if the teacher is the
            model or has parameters of it, has other outputs or other states, or lacks layers of the model.
        TypeError: If the teacher is no module. At the first call, if outputs hold no logits, or the states are asked
            for of a model without time steps.

    References:
        Hinton, Vinyals, Dean (2015), Distilling the knowledge in a neural network.

    Example:
        >>> from taulearn.nn import resnet
        >>> teacher, network, x = resnet(2, 3, 4, 6), resnet(2, 3, 4, 2), torch.ones(5, 2)
        >>> penalty = Distillation(teacher, 0.5, temperature=2.0)
        >>> value = penalty(network, x, outputs=network(x))
        >>> expected = 0.5 * 2.0**2 * divergence(network(x), teacher(x), 2.0).mean()
        >>> torch.allclose(value, expected)
        True
    """

    name = "distillation"
    needs_outputs = True
    only_eager = "a teacher answers in each step"

    def __init__(self, teacher: nn.Module, weight: float, temperature: float = 1.0, hidden: float = 0.0) -> None:
        if not isinstance(teacher, nn.Module):
            given = f"the class {teacher.__name__}" if isinstance(teacher, type) else repr(teacher)
            raise TypeError(f"teacher must be a trained torch module, got {given}")
        if not (is_number(temperature) and 0 < temperature < math.inf):
            raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}: 1 is the usual softmax")
        self.teacher = teacher
        self.weight, self.hidden = non_negative("weight", weight), non_negative("hidden", hidden)
        self.temperature = float(temperature)
        self.needs_states = self.hidden > 0
        if self.needs_states:
            check_has_stages(teacher, "teacher")

    def __call__(
        self,
        model: nn.Module,
        inputs: Any = None,
        targets: Any = None,
        states: list[Tensor] | None = None,
        outputs: Any = None,
    ) -> Tensor:
        if inputs is None or outputs is None:
            raise ValueError(
                "inputs and outputs must be given to a distillation, got None: it compares what the model and the "
                "teacher make of the same batch; write session.loss(loss, outputs=outputs, inputs=inputs)"
            )
        self._check_apart(model)
        if isinstance(inputs, Mapping):
            inputs, labels = inputs_and_targets(inputs)
            targets = labels if targets is None else targets
        inputs = with_decoder(self.teacher, inputs, targets)
        with evaluation(self.teacher), torch.no_grad():
            try:
                answer, its_states = self._asked(self.teacher, inputs)
            except TypeError as error:
                raise TypeError(
                    f"teacher must take the inputs of the model, got {type(self.teacher).__name__}, which does not "
                    f"({error}): take one that does the same task"
                ) from error
        logits, teachers = logits_of(outputs, "outputs"), logits_of(answer, "the teacher's outputs").detach()
        self._check_alike(logits, teachers)
        each = self.weight * self.temperature**2 * divergence(logits, teachers, self.temperature)
        counts = tokens_that_count(model, inputs, targets, each.shape)
        if self.needs_states:
            states = self._asked(model, inputs)[1] if states is None else states
            pairs = _matched(time_steps_of(model), states, time_steps_of(self.teacher), its_states)
            squares = [_squares(y, t, each.shape, inputs) for y, t in pairs]
            each = each + self.hidden * torch.stack(squares).mean(0)
        if counts is None:
            return each.mean()
        return torch.where(counts, each, 0).sum() / counts.sum().clamp(min=1)

    def check(self, model: nn.Module, inputs: Any, targets: Any, outputs: Any) -> None:
        self(model, inputs, targets, outputs=outputs)

    def counts(self, model: nn.Module, inputs: Any, targets: Any) -> Tensor | None:
        labels = isinstance(targets, Tensor) and targets.ndim == 2 and not targets.is_floating_point()
        found = tokens_that_count(model, inputs, targets, targets.shape) if labels else None
        return None if found is None else found.sum()

    def _asked(self, model: nn.Module, inputs: Any) -> tuple[Any, list[Tensor]]:
        """What a model answers, and its states where they are compared."""
        return forward_with_states(model, inputs) if self.needs_states else (call(model, inputs), [])

    def _check_apart(self, model: nn.Module) -> None:
        """Refuse a teacher that would change with the model, or stands elsewhere."""
        mine, its = ({id(p): p for p in each.parameters()} for each in (model, self.teacher))
        if self.teacher is model or mine.keys() & its.keys():
            raise ValueError(
                "teacher must be another model with parameters of its own, got the model itself or one that shares its "
                "parameters: take a copy before training, copy.deepcopy(model)"
            )
        devices = [next((str(p.device) for p in each.values()), "") for each in (mine, its)]
        if devices[0] != devices[1] and all(devices):
            raise ValueError(f"teacher must be on {devices[0]} like the model, got it on {devices[1]}: move it there")

    def _check_alike(self, logits: Tensor, teachers: Tensor) -> None:
        """Refuse outputs that cannot be compared."""
        if logits.ndim not in (2, 3) or logits.shape[-1] < 2:
            raise ValueError(
                "outputs must be logits (batch, classes) or (batch, tokens, vocabulary) of two classes or more for a "
                f"distillation, got the shape {tuple(logits.shape)}"
            )
        if logits.shape[-1] != teachers.shape[-1]:
            raise ValueError(
                f"teacher must have the {logits.shape[-1]} classes or words of the model, got {teachers.shape[-1]}: "
                "take a teacher with the same head and vocabulary"
            )
        if logits.shape != teachers.shape:
            raise ValueError(
                f"teacher must answer in the model's shape {tuple(logits.shape)}, got {tuple(teachers.shape)}: take "
                "one that does the same task"
            )


def tokens_that_count(model: nn.Module, inputs: Any, targets: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Which tokens of a batch count, (batch, tokens) as booleans; None: all, or there are no tokens.

    Args:
        model: Its class tells whether the logits at a token are for the label of the next.
        inputs: The batch's inputs, of which the attention mask is used.
        targets: The labels.
        shape: That of the logits without the vocabulary.

    Example:
        >>> labels = torch.tensor([[3, 4, -100]])
        >>> tokens_that_count(nn.Linear(1, 1), None, labels, labels.shape)
        tensor([[ True,  True, False]])
    """
    if len(shape) != 2:
        return None
    if isinstance(targets, Tensor) and targets.shape == shape and not targets.is_floating_point():
        if _NEXT_TOKEN.search(type(model).__name__):
            targets = nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORED)
        return counted(targets)
    mask = _mask(inputs)
    return mask if mask is not None and mask.shape == shape else None


def _mask(inputs: Any) -> Tensor | None:
    found = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    return found != 0 if isinstance(found, Tensor) and found.ndim == 2 else None


def _matched(
    steps: TimeSteps, states: list[Tensor], its_steps: TimeSteps, its_states: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The states after the layers of the model, each with that of the teacher after the same layer.

    Layers that come from one layer of the teacher's are the same part of its way: the last of them counts.
    """
    its = dict(zip(its_steps.origin, its_states[-its_steps.num_steps :], strict=True))
    own, lacking = dict[int, Tensor](), []
    for number, y in zip(steps.origin, states[-steps.num_steps :], strict=True):
        ancestor = number
        while ancestor not in its and ancestor in steps.parent:
            ancestor = steps.parent[ancestor]
        own[ancestor] = y
        lacking += [number] * (ancestor not in its)
    if lacking:
        raise ValueError(
            f"teacher must have the layers {list(steps.origin)} of the model, got one without {lacking}: take a copy "
            "of the model before layers were deleted, or hidden=0"
        )
    pairs = [(y, its[l]) for l, y in own.items()]
    for y, t in pairs:
        if y.shape != t.shape:
            raise ValueError(
                f"teacher must have states of the model's shape {tuple(y.shape)}, got {tuple(t.shape)}: take one of "
                "the same width, or hidden=0"
            )
    return pairs


def _squares(y: Tensor, t: Tensor, shape: tuple[int, ...], inputs: Any) -> Tensor:
    """The mean square of y - t for each sample (over its tokens in the attention mask) or token, of this shape."""
    squares = (y - t).square()
    if squares.shape[: len(shape)] != shape:
        return squares.mean().expand(shape)  # states without the batch in front
    mask = _mask(inputs)
    if len(shape) == 1 and mask is not None and squares.ndim > 2 and mask.shape == squares.shape[:2]:
        of_tokens = squares.flatten(2).mean(-1)
        return torch.where(mask, of_tokens, 0).sum(1) / mask.sum(1).clamp(min=1)
    return squares.flatten(len(shape)).mean(-1) if squares.ndim > len(shape) else squares
