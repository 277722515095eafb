"""The derivatives of the L1 scheme's weights with respect to the steps, of which gradients are made."""

import mpmath
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from reference import caputo_weight
from taulearn import caputo
from taulearn.caputo._rows import BLOCK, cotangent_of_steps

DOUBLE = torch.float64


def derivatives(tau: Tensor, gamma: float) -> Tensor:
    """d a_{k,j} / d tau_l at [k, j, l]."""
    number = len(tau)
    units = torch.eye(number * number, dtype=DOUBLE).view(-1, number, number)
    rows = [cotangent_of_steps(tau, gamma, unit.split(BLOCK)) for unit in units]
    return torch.stack(rows).view(number, number, number)


def random_steps(logarithms: list[float]) -> list[float]:
    return [10.0**x for x in logarithms]


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.floats(-6, 1), min_size=1, max_size=12).map(random_steps),
    gamma=st.floats(0.05, 0.95),
)
def test_are_those_of_plain_operations(steps: list[float], gamma: float) -> None:
    tau = torch.tensor(steps, dtype=DOUBLE)
    jacobian = torch.func.jacfwd(lambda t: caputo.l1_weights(t, gamma, validate=False))(tau)
    found = derivatives(tau, gamma)
    for l in range(len(steps)):
        torch.testing.assert_close(found[..., l], jacobian[..., l], rtol=1e-10, atol=float(1e-13 / tau[l]))


def test_are_difference_quotients_of_the_printed_weights() -> None:
    tau, h = torch.tensor([0.3, 0.2, 0.5, 0.1], dtype=DOUBLE), 1e-6
    found = derivatives(tau, 0.4)
    for l in range(4):
        step = h * torch.eye(4, dtype=DOUBLE)[l]
        for k in range(4):
            for j in range(k):
                up, down = (caputo_weight((tau + s * step).numpy(), 0.4, k, j) for s in (1, -1))
                assert float(found[k, j, l]) == pytest.approx((up - down) / (2 * h), abs=1e-8)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("ratio", [1e-8, 1e-5, 1e-3, 0.0312499, 0.0312501, 0.5, 1.0, 30.0, 1e8])
def test_digits_of_two_steps(ratio: float, gamma: float) -> None:
    """a_{1,0} = ((1+r)^(1-gamma) - 1) / r with r = tau_0 and tau_1 = 1, differentiated with 60 digits."""
    with mpmath.workdps(60):
        r, c = mpmath.mpf(ratio), 1 - mpmath.mpf(gamma)
        expected = float((c * (1 + r) ** (c - 1) - ((1 + r) ** c - 1) / r) / r)
    found = derivatives(torch.tensor([ratio, 1.0], dtype=DOUBLE), gamma)[1, 0, 0]
    assert float(found) == pytest.approx(expected, rel=1e-12)
