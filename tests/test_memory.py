"""The blocked memories, exact and fast, against the double loop of the scheme."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from taulearn.caputo import ExponentialKernel, l1_weights
from taulearn.caputo.fast_memory import FastMemory, fast_weights, kernel_for
from taulearn.caputo.memory import ExactMemory, Recall, memory_weights
from taulearn.caputo.weights import plain_left_weights

DOUBLE = torch.float64
Advance = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """y_{l+1} from tanh(y_l W_l): a scheme without layers or modules."""

    tau: Tensor
    y: Tensor
    first: Tensor | None
    matrices: Tensor
    gamma: float = 0.4
    memory_from: int = 1

    @property
    def inputs(self) -> list[Tensor]:
        return [self.tau, self.y, self.matrices, *([] if self.first is None else [self.first])]

    @property
    def factors(self) -> Tensor:
        return self.tau**self.gamma * math.gamma(2 - self.gamma)

    def states(self, step: Advance) -> list[Tensor]:
        states = [self.y]
        for l in range(1, len(self.tau)):
            states.append(step(l, torch.tanh(states[-1] @ self.matrices[l]), states[-1]))
        return states

    def by_loops(self) -> list[Tensor]:
        """The scheme as it is written."""
        a, past = l1_weights(self.tau, self.gamma), [self.y * 0 if self.first is None else self.first, self.y]

        def step(l: int, f: Tensor, y: Tensor) -> Tensor:
            new = y + self.factors[l] * f
            for j in range(self.memory_from, l):
                new = new - a[l, j] * (past[j + 1] - past[j])
            past.append(new)
            return new

        return self.states(step)

    def recall(self, kernel: ExponentialKernel | None, block: int) -> Recall:
        if kernel is None:
            weights = memory_weights(self.tau, self.gamma, self.memory_from)
            return Recall(ExactMemory, (self.factors, weights), self.first, self.y, block=block)
        coefficients = fast_weights(self.tau, kernel, self.memory_from, block=block)
        return Recall(FastMemory, (self.factors, *coefficients), self.first, self.y, block=block)

    def blocked(self, *, block: int, tolerance: float | None = None) -> list[Tensor]:
        kernel = None if tolerance is None else kernel_for(self.tau, self.gamma, tolerance)
        return self.states(self.recall(kernel, block).step)


def problem(
    layers: int,
    seed: int = 0,
    *,
    memory_from: int = 1,
    first: bool = False,
    spread: float = 1.0,
    size: int = 3,
    horizon: float | None = None,
) -> Problem:
    """Steps that differ by up to 10^spread, scaled to a sum of ``horizon``; y_0 is remembered where ``first``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_()

    tau = 10 ** (spread * (torch.rand(layers, generator=generator, dtype=DOUBLE) - 1))
    tau = tau if horizon is None else tau * (horizon / tau.sum())
    first = first and memory_from == 0
    return Problem(
        tau.requires_grad_(),
        draw(size, 2),
        draw(size, 2) if first else None,
        draw(layers, 2, 2),
        gamma=float(torch.rand((), generator=generator)) * 0.8 + 0.1,
        memory_from=memory_from,
    )


def gradients(p: Problem, states: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Of a random linear function of all states."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=DOUBLE)).sum() for y in states)
    return list(torch.autograd.grad(total, p.inputs, retain_graph=True, materialize_grads=True))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative distance of two lists of tensors."""
    return max(
        float(torch.linalg.vector_norm(a - b).detach() / torch.linalg.vector_norm(b).detach().clamp(min=1e-300))
        for a, b in zip(found, expected, strict=True)
    )


# A longer horizon makes a chaotic system of the random matrices, which amplifies any error.
problems = st.builds(
    lambda layers, seed, memory_from, first, spread, size: problem(
        layers, seed, memory_from=memory_from, first=first, spread=spread, size=size, horizon=2.0
    ),
    st.integers(2, 40),
    st.integers(0, 2**31),
    st.integers(0, 1),
    st.booleans(),
    st.floats(0.0, 5.0),
    st.integers(1, 4),
)
blocks = st.integers(2, 12)


class TestWeights:
    @given(st.integers(1, 150), st.integers(0, 2**31), st.integers(0, 1), st.floats(0.01, 0.99))
    @settings(max_examples=25, deadline=None)
    def test_differences_of_the_l1_weights(self, layers: int, seed: int, memory_from: int, gamma: float) -> None:
        tau = torch.from_numpy(10.0 ** np.random.default_rng(seed).uniform(-6, 1, layers)).requires_grad_()
        a = plain_left_weights(tau, gamma)
        diagonal = torch.eye(layers, dtype=DOUBLE)
        remembered = torch.where((torch.arange(layers) >= memory_from) | diagonal.bool(), a, 0 * a)
        expected = (remembered - torch.nn.functional.pad(remembered, (1, 0))[:, :-1]).tril()
        found = memory_weights(tau, gamma, memory_from)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)
        torch.testing.assert_close(found.sum(1), torch.ones(layers, dtype=DOUBLE), rtol=0.0, atol=1e-13)
        cotangent = torch.randn(layers, layers, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        before = cotangent.clone()
        (g,), (h,) = (torch.autograd.grad(m, tau, cotangent) for m in (found, expected))
        assert torch.equal(cotangent, before)
        # each entry is compared with the largest of its own step: they differ by 1e7
        torch.testing.assert_close(g * tau.detach(), h * tau.detach(), rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_own_gradient_of_l1_weights_over_several_blocks_of_rows(self, side: str) -> None:
        tau = (torch.rand(150, dtype=DOUBLE) + 0.01).requires_grad_()
        a = l1_weights(tau, 0.3, side)
        plain = plain_left_weights(tau, 0.3) if side == "left" else plain_left_weights(tau.flip(0), 0.3).flip(0, 1)
        torch.testing.assert_close(a, plain, rtol=1e-14, atol=0.0)
        cotangent = torch.randn_like(a)
        found, expected = (torch.autograd.grad((m * cotangent).sum(), tau)[0] for m in (a, plain))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class TestExact:
    @given(problems, blocks)
    @settings(max_examples=50, deadline=None)
    def test_states_and_all_gradients_are_those_of_the_loops(self, p: Problem, block: int) -> None:
        found, expected = p.blocked(block=block), p.by_loops()
        assert distance(found, expected) < 1e-12
        assert distance(gradients(p, found), gradients(p, expected)) < 1e-11

    def test_blocks_of_the_size_in_use(self) -> None:
        p = problem(100, memory_from=0, first=True)
        found, expected = p.blocked(block=32), p.by_loops()
        assert distance(found, expected) < 1e-12
        assert distance(gradients(p, found), gradients(p, expected)) < 1e-12

    def test_gradcheck(self) -> None:
        assert torch.autograd.gradcheck(*as_function(problem(7, memory_from=0, first=True, size=1), None))


class TestFast:
    @given(problems, blocks)
    @settings(max_examples=25, deadline=None)
    def test_states_and_all_gradients_are_those_of_the_loops(self, p: Problem, block: int) -> None:
        found, expected = p.blocked(block=block, tolerance=1e-9), p.by_loops()
        assert distance([torch.stack(found)], [torch.stack(expected)]) < 1e-7
        assert distance(gradients(p, found), gradients(p, expected)) < 1e-5

    @pytest.mark.parametrize("memory_from", [0, 1])
    @pytest.mark.parametrize("layers", [33, 64, 65, 200])
    def test_stated_accuracy_at_the_default_tolerance(self, layers: int, memory_from: int) -> None:
        p = problem(layers, memory_from=memory_from, horizon=1.0)
        found, expected = p.blocked(block=32, tolerance=1e-6), p.by_loops()
        assert distance(found[-1:], expected[-1:]) < 1e-5
        assert distance(gradients(p, found)[:1], gradients(p, expected)[:1]) < 1e-4

    def test_error_falls_with_the_tolerance(self) -> None:
        p = problem(80)
        exact = p.blocked(block=8)
        errors = [distance(p.blocked(block=8, tolerance=t), exact) for t in (1e-3, 1e-6, 1e-9)]
        assert errors[0] > 100 * errors[1] > 10_000 * errors[2] > 0

    def test_gradcheck(self) -> None:
        """Of the approximation itself: its gradient is exact however coarse the kernel is."""
        p = problem(9, memory_from=0, first=True, size=1)
        kernel = ExponentialKernel(p.gamma, 0.05, 20.0, 1e-1)
        assert torch.autograd.gradcheck(*as_function(p, kernel))

    def test_memory_grows_as_the_square_root_of_the_number_of_blocks(self) -> None:
        tau = torch.full((4096,), 1.0 / 4096)
        weights = fast_weights(tau, kernel_for(tau, 0.5, 1e-6), 1)  # type: ignore[arg-type]
        (histories,) = FastMemory(32, tau, *weights).buffers(torch.empty(2, 5), keep=True)
        assert len(histories) <= math.sqrt(4096 / 32) + 2


def as_function(p: Problem, kernel: ExponentialKernel | None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def last_and_middle(tau: Tensor, y: Tensor, matrices: Tensor, first: Tensor) -> Tensor:
        own = Problem(tau, y, first, matrices, p.gamma, p.memory_from)
        states = own.states(own.recall(kernel, 3).step)
        return torch.stack([states[-1], states[3]])

    return last_and_middle, tuple(p.inputs)


modes = pytest.mark.parametrize("tolerance", [None, 1e-8], ids=["exact", "fast"])


@modes
class TestPasses:
    """The contents of the buffers belong to one forward pass, and one call of backward or grad."""

    @pytest.mark.parametrize("last", [1, 2, 4, 5, 9, 12])
    def test_a_loss_of_an_early_state(self, tolerance: float | None, last: int) -> None:
        p = problem(14)
        found, expected = p.blocked(block=4, tolerance=tolerance), p.by_loops()
        assert distance(gradients(p, found[: last + 1]), gradients(p, expected[: last + 1])) < 1e-6

    def test_passes_that_stop_early_leave_nothing_behind(self, tolerance: float | None) -> None:
        """The second pass begins where the first one stopped."""
        p = problem(14)
        found, expected = p.blocked(block=4, tolerance=tolerance), p.by_loops()
        results = []
        for y in (found, expected):
            (upper,) = torch.autograd.grad(y[-1].sum(), y[6], retain_graph=True)
            (lower,) = torch.autograd.grad(y[6].sum(), y[2], retain_graph=True)
            results.append([upper, lower, *gradients(p, y), *gradients(p, y[:9]), *gradients(p, y)])
        assert distance(*results) < 1e-6

    def test_a_second_backward_needs_retain_graph(self, tolerance: float | None) -> None:
        states = problem(9).blocked(block=4, tolerance=tolerance)
        states[-1].sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            states[-1].sum().backward()

    def test_the_buffer_goes_with_the_backward_pass(self, tolerance: float | None) -> None:
        """Also while the loss and its graph are kept, as with autograd's own saved tensors."""
        p = problem(9)
        kernel = None if tolerance is None else kernel_for(p.tau, p.gamma, tolerance)
        recall = p.recall(kernel, 4)
        buffer = weakref.ref(recall.rows)
        loss = p.states(recall.step)[-1].sum()
        del recall
        assert buffer() is not None
        loss.backward()
        assert buffer() is None

    def test_a_state_changed_in_place_is_noticed(self, tolerance: float | None) -> None:
        """Also where no layer keeps its argument."""
        p = problem(9)
        recall = p.recall(None if tolerance is None else kernel_for(p.tau, p.gamma, tolerance), 4)
        states = [p.y]
        for l in range(1, 9):
            states.append(recall.step(l, p.matrices[l, 0].expand(p.y.shape), states[-1]))
        with torch.no_grad():
            states[3].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            states[-1].sum().backward()

    def test_without_gradients(self, tolerance: float | None) -> None:
        p = problem(14)
        with torch.no_grad():
            found = p.blocked(block=4, tolerance=tolerance)
        assert distance(found, p.blocked(block=4, tolerance=tolerance)) == 0.0
        assert not any(y.requires_grad for y in found[1:])

    def test_the_last_state_does_not_hold_the_buffer(self, tolerance: float | None) -> None:
        *others, last = problem(9).blocked(block=4, tolerance=tolerance)
        assert last.untyped_storage().nbytes() == last.numel() * 8
        assert others[1].untyped_storage().data_ptr() == others[2].untyped_storage().data_ptr()

    def test_frozen_weights(self, tolerance: float | None) -> None:
        """Only the layers learn: nothing is computed for the steps."""
        p = problem(14)
        frozen = Problem(p.tau.detach(), p.y.detach(), None, p.matrices, p.gamma, p.memory_from)
        results = [
            torch.autograd.grad(q.blocked(block=4, tolerance=tolerance)[-1].sum(), p.matrices)[0] for q in (p, frozen)
        ]
        assert torch.equal(*results)

    def test_hooks_on_saved_tensors_do_not_see_the_buffer(self, tolerance: float | None) -> None:
        """A hook that copies would copy it before it is filled."""
        p = problem(14)
        expected = gradients(p, p.blocked(block=4, tolerance=tolerance))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            found = p.blocked(block=4, tolerance=tolerance)
        assert distance(gradients(p, found), expected) == 0.0


class TestKernel:
    @given(st.floats(-6, 0), st.floats(0, 3), st.floats(0.1, 0.9))
    @settings(max_examples=15, deadline=None)
    def test_the_range_contains_the_steps(self, shortest: float, longest: float, gamma: float) -> None:
        tau = torch.tensor([10.0**shortest, 10.0**longest], dtype=DOUBLE)
        kernel = kernel_for(tau, gamma, 1e-4)
        assert kernel is not None
        assert kernel.tau_min < tau.min() < 2.02 * kernel.tau_min
        assert tau.sum() < kernel.horizon < 2.02 * 2 * tau.sum()
        assert kernel.error <= 1e-4

    def test_it_is_rebuilt_when_the_steps_leave_its_range_and_only_then(self) -> None:
        tau = torch.full((10,), 0.3)
        kernel = kernel_for(tau, 0.5, 1e-5)
        assert kernel_for(0.9 * tau, 0.5, 1e-5) is kernel
        smaller = torch.cat([tau, torch.tensor([1e-3])])
        other = kernel_for(smaller, 0.5, 1e-5)
        assert other is not None
        assert other.tau_min < 1e-3
        assert kernel_for(tau, 0.5, 1e-5) is kernel

    def test_it_depends_on_the_steps_alone(self) -> None:
        """A run that is resumed gets the very nodes."""
        from taulearn.caputo import fast_memory

        tau = torch.rand(20) + 0.1
        before = kernel_for(tau, 0.5, 1e-6)
        fast_memory._kernel.cache_clear()
        kernel_for(100 * tau, 0.5, 1e-6)
        after = kernel_for(tau, 0.5, 1e-6)
        assert before is not None
        assert after is not None
        assert after is not before
        assert torch.equal(before.nodes, after.nodes)
        assert torch.equal(before.weights, after.weights)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_steps_that_have_no_kernel(self, value: float) -> None:
        assert kernel_for(torch.tensor([1.0, value]), 0.5, 1e-6) is None
