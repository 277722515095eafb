"""Optimisers as callers give them, and what is refused."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from taulearn.adaptivity.optimizer_state import (
    bare,
    check_current,
    check_follows,
    check_holds,
    check_holds_steps,
    optimizers_in,
    with_inner,
)
from taulearn.adaptivity.transaction import Snapshot, check_averaged
from taulearn.nn import resnet
from taulearn.nn.pruned_models import retire


def test_one_several_none_and_one_inside_another() -> None:
    outer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    outer.fast = torch.optim.Adam(outer.param_groups)  # type: ignore[attr-defined]
    assert optimizers_in(None) == []
    assert optimizers_in(outer) == optimizers_in([outer]) == [outer]
    assert bare(outer) is outer
    assert [type(each) for each in with_inner([outer])] == [torch.optim.SGD, torch.optim.Adam]
    with pytest.raises(ValueError, match="optimizer must be an optimiser or a list of them, got an empty list"):
        optimizers_in([])


def test_what_holds_something_else_is_refused() -> None:
    network = resnet(2, 3, 1, 4)
    check_holds(torch.optim.SGD(network.parameters()), network)
    with pytest.raises(TypeError, match="optimizer must be an optimiser of the model's parameters, got the class SGD"):
        check_holds(torch.optim.SGD, network)
    with pytest.raises(ValueError, match="optimizer must hold the model's time steps, got one that does not"):
        check_holds_steps(torch.optim.SGD(network.layers.parameters()), network)
    check_current(network.parameters())
    retire(network.time_steps.values)
    with pytest.raises(ValueError, match="from before layers came or went"):
        check_current(network.parameters())


def test_flat_buffers_cannot_follow() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    named = {p: name for name, p in layer.named_parameters()}
    check_follows(optimizer, named, set())
    optimizer.flat = torch.zeros(6)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"keep its state by parameter.*its attribute 'flat'"):
        check_follows(optimizer, named, set())


def test_a_snapshot_puts_back_what_was_deleted() -> None:
    layer = nn.Linear(1, 1)
    optimizer, weight = torch.optim.SGD(layer.parameters()), layer.weight
    before = Snapshot([layer], [optimizer])
    del layer.weight
    optimizer.param_groups[0]["params"].clear()
    before.restore()
    assert layer.weight is weight
    assert optimizer.param_groups[0]["params"] == [*layer.parameters()]


def test_averages_of_other_models() -> None:
    check_averaged(AveragedModel(nn.Linear(1, 1)), nn.Linear(1, 1))
    with pytest.raises(TypeError, match="averaged must be torch's AveragedModel of the model, got a Linear"):
        check_averaged(nn.Linear(1, 1), nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="averaged must average this model"):
        check_averaged(AveragedModel(nn.Linear(1, 2)), nn.Linear(1, 1))
