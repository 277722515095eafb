"""The families of models that wrapping is tested on, and what each of them cannot do: tests/wrapping/test_families.py.

As a program it prints the table in docs/families.md:  cd tests && PYTHONPATH=. python -m wrapping.families
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wrapping.test_saved_families import CAUSAL, IMAGE, SIDES, TEXT, both_ids, drawn, ids, model, pixels

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@dataclass(frozen=True)
class Family:
    """One row. Reasons are parts of what taulearn says.

    Attributes:
        title: Its name on the page.
        make: A fresh small model of random weights.
        inputs: Its example inputs.
        ends: The modules of the first block into which steps fold; none: the form is "whole".
        whole: Why the form is "whole".
        stays: Numbers of blocks that cannot be deleted, with the reason.
        gone: Numbers of those that are deleted, together.
        config: Entries of the configuration afterwards.
        generates: Whether it generates text.
        unsaved: Why save_pretrained is refused afterwards.
        together: Why per="branch" is refused.
        alone: Patterns of the names of branches that cannot be deleted, with the reason.
        runs_on: Parts of a block, with weights of matrices, that stay when all of its branches are deleted one by one.
        double: Whether its kernels know double precision.
        fast: Whether torch's encoder may take its fast path.
        short: Whether ``make test`` has it.
    """

    title: str
    make: Callable[[], Any]
    inputs: Any
    ends: tuple[str, ...] = ()
    whole: str = ""
    stays: dict[int, str] = field(default_factory=dict)
    gone: tuple[int, ...] = (0, 2)
    config: dict[str, Any] = field(default_factory=dict)
    generates: bool = False
    unsaved: str = ""
    together: str = ""
    alone: dict[str, str] = field(default_factory=dict)
    runs_on: tuple[str, ...] = ()
    double: bool = True
    fast: bool = True
    short: bool = False

    @property
    def form(self) -> str:
        return "branches" if self.ends else "whole"

    @property
    def is_pretrained(self) -> bool:
        """Whether it is of transformers, whose models are called by keywords here."""
        return isinstance(self.inputs, dict)

    def bare(self) -> Any:
        """The model with what is constant at the start, such as the scales of normalisations, drawn as well."""
        torch.manual_seed(0)
        built = self.make().eval()
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return built


class Residual(nn.Module):
    """A residual block of a U-Net, as diffusion models have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        y = self.conv2(nn.functional.silu(self.norm2(y)))
        return x + y


class UNet(nn.Module):
    """Two residual blocks on the way down, at the bottom, and on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.down, self.bottom, self.up = (nn.ModuleList(Residual(c) for _ in range(2)) for c in (8, 16, 8))
        self.shrink, self.grow = nn.Conv2d(8, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.down:
            x = block(x)
        y = self.shrink(x)
        for block in self.bottom:
            y = block(y)
        x = self.merge(torch.cat([x, self.grow(y)], 1))
        for block in self.up:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def torch_layers(stack: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = getattr(nn, f"{stack}Layer")(16, 2, 24, dropout=0.1, batch_first=True, **options)
        more = {"enable_nested_tensor": False} if stack == "TransformerEncoder" else {}
        built: nn.Module = getattr(nn, stack)(layer, 4, norm=nn.LayerNorm(16), **more)
        return built

    return make


def decoder(title: str, prefix: str, kind: str = "ForCausalLM", **row: Any) -> Family:
    """A decoder of transformers; options of its configuration are in ``sizes``."""
    sizes = row.pop("sizes", CAUSAL)
    row = {"ends": ("self_attn.o_proj", "mlp.down_proj"), "config": {"num_hidden_layers": 2}, "generates": True} | row
    config = row.pop("config_class", f"{prefix}Config")
    return Family(title, model(f"{prefix}{kind}", config, **sizes), ids(), **row)


def encoder(title: str, prefix: str, **row: Any) -> Family:
    """A post-norm encoder of transformers."""
    row = {"whole": "zeroing test", "together": "zeroing test", "config": {"num_hidden_layers": 2}} | row
    sizes = row.pop("sizes", TEXT)
    return Family(title, model(f"{prefix}ForMaskedLM", f"{prefix}Config", **sizes), ids(), **row)


def vision(title: str, prefix: str, **row: Any) -> Family:
    row = {"ends": ("attention.o_proj", "mlp.fc2"), "config": {"num_hidden_layers": 2}} | row
    sizes = row.pop("sizes", IMAGE)
    return Family(title, model(f"{prefix}ForImageClassification", f"{prefix}Config", **sizes), pixels(), **row)


def sound(title: str, do_stable_layer_norm: bool = False, **row: Any) -> Family:
    sizes = {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    options = TEXT | sizes | positions | {"do_stable_layer_norm": do_stable_layer_norm}
    return Family(
        title, model("Wav2Vec2ForCTC", "Wav2Vec2Config", **options), {"input_values": drawn(2, 64)}, config=TWO, **row
    )


TWO = {"num_hidden_layers": 2}
BOTH_SIDES = SIDES | {"encoder_layers": 4, "decoder_layers": 4}
KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
LATE = TWO | {"layer_types": ["full_attention"] * 2}
GPT: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3}
TOWERS: dict[str, Any] = {
    "text_config": TEXT | {"projection_dim": 8},
    "vision_config": IMAGE | {"projection_dim": 8},
}
BOTH_TOWERS = {"text_config.num_hidden_layers": 2, "vision_config.num_hidden_layers": 2}
SEVERAL = "caches know layers of several kinds"
ONE = "one branch"

FAMILIES = {
    "gpt2": decoder(
        "GPT-2",
        "GPT2",
        "LMHeadModel",
        sizes=GPT | {"n_positions": 64, "n_embd": 16, "n_layer": 4, "n_head": 2},
        ends=("attn.c_proj", "mlp.c_proj"),
        config={"n_layer": 2},
    ),
    "llama": decoder("Llama", "Llama", short=True),
    "mistral": decoder("Mistral", "Mistral", sizes=CAUSAL | {"sliding_window": 4}),
    "qwen2": decoder("Qwen2", "Qwen2", config=LATE),
    "qwen2, two kinds": decoder(
        "Qwen2, layers of two kinds",
        "Qwen2",
        sizes=CAUSAL | KINDS | {"use_sliding_window": True},
        config=LATE,
        alone={"model.layers.0.self_attn": SEVERAL},
    ),
    "qwen3": decoder("Qwen3", "Qwen3", sizes=CAUSAL | {"head_dim": 8}, config=LATE),
    "gemma2": decoder(
        "Gemma 2",
        "Gemma2",
        sizes=CAUSAL | KINDS | {"head_dim": 8},
        ends=("post_attention_layernorm", "post_feedforward_layernorm"),
        config=LATE,
        runs_on=("self_attn", "mlp"),
    ),
    "gemma3": decoder(
        "Gemma 3",
        "Gemma3",
        config_class="Gemma3TextConfig",
        sizes=CAUSAL | KINDS | {"head_dim": 8},
        ends=("post_attention_layernorm", "post_feedforward_layernorm"),
        config=LATE,
        runs_on=("self_attn", "mlp"),
    ),
    "phi3": decoder("Phi-3", "Phi3"),
    "opt": decoder(
        "OPT",
        "OPT",
        sizes=TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
        ends=("self_attn.out_proj", "fc2"),
        runs_on=("fc1",),
    ),
    "gpt_neox": decoder("GPT-NeoX", "GPTNeoX", sizes=TEXT, ends=("attention.dense", "mlp.dense_4h_to_h")),
    "gpt_neox, in turn": decoder(
        "GPT-NeoX, not parallel",
        "GPTNeoX",
        sizes=TEXT | {"use_parallel_residual": False},
        ends=("attention.dense", "mlp.dense_4h_to_h"),
    ),
    "falcon": decoder("Falcon", "Falcon", sizes=TEXT, ends=("self_attention.dense", "mlp.dense_4h_to_h")),
    "mixtral": decoder(
        "Mixtral",
        "Mixtral",
        sizes=CAUSAL | {"num_local_experts": 4},
        ends=("self_attn.o_proj", "mlp.experts"),
        double=False,
    ),
    "mamba": decoder(
        "Mamba",
        "Mamba",
        sizes=GPT | {"hidden_size": 16, "num_hidden_layers": 4, "state_size": 4},
        ends=("mixer.out_proj",),
        together=ONE,
    ),
    "t5": Family(
        "T5",
        model(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=4,
            num_decoder_layers=4,
            num_heads=2,
            decoder_start_token_id=0,
            initializer_factor=1.0,
        ),
        both_ids(),
        ends=("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
        stays=dict.fromkeys((0, 4), "it uses the block's place or its other outputs"),
        gone=(1, 3, 5, 7),
        config={"num_layers": 2, "num_decoder_layers": 2},
        generates=True,
        alone=dict.fromkeys(("*.SelfAttention", "*.EncDecAttention"), "another output without it"),
    ),
    "bart": Family(
        "BART",
        model("BartForConditionalGeneration", "BartConfig", **BOTH_SIDES, max_position_embeddings=64),
        both_ids(),
        whole="zeroing test",
        gone=(0, 2, 4, 6),
        config={"encoder_layers": 2, "decoder_layers": 2},
        generates=True,
        together="zeroing test",
    ),
    "whisper": Family(
        "Whisper",
        model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **BOTH_SIDES,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=64,
        ),
        {"input_features": drawn(2, 8, 16), "decoder_input_ids": ids()["input_ids"]},
        ends=("self_attn.out_proj", "fc2"),
        gone=(0, 2, 4, 6),
        config={"encoder_layers": 2, "decoder_layers": 2},
        generates=True,
        runs_on=("fc1",),
    ),
    "bert": encoder("BERT", "Bert", short=True),
    "roberta": encoder("RoBERTa", "Roberta"),
    "distilbert": encoder(
        "DistilBERT",
        "DistilBert",
        sizes={"vocab_size": 64, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24, "initializer_range": 0.3},
        config={"n_layers": 2},
    ),
    "electra": encoder("ELECTRA", "Electra", sizes=TEXT | {"embedding_size": 8}),
    "modernbert": encoder(
        "ModernBERT",
        "ModernBert",
        sizes=TEXT
        | {"layer_types": ["full_attention", "sliding_attention"] * 2, "local_attention": 4}
        | {"cls_token_id": 0, "sep_token_id": 2},
        ends=("attn.Wo", "mlp.Wo"),
        whole="",
        together="",
        config=TWO | {"layer_types": ["sliding_attention"] * 2},
        unsaved="layers.0.attn_norm.weight",
        alone={"model.layers.0.attn": SEVERAL},
    ),
    "deberta_v2": encoder(
        "DeBERTa-v2",
        "DebertaV2",
        sizes=TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "vit": vision("ViT", "ViT", short=True),
    "deit": vision("DeiT", "DeiT"),
    "beit": vision("BEiT", "Beit", sizes=IMAGE | {"layer_scale_init_value": 0.5}),
    "dinov2": vision("DINOv2", "Dinov2", ends=("layer_scale1", "layer_scale2"), runs_on=("attention", "mlp")),
    "swin": vision(
        "Swin",
        "Swin",
        sizes={"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 4]}
        | {"window_size": 4, "initializer_range": 0.3},
        gone=(2, 3),
        config={"depths": [2, 2]},
    ),
    "swin_alone": vision(
        "Swin, one block of a pair",
        "Swin",
        sizes={"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 4]}
        | {"window_size": 4, "initializer_range": 0.3},
        gone=(2,),
        config={"depths": [2, 3]},
        unsaved="shift_size",
    ),
    "convnext": vision(
        "ConvNeXt",
        "ConvNext",
        sizes={"hidden_sizes": [8, 12], "depths": [3, 2], "num_stages": 2}
        | {"layer_scale_init_value": 0.5, "initializer_range": 0.3},
        ends=("pwconv2",),
        gone=(1, 4),
        config={"depths": [2, 1]},
        together=ONE,
    ),
    "resnet": vision(
        "ResNet",
        "ResNet",
        sizes={"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [3, 2], "layer_type": "basic"},
        ends=("layer.1.normalization",),
        gone=(1, 3),
        config={"depths": [2, 1]},
        together=ONE,
        short=True,
    ),
    "resnet, bottlenecks": vision(
        "ResNet, bottlenecks",
        "ResNet",
        sizes={"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [3, 2], "layer_type": "bottleneck"},
        ends=("layer.2.normalization",),
        config={"depths": [2, 1]},
        together=ONE,
    ),
    "clip": Family(
        "CLIP",
        model("CLIPModel", "CLIPConfig", **TOWERS, projection_dim=8),
        ids() | pixels(),
        ends=("self_attn.out_proj", "mlp.fc2"),
        gone=(0, 2, 4, 6),
        config=BOTH_TOWERS,
    ),
    "siglip": Family(
        "SigLIP",
        model("SiglipModel", "SiglipConfig", **TOWERS),
        ids() | pixels(),
        ends=("self_attn.out_proj", "mlp.fc2"),
        gone=(0, 2, 4, 6),
        config=BOTH_TOWERS,
    ),
    "wav2vec2": sound("wav2vec2", whole="zeroing test", together="zeroing test"),
    "wav2vec2, stable": sound(
        "wav2vec2, stable layer norm",
        do_stable_layer_norm=True,
        ends=("attention.out_proj", "feed_forward.output_dense"),
    ),
    "encoder": Family(
        "torch's encoder, norm_first",
        torch_layers("TransformerEncoder", norm_first=True),
        drawn(2, 5, 16),
        whole="fast path",
        together="fast path",
    ),
    "encoder, slow": Family(
        "torch's encoder, norm_first, fast path off",
        torch_layers("TransformerEncoder", norm_first=True),
        drawn(2, 5, 16),
        ends=("self_attn.out_proj", "linear2"),
        runs_on=("linear1",),
        fast=False,
    ),
    "encoder, post-norm": Family(
        "torch's encoder",
        torch_layers("TransformerEncoder"),
        drawn(2, 5, 16),
        whole="zeroing test",
        together="zeroing test",
        fast=False,
    ),
    "decoder": Family(
        "torch's decoder, norm_first",
        torch_layers("TransformerDecoder", norm_first=True),
        (drawn(2, 5, 16), drawn(2, 4, 16)),
        ends=("self_attn.out_proj", "multihead_attn.out_proj", "linear2"),
        runs_on=("linear1",),
    ),
    "decoder, post-norm": Family(
        "torch's decoder",
        torch_layers("TransformerDecoder"),
        (drawn(2, 5, 16), drawn(2, 4, 16)),
        whole="zeroing test",
        together="zeroing test",
    ),
    "unet": Family("a U-Net's residual blocks", UNet, drawn(2, 3, 8, 8), ends=("conv2",), gone=(0, 2, 4), together=ONE),
}


def table() -> str:
    """The table in docs/families.md."""
    columns = ("model", "steps", "deleted", "the configuration follows", "generates", "save_pretrained", 'per="branch"')
    rows = [columns, ("---",) * len(columns), *map(_row, FAMILIES.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(family: Family) -> tuple[str, ...]:
    config = (f"{key} = {value}" for key, value in family.config.items())
    return (
        family.title,
        f"fold into {_code(family.ends)}" if family.ends else f"whole ({family.whole})",
        f"any but blocks {_listed(family.stays)}" if family.stays else "any block",
        _code(config),
        "yes" if family.generates else "",
        ""
        if not family.is_pretrained
        else f"refused without {_listed(family.gone)}: {family.unsaved}"
        if family.unsaved
        else "yes",
        _branches(family),
    )


def _branches(family: Family) -> str:
    if family.together:
        return f"refused ({family.together})"
    lines = [f"{_code(family.runs_on)} {'runs' if len(family.runs_on) == 1 else 'run'} on"] if family.runs_on else []
    lines += [f"not {_code(family.alone)}"] if family.alone else []
    return "; ".join(["yes", *lines])


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    sys.stdout.write(table())
