"""The step vector: constraints, projections, deletion, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

import taulearn
from taulearn.nn import TimeSteps

CONSTRAINTS = ("free", "fixed", "dependent", "simplex")
all_constraints = pytest.mark.parametrize("constraint", CONSTRAINTS)
entries = st.lists(st.floats(-10.0, 10.0), min_size=2, max_size=8)
bounds = st.one_of(st.none(), st.floats(0.0, 0.1))


def vector(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def set_(steps: TimeSteps, values: Any) -> TimeSteps:
    with torch.no_grad():
        steps.values.copy_(torch.as_tensor(values, dtype=torch.float64))
    return steps


@all_constraints
class TestEveryConstraint:
    def test_the_default_divides_the_horizon(self, constraint: str) -> None:
        steps = TimeSteps(5, horizon=2.0, constraint=constraint, dtype=torch.float64)
        torch.testing.assert_close(steps.tau.detach(), vector([0.4] * 5), rtol=1e-15, atol=1e-16)
        assert steps.num_steps == 5
        assert steps.origin == (0, 1, 2, 3, 4)

    @pytest.mark.parametrize("make", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
    def test_initial_steps(self, constraint: str, make: Callable[[list[float]], Any]) -> None:
        init = make([0.5, 0.125, 0.25, 0.125])
        steps = TimeSteps(4, constraint=constraint, init=init)
        assert steps.tau.tolist() == [0.5, 0.125, 0.25, 0.125]

    def test_initial_steps_are_copied(self, constraint: str) -> None:
        init = torch.tensor([0.5, 0.5], dtype=torch.float64)
        steps = TimeSteps(2, constraint=constraint, init=init, dtype=torch.float64)
        set_(steps, 0.0)
        assert init.tolist() == [0.5, 0.5]

    def test_a_number_starts_every_step(self, constraint: str) -> None:
        assert TimeSteps(4, constraint=constraint, init=0.25).tau.tolist() == [0.25] * 4

    def test_what_is_stored(self, constraint: str) -> None:
        steps = TimeSteps(4, constraint=constraint)
        entries = 3 if constraint == "dependent" else 4
        assert {name: value.shape for name, value in steps.state_dict().items()} == {"values": (entries,)}
        assert [p.numel() for p in steps.parameters()] == ([] if constraint == "fixed" else [entries])
        assert steps.tau.requires_grad == (constraint != "fixed")

    def test_a_single_step(self, constraint: str) -> None:
        steps = TimeSteps(1, horizon=3.0, constraint=constraint)
        steps.project_()
        assert steps.tau.tolist() == [3.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtype(self, constraint: str, dtype: torch.dtype) -> None:
        steps = TimeSteps(3, constraint=constraint, dtype=dtype)
        assert steps.tau.dtype == steps.raw_tau.dtype == dtype
        steps.keep_([0, 2])
        assert steps.tau.dtype == dtype

    def test_keeping_composes_the_origin(self, constraint: str) -> None:
        steps = TimeSteps(6, constraint=constraint)
        steps.keep_([0, 2, 3, 5])
        assert steps.origin == (0, 2, 3, 5)
        steps.keep_(iter([1, 3]))
        assert steps.num_steps == len(steps.tau) == 2
        assert copy.deepcopy(steps).origin == (2, 5)

    @pytest.mark.parametrize("indices", [[], [1, 0], [0, 0, 3], [-1, 3], [0, 4]], ids=str)
    def test_keeping_refuses(self, constraint: str, indices: list[int]) -> None:
        steps = TimeSteps(4, constraint=constraint)
        with pytest.raises(ValueError, match=r"indices must .*got \["):
            steps.keep_(indices)
        assert steps.num_steps == 4

    def test_requires_grad_survives(self, constraint: str) -> None:
        steps = TimeSteps(4, constraint=constraint)
        if constraint != "fixed":
            steps.values.requires_grad_(False)
        steps.keep_([0, 3])
        assert not steps.values.requires_grad
        assert isinstance(steps.values, nn.Parameter) == (constraint != "fixed")


class TestDependent:
    def test_the_last_step_is_the_rest_of_the_horizon(self) -> None:
        steps = set_(TimeSteps(4, horizon=2.0, constraint="dependent", dtype=torch.float64), [0.5, -0.25, 0.1])
        torch.testing.assert_close(steps.tau.detach(), vector([0.5, -0.25, 0.1, 1.65]), rtol=1e-15, atol=1e-16)

    def test_gradients_flow_through_it(self) -> None:
        steps = TimeSteps(3, constraint="dependent", dtype=torch.float64)
        (steps.tau * vector([1.0, 2.0, 5.0])).sum().backward()
        assert steps.values.grad is not None
        assert steps.values.grad.tolist() == [1.0 - 5.0, 2.0 - 5.0]

    def test_a_last_step_at_its_bound_has_a_gradient(self) -> None:
        steps = TimeSteps(3, constraint="dependent", horizon=1.0, init=[0.25, 0.5, 0.25], lower_bound=0.25)
        steps.tau[-1].backward()
        assert steps.values.grad is not None
        assert steps.values.grad.tolist() == [-1.0, -1.0]

    def test_the_lower_bound_acts_in_the_forward_pass_and_both_are_recorded(self) -> None:
        steps = TimeSteps(3, constraint="dependent", lower_bound=0.01, dtype=torch.float64)
        set_(steps, [0.8, 0.7])
        assert steps.tau[-1].item() == 0.01
        assert steps.raw_tau[-1].item() == pytest.approx(-0.5, abs=1e-15)
        assert steps.bounded
        assert steps.raw_tau[:2].tolist() == steps.tau[:2].tolist() == [0.8, 0.7]

    def test_without_a_bound_both_agree(self) -> None:
        steps = set_(TimeSteps(3, constraint="dependent"), [0.8, 0.7])
        assert torch.equal(steps.raw_tau, steps.tau)
        assert not steps.bounded

    def test_it_takes_up_deleted_steps(self) -> None:
        steps = TimeSteps(4, constraint="dependent", init=[0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        steps.keep_([0, 3])
        torch.testing.assert_close(steps.tau.detach(), vector([0.1, 0.9]), rtol=1e-15, atol=1e-16)


class TestProjection:
    @given(entries, st.floats(0.0, 1.0))
    def test_bound(self, values: list[float], lower: float) -> None:
        steps = TimeSteps(len(values), horizon=10.0, lower_bound=lower, dtype=torch.float64)
        set_(steps, vector(values)).project_()
        assert steps.tau.tolist() == [max(x, lower) for x in values]

    @given(entries, bounds)
    def test_simplex(self, values: list[float], lower: float | None) -> None:
        steps = TimeSteps(len(values), constraint="simplex", lower_bound=lower, dtype=torch.float64)
        set_(steps, vector(values)).project_()
        once = steps.tau.detach().clone()
        assert float(once.sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(once.min()) >= (lower or 0.0)
        steps.project_()
        torch.testing.assert_close(steps.tau.detach(), once, rtol=0.0, atol=1e-14)

    @given(entries, bounds)
    def test_dependent(self, values: list[float], lower: float | None) -> None:
        steps = TimeSteps(len(values) + 1, constraint="dependent", lower_bound=lower, dtype=torch.float64)
        set_(steps, vector(values)).project_()
        assert steps.values.tolist() == (values if lower is None else [max(x, lower) for x in values])
        if lower is not None:
            assert float(steps.tau.detach().min()) >= lower

    def test_fixed_steps_stay(self) -> None:
        steps = TimeSteps(2, constraint="fixed", lower_bound=0.1)
        set_(steps, [0.0, -1.0]).project_()
        assert steps.tau.tolist() == [0.0, -1.0]

    def test_free_steps_without_a_bound_stay(self) -> None:
        steps = set_(TimeSteps(2), [0.0, -1.0])
        steps.project_()
        assert steps.tau.tolist() == [0.0, -1.0]

    @all_constraints
    def test_it_works_in_place(self, constraint: str) -> None:
        steps = TimeSteps(3, constraint=constraint, lower_bound=0.1)
        values, address = steps.values, steps.values.data_ptr()
        steps.project_()
        assert steps.values is values
        assert values.data_ptr() == address

    def test_the_simplex_is_projected_upon_after_a_deletion(self) -> None:
        steps = TimeSteps(4, constraint="simplex", init=[0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        steps.keep_([0, 3])
        torch.testing.assert_close(steps.tau.detach(), vector([0.35, 0.65]), rtol=1e-14, atol=1e-15)


def test_print_shows_what_matters() -> None:
    steps = TimeSteps(4, horizon=2.0, constraint="simplex", lower_bound=0.1)
    assert repr(steps) == "TimeSteps(4, constraint='simplex', horizon=2, lower_bound=0.1)"
    steps.keep_([0, 3])
    assert repr(steps) == "TimeSteps(2, constraint='simplex', horizon=2, lower_bound=0.1, origin=(0, 3))"


def test_public_name() -> None:
    assert taulearn.TimeSteps is TimeSteps
