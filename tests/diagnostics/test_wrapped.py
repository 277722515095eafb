"""Propagation of gradients through wrapped models: what a network built with the same blocks shows."""

import copy

import pytest
import torch
from torch import nn

import taulearn
from taulearn.diagnostics import gradient_propagation
from taulearn.nn import IdentitySkips, Residual, TimeSteps, TimeVariableNetwork


class Block(nn.Module):
    """x -> x + f(x), so that its time-variable form is x + tau f(x)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("method", ["exact", "products"])
def test_wrapped_blocks_propagate_as_the_residual_network_of_the_same_layers(method):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(4)]
    tau = [0.7, 0.1, 1.2, 0.4]
    steps = TimeSteps(4, init=tau, dtype=torch.float64)
    skips = IdentitySkips(4, from_input=True)
    network = TimeVariableNetwork(copy.deepcopy(layers), nn.Identity(), Residual(), steps, skips)
    host = nn.Sequential(*(Block(layer) for layer in layers))
    x = torch.randn(2, 3, dtype=torch.float64)
    wrapped = taulearn.wrap(host, example_inputs=x)
    with torch.no_grad():
        wrapped.time_steps.values.copy_(torch.tensor(tau))
    expected = gradient_propagation(network, x, method=method)
    found = gradient_propagation(wrapped, x, method=method)
    for field in ("largest", "smallest", "weight", "bias", "step"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-6, atol=1e-9)


def test_a_transformer_has_a_propagation():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(1, 5, 8)
    result = gradient_propagation(taulearn.wrap(encoder, example_inputs=x), x)
    assert result.layers == (0, 1, 2)
    assert torch.isfinite(result.largest).all()
    assert (result.step > 0).all()
