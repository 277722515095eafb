"""Families of transformers without one block: saved as what plain loading loads, or refused and said so beforehand."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from taulearn import prune, unwrap, wrap
from taulearn.diagnostics import summary
from taulearn.wrapping import wrapping_of
from wrapping.hosts import transformers as t

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
CAUSAL = TEXT | {"num_key_value_heads": 1}
EXPERTS = CAUSAL | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
SIDES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))}


def both_ids() -> dict[str, Tensor]:
    return ids() | {"decoder_input_ids": ids()["input_ids"]}


def pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": drawn(2, 3, size, size)}


def patches(height: int, width: int) -> dict[str, Tensor]:
    return {"hidden_states": drawn(height * width, 1176), "grid_thw": torch.tensor([[1, height, width]])}


def series() -> dict[str, Tensor]:
    return {
        "past_values": drawn(2, 14),
        "past_time_features": drawn(2, 14, 1),
        "past_observed_mask": torch.ones(2, 14),
        "future_values": drawn(2, 4),
        "future_time_features": drawn(2, 4, 1),
    }


def qwen_vision() -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=5,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=16,
        window_size=112,
        fullatt_block_indexes=[1, 4],
        initializer_range=0.3,
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def qwen3_vision() -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(
        depth=4,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=16,
        patch_size=14,
        num_position_embeddings=64,
        deepstack_visual_indexes=[1, 2],
        initializer_range=0.3,
    )
    return Qwen3VLVisionModel(config)


def model(name: str, config: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(t, name)(getattr(t, config)(**options))


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bert": (model("BertForMaskedLM", "BertConfig", **TEXT), ids()),
    "hiera": (  # a stage that must not be empty
        model(
            "HieraModel",
            "HieraConfig",
            embed_dim=8,
            image_size=[32, 32],
            patch_stride=[4, 4],
            depths=[3, 3],
            num_heads=[1, 2],
            num_query_pool=1,
            query_stride=[2, 2],
            masked_unit_size=[4, 4],
            initializer_range=0.3,
        ),
        pixels(),
    ),
    "distilbert": (
        model(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=64,
            dim=16,
            n_layers=3,
            n_heads=2,
            hidden_dim=24,
            initializer_range=0.3,
        ),
        ids(),
    ),
    "xlnet": (
        model(
            "XLNetLMHeadModel",
            "XLNetConfig",
            vocab_size=64,
            d_model=16,
            n_layer=3,
            n_head=2,
            d_inner=24,
            initializer_range=0.3,
        ),
        ids() | {"use_mems": False},
    ),
    "ctrl": (
        model(
            "CTRLLMHeadModel",
            "CTRLConfig",
            vocab_size=64,
            n_positions=64,
            n_embd=16,
            dff=24,
            n_layer=3,
            n_head=2,
            initializer_range=0.3,
        ),
        ids() | {"use_cache": False},
    ),
    "modernbert": (
        model(
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **(TEXT | {"num_hidden_layers": 7}),
            local_attention=4,
            global_attn_every_n_layers=3,
            cls_token_id=0,
            sep_token_id=2,
        ),
        ids(),
    ),
    "mixture, dense in turn": (
        model(
            "Qwen2MoeForCausalLM", "Qwen2MoeConfig", **EXPERTS, decoder_sparse_step=2, shared_expert_intermediate_size=8
        ),
        ids(),
    ),
    "mixture, dense by number": (
        model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **EXPERTS, mlp_only_layers=[1, 3], head_dim=8),
        ids(),
    ),
    "mixture, dense first": (
        model(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **(CAUSAL | {"num_key_value_heads": 2}),
            first_k_dense_replace=2,
            moe_intermediate_size=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        ),
        ids(),
    ),
    "llama4": (
        model(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **(CAUSAL | {"num_hidden_layers": 5}),
            head_dim=8,
            intermediate_size_mlp=24,
            num_local_experts=2,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
        ),
        ids(),
    ),
    "led": (
        model(
            "LEDForConditionalGeneration",
            "LEDConfig",
            **SIDES,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
            attention_window=[8, 4, 8],
        ),
        both_ids(),
    ),
    "bart": (
        model("BartForConditionalGeneration", "BartConfig", **SIDES, max_position_embeddings=64),
        both_ids(),
    ),
    "t5": (
        model(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        both_ids(),
    ),
    "longformer": (model("LongformerForMaskedLM", "LongformerConfig", **TEXT, attention_window=[8, 4, 4, 8]), ids()),
    "beit": (model("BeitForImageClassification", "BeitConfig", **IMAGE), pixels()),
    "beit, shared bias": (
        model("BeitForImageClassification", "BeitConfig", **IMAGE, use_shared_relative_position_bias=True),
        pixels(),
    ),
    "data2vec": (model("Data2VecVisionForImageClassification", "Data2VecVisionConfig", **IMAGE), pixels()),
    "dinov2": (model("Dinov2ForImageClassification", "Dinov2Config", **IMAGE), pixels()),
    "dinov2 backbone": (model("Dinov2Backbone", "Dinov2Config", **IMAGE, out_indices=[2, 4]), pixels()),
    "beit backbone": (
        model("BeitBackbone", "BeitConfig", **IMAGE, out_features=["stage1", "stage2", "stage4"], add_fpn=False),
        pixels(),
    ),
    "dinov3": (model("DINOv3ViTModel", "DINOv3ViTConfig", **IMAGE), pixels()),
    "swin": (
        model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[2, 4],
            num_heads=[2, 4],
            window_size=4,
            initializer_range=0.3,
        ),
        pixels(),
    ),
    "swinv2": (
        model(
            "Swinv2ForImageClassification",
            "Swinv2Config",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[2, 4],
            num_heads=[2, 4],
            window_size=4,
            initializer_range=0.3,
        ),
        pixels(),
    ),
    "masked autoencoder": (
        model(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **IMAGE,
            decoder_num_hidden_layers=3,
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        ),
        pixels() | {"noise": drawn(2, 16)},
    ),
    "segment anything": (
        model(
            "SamVisionModel",
            "SamVisionConfig",
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            mlp_dim=24,
            output_channels=8,
            image_size=64,
            patch_size=8,
            window_size=4,
            global_attn_indexes=[1, 3],
            initializer_range=0.3,
        ),
        pixels(64),
    ),
    "vitdet": (
        model(
            "VitDetModel",
            "VitDetConfig",
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=32,
            pretrain_image_size=32,
            patch_size=4,
            window_size=4,
            window_block_indices=[0, 2],
            residual_block_indices=[1],
            initializer_range=0.3,
        ),
        pixels(),
    ),
    "albert": (model("AlbertModel", "AlbertConfig", **TEXT, num_hidden_groups=4, embedding_size=8), ids()),
    "big bird": (model("BigBirdForMaskedLM", "BigBirdConfig", **TEXT, block_size=4, num_random_blocks=1), ids()),
    "informer": (
        model(
            "InformerModel",
            "InformerConfig",
            prediction_length=4,
            context_length=12,
            lags_sequence=[1, 2],
            num_time_features=1,
            d_model=8,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            init_std=0.3,
        ),
        series(),
    ),
    "gpt2, scaled by number": (
        model(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=64,
            n_embd=16,
            n_layer=3,
            n_head=2,
            n_positions=32,
            scale_attn_by_inverse_layer_idx=True,
            initializer_range=0.3,
        ),
        ids() | {"use_cache": False},
    ),
    "qwen vision, small image": (qwen_vision, patches(8, 8)),
    "qwen vision, large image": (qwen_vision, patches(16, 16)),
    "qwen3 vision": (qwen3_vision, patches(8, 8)),
    "gpt neo": (
        model(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=64,
            hidden_size=16,
            num_layers=4,
            num_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 2]],
            window_size=4,
            initializer_range=0.3,
        ),
        ids(),
    ),
    "gemma3": (
        model(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **(CAUSAL | {"num_hidden_layers": 7}),
            head_dim=8,
            sliding_window=4,
        ),
        ids(),
    ),
    "cohere2": (model("Cohere2ForCausalLM", "Cohere2Config", **CAUSAL, sliding_window=4), ids()),
    "smollm3": (model("SmolLM3ForCausalLM", "SmolLM3Config", **CAUSAL), ids()),
    "esm": (model("EsmForMaskedLM", "EsmConfig", **TEXT, mask_token_id=4, position_embedding_type="rotary"), ids()),
    "lfm2": (model("Lfm2ForCausalLM", "Lfm2Config", **CAUSAL, full_attn_idxs=[1, 3]), ids()),
    "bamba": (
        model(
            "BambaForCausalLM",
            "BambaConfig",
            **CAUSAL,
            attn_layer_indices=[1, 3],
            mamba_n_heads=4,
            mamba_d_state=8,
            mamba_d_head=8,
            mamba_n_groups=1,
        ),
        ids(),
    ),
}
SHORT = ("distilbert", "dinov2 backbone", "mixture, dense by number", "vitdet", "gpt2, scaled by number")


def made(name: str) -> Any:
    torch.manual_seed(0)
    built = FAMILIES[name][0]().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def answer(built: Any, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [v for v in tree_leaves(built.eval()(**inputs)) if isinstance(v, Tensor)]


def saved_and_loaded(built: Any, folder: Path) -> Any:
    """The model as plain loading loads it, or None if it cannot be saved; nothing is left behind then."""
    refused = ""
    try:
        built.save_pretrained(folder)
    except ValueError as error:
        refused = str(error)
    assert folder.exists() == (not refused)
    assert "load_model" in refused or not refused
    return None if refused else type(built).from_pretrained(folder)


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_without_one_block_a_family_is_saved_as_what_it_is_or_refused_as_was_said(name: str) -> None:
    inputs = FAMILIES[name][1]
    number = wrap(made(name), example_inputs=inputs).time_steps.num_steps
    for gone in range(number):
        built = wrap(made(name), example_inputs=inputs)
        wrapping = wrapping_of(built)
        assert wrapping is not None
        if gone in wrapping.fixed_layers():
            continue
        told = summary(built).not_saved
        with torch.no_grad():
            built.time_steps.values[gone] = 0.0
        before = answer(built, inputs)
        prune(built, keep=[l for l in range(number) if l != gone])
        expected = answer(built, inputs)
        torch.testing.assert_close(expected, before, rtol=0, atol=1e-3)
        for plain in (built, unwrap):
            with tempfile.TemporaryDirectory() as folder:
                model_now = plain(built) if plain is unwrap else built
                loaded = saved_and_loaded(model_now, Path(folder) / "model")
                assert (loaded is None) == (gone in told), f"{name} without block {gone}"
                if loaded is not None:
                    torch.testing.assert_close(answer(loaded, inputs), expected, rtol=0, atol=1e-5)


def test_list_of_a_stage_gets_shorter_though_one_member_must_stay() -> None:
    make, inputs = FAMILIES["hiera"]
    built = wrap(make().eval(), example_inputs=inputs)
    assert len(summary(built).must_stay) == 1
    assert not summary(built).not_saved


@pytest.mark.long
def test_detr_with_a_backbone_of_convolutions(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        sides = {k: v for k, v in SIDES.items() if k.endswith(("layers", "heads", "ffn_dim", "d_model"))}
        backbone = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], out_features=["stage2"])
        config = t.DetrConfig(
            **sides, num_queries=5, use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone
        )
        return t.DetrModel(config).eval()

    built = wrap(make(), example_inputs=pixels())
    wrapping = wrapping_of(built)
    assert wrapping is not None
    assert not summary(built).not_saved
    for name in ("backbone.model.encoder.stages.0.layers.1", "encoder.layers.0"):
        built = wrap(make(), example_inputs=pixels())
        prune(built, keep=[l for l, each in enumerate(wrapping.names) if each != name])
        assert built.backbone.model.channels == [16]
        loaded = saved_and_loaded(built, tmp_path / name)
        torch.testing.assert_close(answer(loaded, pixels()), answer(built, pixels()), rtol=0, atol=1e-5)
