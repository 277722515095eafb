"""The contract for the fully connected networks of the papers, on every scheme, with every kind of skip."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from contract import Case, TimeVariableContract
from reference import network_output
from taulearn.nn import LearnedOrder, Momentum, TimeVariableNetwork, densenet, feedforward, fractional_dnn, resnet

SCHEMES: dict[str, Callable[..., TimeVariableNetwork]] = {
    "feedforward": feedforward,
    "residual": resnet,
    "dense": densenet,
    "fractional": fractional_dnn,
    "fractional from 0": lambda *args, **options: fractional_dnn(*args, gamma=0.3, memory_from=0, **options),
}
LOCAL: dict[str, Callable[..., TimeVariableNetwork]] = {
    name: partial(resnet, scheme=Momentum(0.7) if name == "momentum" else name)
    for name in ("midpoint", "heun", "rk4", "momentum", "verlet")
}
LEARNED: dict[str, Callable[..., TimeVariableNetwork]] = {
    f"order learned per {per}": partial(fractional_dnn, gamma=LearnedOrder(0.6, per)) for per in ("network", "layer")
}
WIDTHS: dict[str, int | list[int]] = {"equal": 3, "pad": [3, 2, 2, 4], "learned": [2, 3, 3, 2]}


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)


def make_case(scheme: str, widths: str) -> Case:
    builder, skips = (SCHEMES | LOCAL | LEARNED)[scheme], "learned" if widths == "learned" else "pad"

    def build(constraint: str) -> TimeVariableNetwork:
        options = {"activation": "tanh", "horizon": 2.0, "constraint": constraint, "skips": skips}
        return builder(4, WIDTHS[widths], 2, 4, dtype=torch.float64, **options)

    return Case(f"{scheme}, {widths}", build, inputs, network_output)


CASES = [make_case(scheme, widths) for scheme in SCHEMES for widths in WIDTHS]
LIKE_HEUN = ("midpoint", "rk4")  # the same code with other numbers
CASES += [make_case(scheme, "equal") for scheme in LOCAL if scheme not in LIKE_HEUN]
CASES += [make_case(scheme, widths) for scheme in LEARNED for widths in ("equal", "pad")]
# One of each kind of scheme, every kind of skip: compilation takes a second.
NAMES = ("feedforward, equal", "residual, pad", "dense, learned", "fractional, pad", "heun, equal", "verlet, equal")
COMPILED = [case for case in CASES if str(case) in NAMES]


class TestFullyConnected(TimeVariableContract):
    @pytest.fixture(
        params=[
            *CASES,
            *(pytest.param(make_case(scheme, "equal"), marks=pytest.mark.long) for scheme in LIKE_HEUN),
        ],
        ids=str,
    )
    def case(self, request: pytest.FixtureRequest) -> Case:
        case = request.param
        assert isinstance(case, Case)
        return case

    @pytest.mark.parametrize("case", COMPILED, ids=str)
    def test_compiled_is_eager(self, case: Case) -> None:
        assert len(COMPILED) == len(NAMES)
        super().test_compiled_is_eager(case)
