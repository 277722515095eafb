"""CIFAR-10: a ResNet of 27 blocks pruned to 15 and 9 while it trains, grown from 9 to 15, and others, for equal epochs.

    python examples/cifar10_resnet.py --out cifar10 --data cifar10

Three stages of nine pre-activation blocks, 16, 32 and 64 wide: the stage-cost paper's 54, halved. A convolution leads
from each stage to the next and is no block. ``--data`` may be a file or a folder of one's own. See _comparison.py for
the ways; cifar10/table.md and cifar10/record.json are written. Many hours on a CPU: a stem of ``--stride 2`` takes a
quarter of the time, ``--samples`` takes fewer images.
"""

import functools
import itertools

from _comparison import WAYS, Study, parser, run
from prune_a_resnet import SETTINGS, Block
from torch import Tensor, nn


class StagedResNet(nn.Module):
    """A stem, stages of blocks with a strided convolution between them, mean over the pixels, and a linear head."""

    def __init__(self, widths: tuple[int, ...], colours: int, stride: int, blocks: int) -> None:
        super().__init__()
        if blocks % len(widths):
            raise ValueError(f"blocks must be a multiple of the {len(widths)} stages, got {blocks}")
        self.stem = nn.Conv2d(colours, widths[0], 3, stride, padding=1, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(blocks // len(widths)))) for width in widths
        )
        self.between = nn.ModuleList(
            nn.Conv2d(a, b, 3, 2, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stages[0](self.stem(x))
        for convolution, stage in zip(self.between, self.stages[1:], strict=True):
            y = stage(convolution(y))
        return self.head(self.norm(y).relu().mean((2, 3)))


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(data="cifar10")
    options.add_argument("--stride", type=int, default=1, help="of the stem")
    given = options.parse_args()
    quick = given.quick
    shape = ((4, 8), 1, 1) if quick else ((16, 32, 64), 3, given.stride)
    study = Study(
        title="pre-activation ResNet, CIFAR-10" + (f", stem of stride {shape[2]}" if shape[2] > 1 else ""),
        make=functools.partial(StagedResNet, *shape),
        blocks=given.blocks or (8 if quick else 27),
        targets=tuple(given.targets or ((6, 4) if quick else (15, 9))),
        data="digits" if quick else given.data,
        samples=given.samples,
        epochs=given.epochs or 5,
        batch_size=32 if quick else 128,
        device=given.device,
        **SETTINGS,
        ways=(*WAYS, "small, taught", "grown"),
        names="stages.*.*",
    )
    run(study, seeds=given.seeds, workers=given.workers, out=given.out)


if __name__ == "__main__":
    main()
