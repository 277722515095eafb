"""Models of transformers: configurations follow, caches work, and plain loading loads the same model or fails."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from taulearn import load_model, prune, save_model, unwrap, wrap
from taulearn.wrapping import anneal_to_one
from taulearn.wrapping.configurations import refused_modules
from wrapping.hosts import (
    BY_NAME,
    LANGUAGE,
    STAGES,
    Host,
    evaluated,
    every_pretrained_host,
    gpt2,
    llama,
    resnet,
    tokens,
    transformers,
    vit,
)

COUNTS = {"vit": "num_hidden_layers", "bert": "num_hidden_layers", "gpt2": "n_layer", "llama": "num_hidden_layers"}


def generated(model: Any, *, use_cache: bool) -> torch.Tensor:
    model.eval()
    found: torch.Tensor = model.generate(
        tokens(), max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    return found


@pytest.mark.parametrize("host", LANGUAGE, ids=str)
@pytest.mark.parametrize("keep", [[1, 3], [0, 2, 3], [3]], ids=str)
@pytest.mark.parametrize("init", [1.0, 0.6])
def test_generation_with_and_without_the_cache_gives_the_same_tokens(host: Host, keep: list[int], init: float) -> None:
    model = host.wrapped(init=init)
    full = generated(model, use_cache=False)
    assert torch.equal(full, generated(model, use_cache=True))
    prune(model, keep=keep)
    pruned = generated(model, use_cache=True)
    assert pruned.shape == (2, 18)
    assert torch.equal(pruned, generated(model, use_cache=False))


@every_pretrained_host
def test_configurations_count_what_is_left(host: Host) -> None:
    model = host.make()
    given = model.config
    before = given.to_dict()
    wrap(model, example_inputs=host.inputs())
    prune(model, keep=[1, 3])
    if str(host) == "resnet":
        assert model.config.depths == [1, 2]
    else:
        assert getattr(model.config, COUNTS[str(host)]) == 2
    assert given.to_dict() == before  # others may have been built from it
    assert all(vars(m).get("config", model.config) is model.config for m in model.modules())
    numbers = [m.layer_idx for m in model.modules() if isinstance(vars(m).get("layer_idx"), int)]
    assert sorted(set(numbers)) in ([], [0, 1])


@every_pretrained_host
def test_pruned_and_annealed_it_is_saved_for_plain_loading(host: Host, tmp_path: Path) -> None:
    model = host.wrapped(init=[1.0, 0.7, 0.001, 1.3], form="whole")
    assert [d.layer for d in prune(model).deleted] == [2]
    anneal_to_one(model, 0.5)
    torch.testing.assert_close(model.time_steps.tau.tolist(), [1.0, 0.85, 1.15])
    with pytest.raises(ValueError, match=r"steps must .*got \[1.0, 0.85, 1.15\]"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    anneal_to_one(model, 1.0)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(evaluated(loaded, host.inputs()), evaluated(model, host.inputs()))
    assert "time_steps" in dict(model.named_children())
    _again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(unwrap(model).save_pretrained).__name__ == "method"


@every_pretrained_host
def test_steps_other_than_one_are_restored_by_load_model(host: Host, tmp_path: Path) -> None:
    model = host.wrapped(init=[0.9, 0.7, 0.001, 1.3])
    prune(model)
    save_model(model, tmp_path)
    for fresh in (host.make(), host.wrapped(init=0.5, horizon=model.time_steps.horizon)):
        loaded = load_model(tmp_path, host=fresh)
        assert loaded is fresh
        assert torch.equal(evaluated(loaded, host.inputs()), evaluated(model, host.inputs()))
        assert loaded.config.to_dict() == model.config.to_dict()
        assert loaded.time_steps.origin == (0, 1, 3)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_inner_models_are_guarded_as_well(tmp_path: Path) -> None:
    model = BY_NAME["gpt2"].wrapped(init=0.5, form="whole")
    with pytest.raises(ValueError, match="steps must all be 1"):
        model.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="steps must all be 1"):
        copy.deepcopy(model).save_pretrained(tmp_path)
    prune(model, keep=[0, 1])
    anneal_to_one(model, 1.0)
    model.transformer.save_pretrained(tmp_path)
    loaded = transformers.GPT2Model.from_pretrained(tmp_path).eval()
    model.eval()
    assert torch.equal(loaded(tokens()).last_hidden_state, model.transformer(tokens()).last_hidden_state)


def test_a_state_dict_given_to_save_pretrained_loses_the_steps(tmp_path: Path) -> None:
    model = BY_NAME["gpt2"].wrapped()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_layers_that_depend_on_their_number_are_exact_in_memory_and_not_saved_for_plain_loading(tmp_path: Path) -> None:
    model = wrap(gpt2(scale_attn_by_inverse_layer_idx=True), example_inputs=tokens())
    with torch.no_grad():
        model.time_steps.values[1] = 0.0
    before = evaluated(model, tokens())
    prune(model)
    torch.testing.assert_close(evaluated(model, tokens()), before, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"must be what its configuration describes .*h.1.attn.scaling is"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_its_configuration_cannot_leave_empty(tmp_path: Path) -> None:
    model = BY_NAME["resnet"].wrapped()
    prune(model, keep=[3])
    with pytest.raises(ValueError, match=r"configuration describes for save_pretrained, got .*absent"):
        model.save_pretrained(tmp_path)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, host=resnet())
    assert torch.equal(evaluated(loaded, BY_NAME["resnet"].inputs()), evaluated(model, BY_NAME["resnet"].inputs()))


def test_lists_with_one_entry_per_layer_follow(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=2,
    )
    kinds = list(config.layer_types)
    assert len(set(kinds)) == 2
    model = wrap(transformers.Qwen2ForCausalLM(config), example_inputs=tokens()).eval()
    with torch.no_grad():
        model.time_steps.values[[0, 2]] = 0.0
    before = evaluated(model, tokens())
    prune(model)
    torch.testing.assert_close(evaluated(model, tokens()), before, rtol=0, atol=1e-6)
    assert list(model.config.layer_types) == [kinds[1], kinds[3]]
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(evaluated(loaded, tokens()), evaluated(model, tokens()))


def test_encoder_and_decoder_are_counted_apart(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=8,
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    model = wrap(transformers.BartForConditionalGeneration(config), example_inputs=inputs)
    prune(model, keep=[0, 2, 4])
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 1)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(evaluated(loaded, inputs), evaluated(model, inputs))


def test_heads_of_transformers_are_no_blocks() -> None:
    reasons = refused_modules(BY_NAME["bert"].make())
    assert "cls.predictions.transform" in reasons
    assert "bert.encoder.layer.0" not in reasons
    assert f"{STAGES}.0.layers.0" not in refused_modules(resnet())
    assert f"{STAGES}.0.layers.0.layer.1" in refused_modules(resnet())


def test_the_cache_of_a_pruned_model_has_a_layer_per_block() -> None:
    model = wrap(llama(), example_inputs=tokens())
    prune(model, keep=[2, 3])
    cache = model(tokens(), use_cache=True).past_key_values
    assert len(cache.layers) == 2
    assert cache.get_seq_length() == 6


def test_two_models_of_one_configuration_do_not_disturb_each_other() -> None:
    first = vit()
    second = type(first)(first.config)
    wrap(first, example_inputs=BY_NAME["vit"].inputs())
    prune(first, keep=[0])
    assert (first.config.num_hidden_layers, second.config.num_hidden_layers) == (1, 4)
