"""The small functions of wrapping."""

import pickle

import pytest
import torch
from torch import nn

from taulearn.wrapping.block import blend
from taulearn.wrapping.comparison import in_short, tensors_of
from taulearn.wrapping.configurations import is_of_transformers, is_pretrained
from taulearn.wrapping.find_blocks import matching, nearest_names
from taulearn.wrapping.remove_blocks import list_of
from taulearn.wrapping.state_argument import Form, parameter_names
from taulearn.wrapping.wrapped_model import ExampleInputs


def test_blend_keeps_the_layout_of_the_output() -> None:
    y = torch.ones(2, 3).T
    mixed = blend(torch.zeros(3, 2), y, torch.tensor(0.25))
    assert mixed.unique().tolist() == [0.25]
    assert mixed.stride() == y.stride()


def test_names_and_patterns() -> None:
    assert matching("blocks", "h.*", ["h", "h.0", "h.1", "h.1.attn"]) == ["h.0", "h.1"]
    assert nearest_names("layer.0", ["layers.0", "head"]) == ": did you mean 'layers.0'?"
    with pytest.raises(ValueError, match=r"blocks must match names of the model, got 'k\.\*'"):
        matching("blocks", "k.*", ["h.0"])


def test_where_a_state_is() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert parameter_names(lambda context, x, *, mask=None: x) == ["context", "x"]
    assert Form.of((None, zero)).around(one) == (None, one)
    assert Form(argument="x", position=1).arriving((zero, one), {}) is one
    assert Form().replaced((zero, "rest"), one) == (one, "rest")


def test_the_list_that_holds_a_block() -> None:
    block = nn.ReLU()
    assert list_of(nn.ModuleDict({"stage": nn.Sequential(block)}), block) == "stage"
    assert list_of(nn.ModuleDict({"stage": block}), block) is None


def test_example_inputs_are_no_part_of_a_pickle() -> None:
    assert pickle.loads(pickle.dumps(ExampleInputs(torch.ones(1)))).value is None


def test_what_is_compared() -> None:
    state = {"a": torch.ones(1), "time_steps.values": torch.ones(1), "version": 2}
    assert list(tensors_of(state)) == ["a"]
    assert in_short(ValueError("must be   one line")) == "ValueError: must be one line"
    assert not is_pretrained(nn.Linear(1, 1))
    assert not is_of_transformers(nn.Linear(1, 1), "PreTrainedModel")
