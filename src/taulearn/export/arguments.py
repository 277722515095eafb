"""Inputs and outputs of an export: their names, their batch dimension, random ones like the examples."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import call


@dataclass(frozen=True)
class Arguments:
    """Arguments of a model by name, in the order of its call."""

    values: dict[str, Any]  # by name; entries that are no tensors are constants of the export
    positional: bool  # whether they are handed over in order rather than by name
    batch: int  # size of the first dimension that all batched tensors share

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that an exported file takes."""
        return {name: value for name, value in self.values.items() if isinstance(value, Tensor)}

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return tuple(self.values.values()) if self.positional else ()

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return {} if self.positional else dict(self.values)

    def batched(self, name: str) -> bool:
        """Whether the first dimension of an argument is the batch."""
        value = self.values[name]
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.batch

    def of_batch(self, size: int) -> "Arguments":
        """Random arguments like these in a batch of another size.

        Entries are drawn uniformly between the smallest and the largest of each argument; where floating point entries
        are all equal, between -1 and 1. Infinity and NaN stay where they are, in the samples in turn: masks.
        """
        values = {}
        for name, value in self.values.items():
            shape = (size, *value.shape[1:]) if self.batched(name) else getattr(value, "shape", ())
            values[name] = _random(value, tuple(shape)) if isinstance(value, Tensor) else value
        return replace(self, values=values, batch=size)


def arguments(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> Arguments:
    """The example inputs as named arguments on the CPU, with at least two samples where their number is to be free.

    torch.export takes sizes 0 and 1 for constants, so that a single sample is repeated then, until their number is that
    of no other dimension in front.

    Example:
        >>> arguments(nn.Linear(3, 1), torch.ones(1, 3)).values["input"].shape
        torch.Size([2, 3])
    """
    positional = not isinstance(example_inputs, Mapping)
    if isinstance(example_inputs, Mapping):
        values = dict(example_inputs)
    else:
        given = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        values = dict(zip(_names(model, len(given)), given, strict=True))
    values = {name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in values.items()}
    sizes = [len(v) for v in values.values() if isinstance(v, Tensor) and v.ndim > 0]
    batch = sizes[0] if sizes else 0
    if batch == 0:
        found_instead = ", ".join(f"{name}: {_described(value)}" for name, value in values.items())
        hint = "; convert arrays with torch.from_numpy" if "ndarray" in found_instead else ""
        raise ValueError(
            f"example_inputs must hold a tensor (batch, ...) with at least one sample, got "
            f"{found_instead or 'nothing'}: hand over a batch as the model takes it{hint}"
        )
    if batch == 1 and dynamic_batch:
        batch = next(number for number in range(2, len(sizes) + 3) if number not in sizes)
        values = {
            name: torch.cat([v] * batch) if isinstance(v, Tensor) and v.ndim > 0 and len(v) == 1 else v
            for name, v in values.items()
        }
    found = Arguments(values, positional, batch)
    try:
        inspect.signature(model.forward).bind(*found.args, **found.kwargs)
    except TypeError as error:
        raise TypeError(
            f"example_inputs must be what {type(model).__name__}.forward{inspect.signature(model.forward)} takes, got "
            f"{', '.join(values)}: {error}"
        ) from error
    return found


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _names(model: nn.Module, number: int) -> list[str]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:number]
    return [*named, *(f"input_{i}" for i in range(len(named), number))]


def _random(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    pattern = like if like.shape == shape else like[torch.arange(shape[0]) % len(like)]
    finite = like[like.isfinite()]
    if not finite.numel():
        return pattern
    low, high = finite.min().item(), finite.max().item()
    if like.dtype == torch.bool:
        return torch.rand(shape) < 0.5 if low != high else torch.full(shape, bool(low))
    if not like.is_floating_point():
        return torch.randint(int(low), int(high) + 1, shape, dtype=like.dtype)
    if low == high:
        low, high = -1.0, 1.0
    drawn = (low + (high - low) * torch.rand(shape, dtype=torch.float64)).to(like.dtype)
    return torch.where(pattern.isfinite(), drawn, pattern)


def outputs(output: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, by name; nested ones are left out.

    Example:
        >>> list(outputs((torch.zeros(1), None, torch.ones(1))))
        ['output_0', 'output_2']
    """
    if isinstance(output, Tensor):
        return {"output": output}
    items: Iterable[tuple[Any, Any]]
    if isinstance(output, Mapping):
        items = output.items()
    else:
        items = ((f"output_{i}", v) for i, v in enumerate(output)) if isinstance(output, tuple | list) else ()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


class TensorsOnly(nn.Module):
    """A model that returns a plain tuple of its output's tensors, which every reader of an exported file knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            return tuple(outputs(model(*args, **kwargs)).values())

        vars(forward)["__signature__"] = inspect.signature(model.forward)
        vars(self)["forward"] = forward


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, out of torch.compile's wrapper; the model stays as it is."""
    twin: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu().eval()
    return twin.requires_grad_(False)


@torch.no_grad()
def answers(model: nn.Module, inputs: Arguments) -> list[Tensor]:
    """The tensors that the model returns."""
    return list(outputs(call(model, inputs.args if inputs.positional else inputs.kwargs)).values())
