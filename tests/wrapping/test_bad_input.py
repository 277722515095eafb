"""Wrapped models where something does not fit, beyond what tests/wrapping/refusals.py lists."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import fit, prune, unwrap, wrap
from wrapping.hosts import sequential

X = torch.ones(1, 4)


def test_what_was_compiled_before_can_still_be_wrapped() -> None:
    model = sequential()
    torch.compile(model)
    assert wrap(model, example_inputs=X).time_steps.num_steps > 0


@pytest.mark.parametrize("constraint", ["free", "simplex"])
def test_an_optimiser_from_before(constraint: str) -> None:
    """It holds no time steps, and would leave them as they are without a word."""
    model = sequential()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrap(model, example_inputs=X, constraint=constraint)
    options: Any = {"loss": nn.functional.mse_loss, "optimizer": optimizer, "epochs": 1, "progress": False}
    with pytest.raises(ValueError, match="optimizer must hold the model's time steps"):
        fit(model, (X, torch.zeros(1, 2)), **options)
    model.time_steps.values.requires_grad_(False)
    before = model.time_steps.tau.detach().clone()
    fit(model, (X, torch.zeros(1, 2)), **options)
    torch.testing.assert_close(model.time_steps.tau.detach(), before)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.encoder(x, src_key_padding_mask=mask)
        return y


def test_nested_tensors_that_come_after_wrapping() -> None:
    model = Nested().eval()
    model.encoder.use_nested_tensor = False
    wrap(model, example_inputs=X[None].expand(2, 3, 4))
    model.encoder.use_nested_tensor = True
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"must get a plain tensor, got a nested one: build torch.nn.Tran"),
    ):
        model(torch.rand(2, 3, 4), mask)


def test_steps_are_discarded_where_that_is_asked_for() -> None:
    model = wrap(sequential(), example_inputs=X, init=[1.0, 0.5, 1.0, 1.0])
    assert not hasattr(unwrap(model, discard_steps=True), "time_steps")


def test_pruning_everything() -> None:
    model = wrap(sequential(), example_inputs=X)
    with torch.no_grad():
        model.time_steps.values.zero_()
    assert prune(model).layers_after == 1
