"""A deep convolutional ResNet, pruned while it trains, against other ways to a network as fast.

    python examples/prune_a_resnet.py --out resnet

trains a pre-activation ResNet of 12 blocks on Fashion-MNIST, and others in other ways, see _comparison.py, and writes
resnet/table.md and resnet/record.json; 27 networks, about 40 minutes on two cores. ``--quick`` takes some seconds. For
a GPU: ``--device cuda --width 64 --stride 1 --blocks 32 --targets 16 8 --epochs 30 --workers 1``.
"""

import functools
from typing import Any

import torch
from _comparison import Study, parser, run
from torch import Tensor, nn


class Block(nn.Module):
    """x + W2 relu(norm(W1 relu(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class ResNet(nn.Module):
    """A stem of two convolutions, blocks of one width, mean over the pixels, and a linear head."""

    def __init__(self, width: int, stride: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.blocks(self.stem(x))).relu()
        return self.head(y.mean((2, 3)))


def channels(model: nn.Module) -> dict[str, Any]:
    return {"global_pruning": False, "ignored_layers": [model.head]}


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9)


SETTINGS: dict[str, Any] = {
    "optimizer": sgd,
    "lr": 0.1,
    "tau_lr": 0.1,
    "weight_decay": 5e-4,
    "units": "displacement",
    "pruning": {"by": 0.4, "criterion": "contribution"},
    "channels": channels,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--stride", type=int, default=2, help="of both convolutions of the stem")
    given = options.parse_args()
    quick = given.quick
    study = Study(
        title="pre-activation ResNet",
        make=functools.partial(ResNet, given.width or (8 if quick else 32), 1 if quick else given.stride),
        blocks=given.blocks or (4 if quick else 12),
        targets=tuple(given.targets or ((2,) if quick else (6, 3))),
        data="digits" if quick else given.data,
        samples=given.samples,
        epochs=given.epochs or (3 if quick else 5),
        batch_size=32 if quick else 128,
        device=given.device,
        **SETTINGS,
    )
    run(study, seeds=given.seeds, workers=given.workers, out=given.out)


if __name__ == "__main__":
    main()
