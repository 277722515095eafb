"""Cost of time steps in an existing model, of a deletion, and what deleting half of the blocks saves.

(a) a wrapped model against the bare one, nothing pruned, every step 1, in both forms: a training step and a forward
    pass
(b) the blocks' own time in a forward pass after half of them are deleted, against before
(c) ``wrap`` of a Llama of 12 layers and width 384, with the probe
(d) ``prune`` of a model of 100 million parameters with Adam: seconds, and memory at its peak over that before

Both models of (a) and (b) take turns in one process; given are the ratio of the shortest times, and the median of the
ratios of neighbouring turns with its 95 % interval; "noise" is a bare model against a copy of itself. With one thread
the processor's time is taken, which other processes disturb less than that of the clock. ``python
benchmarks/wrapping.py [--seconds 20] [--models ViT] [--batches 1]``.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from taulearn import parameter_groups, prune, wrap

BATCHES = (1, 32)
OVERHEAD, HALF, SECONDS, MEMORY, WRAP = 1.02, 0.52, 1.0, 0.05, 2.0


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

    def __init__(self, width: int = 64, blocks: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(ConvolutionalBlock(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ViT(nn.Module):
    """A vision transformer as transformers builds it."""

    def __init__(self, width: int = 192, blocks: int = 12, patch: int = 4) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        config = ViTConfig(num_hidden_layers=blocks, image_size=32, patch_size=patch, num_labels=10, **sizes)
        self.model = ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


class Llama(nn.Module):
    """A Llama as transformers builds it, that reads the pixels of an image as 192 tokens."""

    def __init__(self, width: int = 192, blocks: int = 12) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 64}
        config = LlamaConfig(vocab_size=256, num_hidden_layers=blocks, use_cache=False, **sizes)
        self.model = LlamaForCausalLM(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :, ::4, ::4].flatten(1).sigmoid().mul(255).long()
        return self.model(tokens, logits_to_keep=1).logits[:, 0, :10]


MODELS: dict[str, type[nn.Module]] = {"ViT": ViT, "Llama": Llama, "ResNet": ResNet}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def training(model: nn.Module, batch: int) -> Callable[[], None]:
    """One step of SGD with momentum, on the model's device; it is done when the function returns."""
    device = next(model.parameters()).device
    x, z = images(batch).to(device), torch.arange(batch, device=device) % 10
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), z).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def inference(model: nn.Module, batch: int) -> Callable[[], None]:
    x = images(batch)
    model.eval()

    @torch.inference_mode()
    def run() -> None:
        model(x)

    return run


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of one of these models, as a Sequential or a list."""
    inner = next(each for name, each in model.named_modules() if name.endswith(("blocks", "layers", "layer")))
    return list(inner)


def blocks_alone(model: nn.Module, batch: int) -> Callable[[], None]:
    """A forward pass through the blocks alone, on what they are given in the model."""
    seen: list[tuple[nn.Module, tuple[object, ...], dict[str, object]]] = []
    blocks = blocks_of(model.eval())
    hooks = [
        block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((m, args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    with torch.inference_mode():
        model(images(batch))
    for hook in hooks:
        hook.remove()

    @torch.inference_mode()
    def run() -> None:
        for block, args, kwargs in seen:
            block(*args, **kwargs)

    return run


class Ratio(NamedTuple):
    """How long the first of two takes over the second."""

    ms: float  # of the second, the shortest
    shortest: float
    median: float
    low: float  # of the median's 95 % interval
    high: float


def compare(first: Callable[[], None], second: Callable[[], None], seconds: float) -> Ratio:
    """Let two take turns; the interval of the median is that of the binomial distribution of its rank."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    now = time.process_time if alone else time.perf_counter
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
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    number, spread = len(ratios), round(0.98 * len(ratios) ** 0.5)
    low, high = ratios[max(0, number // 2 - spread)], ratios[min(number - 1, number // 2 + spread)]
    return Ratio(1e3 * shortest[1], shortest[0] / shortest[1], statistics.median(ratios), low, high)


def row(*cells: object) -> None:
    widths = (34, 6, 9, 9, 8, 16, 9)
    print("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


def line(name: str, batch: int, ratio: Ratio, bar: float) -> None:
    verdict = "" if name.endswith("noise") else "met" if ratio.median <= bar else "missed"
    numbers = f"{ratio.ms:.2f}", f"{ratio.shortest:.3f}", f"{ratio.median:.3f}", f"{ratio.low:.3f} - {ratio.high:.3f}"
    row(name, batch, *numbers, verdict)


def measure_overhead(models: Sequence[type[nn.Module]], batches: Sequence[int], seconds: float) -> None:
    row("wrapped over bare", "batch", "bare ms", "shortest", "median", "95 %", f"bar {OVERHEAD}")
    for make in models:
        for batch in batches:
            for kind in (training, inference):
                torch.manual_seed(0)
                bare = make()
                others = {"noise": copy.deepcopy(bare)}
                for form in ("branches", "whole"):
                    others[f"{kind.__name__}, {form}"] = wrap(copy.deepcopy(bare), example_inputs=images(1), form=form)
                for name, model in others.items():
                    ratio = compare(kind(model, batch), kind(bare, batch), seconds)
                    line(f"{make.__name__}, {name}", batch, ratio, OVERHEAD)


def measure_half(models: Sequence[type[nn.Module]], batches: Sequence[int], seconds: float) -> None:
    row("half of the blocks over all", "batch", "all ms", "shortest", "median", "95 %", f"bar {HALF}")
    for make in models:
        for batch in batches:
            whole = wrap(make(), example_inputs=images(1))
            half = copy.deepcopy(whole)
            prune(half, keep=range(0, 12, 2))
            ratio = compare(blocks_alone(half, batch), blocks_alone(whole, batch), seconds)
            line(f"{make.__name__}, inference", batch, ratio, HALF)


def measure_wrap() -> None:
    taken = []
    for _ in range(5):
        model = Llama(width=384)
        start = time.process_time()
        wrap(model, example_inputs=images(1))
        taken.append(time.process_time() - start)
    verdict = "met" if min(taken) <= WRAP else "missed"
    print(f"\nwrap of a Llama of 12 layers, width 384: {min(taken):.2f} s of the processor (bar {WRAP}) {verdict}")


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
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--give-back", action="store_true", help="let glibc give memory back after each step")
    parser.add_argument("--large", action="store_true", help="the deletion of (d) alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.large:
        large_deletion()
        return
    if not options.give_back:
        keep_memory()
    print(f"torch {torch.__version__}, {options.threads} thread(s), {platform.machine()}, {os.cpu_count()} cores\n")
    chosen = [MODELS[name] for name in options.models], options.batches, options.seconds
    measure_overhead(*chosen)
    print()
    measure_half(*chosen)
    measure_wrap()
    subprocess.run([sys.executable, __file__, "--large", "--threads", str(options.threads)], check=True)


if __name__ == "__main__":
    main()
