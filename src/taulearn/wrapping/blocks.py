"""A block with a time step, and what stays where a block was deleted whose place must stay.

A block B whose output has the shape of its input is one explicit Euler step of x' = B(x) - x. Its time-variable form is

    x + tau (B(x) - x) = torch.lerp(x, B(x), tau)

which is B(x) to the bit at tau = 1, and x at tau = 0.

In training on a CPU the step is taken in place (:mod:`taulearn.wrapping.compiled`) where nobody can tell.

The step replaces ``forward`` on the instance of the block. A forward hook would do the same, but torch's
TransformerEncoderLayer leaves its fast path as soon as one of its modules has a hook, and hooks that others registered
before would see the output without the step.
"""

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..caputo._arguments import transforming
from ..nn.time_steps import TimeSteps
from . import compiled
from .state import Form, state_in, state_out, with_state
from .units import DisplacementUnits

_HALF = (torch.float16, torch.bfloat16)


class Scalars:
    """The steps as scalars, taken apart once for all blocks and all forward passes until they change.

    Indexing costs each block a vector of zeros in the backward pass, in which only its own entry is not 0. Here all
    blocks share one operation, which keeps no tensors and so serves any number of backward passes.

    Args:
        steps: The time steps.
        least: Elements of a state from which its step is taken in place, in training on a CPU.

    Attributes:
        in_place: The function that does so; None: it is not known yet, :meth:`load` finds it.
    """

    def __init__(self, steps: TimeSteps, least: float = float("inf")) -> None:
        self.steps, self.least = steps, least
        self.in_place: Callable[..., bool] | None = None
        self._found: tuple[Any, ...] = (None, 0, 0, (), ())
        self._memory: tuple[int, memoryview | None] = (0, None)

    def step(self, index: int, *, as_tensor: bool = False) -> float | Tensor:
        """A step: a number where nobody differentiates or traces it and reading it waits for no device, else a tensor.

        Blocks are called with cold caches: whatever is asked here costs five times what a loop around it would show.

        Args:
            index: The block's position.
            as_tensor: Whether it must be a tensor.
        """
        values = self.steps._parameters.get("values")  # without the detour of Module.__getattr__
        # functional_call puts plain tensors in the place of parameters
        if (
            type(values) is not Parameter
            or self.steps.constraint == "dependent"
            or transforming()
            or torch._C._len_torch_dispatch_stack()
        ):
            return self.steps.tau[index]
        differentiated = values.requires_grad and torch.is_grad_enabled()
        if not differentiated and not as_tensor:
            memory = self._numbers(values)
            if memory is not None:
                return memory[index]
        if values.is_inference():
            return values[index]
        kind = differentiated, torch.is_inference_mode_enabled()
        of, version, address, found, scalars = self._found
        if of is not values or version != values._version or address != values.data_ptr() or found != kind:
            scalars = values.unbind()
            self._found = (values, values._version, values.data_ptr(), kind, scalars)
        return scalars[index]

    def _numbers(self, values: Parameter) -> memoryview | None:
        """The memory of the parameter, which is read each time: it follows all changes, those of ``.data`` too."""
        address = values.data_ptr()
        if self._memory[0] != address:
            # numpy has no bfloat16
            readable = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
            self._memory = (address, values.detach().numpy().data if readable else None)
        return self._memory[1]

    def load(self, state: Tensor) -> Callable[..., bool]:
        """What takes steps in place; for states that it does not take, something that never does."""
        plain = type(state) is Tensor and state.is_cpu and state.dtype in (torch.float32, torch.float64)
        modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
        if not plain or modes or transforming() or not torch.is_grad_enabled():
            return _not_in_place
        self.in_place = _in_place()
        return self.in_place

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scalars":
        return Scalars(copy.deepcopy(self.steps, memo), self.least)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scalars, (self.steps, self.least)


def _not_in_place(*_: Any) -> bool:
    return False


def _nothing_seen() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device="cpu")


@functools.cache
def _in_place() -> Callable[..., bool]:
    """The function of step.cpp, which has seen how often a state is referred to that nobody else holds."""
    function = compiled.load()
    if function is None:
        return _not_in_place
    scalars = Scalars(TimeSteps(1, dtype=torch.float32, device="cpu"), least=0)
    scalars.in_place = function
    example = torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=True)
    tracing = sys.gettrace()
    sys.settrace(None)  # debuggers refer to what they show
    try:
        Step(lambda x: x + x, scalars, 0, "", own=False)(example)
    finally:
        sys.settrace(tracing)
    return function


@dataclass(frozen=True, eq=False)
class Step:
    """The ``forward`` of a wrapped block. It is never changed: a deletion puts others in place, which can be undone.

    Attributes:
        inner: The block's own forward.
        scalars: The time steps of the host.
        index: The block's position among them.
        name: The block's name in the host when it was wrapped.
        own: Whether ``inner`` was an attribute of the instance already.
        units: Units of displacement, or None.
        seen: What became of the block's output until its gradient came: 0 nothing yet, 1 it was left as it was, 2 it
            was changed in place.
    """

    inner: Callable[..., Any]
    scalars: Scalars
    index: int
    name: str
    own: bool
    units: DisplacementUnits | None = None
    seen: Tensor = field(default_factory=_nothing_seen)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What ``inspect.signature`` shows."""
        return self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output with x + tau (B(x) - x) in the place of B(x).

        The arithmetic takes the type of B(x), so that under autocast too the output at tau = 1 is B(x) itself.

        Raises:
            ValueError: If input and output have no state of one shape, or the block changes its input in place.
        """
        x = state_in(args, kwargs)
        watched = x is not None and not torch.compiler.is_compiling() and not x.is_inference()
        version = x._version if x is not None and watched else 0
        output = self.inner(*args, **kwargs)
        y = state_out(output)
        if x is None or y is None or x.is_nested or x.shape != y.shape:
            raise ValueError(self._wrong(x, y))
        if watched and x._version != version:
            raise ValueError(f"block {self.name!r} must leave its input as it is, but {IN_PLACE}")
        tau = self.scalars.step(self.index, as_tensor=self.units is not None)
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        if isinstance(tau, Tensor):
            if self.units is not None:
                tau = tau * self.units.factor(self.index, y - x, x)
            if tau.dtype != y.dtype or tau.device != y.device:
                tau = tau.to(device=y.device, dtype=y.dtype)
            if watched and output is y and y.requires_grad and y.numel() >= self.scalars.least:
                in_place = self.scalars.in_place or self.scalars.load(y)
                if in_place(x, y, tau, self.seen):
                    return output
        elif tau == 1.0:
            return output
        elif y.dtype in _HALF:  # rounded as in training
            tau = torch.tensor(tau, dtype=y.dtype).item()
        return with_state(output, torch.lerp(x, y, tau))

    def __getstate__(self) -> dict[str, Any]:
        """All but what was seen: a copy sees for itself, on whatever device it comes to be."""
        return {name: value for name, value in vars(self).items() if name != "seen"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, seen=_nothing_seen())

    def _wrong(self, x: Tensor | None, y: Tensor | None) -> str:
        if x is not None and x.is_nested:
            return f"block {self.name!r} must get a plain tensor, got a nested one: {NESTED}"
        found = ["no tensor" if each is None else str(tuple(each.shape)) for each in (x, y)]
        return (
            f"block {self.name!r} must return a state of its input's shape, got {found[0]} in and {found[1]} out: "
            "leave it out of blocks"
        )


IN_PLACE = (
    "it changed it in place, and x + tau (B(x) - x) needs both: make the block's first operation out of place "
    "(inplace=False)"
)
NESTED = "build torch.nn.TransformerEncoder with enable_nested_tensor=False"


@dataclass(frozen=True, eq=False)
class Skip:
    """The ``forward`` of a block at tau = 0, with which deletions are compared when a model is wrapped.

    Attributes:
        inner: The block's own forward.
    """

    inner: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output with x in the place of B(x)."""
        x = state_in(args, kwargs)
        output = self.inner(*args, **kwargs)
        return output if x is None else with_state(output, x)


class PassThrough(nn.Module):
    """Stands where a block was deleted whose place must stay: returns its input as the block would have.

    Args:
        form: How the block's output held the state; its other entries become None.

    Example:
        >>> PassThrough(Form())(torch.ones(1), mask=None)
        tensor([1.])
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The state, in the block's form."""
        return self.form.around(state_in(args, kwargs))


class PassingTimeSteps(TimeSteps):
    """Time steps that return their input when called, for hosts that call all their children in turn (Sequential)."""

    def forward(self, x: Any) -> Any:
        """The input."""
        return x
