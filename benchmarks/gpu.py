"""What one card does, in one table; sized for less than 8 minutes.

    python benchmarks/gpu.py                          on a machine with a CUDA device
    python benchmarks/gpu.py --device cpu --quick     small sizes, to try the script

(a) seconds per epoch of ``fit`` with the papers' network 784-100x6-10 on Fashion-MNIST, by compile mode
(b) a training step of ViT and Llama, wrapped over bare (``benchmarks/wrapping.py``, random weights, nothing pruned)
(c) the tests marked ``cuda``
(d) a training of the papers' network of 200 epochs, its steps captured as CUDA graphs, and 64 seeds of it at once
    (``--engine vmap`` of the sweeps)

Where Fashion-MNIST is not there, (a) and (d) take random images of its shapes, and the table says so. Compilation is
left out of both.
"""

import argparse
import copy
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sweep_throughput import members_of, seconds
from torch import nn

import taulearn
from taulearn.data import Generated, Samples
from wrapping import Llama, ViT, compare, images, training

Row = tuple[str, str, str]
"""What was measured, the figure, its unit."""


def data_set(quick: bool) -> str:
    """The name of Fashion-MNIST, or of random images of its shapes."""
    try:
        if not quick:
            taulearn.data.load("fashion-mnist", download=False)
            return "fashion-mnist"
    except FileNotFoundError:
        pass
    samples = {"train": 400, "test": 100} if quick else {"train": 60_000, "test": 10_000}

    def generate(split: str) -> Samples:
        torch.manual_seed(len(split))
        number = samples[split]
        return Samples(torch.randint(256, (number, 1, 28, 28), dtype=torch.uint8), torch.arange(number) % 10)

    shape = (1, 28, 28)
    taulearn.data.register(
        Generated(name="random images", kind="images", samples=samples, shape=shape, generate=generate, classes=10)
    )
    return "random images"


def compile_modes(data: str, device: str, quick: bool) -> Iterator[Row]:
    """(a): epochs of ``fit``."""
    inputs, targets = (each.to(device) for each in taulearn.data.load(data, as_uint8=True))
    for mode in ("never",) if quick else ("never", "always"):
        torch.manual_seed(0)
        model = taulearn.nn.resnet(784, 100, 10, 6).to(device)
        history = taulearn.fit(
            model,
            (inputs, targets),
            loss=nn.functional.cross_entropy,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            epochs=4,
            batch_size=100,
            compile=mode,
            progress=False,
        )
        yield f"fit, compile={mode!r}, {data}", f"{min(history.epochs['seconds'][2:]):.3f}", "s an epoch"


def wrapped(device: str, quick: bool) -> Iterator[Row]:
    """(b): the overhead of time steps."""
    sizes = {"width": 64, "blocks": 2} if quick else {}
    for make in (ViT, Llama):
        for batch in (1,) if quick else (1, 32):
            torch.manual_seed(0)
            bare = make(**sizes).to(device)
            for form in ("branches", "whole"):
                model = taulearn.wrap(copy.deepcopy(bare), example_inputs=images(1).to(device), form=form)
                ratio = compare(training(model, batch), training(bare, batch), 0.1 if quick else 4.0)
                figure = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
                yield f"{make.__name__}, {form}, batch {batch}: step over {ratio.ms:.2f} ms bare", figure, "ratio"


def tests(quick: bool) -> Iterator[Row]:
    """(c): in a process of their own."""
    root = Path(__file__).parents[1]
    chosen = ["tests/test_devices.py"] if quick else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda and not long", *chosen]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired:
        yield "tests marked cuda", "not done in 150 s", "tests"
        return
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(line, file=sys.stderr)
    counts = re.findall(r"\d+ (?:passed|failed|errors?)\b", done.stdout.rstrip().rpartition("\n")[2])
    yield "tests marked cuda", ", ".join(counts) or "none: no card", "tests"


def trainings(data: str, device: str, quick: bool) -> Iterator[Row]:
    """(d): whole trainings."""
    epochs, seeds = (2, 2) if quick else (200, 64)
    settings = {"data": data, "device": device, "compile": "never" if quick else "always"}
    for number in (1, seeds):
        if not quick:
            seconds(members_of(number, 2, **settings))  # compiles
        taken = seconds(members_of(number, epochs, **settings))
        name = "one training" if number == 1 else f"{number} seeds at once"
        yield f"{name}, {epochs} epochs, {data}", f"{taken:.1f}", "s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing about speed")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: take --device cpu --quick")
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    began = time.perf_counter()
    data = data_set(options.quick)
    rows = [("what", "figure", "unit")]
    parts = (
        compile_modes(data, options.device, options.quick),
        wrapped(options.device, options.quick),
        tests(options.quick),
        trainings(data, options.device, options.quick),
    )
    for part in parts:
        for row in part:
            rows.append(row)
            print(f"  {time.perf_counter() - began:4.0f} s: {' '.join(row)}", file=sys.stderr, flush=True)
    print(f"{name}, torch {torch.__version__}\n")
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if number == 0:
            print("|---|---|---|")


if __name__ == "__main__":
    main()
