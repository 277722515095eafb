"""Epochs per second of the papers' residual network: one run with all cores, a sweep, many networks at once.

    python benchmarks/sweep_throughput.py [--rounds 3] [--members 16]
    python benchmarks/sweep_throughput.py --gpu          on a machine with a GPU: whole trainings, see below

The network is 784-100x6-10 with batches of 100, in compiled steps; an epoch is 600 steps on MNIST. What is compared
takes turns, and medians over the rounds count, because the machine may be doing other things. Compilation and the start
of processes are left out: a sweep pays for them once (the compiled code is kept on disk, and so shared).

With --gpu: seconds of a whole training of 200 epochs as CUDA graphs, of 64 of them at once, and of the suite
herberg2023 with ten seeds for every setting.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from taulearn.app.members import Member
from taulearn.app.run_members import run_members
from taulearn.experiments import TrainConfig
from taulearn.training import History
from taulearn_papers import herberg2023

WARM = 2
"""Epochs that do not count: the first one has the compilation in it."""


def rate(members: list[Member], folder: Path, *, at_once: bool = False, **options) -> float:
    """Epochs per second of all members together, once they are under way."""
    outcome = run_members(members, folder, **options)
    if outcome.failed:
        raise SystemExit(f"failed: {outcome.failed}")
    records = [History.load(member.folder(folder) / "history.safetensors") for member in members]
    seconds = [float(np.median(record.epochs["seconds"][1 + WARM :])) for record in records]
    # the seconds of networks trained at once are each one's share
    return 1.0 / float(np.mean(seconds)) if at_once else sum(1.0 / each for each in seconds)


def members_of(number: int, epochs: int, **settings) -> list[Member]:
    """So many of the papers' trainings on MNIST."""
    common = {"data": "mnist", "epochs": epochs, "compile": "always", "trace": "thinned", "checkpoint_every": 1000}
    return [Member("a", seed, TrainConfig(**{**common, **settings}, seed=seed)) for seed in range(number)]


def on_cpu(rounds: int, together: int, epochs: int) -> None:
    cores = os.cpu_count() or 1
    ways = {
        f"one run, {cores} threads": (members_of(1, epochs), {"engine": "serial", "threads": cores}),
        "one run, 1 thread": (members_of(1, epochs), {"engine": "serial", "threads": 1}),
        f"sweep, {cores} processes of 1 thread": (members_of(cores, epochs), {"engine": "processes", "workers": cores}),
        f"{together} networks at once, {cores} threads": (
            members_of(together, epochs),
            {"engine": "vmap", "threads": cores},
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, (members, options) in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                found = rate(members, Path(folder), at_once=options["engine"] == "vmap", **options)
            rates[name].append(found)
            print(f"  round {number + 1}, {name}: {found:.2f} epochs/s", flush=True)
    first = next(iter(rates.values()))
    print(f"{'':42}epochs/s  / one run  (median of the rounds, median of the ratios in each)")
    for name, found in rates.items():
        print(f"{name:<42}{np.median(found):8.2f}  {np.median(np.divide(found, first)):9.2f}")


def seconds(members: list[Member]) -> float:
    """Seconds of whole trainings, as many at once as go together."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        outcome = run_members(members, folder, engine="vmap")
        if outcome.failed:
            raise SystemExit(f"failed: {outcome.failed}")
        return time.perf_counter() - began


def on_gpu(epochs: int) -> None:
    print(torch.cuda.get_device_name())
    seconds(members_of(1, 2))  # compiles
    print(f"{'one training of ' + str(epochs) + ' epochs':<42}{seconds(members_of(1, epochs)):8.1f} s", flush=True)
    print(f"{'64 of them at once':<42}{seconds(members_of(64, epochs)):8.1f} s", flush=True)
    suite = [m for m in herberg2023.SUITE.members(False, 10) if m.config is not None]
    print(f"{'herberg2023, 10 seeds, ' + str(len(suite)) + ' trainings':<42}{seconds(suite):8.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if arguments.gpu:
        on_gpu(200)
    else:
        on_cpu(arguments.rounds, arguments.members, WARM + arguments.epochs)
