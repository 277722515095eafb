"""Networks cut after some of their layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import load_model, save_model, wrap
from taulearn.depth.truncate import truncate
from taulearn.nn import (
    IdentitySkips,
    Residual,
    TimeSteps,
    TimeVariableNetwork,
    densenet,
    feedforward,
    fractional_dnn,
    resnet,
)

DOUBLE = torch.float64
BUILDERS: dict[str, Callable[..., TimeVariableNetwork]] = {
    "feedforward": feedforward,
    "residual": resnet,
    "dense": densenet,
    "fractional": fractional_dnn,
}


def make(name: str, width: Any = 4, **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(0)
    depth = len(width) if isinstance(width, list) else 5
    return BUILDERS[name](3, width, 2, depth, **{"activation": "tanh", "dtype": DOUBLE} | options)


def batch() -> Tensor:
    return torch.randn(6, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("skips", ["pad", "learned"])
@pytest.mark.parametrize("width", [4, [4, 2, 5, 5, 3]], ids=str)
def test_is_the_intermediate_output(name: str, skips: str, width: Any, tmp_path: Any) -> None:
    network, x = make(name, width, skips=skips), batch()
    expected = network.intermediate_outputs(x)
    for k in (5, 3, 2, 1):
        before = sum(p.numel() for p in network.parameters())
        report = truncate(network, k)
        torch.testing.assert_close(network(x), expected[k])
        assert network.time_steps.origin == tuple(range(k))
        assert (report.layers_after, report.parameters_before) == (k, before)
        assert report.parameters_after == sum(p.numel() for p in network.parameters())
    save_model(network, tmp_path)
    assert torch.equal(load_model(tmp_path)(x), network(x))


def test_report() -> None:
    report = truncate(make("residual", init=[0.5, 0.1, 0.2, 0.1, 0.1]), 3)
    assert [(d.layer, round(d.share, 3), d.parameters) for d in report.deleted] == [(4, 0.1, 21), (3, 0.1, 21)]
    assert report.kept == (0, 1, 2)
    assert not truncate(make("residual"), 5)


class Shift(IdentitySkips):
    """Skips of a user that change the state, and forget by number."""

    def carry(self, y: Tensor, source: int, target: int) -> Tensor:
        return y + sum(range(source, target))

    def unchanged(self, layer: int) -> bool:
        return layer == 0


def test_skips_of_ones_own() -> None:
    layers = [nn.Linear(3, 3, dtype=DOUBLE) for _ in range(4)]
    network = TimeVariableNetwork(
        layers, nn.Linear(3, 2, dtype=DOUBLE), Residual(), TimeSteps(4, dtype=DOUBLE), Shift(4, from_input=True)
    )
    expected = network.intermediate_outputs(batch())
    torch.testing.assert_close(expected[0], network.head(batch() + 6))
    for k in (3, 1):
        truncate(network, k)
        torch.testing.assert_close(network(batch()), expected[k])


def test_wrapped_model() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)]
    model, x = nn.Sequential(*blocks, nn.Linear(3, 2)).double(), batch()
    wrap(model, example_inputs=x)
    expected = model[3](model[1](model[0](x)))
    assert [d.layer for d in truncate(model, 2).deleted] == [2]
    assert torch.equal(model(x), expected)


def test_simplex_steps_add_up_again() -> None:
    network = make("residual", constraint="simplex")
    report = truncate(network, 2)
    assert network.time_steps.tau.sum().item() == pytest.approx(1.0)
    assert report.note.startswith("the steps that are left were projected")


def test_all_of_dependent_steps_can_stay() -> None:
    assert not truncate(make("residual", constraint="dependent"), 5)
