"""The Maxwell problem: seconds per full-batch step of steepest descent, compiled and eager, and finite elements.

Steps: the eager loop is the one an expert writes, torch modules with ``SteepestDescent`` (gradient by ``backward``,
trials without gradient); the compiled one is what ``fit`` does. Both take the same steps on the same 12,000 samples, in
turn, a few at a time. ``fit`` is timed with its record, too.

Finite elements: unknowns, errors, seconds and memory on the meshes of the paper, and the order that they show.

``python benchmarks/maxwell_step.py [--steps 40] [--skip-fem | --skip-steps]``
"""

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

NETWORKS = (("resnet", 6, 50), ("fractional", 6, 50), ("resnet", 2, 50), ("fractional", 2, 50), ("resnet", 5, 10))
MESHES = range(4, 32, 3)
TURN = 5


def build(kind: str, layers: int, width: int) -> nn.Module:
    from taulearn.nn import fractional_dnn, resnet

    torch.manual_seed(0)
    make = {"resnet": resnet, "fractional": fractional_dnn}[kind]
    return make(7, width, 3, layers, activation="smooth_relu", init=1.0)


def eager_loop(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """The loop an expert writes; returns the seconds of one step."""
    from taulearn.functional import half_mse_loss
    from taulearn.optim import SteepestDescent, register_projection

    optimizer = SteepestDescent(network.parameters())
    register_projection(optimizer, network)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = half_mse_loss(network(inputs), targets)
        loss.backward()
        return loss

    @torch.no_grad()
    def value() -> torch.Tensor:
        return half_mse_loss(network(inputs), targets)

    def step() -> float:
        began = time.perf_counter()
        optimizer.step(closure, value)
        return time.perf_counter() - began

    return step


def compiled_loop(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], float]:
    """The steps that fit takes, without record and progress."""
    from taulearn.functional import half_mse_loss
    from taulearn.optim import SteepestDescent
    from taulearn.training.batches import TensorBatches
    from taulearn.training.objective import Objective, StepOptions
    from taulearn.training.step import Engine

    optimizer = SteepestDescent(network.parameters())
    objective = Objective(network, half_mse_loss, ())
    batches = TensorBatches(inputs, targets, len(inputs), 0)
    engine = Engine(objective, optimizer, batches, StepOptions(), compiled=True)

    def step() -> float:
        began = time.perf_counter()
        for _ in engine.epoch(0, 0, 0):
            pass
        return time.perf_counter() - began

    return step


def fit_loop(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, steps: int) -> float:
    """Least seconds of a step of fit, all that belongs to it included, once it is compiled."""
    import taulearn
    from taulearn.functional import half_mse_loss
    from taulearn.optim import SteepestDescent

    times = [time.perf_counter()]
    taulearn.fit(
        network,
        (inputs, targets),
        loss=half_mse_loss,
        optimizer=SteepestDescent(network.parameters()),
        epochs=steps + TURN,
        batch_size=len(inputs),
        compile="always",
        progress=False,
        callbacks=[lambda _: times.append(time.perf_counter())],
    )
    return float(np.diff(times)[TURN:].min())


def time_steps(steps: int) -> None:
    import taulearn

    inputs, targets = taulearn.data.load("maxwell")
    print(f"\nfull-batch steepest descent, {len(inputs):,} samples; milliseconds per step, the least of {steps}")
    print(f"{'network':18}{'eager':>9}{'compiled':>10}{'fit':>9}{'compiled / eager':>18}{'compiling, s':>14}")
    for kind, layers, width in NETWORKS:
        eager = eager_loop(build(kind, layers, width), inputs, targets)
        compiled = compiled_loop(build(kind, layers, width), inputs, targets)
        began = time.perf_counter()
        for _ in range(TURN):
            compiled()
        warm_up = time.perf_counter() - began
        for _ in range(TURN):
            eager()  # the same steps as the other loop, so that both search as long
        seconds: dict[Callable[[], float], list[float]] = {eager: [], compiled: []}
        for _ in range(-(-steps // TURN)):
            for loop, values in seconds.items():
                values += [loop() for _ in range(TURN)]
        a, b = (min(values) for values in seconds.values())
        c = fit_loop(build(kind, layers, width), inputs, targets, steps)
        print(
            f"{f'{kind} {layers}-{width}':18}{1e3 * a:9.1f}{1e3 * b:10.1f}{1e3 * c:9.1f}{b / a:18.2f}{warm_up:14.1f}",
            flush=True,
        )


def time_fem() -> None:
    from taulearn import fem

    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("\nbest approximation of the Maxwell solution in the lowest order Nedelec space, unit cube")
    print(
        f"{'n':>3}{'h':>9}{'unknowns':>10}{'L2 error':>11}{'H(curl) error':>15}{'seconds':>9}{'MB':>7}{'estimate':>10}"
    )
    found = []
    for n in MESHES:
        each = fem.best_approximation_error(n)
        found.append(each)
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024
        print(
            f"{n:3}{each.h:9.4f}{each.dofs:10,}{each.l2:11.3e}{each.hcurl:15.3e}{each.seconds:9.2f}{memory:7.0f}"
            f"{fem.estimated_memory(n) / 2**20:10.0f}",
            flush=True,
        )
    h = np.log([each.h for each in found])
    for norm in ("l2", "hcurl"):
        slope = np.polyfit(h, np.log([getattr(each, norm) for each in found]), 1)[0]
        print(f"order in {norm}: {slope:.3f}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=40, help="timed steps of each loop")
    arguments.add_argument("--skip-fem", action="store_true")
    arguments.add_argument("--skip-steps", action="store_true")
    options = arguments.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if not options.skip_steps:
        time_steps(options.steps)
    if not options.skip_fem:
        time_fem()


if __name__ == "__main__":
    main()
