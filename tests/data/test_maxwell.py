"""The Maxwell problem: its equations by automatic differentiation, its formulas, its samples."""

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from taulearn import data
from taulearn.data import maxwell


def points(n: int = 50) -> Tensor:
    """The axis, points near it on both sides of the switch to the series, the rim, and the corners of the cube."""
    special = [
        [0, 0, 0.3],
        [1e-9, 0, 0],
        [1e-3, -2e-3, 1],
        [0.0999, 0, 0.5],
        [0.1001, 0, 0.5],
        [0.6, -0.8, 0.2],
        [1, 1, 1],
    ]
    random = np.random.default_rng(0).uniform(-1, 1, (n, 3))
    return torch.tensor(np.concatenate([special, random]), dtype=torch.float64)


def curl_of(field):
    """The curl of x -> (3,) by automatic differentiation, as a function of one point."""

    def value(x: Tensor) -> Tensor:
        d = jacrev(field)(x)
        return torch.stack([d[2, 1] - d[1, 2], d[0, 2] - d[2, 0], d[1, 0] - d[0, 1]])

    return value


def check(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


class TestEquations:
    def test_curl_of_the_solution(self) -> None:
        check(vmap(curl_of(maxwell.solution))(points()), maxwell.curl(points()))

    def test_curl_phi_curl_u_is_f(self) -> None:
        flux = lambda x: maxwell.coefficient(x) * curl_of(maxwell.solution)(x)  # noqa: E731
        check(vmap(curl_of(flux))(points()), maxwell.source(points()))

    def test_curl_curl_u_is_minus_u(self) -> None:
        check(vmap(curl_of(curl_of(maxwell.solution)))(points()), -maxwell.solution(points()))

    def test_divergence_is_zero(self) -> None:
        divergence = vmap(lambda x: jacrev(maxwell.solution)(x).diagonal().sum())(points())
        check(divergence, torch.zeros_like(divergence))


class TestFormulas:
    def test_scipy_bessel_functions(self) -> None:
        x = points().numpy()
        r = np.hypot(x[:, 0], x[:, 1])
        safe = np.where(r > 0, r, 1.0)
        e_theta = np.stack([-x[:, 1] / safe, x[:, 0] / safe, 0 * r], axis=1)
        u = scipy.special.iv(1, r)[:, None] * e_theta
        f = -(r * scipy.special.iv(0, r))[:, None] * e_theta - ((r**2 + 1) / 2)[:, None] * u
        check(maxwell.solution(points()), torch.from_numpy(u))
        check(maxwell.source(points()), torch.from_numpy(f))
        check(maxwell.curl(points())[:, 2], torch.from_numpy(scipy.special.iv(0, r)))

    @pytest.mark.parametrize("r", [1e-8, 0.05, 0.0999999, 0.1000001, 0.7, 1.4])
    def test_mpmath_bessel_functions_at_the_switch_to_the_series(self, r: float) -> None:
        x = torch.tensor([r, 0.0, 0.0], dtype=torch.float64)
        with mpmath.workdps(40):
            i0, i1 = mpmath.besseli(0, r), mpmath.besseli(1, r)
        assert maxwell.solution(x)[1].item() == pytest.approx(float(i1), rel=4e-16)
        assert maxwell.curl(x)[2].item() == pytest.approx(float(i0), rel=4e-16)

    def test_finite_on_the_axis_with_derivatives(self) -> None:
        x = torch.zeros(1, 3, requires_grad=True)
        inputs = maxwell.inputs_at(x)
        assert torch.equal(inputs.detach(), torch.tensor([[0, 0, 0, 0, 0, 0, 0.5]]))
        (gradient,) = torch.autograd.grad(inputs.sum() + maxwell.solution(x).sum(), x)
        assert gradient.isfinite().all()


class TestSamples:
    def test_sizes_and_contents(self) -> None:
        train, test = data.load("maxwell"), data.load("maxwell", "test")
        assert train.inputs.shape == (12_000, 7)
        assert test.inputs.shape == (2000, 7)
        for inputs, targets in (train, test):
            assert inputs.dtype == targets.dtype == torch.float32
            x = inputs[:, :3].double()
            assert maxwell.inside(x).all()
            torch.testing.assert_close(inputs[:, 3:6].double(), maxwell.source(x), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(inputs[:, 6:].double(), maxwell.coefficient(x), rtol=1e-6, atol=0)
            torch.testing.assert_close(targets.double(), maxwell.solution(x), rtol=1e-5, atol=1e-6)

    def test_the_stream_of_numbers_is_the_documented_one(self) -> None:
        area, angle, height = np.random.Generator(np.random.Philox(key=1)).random((2000, 3)).T
        x = np.stack([np.sqrt(area) * np.cos(2 * np.pi * angle), np.sqrt(area) * np.sin(2 * np.pi * angle), height], 1)
        assert torch.equal(data.load("maxwell", "test").inputs[:, :3], torch.from_numpy(x).float())
        assert torch.equal(maxwell.samples(2000, key=1).inputs, data.load("maxwell", "test").inputs)

    def test_uniform_in_the_cylinder(self) -> None:
        x = maxwell.sample_points(20_000, key=3)
        area = x[:, :2].square().sum(1)
        angle = torch.atan2(x[:, 1], x[:, 0]) / (2 * torch.pi) + 0.5
        for share in (area, angle, x[:, 2]):
            counts = torch.histc(share, bins=10, min=0, max=1)
            assert (counts - 2000).abs().max() < 5 * (20_000 * 0.09) ** 0.5  # five standard deviations

    def test_train_and_test_points_differ(self) -> None:
        train, test = data.load("maxwell").inputs, data.load("maxwell", "test").inputs
        both = torch.cat([train, test])
        assert len(both.unique(dim=0)) == len(both)


class TestBadInput:
    @pytest.mark.parametrize("outside", [[0.8, 0.8, 0.5], [0.0, 0.0, 1.1], [0.0, 0.0, -0.1]])
    def test_points_outside_the_cylinder(self, outside: list[float]) -> None:
        x = torch.tensor([[0.0, 0.0, 0.5], outside])
        with pytest.raises(ValueError, match=r"points must lie in the cylinder.*got 1 of 2 outside.*extrapolate=True"):
            maxwell.samples_at(x)
        assert torch.equal(maxwell.samples_at(x, extrapolate=True).targets, maxwell.solution(x))
