"""Entries of configurations that speak of single layers, and their copies in modules, follow a deletion."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import prune, wrap
from taulearn.wrapping import wrapping_of
from wrapping.hosts import BY_NAME, VOCABULARY, evaluated, tokens, transformers as t
from wrapping.test_saved_families import FAMILIES, answer, made

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def without_the_third_layer(**entries: Any) -> dict[str, Any]:
    """What becomes of entries in the configuration of a BERT of five layers."""
    model = wrap(t.BertModel(t.BertConfig(**SIZES, **entries)), example_inputs=tokens())
    prune(model, keep=[0, 1, 3, 4])
    return {key: getattr(model.config, key) for key in entries}


def test_lists_of_layer_numbers_are_numbered_anew() -> None:
    assert without_the_third_layer(
        global_attn_indexes=[1, 4],
        mlp_only_layers=(0, 2),
        cross_attention_layers=[0, 1, 2, 3, 4],
        window_block_indices=[-1, 3, 1],
        full_attn_idxs=[-1],
        local_layer_ids=[2],
    ) == {
        "global_attn_indexes": [1, 3],
        "mlp_only_layers": (0,),
        "cross_attention_layers": [0, 1, 2, 3],
        "window_block_indices": [-1, 2, 1],
        "full_attn_idxs": [-1],
        "local_layer_ids": [],
    }


def test_lists_with_an_entry_per_layer_lose_that_of_the_layer() -> None:
    assert without_the_third_layer(
        layer_kinds=["a", "b", "c", "d", "e"],
        no_rope_layers=[1, 1, 0, 1, 1],
        attention_window=(2, 4, 6, 8, 10),
        heads_per_layer=[4, 3, 2, 1, 0],
        block_flags=[True, False, True, False, False],
    ) == {
        "layer_kinds": ["a", "b", "d", "e"],
        "no_rope_layers": [1, 1, 1, 1],
        "attention_window": (2, 4, 8, 10),
        "heads_per_layer": [4, 3, 1, 0],
        "block_flags": [True, False, False, False],
    }


def test_dictionaries_by_layer_number_are_numbered_anew() -> None:
    assert without_the_third_layer(options_per_layer={0: "a", 2: "b", 4: "c"}, block_options={"1": "a", "3": "b"}) == {
        "options_per_layer": {0: "a", 3: "c"},
        "block_options": {"1": "a", "2": "b"},
    }


def test_what_does_not_speak_of_these_layers_stays() -> None:
    entries: dict[str, Any] = {
        "image_shape": [5, 5, 5, 5, 5],
        "suppressed_token_ids": [1, 2, 4],
        "conv_stride_layers": [7, 9],
        "id2label": {0: "a", 2: "b", 4: "c"},
        "decoder_layer_kinds": ["a", "b", "c", "d", "e"],
    }
    assert without_the_third_layer(**entries) == entries


def test_several_layers_and_several_deletions() -> None:
    model = wrap(t.BertModel(t.BertConfig(**SIZES, mlp_only_layers=[0, 2, 4])), example_inputs=tokens())
    prune(model, keep=[1, 2, 3, 4])
    assert model.config.mlp_only_layers == [1, 3]
    prune(model, keep=[1, 3])
    assert model.config.mlp_only_layers == [0, 1]


def test_per_layer_config_of_transformers_follows() -> None:
    sizes = {1: {"intermediate_size": 8}, 3: {"intermediate_size": 24}}
    model = t.BertModel(t.BertConfig(**SIZES, per_layer_config=sizes, allow_global_per_layer_attribute_access=True))
    prune(wrap(model, example_inputs=tokens()), keep=[0, 2, 3, 4])
    config = model.config
    assert [each.intermediate_size for each in config.per_layer_config] == [16, 16, 24, 16]


def test_flags_of_kinds_of_layers_follow() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 1}
    config = t.Qwen2Config(**sizes, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    model = wrap(t.Qwen2Model(config), example_inputs=tokens())
    prune(model, keep=[0, 1, 3])
    assert model.has_sliding_layers is True
    prune(model, keep=[1, 2])
    assert model.has_sliding_layers is False


def test_states_that_a_backbone_returns_follow() -> None:
    name = "dinov2 backbone"  # of four layers, it returns the states after the second and after the last
    for gone, numbers in ((0, [1, 3]), (2, [2, 3]), (3, [2, 3])):
        model = wrap(made(name), example_inputs=FAMILIES[name][1])
        wrapping = wrapping_of(model)
        assert wrapping is not None
        if gone in wrapping.fixed_layers():  # of two blocks between states that are returned, one
            assert gone != 0
            continue
        with torch.no_grad():
            model.time_steps.values[gone] = 0.0
        before = answer(model, FAMILIES[name][1])
        prune(model, keep=[l for l in range(4) if l != gone])
        assert model.config.out_indices == numbers
        assert model.config.out_features == [f"stage{i}" for i in numbers]
        assert list(model.stage_names) == model.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
        assert len(model.channels) == 2
        torch.testing.assert_close(answer(model, FAMILIES[name][1]), before, rtol=0, atol=1e-5)


def test_numbers_in_modules_follow_where_only_other_inputs_would_show_it() -> None:
    small, large = (FAMILIES[f"qwen vision, {size} image"][1] for size in ("small", "large"))
    for gone in range(5):
        model = wrap(made("qwen vision, small image"), example_inputs=small)
        with torch.no_grad():
            model.time_steps.values[gone] = 0.0
        before = answer(model, large)
        prune(model, keep=[l for l in range(5) if l != gone])
        assert model.fullatt_block_indexes == model.config.fullatt_block_indexes
        torch.testing.assert_close(answer(model, large), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "owner"), [("distilbert", "distilbert.transformer"), ("ctrl", "transformer")])
def test_counts_in_modules_follow(name: str, owner: str) -> None:
    model = wrap(made(name), example_inputs=FAMILIES[name][1])
    prune(model, keep=[0, 2])
    held = vars(model.get_submodule(owner))
    assert [held[key] for key in ("n_layers", "n_layer", "num_layers") if key in held] == [2]


def test_the_other_side_of_a_model_stays_as_it_is() -> None:
    model = wrap(made("led"), example_inputs=FAMILIES["led"][1])
    prune(model, keep=[0, 1, 2, 4, 5])
    assert (model.config.encoder_layers, model.config.decoder_layers) == (3, 2)
    assert model.config.attention_window == [8, 4, 8]
    prune(model, keep=[1, 2, 3, 4])
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 2)
    assert model.config.attention_window == [4, 8]


def test_a_configuration_that_others_were_built_from_keeps_its_lists() -> None:
    config = t.BertConfig(**SIZES, mlp_only_layers=[1, 4])
    first, second = t.BertModel(config), t.BertModel(config)
    wrap(first, example_inputs=tokens())
    prune(first, keep=[0, 1, 2])
    assert first.config.mlp_only_layers == [1]
    assert second.config.mlp_only_layers == config.mlp_only_layers == [1, 4]


class Part(nn.Module):
    """A host of its own around a model of transformers, with a count that is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.num_layers = t.BertModel(t.BertConfig(**SIZES)), 5

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.bert(x).last_hidden_state
        return found


def test_counts_further_out_are_not_touched() -> None:
    model = wrap(Part(), example_inputs=tokens())
    prune(model, keep=[0, 1])
    assert (model.num_layers, model.bert.config.num_hidden_layers) == (5, 2)
    wrapping = wrapping_of(model)
    assert wrapping is not None
    assert not wrapping.fixed_layers()
    assert evaluated(BY_NAME["bert"].make(), tokens()).shape[:2] == model(tokens()).shape[:2]
