"""Cost of time steps in an existing model, of a deletion, and what deleting half of the blocks saves.

(a) a wrapped model against the bare one, nothing pruned, every step 1: a training step and a forward pass
(b) a forward pass of a wrapped ViT-like model after half of its blocks are deleted, against before
(c) ``prune`` of a model of 100 million parameters with Adam: seconds, and memory at its peak over that before

Both models of (a) and (b) take turns in one process; given are the ratio of the shortest times and the median of the
ratios of neighbouring turns; "noise" is a bare model against a copy of itself. With one thread the processor's time is
taken, which other processes disturb less than that of the clock. ``python benchmarks/wrapping.py [--seconds 20]``.

The process keeps its memory. glibc gives the top of its heap back to the system when a step ends, and of two models
that take turns only the larger one, which reaches the top, pays for taking it anew at each step; alone in a process the
bare one pays as much. ``--give-back`` leaves that as it is.
"""

import argparse
import copy
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from taulearn import parameter_groups, prune, wrap

BATCHES = (1, 32)
OVERHEAD, HALF, SECONDS, MEMORY = 1.03, 0.55, 1.0, 0.05


class ConvolutionalBlock(nn.Module):
    """x + W2 relu(norm(W1 relu(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class ResNet(nn.Module):
    """A pre-activation ResNet of one stage."""

    side = 32

    def __init__(self, width: int = 64, blocks: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(ConvolutionalBlock(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ResNet34(nn.Module):
    """ResNet-34 (He et al., 2016) as transformers builds it: 13 of its 16 blocks keep the shape of their input."""

    side = 64

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        widths, depths = [64, 128, 256, 512], [3, 4, 6, 3]
        config = ResNetConfig(layer_type="basic", depths=depths, hidden_sizes=widths, num_labels=10)
        self.model = ResNetForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


class ViT(nn.Module):
    """The encoder of a vision transformer, of torch's own layers."""

    side = 32

    def __init__(self, width: int = 192, blocks: int = 12, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, blocks, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(y).mean(1))


def images(batch: int, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def training(model: nn.Module, batch: int, side: int = 32) -> Callable[[], None]:
    """One step of SGD with momentum."""
    x, z = images(batch, side), torch.arange(batch) % 10
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), z).backward()
        optimizer.step()

    return run


def inference(model: nn.Module, batch: int, side: int = 32) -> Callable[[], None]:
    x = images(batch, side)
    model.eval()

    @torch.inference_mode()
    def run() -> None:
        model(x)

    return run


def compare(first: Callable[[], None], second: Callable[[], None], seconds: float) -> tuple[float, float, float]:
    """Shortest milliseconds of the second; shortest first over shortest second; median of the ratios of neighbours."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[], []]
    for run in (first, second) * 3:
        run()
    gc.disable()
    began = now()
    while now() - began < seconds or len(times[0]) < 20:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for i in order:
            start = now()
            (first, second)[i]()
            times[i].append(now() - start)
    gc.enable()
    shortest = [min(each) for each in times]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return 1e3 * shortest[1], shortest[0] / shortest[1], statistics.median(ratios)


def row(*cells: object) -> None:
    widths = (34, 6, 9, 13, 13, 9)
    print("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


def measure_overhead(seconds: float) -> None:
    row("wrapped over bare", "batch", "bare ms", "shortest", "median", f"bar {OVERHEAD}")
    for make in (ViT, ResNet, ResNet34):
        for batch in BATCHES:
            for kind in (training, inference):
                torch.manual_seed(0)
                bare = make()
                wrapped = wrap(copy.deepcopy(bare), example_inputs=images(1, make.side))
                for name, model in (("noise", copy.deepcopy(bare)), (kind.__name__, wrapped)):
                    ms, shortest, median = compare(kind(model, batch, make.side), kind(bare, batch, make.side), seconds)
                    verdict = "" if name == "noise" else "met" if median <= OVERHEAD else "missed"
                    row(f"{make.__name__}, {name}", batch, f"{ms:.2f}", f"{shortest:.3f}", f"{median:.3f}", verdict)


def measure_half(seconds: float) -> None:
    row("half of the blocks over all", "batch", "all ms", "shortest", "median", f"bar {HALF}")
    for make in (ViT, ResNet):
        for batch in BATCHES:
            whole = wrap(make(), example_inputs=images(1))
            half = copy.deepcopy(whole)
            prune(half, keep=range(0, 12, 2))
            ms, shortest, median = compare(inference(half, batch), inference(whole, batch), seconds)
            verdict = "met" if median <= HALF else "missed"
            row(f"{make.__name__}, inference", batch, f"{ms:.2f}", f"{shortest:.3f}", f"{median:.3f}", verdict)


def keep_memory() -> None:
    """Let glibc keep the memory that it once took; elsewhere nothing happens."""
    trim_threshold, most_mapped = -1, -4
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(most_mapped, 0)


def resident() -> int:
    """Bytes of memory in use, and a new start for the peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def large_deletion() -> None:
    """In a process of its own, for its memory."""
    model = ViT(width=768, blocks=14, patch=8)
    model = wrap(model, example_inputs=images(1))
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-6))
    training_step = training(model, 1)
    training_step()
    optimizer.step()
    before = resident()
    start = time.perf_counter()
    report = prune(model, keep=range(0, 14, 2), optimizer=optimizer)
    seconds = time.perf_counter() - start
    extra = (status("VmHWM") - before) / before
    parameters = report.parameters_before
    print(f"\nprune of {parameters:,} parameters with Adam, {report.layers_before} -> {report.layers_after} blocks:")
    print(f"  {seconds:.3f} s (bar {SECONDS}), peak memory {100 * extra:+.2f} % (bar +{100 * MEMORY:.0f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="per comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--give-back", action="store_true", help="let glibc give memory back after each step")
    parser.add_argument("--large", action="store_true", help="the deletion of (c) alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.large:
        large_deletion()
        return
    if not options.give_back:
        keep_memory()
    print(f"torch {torch.__version__}, {options.threads} thread(s), {platform.machine()}, {os.cpu_count()} cores\n")
    measure_overhead(options.seconds)
    print()
    measure_half(options.seconds)
    subprocess.run([sys.executable, __file__, "--large", "--threads", str(options.threads)], check=True)


if __name__ == "__main__":
    main()
