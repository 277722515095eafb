"""Steps in place: those of torch, wherever they are taken, and not taken where anyone could tell."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from taulearn import wrap
from wrapping.in_place import (
    LEFT,
    TAKEN,
    Own,
    compare,
    model,
    needs,
    needs_compiler,
    results,
    states,
    taken,
)

pytestmark = needs_compiler


@pytest.mark.parametrize("tau", [1.0, 0.3, -0.7, 1.6])
@pytest.mark.parametrize("name", TAKEN)
def test_results_are_those_of_torch(name: str, tau: float) -> None:
    for size in (1, 2, 5, 12, 1500):
        wrapped, plain = (model(TAKEN[name], init=tau, compile=each).double() for each in ("always", "never"))
        x = states(size, 9)
        assert taken(wrapped(x.requires_grad_()))
        assert not taken(plain(x))
        for _ in range(2):
            compare(wrapped, plain, x.detach())
        assert torch.equal(wrapped(x), plain(x))


@pytest.mark.parametrize("name", TAKEN)
def test_results_in_single_precision(name: str) -> None:
    wrapped, plain = (model(TAKEN[name], init=0.8, compile=each) for each in ("always", "never"))
    x = states(4001, 9, dtype=torch.float32)
    assert taken(wrapped(x.clone().requires_grad_()))
    assert torch.equal(wrapped(x), plain(x))
    compare(wrapped, plain, x, 1e-4)


@pytest.mark.parametrize("name", LEFT)
def test_not_taken_where_anyone_could_tell(name: str) -> None:
    wrapped, plain = (model(LEFT[name], init=0.8, compile=each).double() for each in ("always", "never"))
    x = states(12, 9)
    assert not taken(wrapped(x.requires_grad_()))
    for each in (wrapped, plain):
        each[0].kept.clear()
        each[1].kept.clear()
    compare(wrapped, plain, x.detach())


def test_what_a_hook_of_a_submodule_keeps_stays() -> None:
    inner, seen = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), []
    wrapped = wrap(nn.Sequential(inner), "0", init=0.5, compile="always")
    x = states(3, 9, dtype=torch.float32).requires_grad_()
    assert taken(wrapped(x))
    inner[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    output = wrapped(x)
    assert not taken(output)
    torch.testing.assert_close(output, torch.lerp(x, seen[0], 0.5))


@pytest.mark.parametrize("kind", [tuple, list, lambda entries: dict(zip("ab", entries, strict=True))])
def test_states_in_containers(kind: Callable[[Any], Any]) -> None:
    class Holding(nn.Module):
        def __init__(self, *, twice: bool) -> None:
            super().__init__()
            self.linear, self.twice = nn.Linear(4, 4), twice

        def forward(self, x: Tensor) -> Any:
            y = x + self.linear(x)
            return kind((y, y if self.twice else "rest"))

    x = states(6, 4, dtype=torch.float32).requires_grad_()
    for twice in (False, True):
        block = Holding(twice=twice)
        wrapped = wrap(nn.Sequential(block), "0", init=0.7, compile="always")
        output = wrapped(x)
        state, other = output.values() if isinstance(output, dict) else output
        assert type(output) is type(kind(()) if kind in (tuple, list) else {})
        assert not taken(state)  # others may hold the container
        torch.testing.assert_close(state, torch.lerp(x, x + block.linear(x), 0.7))
        assert other == "rest" if not twice else torch.equal(other, x + block.linear(x))


@pytest.mark.parametrize("name", ["sum", "no sum", "sum with a factor"])
def test_first_and_second_derivatives(name: str) -> None:
    torch.manual_seed(0)
    wrapped = model(TAKEN[name], init=0.6, width=3).double()
    x = states(2, 3).requires_grad_()
    assert taken(wrapped(x))
    assert torch.autograd.gradcheck(wrapped, (x,))
    assert torch.autograd.gradgradcheck(wrapped, (x,))
    # second derivatives by parameters, against torch's own operations
    plain = model(TAKEN[name], init=0.6, width=3, compile="never").double()
    found = []
    for each in (wrapped, plain):
        parameters = list(each.parameters())
        first = torch.autograd.grad(each(x).sin().sum(), parameters, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(norm, [x, *parameters]))  # type: ignore[arg-type]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_is_gone_through_once_unless_it_is_kept() -> None:
    wrapped, x = model(TAKEN["sum"], init=0.6), states(5, 9, dtype=torch.float32)
    total = wrapped(x).sum()
    first = torch.autograd.grad(total, list(wrapped.parameters()), retain_graph=True)
    again = torch.autograd.grad(total, list(wrapped.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, list(wrapped.parameters()))


def test_only_some_gradients() -> None:
    wrapped, plain = (model(TAKEN["sum"], init=0.6, compile=each).double() for each in ("always", "never"))
    x = states(5, 9)
    for pick in (lambda m, _: [m.time_steps.values], lambda m, _: [m[0].w], lambda _, x: [x]):
        found = []
        for each in (wrapped, plain):
            start = x.clone().requires_grad_()
            found += torch.autograd.grad(each(start).sin().sum(), pick(each, start))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("train", ["tau", "all"])
def test_frozen_weights_and_fixed_steps(train: str) -> None:
    x = states(40, 9, dtype=torch.float32)
    for constraint in ("free", "fixed", "dependent"):
        found = []
        for each in ("always", "never"):
            host = nn.Sequential(Own(TAKEN["sum"], 9), Own(TAKEN["sum"], 9))
            wrapped = wrap(host, "[01]", constraint=constraint, train=train, compile=each)
            start = x.clone().requires_grad_()
            found.append(torch.autograd.grad(wrapped(start).sin().sum(), [start, *filter(needs, wrapped.parameters())]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_small_steps_are_torchs() -> None:
    x = states(5, 9, dtype=torch.float32).requires_grad_()
    for tau in (0.0, 0.05, -0.06, float("nan")):
        wrapped = model(TAKEN["sum"])
        with torch.no_grad():
            wrapped.time_steps.values.fill_(tau)
        assert not taken(wrapped(x))


def test_the_same_bits_on_any_number_of_threads() -> None:
    wrapped, threads, found = model(TAKEN["sum"], init=0.9), torch.get_num_threads(), []
    x = states(30_011, 9, dtype=torch.float32)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(wrapped, x)[-1])  # the gradient of the steps; others are torch's sums
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_layouts_of_images() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 6, 3, padding=1)
    for format in (torch.contiguous_format, torch.channels_last):  # noqa: A001
        found = []
        for each in ("always", "never"):
            wrapped = wrap(nn.Sequential(copy.deepcopy(convolution)), "0", init=0.8, compile=each)
            x = states(2, 6, 5, 5, dtype=torch.float32).contiguous(memory_format=format).requires_grad_()
            output = wrapped(x)
            assert taken(output) is (each == "always")
            # the gradient comes in another layout than the state
            total = (output.contiguous() * torch.arange(300.0).view(2, 6, 5, 5)).sum()
            found.append(torch.autograd.grad(total, [x, *wrapped.parameters()]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_blocks_that_gelu_ends() -> None:
    """Its gradient needs its input, not its result."""
    wrapped = model(lambda b, x: gelu(x * b.w), init=0.9).double()
    plain = model(lambda b, x: gelu(x * b.w), init=0.9, compile="never").double()
    x = states(8, 9)
    assert taken(wrapped(x))
    compare(wrapped, plain, x)
