"""A block with a time step, and what stays where a block was deleted whose place must stay.

A block B whose output has the shape of its input is one explicit Euler step of x' = B(x) - x. Its time-variable form is

    x + tau (B(x) - x) = torch.lerp(x, B(x), tau)

which is B(x) to the bit at tau = 1, and x at tau = 0. It has the memory layout of B(x), as hosts may need (``view``).

The step replaces ``forward`` on the instance of the block. A forward hook would do the same, but torch's
TransformerEncoderLayer leaves its fast path as soon as one of its modules has a hook, and hooks that others registered
before would see the output without the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..nn.time_steps import TimeSteps
from .state_argument import Form

if TYPE_CHECKING:
    from .displacement import DisplacementUnits


def blend(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    """x + tau (y - x): y to the bit at tau = 1, x at tau = 0; in the memory layout of y."""
    if x.stride() != y.stride():
        # lerp follows the layout of its first argument
        order = sorted(range(y.ndim), key=y.stride, reverse=True)
        x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(y.ndim)])
    return torch.lerp(x, y, tau)


@dataclass(frozen=True, eq=False)
class Step:
    """The ``forward`` of a wrapped block. It is never changed: a deletion puts others in place, which can be undone."""

    inner: Callable[..., Any]
    steps: TimeSteps  # the time steps of the host
    index: int  # the block's position among them
    name: str  # the block's name in the host when it was wrapped
    form: Form  # where the block's state is
    own: bool  # whether ``inner`` was an attribute of the instance already
    units: "DisplacementUnits | None" = None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function whose signature ``inspect.signature`` shows."""
        return self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output with x + tau (B(x) - x) in the place of B(x)."""
        x = self.form.arriving(args, kwargs)
        watched = x is not None and not torch.compiler.is_compiling() and not x.is_inference()
        version = x._version if x is not None and watched else 0
        output = self.inner(*args, **kwargs)
        y = self.form.leaving(output)
        if x is None or y is None or x.is_nested or x.shape != y.shape:
            raise ValueError(self._wrong(x, y))
        given = () if self.form.argument is not None else (*args, *kwargs.values())
        if sum(isinstance(v, Tensor) and v.shape == y.shape and v.dtype == y.dtype for v in given) > 1:
            raise ValueError(
                f"block {self.name!r} must show which of its arguments is the state, got several of its output's "
                "shape: give example_inputs to wrap"
            )
        if watched and x._version != version:
            raise ValueError(f"block {self.name!r} must leave its input as it is, but {IN_PLACE}")
        if x.dtype != y.dtype:  # under autocast, where the output at tau = 1 is to be B(x) itself, too
            x = x.to(y.dtype)
        tau = self.steps.tau[self.index]
        if self.units is not None:
            tau = tau * self.units.factor(self.index, y - x, x)
        return self.form.replaced(output, blend(x, y, tau.to(device=y.device, dtype=y.dtype)))

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
    """The ``forward`` of a block at tau = 0, with which deletions are compared when a model is wrapped."""

    inner: Callable[..., Any]
    form: Form  # where the block's state is

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output with x in the place of B(x)."""
        x = self.form.arriving(args, kwargs)
        output = self.inner(*args, **kwargs)
        return output if x is None else self.form.replaced(output, x)


class PassThrough(nn.Module):
    """Stands where a block was deleted whose place must stay: returns its input as the block would have.

    Args:
        form: Where the block's state was; the other entries of its output become None.

    Example:
        >>> PassThrough(Form())(torch.ones(1), mask=None)
        tensor([1.])
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The state, in the block's form."""
        return self.form.around(self.form.arriving(args, kwargs))


class PassingTimeSteps(TimeSteps):
    """The time steps of a host, in which they are one child more.

    They return their input when called, for hosts that call all their children in turn (Sequential), and they stay as
    they are where a state dict that is loaded has none: the host's own checkpoints load, strictly too. They stay of
    single precision in a host that is cast to a shorter type, in which 1 - 1e-3 would be 1.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def cast(each: Tensor) -> Tensor:
            made = fn(each)
            return each.to(made.device) if made.is_floating_point() and made.itemsize < 4 else made

        return super()._apply(cast, recurse)  # type: ignore[no-untyped-call]

    def forward(self, x: Any) -> Any:
        """The input."""
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)
