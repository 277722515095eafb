"""Deep fractional networks against the residual network of the same size: seconds, peak memory, errors of fast memory.

Forward and backward of a network of width 100 on a batch of 100 in float32, with one gradient for every parameter.
Seconds are minima over repetitions that take the three networks in turn. Peak memory is the growth of the resident
set above the process that has built the network and run a small one, each case in a process of its own. Errors of fast
against exact memory, of the output and of the gradient of tau, in float64 (of the method) and float32 (with rounding).

``python benchmarks/fractional_memory.py [--layers 8 32 128 512 1024] [--repetitions 20]``
"""

import argparse
import gc
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from taulearn.nn import TimeVariableNetwork, fractional_dnn, resnet

WIDTH, BATCH = 100, 100
KINDS = ("residual", "exact", "fast")


def network(kind: str, layers: int, dtype: torch.dtype = torch.float32) -> TimeVariableNetwork:
    """The same weights and steps for every kind; the steps differ by a factor of up to three."""
    torch.manual_seed(0)
    if kind == "residual":
        model = resnet(WIDTH, WIDTH, 10, layers, dtype=dtype)
    else:
        model = fractional_dnn(WIDTH, WIDTH, 10, layers, memory=kind, dtype=dtype)
    with torch.no_grad():
        steps = torch.rand(layers, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
        model.time_steps.values.copy_(steps / steps.sum())
    return model


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def train(model: TimeVariableNetwork, x: Tensor) -> Tensor:
    """Forward and backward; the output."""
    model.zero_grad()
    output = model(x)
    output.square().mean().backward()
    return output.detach()


def seconds(layers: int, repetitions: int) -> dict[str, float]:
    models, x = {kind: network(kind, layers) for kind in KINDS}, batch()
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(repetitions + 1):
        for kind, model in models.items():
            gc.collect()
            began = time.perf_counter()
            train(model, x)
            best[kind] = min(best[kind], time.perf_counter() - began)
    return best


def resident(line: str) -> float:
    """VmRSS, the resident set, or VmHWM, its peak, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 1024


def peak_memory(kind: str, layers: int) -> float:
    """MB above the built network, measured in this process (Linux)."""
    train(network(kind, 40), batch())
    model, x = network(kind, layers), batch()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    train(model, x)
    return resident("VmHWM") - before


def in_a_process(kind: str, layers: int) -> float:
    command = [sys.executable, __file__, "--peak", kind, "--layers", str(layers)]
    return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3))


def errors(layers: int, dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors of output and tau gradient of fast memory."""
    outputs, gradients = [], []
    for kind in ("exact", "fast"):
        model = network(kind, layers, dtype)
        outputs.append(train(model, batch(dtype)).double())
        gradient = model.time_steps.values.grad
        assert gradient is not None
        gradients.append(gradient.double())
    return tuple(float((fast - exact).norm() / exact.norm()) for exact, fast in (outputs, gradients))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--repetitions", type=int, default=20, help="of each measurement of time")
    parser.add_argument("--skip-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(options.peak, options.layers[0]))
        return
    machine, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    print(f"{machine}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}")
    print("  N       ms: residual   exact    fast  exact/res fast/res  MB: res  exact   fast  exact/res fast/res")
    rows = {}
    for layers in options.layers:
        rows[layers] = s = seconds(layers, options.repetitions)
        ms = "".join(f"{1e3 * s[kind]:9.1f}" for kind in KINDS)
        line = f"{layers:5}  {ms:>30} {s['exact'] / s['residual']:9.2f} {s['fast'] / s['residual']:8.2f}"
        if not options.skip_memory:
            mb = {kind: in_a_process(kind, layers) for kind in KINDS}
            line += f" {mb['residual']:9.1f}{mb['exact']:7.1f}{mb['fast']:7.1f}"
            line += f" {mb['exact'] / max(mb['residual'], 1):9.2f} {mb['fast'] / max(mb['residual'], 1):8.2f}"
        print(line, flush=True)
    print("  N  errors of fast memory: output, tau gradient in float64; output, tau gradient in float32")
    for layers in options.layers:
        found = [*errors(layers, torch.float64), *errors(layers, torch.float32)]
        print(f"{layers:5}" + "".join(f"{error:12.1e}" for error in found), flush=True)
    if {512, 1024} <= rows.keys():
        growth = {kind: rows[1024][kind] / rows[512][kind] for kind in KINDS}
        print("growth of the time from 512 to 1024 layers: " + ", ".join(f"{k} {v:.2f}" for k, v in growth.items()))


if __name__ == "__main__":
    main()
