"""Stored against reversible memory of Momentum and Verlet: seconds, peak memory, error of the gradients.

Forward and backward of a network of width 100 on a batch of 4,000 in float32, tanh, horizon 1. Seconds are minima over
repetitions that take the two in turn. Peak memory is the growth of the resident set above the process that has built
the network, its gradients in place, each case in a process of its own, in which glibc gives freed blocks back
(MALLOC_MMAP_THRESHOLD_), so that its fragmentation is not counted. The error is that of all gradients together.

``python benchmarks/reversible_memory.py [--layers 16 64 256] [--repetitions 5]``
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from taulearn.nn import Momentum, TimeVariableNetwork, Verlet, resnet

WIDTH, BATCH = 100, 4000
SCHEMES = {"momentum": Momentum, "verlet": Verlet}
MEMORIES = ("stored", "reversible")
ALLOCATION = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


def network(scheme: str, memory: str, layers: int) -> TimeVariableNetwork:
    torch.manual_seed(0)
    return resnet(WIDTH, WIDTH, 10, layers, scheme=SCHEMES[scheme](memory=memory), activation="tanh")


def batch(size: int = BATCH) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(2))


def train(model: TimeVariableNetwork, x: Tensor) -> Tensor:
    """Forward and backward; all gradients in one vector."""
    model.zero_grad(set_to_none=False)
    model(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def resident(line: str) -> float:
    """VmRSS, the resident set, or VmHWM, its peak, in MB (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) / 1024


def peak_memory(scheme: str, memory: str, layers: int) -> float:
    model, x = network(scheme, memory, layers), batch()
    train(model, x[:2])  # the gradients are there now
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    model.zero_grad(set_to_none=False)
    model(x).square().mean().backward()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(peak_memory(*given.peak, given.layers[0]))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    head = ("layers", "s stored", "s reversible", "MB stored", "MB reversible", "error")
    print("scheme    " + "".join(f"{name:>14}" for name in head))
    for scheme in SCHEMES:
        for layers in given.layers:
            models = {memory: network(scheme, memory, layers) for memory in MEMORIES}
            best, found, x = dict.fromkeys(MEMORIES, float("inf")), {}, batch()
            for _ in range(given.repetitions):
                for memory, model in models.items():
                    began = time.perf_counter()
                    found[memory] = train(model, x)
                    best[memory] = min(best[memory], time.perf_counter() - began)
            error = float((found["reversible"] - found["stored"]).norm() / found["stored"].norm())
            command = [sys.executable, __file__, "--layers", str(layers), "--peak", scheme]
            mb = {memory: float(subprocess.check_output([*command, memory], env=ALLOCATION)) for memory in MEMORIES}
            print(
                f"{scheme:10}{layers:14}{best['stored']:14.3f}{best['reversible']:14.3f}"
                f"{mb['stored']:14.0f}{mb['reversible']:14.0f}{error:14.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
