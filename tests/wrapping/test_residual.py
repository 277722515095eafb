"""The shorter backward pass of x + tau (B(x) - x), B(x) = x + r, has the gradients of the plain one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import wrap
from taulearn.wrapping import residual

Block = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "_LARGE", 1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call, whether the shorter pass was taken."""
    found: list[bool] = []

    def look(x: Tensor, y: Tensor) -> Any:
        node = original(x, y)
        found.append(node is not None)
        return node

    original = residual._sum_of
    monkeypatch.setattr(residual, "_sum_of", look)
    return found


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(3, 4, dtype=dtype, generator=generator).requires_grad_() for _ in range(2))
    return x, weight, torch.tensor(0.7, dtype=dtype, requires_grad=True)


BLOCKS: dict[str, tuple[Block, bool]] = {
    "x + r": (lambda x, w: x + (w * x).tanh(), True),
    "r + x": (lambda x, w: (w * x).tanh() + x, True),
    "r += x": (lambda x, w: (w * x).add_(x), True),
    "x + 2 r": (lambda x, w: torch.add(x, (w * x).tanh(), alpha=2), True),
    "r + 2 x": (lambda x, w: torch.add((w * x).tanh(), x, alpha=2), False),
    "x + row": (lambda x, w: x + (w * x).sum(0), True),
    "x - r": (lambda x, w: x - (w * x).tanh(), False),
    "tanh(x + r)": (lambda x, w: (x + w * x).tanh(), False),
    "x + x": (lambda x, w: x + x, False),
    "(x + r) + r": (lambda x, w: (x + w * x) + w, False),
    "r": (lambda x, w: (w * x).tanh(), False),
}


def step(block: Block, interpolate: Callable[[Tensor, Tensor, Tensor], Tensor], *, again: bool = False) -> Any:
    """Three steps, and the gradients of a function of the result."""
    x, weight, tau = inputs()
    y = 2 * x
    for _ in range(3):
        y = interpolate(y, block(y, weight), tau)
    gradients = torch.autograd.grad(y.sin().sum(), (x, weight, tau), create_graph=again, allow_unused=True)
    if not again:
        return y, gradients
    square = sum(g.square().sum() for g in gradients if g is not None)
    return y, torch.autograd.grad(square, (x, weight, tau), allow_unused=True)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_lerp(name: str, again: bool, taken: list[bool]) -> None:
    block, short = BLOCKS[name]
    ours, gradients = step(block, residual.interpolate, again=again)
    assert taken == [short] * 3
    theirs, expected = step(block, torch.lerp, again=again)
    assert torch.equal(ours, theirs)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-13)


def test_the_graph_can_be_gone_through_again_and_in_parts(taken: list[bool]) -> None:
    x, weight, tau = inputs()
    y = x + 0
    r = (weight * y).tanh()
    inside = y + r
    out = residual.interpolate(y, inside, tau)
    assert taken == [True]
    loss = out.square().sum() + 3 * inside.sum()  # the block's output is used elsewhere, too
    plain = torch.lerp(y, y + r, tau).square().sum() + 3 * (y + r).sum()
    for wanted in ((x, weight, tau), (tau,), (x,), (weight,), (y,), (r,), (x, weight, tau)):
        ours = torch.autograd.grad(loss, wanted, retain_graph=True)
        theirs = torch.autograd.grad(plain, wanted, retain_graph=True)
        for gradient, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-13)
    only_inside = torch.autograd.grad(inside.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(only_inside, torch.autograd.grad((y + r).sum(), x)[0], rtol=1e-12, atol=1e-13)


def test_half_precision_is_left_to_lerp(taken: list[bool]) -> None:
    x, weight, tau = inputs(torch.bfloat16)
    y = 2 * x
    residual.interpolate(y, y + weight, tau).sum().backward()
    assert taken == []


def test_a_changed_state_is_noticed() -> None:
    x, weight, tau = inputs()
    y = x + 0
    out = residual.interpolate(y, y + weight, tau)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrapped_convolutions(dtype: torch.dtype, memory_format: torch.memory_format, taken: list[bool]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.convolution(x).relu()

    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    images = torch.randn(2, 4, 5, 5).to(dtype, memory_format=memory_format)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *blocks).to(dtype)
    wrapped = wrap(model, example_inputs=images, init=[0.6, 1.0, 1.3])
    tau = wrapped.time_steps.values
    out = wrapped(images)
    assert taken == [True] * 3
    out.square().mean().backward()
    ours = [p.grad.clone() for p in wrapped.parameters()]
    y = model[0](images)
    for block, step in zip(blocks, tau, strict=True):
        y = torch.lerp(y, y + block.convolution(y).relu(), step)
    assert torch.equal(out, y)
    expected = torch.autograd.grad(y.square().mean(), list(wrapped.parameters()))
    for gradient, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, other)
