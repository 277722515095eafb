"""Time steps of a finer grid: splits and insertions in every constraint, numbers and parents."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contract import all_constraints
from taulearn.nn import Constraint, TimeSteps
from taulearn.nn.constraints import Stored
from taulearn.nn.finer_steps import not_split

DOUBLE = torch.float64
TAU = [0.1, 0.2, 0.3, 0.4]


def steps_with(constraint: str | Constraint, **options: Any) -> TimeSteps:
    return TimeSteps(4, constraint=constraint, init=TAU, dtype=DOUBLE, **options)


@all_constraints
@pytest.mark.parametrize("theta", [0.5, 0.25, 0.9])
@pytest.mark.parametrize("indices", [[0], [3], [1, 3], [0, 1, 2, 3]], ids=str)
def test_a_split_is_the_same_time_in_two_parts(constraint: str, theta: float, indices: list[int]) -> None:
    steps = steps_with(constraint)
    steps.split_(iter(indices), theta)
    expected = [part for l, t in enumerate(TAU) for part in ([theta * t, (1 - theta) * t] if l in indices else [t])]
    np.testing.assert_allclose(steps.tau.detach().numpy(), expected, rtol=0, atol=1e-15)
    assert float(steps.tau.detach().sum()) == pytest.approx(1.0, abs=1e-15)
    assert len(steps.values) == len(expected) - (constraint == "dependent")
    assert isinstance(steps.values, nn.Parameter) == (constraint != "fixed")
    steps.project_()
    np.testing.assert_allclose(steps.tau.detach().numpy(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("constraint", ["free", "dependent", "simplex"])
@pytest.mark.parametrize("behind", [[0], [2], [0, 1, 2]], ids=str)
def test_an_inserted_step_is_zero(constraint: str, behind: list[int]) -> None:
    steps = steps_with(constraint)
    steps.insert_(behind)
    expected = [part for l, t in enumerate(TAU) for part in ([t, 0.0] if l in behind else [t])]
    np.testing.assert_allclose(steps.tau.detach().numpy(), expected, rtol=0, atol=1e-15)
    assert steps.tau.tolist().count(0.0) == len(behind)


@pytest.mark.parametrize("constraint", ["free", "dependent", "simplex"])
def test_an_inserted_step_is_not_below_the_bound(constraint: str) -> None:
    steps = steps_with(constraint, lower_bound=0.04)
    steps.insert_([1])
    taken = {"free": [0, 0, 0, 0], "dependent": [0, 0, 0, 0.04], "simplex": [0.01] * 4}[constraint]
    expected = np.insert(np.array(TAU) - taken, 2, 0.04)
    np.testing.assert_allclose(steps.tau.detach().numpy(), expected, rtol=0, atol=1e-14)


@all_constraints
def test_numbers_and_parents(constraint: str) -> None:
    steps = steps_with(constraint)
    steps.split_([1, 3])
    assert (steps.origin, steps.next_number, steps.parent) == ((0, 1, 4, 2, 3, 5), 6, {4: 1, 5: 3})
    steps.keep_([0, 2, 5])
    assert (steps.origin, steps.next_number) == ((0, 4, 5), 6)
    twin = copy.deepcopy(steps)
    steps.split_([1], 0.9)
    assert (steps.origin, steps.parent) == ((0, 4, 6, 5), {4: 1, 5: 3, 6: 4})
    assert (twin.origin, twin.next_number, twin.parent) == ((0, 4, 5), 6, {4: 1, 5: 3})
    assert f"origin={steps.origin}" in repr(steps)


def test_a_number_is_never_used_twice() -> None:
    steps = steps_with("free")
    for _ in range(3):
        steps.insert_([3])
        steps.keep_([0, 1, 2, 3])
    steps.insert_([0])
    assert (steps.origin, steps.next_number) == ((0, 7, 1, 2, 3), 8)


@all_constraints
def test_requires_grad_survives(constraint: str) -> None:
    steps = steps_with(constraint)
    if constraint != "fixed":
        steps.values.requires_grad_(False)
    steps.split_([0])
    assert not steps.values.requires_grad


class Doubled(Constraint):
    """Stores twice the steps and says nothing of refinement."""

    name = "doubled"

    def values(self, steps: Tensor) -> Tensor:
        return 2 * steps

    def tau(self, values: Tensor) -> Tensor:
        return values / 2


class Plain(Stored):
    name = "plain"


class Wrong(Stored):
    name = "wrong"
    seen = 0

    def split(self, values: Tensor, indices: Any, theta: float) -> Tensor:
        self.seen += 1
        return values


def test_a_constraint_of_ones_own() -> None:
    steps = steps_with(Plain())
    steps.split_([3])
    assert steps.tau.tolist() == [*TAU[:3], 0.2, 0.2]
    for constraint, said in ((Doubled(), "Doubled.split"), (Wrong(), "4")):
        steps = steps_with(constraint)
        before = copy.deepcopy(vars(steps.rule))
        with pytest.raises(ValueError, match=said):
            steps.split_([3])
        assert (steps.tau.tolist(), steps.next_number, vars(steps.rule)) == (TAU, 4, before)


@pytest.mark.parametrize(
    ("constraint", "act", "said"),
    [
        ("fixed", lambda s: s.insert_([0]), "fixed"),
        ("dependent", lambda s: s.insert_([3]), "dependent"),
        ("free", lambda s: s.split_([]), r"\[\]"),
        ("free", lambda s: s.split_([1, 1]), "once"),
        ("free", lambda s: s.split_([4]), "4"),
        ("free", lambda s: s.insert_([-1]), "-1"),
        ("free", lambda s: s.split_([1], 0.0), "theta.*0.0"),
        ("free", lambda s: s.split_([1], 1), "theta.*1"),
        ("free", lambda s: s.split_([1], "a"), "theta.*'a'"),
    ],
)
def test_refusals(constraint: str, act: Any, said: str) -> None:
    steps = steps_with(constraint)
    with pytest.raises(ValueError, match=said):
        act(steps)
    assert (steps.tau.tolist(), steps.origin) == (pytest.approx(TAU), (0, 1, 2, 3))


@all_constraints
def test_no_half_lies_below_the_bound(constraint: str) -> None:
    steps = steps_with(constraint, lower_bound=0.08)
    assert sorted(not_split(steps)) == [0]
    assert sorted(not_split(steps, 0.75)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"0\.08"):
        steps.split_([0])
    steps.split_([1])
    assert steps.num_steps == 5


@pytest.mark.parametrize(("constraint", "bound"), [("simplex", 0.22), ("dependent", 0.22)])
def test_there_must_be_room_for_an_inserted_step(constraint: str, bound: float) -> None:
    steps = TimeSteps(4, constraint=constraint, lower_bound=bound, dtype=DOUBLE)
    with pytest.raises(ValueError, match="lower_bound"):
        steps.insert_([0])
    assert steps.num_steps == 4
