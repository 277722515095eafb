"""The states of a wrapped model, and its intermediate outputs, without any block computed twice.

The intermediate output yhat_k is what the model gives when every block from the k-th on passes its input on, which is
tau = 0. The blocks before it need not be computed again: in a forward pass in which each block is replaced by one that
passes its input on, but for the k-th, which answers y_k, only what lies around the blocks is computed.

All k at once: the inputs are repeated, one group of samples for each k, and the blocks put y_k into the group it
belongs to. A host that mixes samples, or has them in another dimension than the first, would notice; so both ways are
compared once, on states that all differ, and a host in which they differ gets one pass for each k.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._calls import call, forwards
from .._undisturbed import undisturbed
from ..nn.module_on_states import mixing, running_statistics_held
from ..nn.pruned_models import wrapping_of
from ..wrapping.state_argument import Form

if TYPE_CHECKING:
    from ..wrapping.wrapped_model import Wrapping

_SEEN = "_time_steps_seen"


@dataclass
class Seen:
    """Facts that forward passes showed of a host; forgotten after a deletion."""

    blocks: list[nn.Module] = field(default_factory=list)  # the blocks, in the order of their calls
    forms: list[Form] = field(default_factory=list)  # how each one's output holds the state
    ends: list[bool] = field(default_factory=list)
    batches: bool | None = None  # whether all groups can go through the host at once; None: not tried yet


def record_states(model: nn.Module, inputs: Any, *, arrivals: list[Tensor] | None = None) -> tuple[Any, list[Tensor]]:
    """A forward pass with the states between the blocks."""
    wrapping = _wrapping(model)
    states: list[Tensor] = []
    seen = Seen()

    def recording(block: nn.Module) -> Callable[..., Any]:
        forward, form = block.forward, wrapping.present[wrapping.layers.index(block)].form

        def run(*args: Any, **kwargs: Any) -> Any:
            x, output = form.arriving(args, kwargs), forward(*args, **kwargs)
            y = form.leaving(output)
            assert x is not None
            assert y is not None
            if arrivals is not None:
                arrivals.append(x)
            if not states:
                states.append(x)
            else:
                seen.ends.append(x is not states[-1])
            states.append(y)
            seen.blocks.append(block)
            seen.forms.append(Form.of(output, form))
            return output

        return run

    with forwards({block: recording(block) for block in wrapping.layers}):
        output = call(model, inputs)
    if seen.blocks != list(wrapping.layers):
        raise ValueError(
            "model must call its blocks one after the other in the order of their steps, got another order or number "
            "of calls: wrap it with example_inputs, which show the order"
        )
    seen.ends.append(True)
    before = _seen(model)
    if before.forms == seen.forms and before.ends == seen.ends:
        seen.batches = before.batches
    vars(model)[_SEEN] = seen
    return output, states


def intermediate_outputs(
    model: nn.Module, inputs: Any, *, states: Sequence[Tensor] | None = None, final: bool = True
) -> dict[int, Any]:
    """The outputs yhat_k of a wrapped model whose blocks from the k-th on pass their input on."""
    number = len(_wrapping(model).layers)
    last: dict[int, Any] = {}
    if states is None:
        output, states = record_states(model, inputs)
        last = {number: output}
    elif len(states) != number + 1:
        raise ValueError(
            f"states must be y_0 .. y_{number}, got {len(states)} tensors: take those of "
            "taulearn.wrapping.record_states"
        )
    depths = range(number + (final and not last))
    return {**_tails(model, inputs, states, depths), **(last if final else {})}


@contextmanager
def skipping(model: nn.Module, depth: int) -> Iterator[None]:
    """The blocks from the ``depth``-th on pass their input on, as with tau = 0, and are not computed."""
    seen = _seen(model)

    def passing(form: Form) -> Callable[..., Any]:
        return lambda *args, **kwargs: form.around(form.arriving(args, kwargs))

    with forwards({seen.blocks[l]: passing(seen.forms[l]) for l in range(depth, len(seen.blocks))}):
        yield


def _tails(model: nn.Module, inputs: Any, states: Sequence[Tensor], depths: Sequence[int]) -> dict[int, Any]:
    seen = _seen(model)
    inside = {module for block in seen.blocks for module in block.modules()}
    if any(norm not in inside for norm in mixing(model)):
        with running_statistics_held(model):
            return _one_by_one(model, seen, inputs, states, depths)
    if not _in_groups(inputs, states):
        return _one_by_one(model, seen, inputs, states, depths)
    if seen.batches is None:
        seen.batches = _same_in_one_pass(model, seen, inputs, states, depths)
    way = _in_one_pass if seen.batches else _one_by_one
    return way(model, seen, inputs, states, depths)


def _in_groups(inputs: Any, states: Sequence[Tensor]) -> bool:
    """Whether inputs and states have their samples where one pass would repeat them."""
    if not isinstance(inputs, Tensor) or inputs.ndim == 0 or len(inputs) == 0:
        return False
    return all(y.ndim > 0 and len(y) == len(inputs) for y in states)


def _one_by_one(
    model: nn.Module, seen: Seen, inputs: Any, states: Sequence[Tensor], depths: Sequence[int]
) -> dict[int, Any]:
    outputs = {}
    for k in depths:

        def passing(l: int, form: Form, k: int = k) -> Callable[..., Any]:
            return lambda *args, **kwargs: form.around(states[k] if l == k - 1 else form.arriving(args, kwargs))

        with forwards({block: passing(l, seen.forms[l]) for l, block in enumerate(seen.blocks)}):
            outputs[k] = call(model, inputs)
    return outputs


def _in_one_pass(
    model: nn.Module, seen: Seen, inputs: Tensor, states: Sequence[Tensor], depths: Sequence[int]
) -> dict[int, Any]:
    size, first, last = len(inputs), depths[0], depths[-1]
    waiting: list[int] = []

    def passing(l: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            x = seen.forms[l].arriving(args, kwargs)
            assert x is not None
            if first <= l + 1 <= last:
                waiting.append(l + 1)
            if waiting and seen.ends[l]:  # until something happens to the states, they need not be in their places
                before, after = x[: (waiting[0] - first) * size], x[(waiting[-1] - first + 1) * size :]
                x = torch.cat([before, *(states[k] for k in waiting), after])
                waiting.clear()
            return seen.forms[l].around(x)

        return run

    with forwards({block: passing(l) for l, block in enumerate(seen.blocks)}):
        output = model(inputs.repeat(len(depths), *(1 for _ in inputs.shape[1:])))
    return dict(zip(depths, output.split(size), strict=True))


def _same_in_one_pass(
    model: nn.Module, seen: Seen, inputs: Tensor, states: Sequence[Tensor], depths: Sequence[int]
) -> bool | None:
    """Whether one pass gives what single passes give; tried in evaluation mode, without a trace.

    The states of the trial are others than the given ones, each with noise of its own: equal states, as steps of zero
    leave them, would look alike in a host that mixes them.
    """
    if len(depths) < 2:
        return None
    with undisturbed(model):
        apart = [_apart(y) for y in states]
        single = _one_by_one(model, seen, inputs, apart, depths)
        if not all(isinstance(each, Tensor) and len(each) == len(inputs) for each in single.values()):
            return False
        if not all(bool(torch.isfinite(each).all()) for each in single.values()):
            return None
        try:
            together = _in_one_pass(model, seen, inputs, apart, depths)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        return all(
            torch.allclose(together[k], single[k], rtol=1e-3, atol=1e-3 * float(single[k].abs().max())) for k in depths
        )


def _apart(y: Tensor) -> Tensor:
    """A state with noise as large as it is itself."""
    size = y.detach().abs().mean()
    return y.detach() + torch.randn_like(y) * torch.where(size > 0, size, torch.ones_like(size))


def _seen(model: nn.Module) -> Seen:
    """The facts known of a host: those it showed since, or those it showed when it was wrapped."""
    wrapping = _wrapping(model)
    found, blocks = vars(model).get(_SEEN), list(wrapping.layers)
    if isinstance(found, Seen) and found.blocks == blocks:
        return found
    return Seen(blocks, [layer.form for layer in wrapping.present], [True] * len(blocks))


def _wrapping(model: nn.Module) -> "Wrapping":
    wrapping = wrapping_of(model)
    if wrapping is None:
        raise ValueError(f"model must be wrapped, got {type(model).__name__} without: wrap it with taulearn.wrap")
    if wrapping.per == "branch":
        raise ValueError(
            "model must be wrapped per block for the states between its layers, got one with steps per branch: wrap "
            "it with per='block'"
        )
    return wrapping
