"""Small hosts for the tests of wrapping: the kinds that the library promises to wrap, each with a batch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from copies import copied
from taulearn import wrap
from taulearn._calls import call

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install 'taulearn[huggingface]'")

VOCABULARY = 40


class Block(nn.Module):
    """A pre-activation residual block with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: Its name in the test's id.
        make: A fresh model, of the same weights each time.
        inputs: Its example inputs.
        blocks: Names of its blocks.
        lists: Names of the lists that hold them.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[], Any]
    blocks: tuple[str, ...]
    lists: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    def wrapped(self, **options: Any) -> Any:
        return wrapped_host(self.name, **options)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return build


def tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def evaluated(model: nn.Module, inputs: Any) -> Tensor:
    """The output in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        output = tensor(call(model, inputs))
    model.train(training)
    return output


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, 6), generator=torch.Generator().manual_seed(1))


def images(size: int, channels: int = 1) -> Callable[[], Tensor]:
    return lambda: torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def features() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


def sequences() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *(Block(6) for _ in range(4)), nn.Linear(6, 2))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(8), enable_nested_tensor=False)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.1,
    )
    return transformers.ViTForImageClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config)


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=1, **options
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[3, 2], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def numbered(prefix: str, numbers: range = range(4)) -> tuple[str, ...]:
    return tuple(f"{prefix}.{i}" for i in numbers)


STAGES = "resnet.encoder.stages"
HOSTS = [
    Host("sequential", seeded(sequential), features, ("1", "2", "3", "4"), ("",)),
    Host("encoder", seeded(encoder), sequences, numbered("layers"), ("layers",)),
    Host("vit", seeded(vit), images(8), numbered("vit.layers"), ("vit.layers",)),
    Host("bert", seeded(bert), tokens, numbered("bert.encoder.layer"), ("bert.encoder.layer",)),
    Host("gpt2", seeded(gpt2), tokens, numbered("transformer.h"), ("transformer.h",)),
    Host("llama", seeded(llama), tokens, numbered("model.layers"), ("model.layers",)),
    Host(
        "resnet",
        seeded(resnet),
        images(16),
        (*numbered(f"{STAGES}.0.layers", range(3)), f"{STAGES}.1.layers.1"),
        (f"{STAGES}.0.layers", f"{STAGES}.1.layers"),
    ),
]
BY_NAME = {str(host): host for host in HOSTS}


@copied
def wrapped_host(name: str, **options: Any) -> Any:
    return wrap(BY_NAME[name].make(), example_inputs=BY_NAME[name].inputs(), **options)


LANGUAGE = [BY_NAME["gpt2"], BY_NAME["llama"]]
PRETRAINED = HOSTS[2:]
every_host = pytest.mark.parametrize("host", HOSTS, ids=str)
every_pretrained_host = pytest.mark.parametrize("host", PRETRAINED, ids=str)
