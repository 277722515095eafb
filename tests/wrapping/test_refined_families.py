"""One contract for the families of models when blocks come in, and which of them cannot have which."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from taulearn import load_model, refine, save_model
from taulearn.wrapping import wrapping_of
from wrapping.families import FAMILIES
from wrapping.test_families import (  # noqa: F401  the fixture is used by being there
    _fast_path,
    answer,
    assert_generates_alike,
    assert_like,
    assert_plain_loading_gives,
    each,
    equal,
    every_family,
    every_pretrained,
    set_steps,
    stepped,
)

REFUSED = {
    "t5": ({0, 4}, "relative_attention_bias"),
    "modernbert": ({0}, "attn_norm"),
    "swin": (set(range(9)), "shift_size"),
    "swin_alone": (set(range(9)), "shift_size"),
}


def deeper(name: str) -> tuple[Any, Any]:
    """The model with a copy of step 0 behind each block that allows it, and what it answered before."""
    host, inputs = stepped(name), FAMILIES[name].inputs
    set_steps(host)
    before = answer(host, inputs)
    number, refused = host.time_steps.num_steps, REFUSED.get(name, (set(), ""))[0]
    if allowed := [l for l in range(number) if l not in refused]:
        refine(host, allowed, by="insert")
    return host, before


@every_family
def test_new_blocks_change_nothing(name: str) -> None:
    host, before = deeper(name)
    assert equal(answer(host, FAMILIES[name].inputs), before)
    numbers = [vars(m)["layer_idx"] for m in host.modules() if isinstance(vars(m).get("layer_idx"), int)]
    assert set(numbers) <= set(range(host.time_steps.num_steps))


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_configuration_cannot_say(name: str) -> None:
    numbers, said = REFUSED[name]
    for l in sorted(numbers)[: min(2, stepped(name).time_steps.num_steps)]:
        host = stepped(name)
        origin, state = host.time_steps.origin, copy.deepcopy(host.state_dict())
        with pytest.raises(ValueError, match=rf"layers must .*{said}"):
            refine(host, [l])
        assert host.time_steps.origin == origin
        assert all(torch.equal(value, host.state_dict()[key]) for key, value in state.items())


@each([name for name, family in FAMILIES.items() if family.generates])
def test_generation_with_and_without_the_cache_is_the_same(name: str) -> None:
    host, _ = deeper(name)
    with torch.no_grad():
        host.time_steps.values.copy_(torch.linspace(1.0, 0.3, host.time_steps.num_steps))
    assert_generates_alike(host, FAMILIES[name].inputs)


@every_pretrained
def test_plain_transformers_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    host, inputs = deeper(name)[0], FAMILIES[name].inputs
    with torch.no_grad():
        host.time_steps.values.copy_(torch.linspace(0.4, 1.7, host.time_steps.num_steps))
        if wrapping_of(host).form == "whole":
            host.time_steps.values.fill_(1.0)
    assert_plain_loading_gives(host, tmp_path, answer(host, inputs), inputs)


@every_family
def test_load_model_restores_it(name: str, tmp_path: Path) -> None:
    family, (host, expected) = FAMILIES[name], deeper(name)
    save_model(host, tmp_path)
    loaded = load_model(tmp_path, host=family.bare())
    assert wrapping_of(loaded).form == family.form
    assert loaded.time_steps.grid == host.time_steps.grid
    assert equal(answer(loaded, family.inputs), expected)
