"""Blocks with a step: what they compute follows the steps however these are changed, in every mode of torch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from taulearn import wrap
from wrapping.hosts import Block


def model() -> nn.Module:
    torch.manual_seed(0)
    return wrap(nn.Sequential(Block(4), Block(4)).eval(), "[01]", init=[0.5, 1.5])


def by_hand(wrapped: nn.Module, x: Tensor) -> Tensor:
    for block, tau in zip(list(wrapped)[:2], wrapped.time_steps.values.detach(), strict=True):
        x = torch.lerp(x, vars(block)["forward"].inner(x), tau)
    return x


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_changes_in_place_are_seen() -> None:
    wrapped = model()
    for change in (
        lambda values: values.mul_(2.0),
        lambda values: values.data.add_(0.25),
        lambda values: values.copy_(torch.ones(2)),
        lambda values: setattr(values, "data", torch.tensor([3.0, -1.0])),
    ):
        with torch.no_grad():
            change(wrapped.time_steps.values)
            torch.testing.assert_close(wrapped(X), by_hand(wrapped, X))
        wrapped(X).sum().backward()


def test_gradients_after_passes_without_any() -> None:
    wrapped = model()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not wrapped(X).requires_grad
        wrapped.zero_grad()
        wrapped(X).sum().backward()
        assert wrapped.time_steps.values.grad is not None
        assert bool((wrapped.time_steps.values.grad != 0).all())
    wrapped.time_steps.values.requires_grad_(False)
    assert not wrapped.requires_grad_(False)(X).requires_grad


def test_several_backward_passes_share_what_was_taken_apart() -> None:
    wrapped = model()
    single = []
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(X).sum().backward()
        single.append(wrapped.time_steps.values.grad.clone())
    assert torch.equal(*single)
    wrapped.zero_grad()
    (wrapped(X).sum() + wrapped(X).sum()).backward()
    torch.testing.assert_close(wrapped.time_steps.values.grad, 2 * single[0])


def test_copies_have_their_own() -> None:
    wrapped = model()
    wrapped(X)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        twin.time_steps.values.zero_()
        assert torch.equal(twin(X), X)
    assert not torch.equal(wrapped(X), X)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_values_that_a_function_puts_in_place(scale: float) -> None:
    wrapped = model()
    expected = by_hand(wrapped, X)
    torch.testing.assert_close(wrapped(X), expected)
    values = scale * wrapped.time_steps.values.detach()
    found = torch.func.functional_call(wrapped, {"time_steps.values": values}, (X,))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(X), expected)
        wrapped.time_steps.values.mul_(scale)
    torch.testing.assert_close(found, by_hand(wrapped, X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_same_bits_with_and_without_gradients(dtype: torch.dtype, context: type) -> None:
    wrapped = model().to(dtype)
    for tau in ([0.3, 0.7], [1.0, 0.0], [-0.2, 1.3]):
        with torch.no_grad():
            wrapped.time_steps.values.copy_(torch.tensor(tau))
        differentiated = wrapped(X.to(dtype))
        with context():
            assert torch.equal(wrapped(X.to(dtype)), differentiated.detach())


def test_steps_of_another_memory_are_seen() -> None:
    wrapped = model()
    with torch.no_grad():
        wrapped(X)
        for tau in (2.0, 0.5):
            wrapped.time_steps.values = nn.Parameter(torch.full((2,), tau))
            torch.testing.assert_close(wrapped(X), by_hand(wrapped, X))
        double = wrapped.double()
        torch.testing.assert_close(double(X.double()), by_hand(double, X.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_single_precision_in_a_model_of_half(dtype: torch.dtype) -> None:
    wrapped = model().to(dtype)
    for tau in ([0.3001, 0.7003], [1.001, 0.999], [-0.2007, 1.3009]):
        wrapped.time_steps.values = nn.Parameter(torch.tensor(tau))
        x = torch.randn(500, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
        differentiated = wrapped(x)
        with torch.no_grad():
            assert torch.equal(wrapped(x), differentiated.detach())


def test_modes_that_look_into_the_computation_see_the_steps() -> None:
    wrapped = model()
    with torch.no_grad():
        traced = make_fx(wrapped)(X)
        wrapped.time_steps.values.mul_(2.0)
        torch.testing.assert_close(traced(X), by_hand(wrapped, X))
    for context in (torch.no_grad, torch.enable_grad):
        fresh = model()
        with context():
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert fresh(torch.ones(3, 4)).shape == (3, 4)
            torch.testing.assert_close(fresh(X), by_hand(fresh, X))


def test_what_inference_mode_took_apart_is_not_trained_with() -> None:
    wrapped = model()
    with torch.inference_mode(), torch.enable_grad():
        wrapped(X)
    wrapped(X).sum().backward()
    assert wrapped.time_steps.values.grad is not None
