"""Blocks for the tests of steps in place, and comparisons with torch's."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import wrap

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

Function = Callable[[Any, Tensor], Any]


class Own(nn.Module):
    """A block that computes what a function says, with one weight of the state's last dimension."""

    def __init__(self, function: Function, width: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.linspace(-1.0, 1.5, width))
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def keeping(block: Own, y: Tensor, kept: Any) -> Tensor:
    block.kept.append(kept)
    return y


TAKEN: dict[str, Function] = {
    "sum": lambda b, x: x + (x * b.w).sin(),
    "sum, other way round": lambda b, x: (x * b.w).sin() + x,
    "sum with a factor": lambda b, x: torch.add(x, (x * b.w).sin(), alpha=0.7),
    "factor at the state": lambda b, x: torch.add((x * b.w).sin(), x, alpha=-1.3),
    "sum with one number": lambda b, x: x + (x * b.w).sum(),
    "state twice": lambda b, x: x + x * b.w + x,
    "sum in place": lambda b, x: (x * b.w).add_(x),
    "no sum": lambda b, x: (x * b.w).cos() * b.w,
    "sum of others": lambda b, x: (2 * x) + (x * b.w).sin(),
    "norm": lambda b, x: nn.functional.layer_norm(x + x * b.w, x.shape[-1:]),
    "only the weight": lambda b, x: x.detach() * b.w,
}
LEFT: dict[str, Function] = {
    "kept": lambda b, x: keeping(b, y := x + x * b.w, y),
    "kept detached": lambda b, x: keeping(b, y := x + x * b.w, y.detach()),
    "kept in a view": lambda b, x: keeping(b, y := x + x * b.w, y[0]),
    "needed for its gradient": lambda b, x: (x + x * b.w).sigmoid(),
    "needed for another": lambda b, x: keeping(b, y := x + x * b.w, y.square().sum()),
    "hooked": lambda b, x: keeping(b, y := x + x * b.w, y.register_hook(lambda g: 2 * g)),
    "a view": lambda b, x: (x + x * b.w).flatten().view_as(x),
    "other layout": lambda b, x: (x.t().contiguous().t() * b.w).sin(),
}


def model(function: Function, *, init: float = 1.0, compile: str = "always", width: int = 9) -> nn.Module:  # noqa: A002
    return wrap(nn.Sequential(Own(function, width), Own(function, width)), "[01]", init=init, compile=compile)


def states(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def taken(output: Tensor) -> bool:
    assert output.grad_fn is not None
    return output.grad_fn.name() == "StepBackward"


def results(wrapped: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weights and steps."""
    x = x.clone().requires_grad_()
    output = wrapped(2 * x)
    kept = [
        each for block in list(wrapped)[:2] for each in block.kept if isinstance(each, Tensor) and each.requires_grad
    ]
    total = output.sin().sum() + sum(each.square().sum() for each in kept)
    return [output.detach(), *torch.autograd.grad(total, [x, *wrapped.parameters()], allow_unused=True)]


def compare(wrapped: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    for found, expected in zip(results(wrapped, x), results(plain, x), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance * (1 + float(expected.abs().max()))
            )


def needs(parameter: Tensor) -> bool:
    return parameter.requires_grad


def nodes(output: Tensor) -> set[str]:
    """Names of all nodes of a graph."""
    found, left = set(), [output.grad_fn]
    seen = set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name())
            left += [each for each, _ in node.next_functions]
    return found
