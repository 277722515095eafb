"""Marked state dicts, loaded into networks and wrapped models that were built anew."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import taulearn
from taulearn.integrations.checkpoints import mark_
from taulearn.nn.pruned_models import ORIGIN, follower_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


def built(**options: Any) -> Any:
    return taulearn.nn.resnet(3, 3, 2, 4, **options)


def wrapped(**options: Any) -> Any:
    host = nn.Sequential(nn.Linear(3, 3), nn.Sequential(*[Block() for _ in range(4)]), nn.Linear(3, 2))
    return taulearn.wrap(host, example_inputs=torch.zeros(2, 3), **options)


def fractional() -> Any:
    return taulearn.nn.fractional_dnn(3, 3, 2, 4)


def displaced() -> Any:
    return wrapped(units="displacement")


def dependent() -> Any:
    return built(constraint="dependent")


def marked(model: nn.Module, prefix: str = "", **options: Any) -> dict[str, Any]:
    state = {prefix + name: value for name, value in model.state_dict().items()}
    mark_(model, state, prefix, **options)
    return state


@pytest.mark.parametrize("make", [built, wrapped, fractional, displaced, dependent])
@pytest.mark.parametrize("lifted", [False, True])
def test_a_fresh_model_deletes_what_a_state_lacks(make: Any, lifted: bool) -> None:
    model, inputs = make(), torch.randn(5, 3)
    last = [0, 2, 3] if make is dependent else [0, 2]  # the last layers went, too
    taulearn.prune(model, keep=last)
    for fresh in (make(), copy.deepcopy(make())):
        state = marked(model, lifted=lifted)
        fresh.load_state_dict(state)
        assert fresh.time_steps.origin == tuple(last)
        assert torch.equal(fresh(inputs), model(inputs))
        assert ORIGIN in state
        fresh.load_state_dict(marked(model))


def test_models_inside_others_and_several_of_them() -> None:
    one, other = built(), wrapped()
    taulearn.prune(one, keep=[0, 3])
    taulearn.prune(other, keep=[1])
    state = marked(one, "parts.0.") | marked(other, "parts.1.")
    whole = nn.ModuleDict({"parts": nn.ModuleList([built(), wrapped()])})
    whole.load_state_dict(state)
    assert [part.time_steps.origin for part in whole["parts"]] == [(0, 3), (1,)]


@pytest.mark.parametrize("make", [built, wrapped])
def test_what_cannot_be_followed(make: Any) -> None:
    state, model = marked(make()), make()
    taulearn.prune(model, keep=[0, 2])
    with pytest.raises(ValueError, match=r"model must have the layers \[0, 1, 2, 3\].*built anew"):
        model.load_state_dict(state)
    plain = model.state_dict()
    model.load_state_dict(plain)
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().load_state_dict(plain)
    first = built()
    bad = marked(first) | {ORIGIN: torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="indices must contain layer 0"):
        first.load_state_dict(bad)


def test_a_model_without_steps_follows_no_more() -> None:
    model = wrapped()
    assert follower_of(model) is not None
    assert follower_of(copy.deepcopy(model)) is not follower_of(model)
    assert follower_of(taulearn.unwrap(model)) is None
