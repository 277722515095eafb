"""Constraints of one's own that keep something themselves, or get something wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn.adaptivity.transaction import all_or_nothing
from taulearn.nn import TimeSteps, resnet
from taulearn.nn.constraints import Constraint


class Capped(Constraint):
    """Steps with a largest value each, which a deletion takes along."""

    name = "capped"

    def __init__(self) -> None:
        self.cap, self.notes = torch.ones(4), ["new"]

    def projected(self, values: Tensor) -> Tensor:
        return torch.minimum(values, self.cap.to(values))

    def keep(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        self.cap = self.cap[torch.tensor(list(indices))]
        self.notes.append("kept")
        return super().keep(values, indices)


class Line(Constraint):
    """Two values, of the first step and the last; it forgets that a deletion leaves fewer steps."""

    name = "line"
    forgets = True

    def values(self, steps: Tensor) -> Tensor:
        self.number = len(steps)
        return steps[[0, -1]]

    def tau(self, values: Tensor) -> Tensor:
        return values[0] + (values[1] - values[0]) * torch.linspace(0, 1, self.number)

    def entries(self, indices: Sequence[int]) -> list[int]:
        return [0, 1]

    def keep(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        self.kept = list(indices)
        self.number = self.number if self.forgets else len(indices)
        return super().keep(values, indices)


def held(rule: Any) -> tuple[int, list[str]]:
    return len(rule.cap), rule.notes


def test_what_a_constraint_holds_is_put_back_in_a_refused_host(tmp_path: Path) -> None:
    model, host = resnet(1, 4, 1, 4, constraint=Capped()), resnet(1, 5, 1, 4, constraint=Capped())
    taulearn.prune(model, keep=[0, 2])
    taulearn.save_model(model, tmp_path)
    with pytest.raises(ValueError, match="host must be of the model"):
        taulearn.load_model(tmp_path, host=host)
    assert held(host.time_steps.rule) == (4, ["new"])
    host.time_steps.project_()


def test_what_an_object_of_a_scheme_holds_is_put_back() -> None:
    class Memory:
        def __init__(self) -> None:
            self.sizes = [4]

    model = resnet(1, 4, 1, 4)
    model.scheme.memory = memory = Memory()  # type: ignore[assignment]

    @all_or_nothing([model])
    def fail() -> None:
        memory.sizes.append(3)
        vars(memory)["last"] = 3
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert vars(memory) == {"sizes": [4]}


def test_a_constraint_with_too_many_steps_after_a_deletion_changes_nothing() -> None:
    model = resnet(1, 4, 1, 5, constraint=Line())
    before = dict(vars(model.time_steps.rule))
    for delete in (lambda: model.time_steps.keep_([0, 2, 4]), lambda: taulearn.prune(model, keep=[0, 2, 4])):
        with pytest.raises(ValueError, match=r"Line.tau must have 3 entries, one a layer, got 5: let Line.keep"):
            delete()
        assert vars(model.time_steps.rule) == before
        assert (model.time_steps.num_steps, len(model.layers)) == (5, 5)
        assert model(torch.ones(2, 1)).shape == (2, 1)


def test_a_constraint_that_follows_a_deletion_is_taken() -> None:
    rule = Line()
    rule.forgets = False
    model = resnet(1, 4, 1, 5, constraint=rule)
    taulearn.prune(model, keep=[0, 2, 4])
    assert len(model.time_steps.tau) == 3


def test_a_constraint_needs_a_name() -> None:
    class Nameless(Constraint):
        pass

    with pytest.raises(TypeError, match="Nameless must have a name"):
        TimeSteps(2, constraint=Nameless())


def test_constraints_with_tensors_can_be_compared() -> None:
    rule = Capped()
    assert rule == rule
    assert rule != Capped()


def test_a_plain_host_of_a_model_wrapped_with_an_own_constraint_is_told_what_to_do(tmp_path: Path) -> None:
    def host() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))

    def wrapped() -> nn.Module:
        return taulearn.wrap(host(), example_inputs=torch.ones(2, 4), constraint=Line())

    model = wrapped()
    taulearn.save_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"got 'line'.*: wrap the host with that constraint of your own first"):
        taulearn.load_model(tmp_path, host=host())
    loaded = taulearn.load_model(tmp_path, host=wrapped())
    assert torch.equal(loaded(torch.ones(2, 4)), model(torch.ones(2, 4)))
