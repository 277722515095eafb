"""The contract of time-variable models, for wrapped ones."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract import Case, TimeVariableContract
from taulearn import wrap
from wrapping.hosts import Block, encoder, images, sequences, vit


class Logits(nn.Module):
    """A host with a model of transformers inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x).logits
        return output


def make_case(name: str, make: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> Case:
    def batch() -> Tensor:
        return inputs().double()

    @functools.cache
    def wrapped(constraint: str) -> nn.Module:
        return wrap(make().double().eval(), example_inputs=batch(), constraint=constraint)

    def build(constraint: str) -> nn.Module:
        model = copy.deepcopy(wrapped(constraint))  # thirty times as fast as wrapping
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model

    return Case(name, build, batch)


CASES = [
    make_case(
        "blocks",
        lambda: nn.Sequential(nn.Linear(2, 3), *(Block(3) for _ in range(4)), nn.Linear(3, 1)),
        lambda: torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    ),
    make_case("encoder", encoder, lambda: sequences()[:, :2]),
    make_case("vit", lambda: Logits(vit()), images(8)),
]


class TestWrapped(TimeVariableContract):
    @pytest.fixture(params=CASES, ids=str)
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    @pytest.mark.parametrize("case", CASES[:1], ids=str)
    @pytest.mark.parametrize("constraint", ["free", "dependent"])
    def test_gradcheck_of_all_parameters(self, case: Case, constraint: str) -> None:
        super().test_gradcheck_of_all_parameters(case, constraint)
