"""A 12-block vision transformer, pruned while it trains, against other ways to a network as fast.

    python examples/prune_a_transformer.py --out transformer

trains a small pre-norm ViT on Fashion-MNIST (patches of 7 x 7), and others in other ways, see _comparison.py, and
writes transformer/table.md and transformer/record.json; 9 networks a seed, about 20 minutes on two cores with
``--seeds 1``. ``--quick`` takes some seconds. For a GPU: ``--device cuda --width 192 --patch 4 --epochs 60
--workers 1``.
"""

import functools
from typing import Any

import torch
from _comparison import Study, parser, run
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm1(x)
        parts = [part(y).view(batch, tokens, self.heads, -1) for part in (self.query, self.key, self.value)]
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches with learned positions, blocks of one width, mean over the tokens, and a linear head."""

    def __init__(self, size: int, patch: int, width: int, blocks: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(y)).mean(1))


def channels(model: nn.Module) -> dict[str, Any]:
    """Heads stay as many and become narrower."""
    heads = {part: block.heads for block in model.blocks for part in (block.query, block.key, block.value)}
    return {
        "global_pruning": False,
        "num_heads": heads,
        "prune_head_dims": True,
        "prune_num_heads": False,
        "ignored_layers": [model.head],
        "unwrapped_parameters": [(model.positions, 2)],
    }


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--patch", type=int, default=7, help="edge of a patch")
    given = options.parse_args()
    quick = given.quick
    size, patch = (8, 4) if quick else (28, given.patch)
    study = Study(
        title="vision transformer",
        make=functools.partial(Transformer, size, patch, given.width or (16 if quick else 64)),
        blocks=given.blocks or (4 if quick else 12),
        targets=tuple(given.targets or ((2,) if quick else (6, 3))),
        data="digits" if quick else given.data,
        samples=given.samples,
        epochs=given.epochs or (3 if quick else 5),
        batch_size=32 if quick else 128,
        optimizer=adamw,
        lr=1e-3,
        tau_lr=5e-3,
        weight_decay=0.05,
        units="displacement",
        pruning={"by": 0.4, "criterion": "contribution"},
        channels=channels,
        device=given.device,
    )
    run(study, seeds=given.seeds, workers=given.workers, out=given.out)


if __name__ == "__main__":
    main()
