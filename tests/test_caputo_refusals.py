"""Arguments of the Caputo functions that are of the wrong kind, and steps whose ratios overflow."""

import re
from typing import Any

import pytest
import torch

from taulearn.caputo import derivative, l1_weights, solve
from taulearn.caputo.weights import plain_left_weights

TAU = torch.full((3,), 0.5)


@pytest.mark.parametrize("tau", [[0.1, 0.1], 0.5, None], ids=repr)
def test_steps_that_are_no_tensor(tau: Any) -> None:
    message = f"tau must be a tensor of step sizes, got {type(tau).__name__}: write torch.as_tensor(tau)"
    for call in (lambda: l1_weights(tau, 0.5), lambda: derivative(torch.zeros(3), tau, 0.5)):
        with pytest.raises(TypeError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("gamma", ["a", None, [0.5]], ids=repr)
def test_orders_that_are_no_number(gamma: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"gamma must be a number in (0, 1), got {gamma!r}")):
        l1_weights(TAU, gamma)
    with pytest.raises(TypeError, match=re.escape(f"gamma must be a number in (0, 1), got {gamma!r}")):
        solve(lambda t, y: y, torch.zeros(2), TAU, gamma)


@pytest.mark.parametrize("value", [None, 1.0, [1.0, 1.0]], ids=repr)
def test_right_hand_sides_that_return_no_tensor(value: Any) -> None:
    message = f"f must return a tensor of the shape of y0, (2,), got {type(value).__name__}"
    with pytest.raises(TypeError, match=re.escape(message)):
        solve(lambda t, y: value, torch.zeros(2), TAU, 0.5)


def test_right_hand_sides_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"f must return the shape of y0, \(2,\), got \(\)"):
        solve(lambda t, y: y.sum(), torch.zeros(2), TAU, 0.5)


def test_values_that_are_no_tensor() -> None:
    with pytest.raises(TypeError, match="y0 must be a tensor, got float"):
        solve(lambda t, y: y, 1.0, TAU, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="y must be a tensor, got list"):
        derivative([1.0] * 4, TAU, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [[1e200, 1e-200], [1.0, 1e-160], [1e308, 1e308]], ids=repr)
def test_steps_whose_ratios_overflow(steps: list[float]) -> None:
    """They gave NaN."""
    tau = torch.tensor(steps, dtype=torch.float64)
    with pytest.raises(ValueError, match="tau must span less than 150 orders of magnitude, got steps from "):
        l1_weights(tau, 0.5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_over_many_orders_of_magnitude_give_numbers_with_gradients(side: str) -> None:
    tau = torch.tensor([1e74, 1e-74, 1.0, 1e-74, 1e70], dtype=torch.float64, requires_grad=True)
    weights = l1_weights(tau, 0.5, side)
    (gradient,) = torch.autograd.grad(weights.sum(), tau)
    assert bool(weights.isfinite().all())
    assert bool(gradient.isfinite().all())
    (plain,) = torch.autograd.grad(plain_left_weights(tau, 0.5).sum(), tau)
    assert bool(plain.isfinite().all())
