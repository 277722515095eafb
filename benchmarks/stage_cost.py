"""Price of a stage cost: a training step with the loss at every depth against one without; and what early exit saves.

(a) ResNet-v2 of 27 blocks (depth 56), images 28 x 28, batch 100: plain steps
(b) the papers' network, 6 layers of width 100, batch 100: plain steps, and fused compiled ones
(c) early exit at confidence 0.9 on MNIST after a short training with stage cost: milliseconds per sample of the test
    data against the whole network, and both accuracies

Both sides of a ratio are timed in turn, in one process. ``python benchmarks/stage_cost.py [--repeats 10] [--threads 2]
[--skip-compiled] [--skip-exit]``; the data lie where ``taulearn train --data mnist`` looks for them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taulearn
from taulearn.diagnostics import depth_statistics, early_exit
from taulearn.nn import TimeVariableNetwork, resnet, resnet_v2
from taulearn.penalties import Penalty, StageCost
from taulearn.training.fast.fused import FusedSGD
from taulearn.training.objective import Objective, StepOptions
from taulearn.training.step import PlainStep

BATCH = 100
CALIBRATION = 500
WEIGHT = 0.1
TARGETS = {"resnet-v2, 27 blocks": 1.25, "6 x 100": 1.6}


def interleaved(steps: Mapping[str, Callable[[], object]], repeats: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds per call of each, taken in turn, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(calls):
                step()
            if repeat:
                taken[name].append(1e3 * (time.perf_counter() - began) / calls)
    return taken


def report(title: str, taken: Mapping[str, list[float]], target: float | None = None) -> None:
    base = next(iter(taken.values()))
    print(f"\n{title}")
    for name, times in taken.items():
        ratios = f"{min(times) / min(base):.3f} of the minima, {statistics.median(times) / statistics.median(base):.3f}"
        print(f"    {name:<24} min {min(times):9.3f} ms  median {statistics.median(times):9.3f} ms  ratio {ratios}")
    if target is not None:
        print(f"    target: at most {target}")


def penalties(stage: bool) -> list[Penalty]:
    return [StageCost(WEIGHT, cross_entropy)] if stage else []


def plain(network: TimeVariableNetwork, x: Tensor, z: Tensor, *, stage: bool) -> Callable[[], object]:
    network.train()
    step = PlainStep(
        Objective(network, cross_entropy, penalties(stage)),
        torch.optim.SGD(network.parameters(), lr=1e-3),
        StepOptions(),
    )
    return lambda: step(x, z)


def fused(network: TimeVariableNetwork, x: Tensor, z: Tensor, *, stage: bool) -> Callable[[], object]:
    """Six steps in one compiled call."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    objective = Objective(network, cross_entropy, penalties(stage))
    step = FusedSGD(objective, optimizer, 6, (x[:BATCH], z[:BATCH]), PlainStep(objective, optimizer, StepOptions()))
    return lambda: step(x, z)


def steps(repeats: int, *, compiled: bool) -> None:
    sides = {"without stage cost": False, "with stage cost": True}
    x, z = torch.rand(6 * BATCH, 1, 28, 28), torch.randint(10, (6 * BATCH,))
    deep = {
        name: plain(resnet_v2((9, 9, 9), 10, 1), x[:BATCH], z[:BATCH], stage=stage) for name, stage in sides.items()
    }
    title = "resnet-v2, 27 blocks"
    report(f"{title}, eager step", interleaved(deep, repeats, 1), TARGETS[title])
    small = {name: plain(resnet(784, 100, 10, 6), x[:BATCH], z[:BATCH], stage=stage) for name, stage in sides.items()}
    report("6 x 100, eager step", interleaved(small, 3 * repeats, 50), TARGETS["6 x 100"])
    if compiled:
        small = {name: fused(resnet(784, 100, 10, 6), x, z, stage=stage) for name, stage in sides.items()}
        report("6 x 100, six fused compiled steps", interleaved(small, 3 * repeats, 10), TARGETS["6 x 100"])


def exits(repeats: int) -> None:
    train, test = (taulearn.data.load("mnist", split) for split in ("train", "test"))
    networks = {
        "resnet-v2, 12 blocks": (lambda: resnet_v2((4, 4, 4), 10, 1, (8, 16, 32), stem_stride=2), 2, 0.1),
        "16 x 100": (lambda: resnet(784, 100, 10, 16, init=1.0, horizon=16.0), 3, 0.02),
    }
    for title, (make, epochs, lr) in networks.items():
        torch.manual_seed(0)
        network = make()
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(train.inputs) // BATCH + 1)
        taulearn.fit(
            network,
            train,
            loss=cross_entropy,
            optimizer=optimizer,
            scheduler=cycle,
            epochs=epochs,
            batch_size=BATCH,
            penalties=penalties(stage=True),
            progress=False,
            compile="never",
        )
        network.eval()
        own = depth_statistics(network, train.inputs[:CALIBRATION])

        @torch.no_grad()
        def whole(network: nn.Module = network) -> list[Tensor]:
            return [network(x) for x in test.inputs.split(1000)]

        def early(network: TimeVariableNetwork = network, own: Any = own) -> list[Tensor]:
            return [network.predict(x, 0.9, statistics=own).outputs for x in test.inputs.split(1000)]

        taken = interleaved({"whole network": whole, "early exit at 0.9": early}, repeats, 1)
        per_sample = {name: [t / len(test.inputs) for t in times] for name, times in taken.items()}
        report(f"{title}: per sample of the test data", per_sample)
        table = early_exit(network, test.inputs, test.targets, (0.9, 1.0), calibration=train.inputs[:CALIBRATION])
        depth, (stopped, all_of_it) = float(table.depth[0]), table.accuracy.tolist()
        print(f"    accuracy {stopped:.4f} at mean depth {depth:.2f}, {all_of_it:.4f} with the whole network")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=10, help="rounds; the cheap ones get three times as many")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments.add_argument("--skip-compiled", action="store_true", help="leave out what takes a minute to compile")
    arguments.add_argument("--skip-exit", action="store_true", help="leave out early exit, which needs MNIST")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    steps(options.repeats, compiled=not options.skip_compiled)
    if not options.skip_exit:
        exits(max(2, options.repeats // 2))


if __name__ == "__main__":
    main()
