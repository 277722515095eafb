"""A shallow network that grows while it trains and is pruned again, at equal arithmetic and at equal seconds.

grown      2 layers, split until there are 6 (``taulearn.Refinement``), then pruned to 4 (``taulearn.Pruning``)
inserted   the same with new layers, which have step 0, in place of halves
deep       6 layers from the start
shallow    2 layers from the start
final      4 layers from the start, as many as the grown network ends with

    python examples/grow_and_prune.py run --out runs/grow
    python examples/grow_and_prune.py report --cells runs/grow --out page

The grown network trains for a given number of epochs. Its multiply-adds are counted, and the others of the same seed
get as many: the shallow network trains for more epochs. Processor seconds are recorded and decide nothing.
All ways have the same learning rates to choose from, by samples held out of the training, on a seed that is not
measured. Each cell (data, way, rate, seed) is a small JSON file; cells that are there are not trained again.
"""

import argparse
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cells import Cell, once, settle
from _growing_page import held_out, report
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from taulearn import Pruning, Refinement, data, fit, parameter_groups
from taulearn.functional import half_mse_loss
from taulearn.nn import fractional_dnn, resnet, resnet_v2
from taulearn.training import Diverged, EpochEnd

LAYERS = {"grown": 2, "deep": 6, "shallow": 2, "final": 4, "inserted": 2}
"""Layers at the start of each way."""
REFINING = {"grown": "split", "inserted": "insert"}
REFINED, GROWN_BY, PRUNED_BY = 0.4, 6, 0.7
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
FURTHER = {"deep": 1.75, "shallow": 1.0, "final": 1.5}
"""Arithmetic of the others over the grown network's: some take fewer seconds for it, and are to take as many."""
ROWS = 60
"""Most evaluations of a training, about."""


def dense_count(inputs: int, width: int, outputs: int, depth: int, memory: bool = False) -> int:
    """Multiply-adds of a sample in a fully connected network, and of a memory of all earlier states."""
    remembered = width * depth * (depth - 1) // 2 if memory else 0
    return inputs * width + (depth - 1) * width**2 + width * outputs + remembered


def convolutional_count(width: int, pixels: int, outputs: int, depth: int) -> int:
    """Multiply-adds of a sample: a convolution of one channel, two of 3 x 3 in each block, and the head."""
    return 9 * pixels * width + depth * 2 * 9 * pixels * width**2 + width * outputs


def multiply_adds(
    depths: Sequence[int], forward: Callable[[int], int], batch: int, looks: Collection[int] = ()
) -> NDArray[np.int64]:
    """Multiply-adds until the end of each iteration.

    An iteration costs three forward passes of its batch, as the backward pass costs two. Where an indicator looks at
    the batch it costs three further forward and backward passes.

    Args:
        depths: Number of layers in each iteration.
        forward: Multiply-adds of one sample by the number of layers.
        batch: tuple[Tensor, Tensor] per iteration.
        looks: Iterations, from 1, after which an indicator looked.

    Example:
        >>> multiply_adds([1, 1, 2], lambda depth: 10 * depth, 5, looks=[2]).tolist()
        [150, 750, 1050]
    """
    costs = [3 * batch * forward(depth) * (4 if i in looks else 1) for i, depth in enumerate(depths, 1)]
    return np.cumsum(costs, dtype=np.int64)


@dataclass(frozen=True)
class Problem:
    """A data set and the networks for it.

    Attributes:
        data: Its name.
        network: Said of the networks in the page.
        make: A network of so many layers.
        forward: Multiply-adds of one sample by the number of layers.
        loss: Trained on and measured.
        train: Training samples taken, in whole batches.
        held: Further ones that are held out, on which the rate is chosen.
        batch: tuple[Tensor, Tensor] per iteration.
        epochs: Of the grown network.
        seeds: Number of measured ones.
    """

    data: str
    network: str
    make: Callable[[int], nn.Module]
    forward: Callable[[int], int]
    loss: Callable[[Any, Any], Tensor]
    train: int
    held: int
    batch: int
    epochs: int
    seeds: int = 5

    def said(self) -> str:
        taken = f"{self.train} training samples in batches of {self.batch}, {self.held} held out"
        return f"{self.network}; {taken}; {self.epochs} epochs of the grown network."

    def samples(self) -> dict[str, tuple[Tensor, Tensor]]:
        inputs, targets = data.load(self.data)
        end = self.train + self.held
        train, held = (
            (inputs[: self.train], targets[: self.train]),
            (inputs[self.train : end], targets[self.train : end]),
        )
        test = data.load(self.data, "test")
        return {"train": train, "held": held, "test": (test.inputs[:2000], test.targets[:2000])}


def convolutional(depth: int, width: int, pixels: int) -> nn.Module:
    return resnet_v2(depth, 10, in_channels=1, widths=width, stem_stride=2 if pixels == 196 else 1)


def dense(depth: int, *, outputs: int, width: int) -> nn.Module:
    return resnet(2, width, outputs, depth, activation="tanh", init=1.0)


def fractional(depth: int, width: int) -> nn.Module:
    return fractional_dnn(7, width, 3, depth, gamma=0.5, activation="smooth_relu", init=1.0, memory_from=0)


def problems(quick: bool) -> list[Problem]:
    w, v, c, pixels, images = (4, 4, 2, 64, "digits") if quick else (20, 50, 8, 196, "fashion-mnist")
    toy, net = f"residual, width {w}, tanh", partial(dense, outputs=1, width=w)
    found = [
        Problem("peaks", toy, net, partial(dense_count, 2, w, 1), mse_loss, 8000, 1000, 200, 100),
        Problem(
            *("nested-spheres", "residual, width 2, tanh", partial(dense, outputs=2, width=2)),
            *(partial(dense_count, 2, 2, 2), cross_entropy, 8000, 1000, 200, 50),
        ),
        Problem(
            *("maxwell", f"fractional, gamma 1/2, width {v}, smoothed ReLU", partial(fractional, width=v)),
            *(partial(dense_count, 7, v, 3, memory=True), half_mse_loss, 10_000, 2000, 500, 60),
        ),
        Problem(
            *(images, f"resnet_v2, {c} channels, {pixels} pixels", partial(convolutional, width=c, pixels=pixels)),
            *(partial(convolutional_count, c, pixels, 10), cross_entropy, 5000, 1000, 100, 10, 1),
        ),
    ]
    return [replace(p, train=120, held=40, batch=20, epochs=4, seeds=2) for p in found] if quick else found


REMARKS = f"""Made by `python examples/grow_and_prune.py`, from `cells.jsonl` alone (`report --cells
docs/results/grow-and-prune --out docs/results/grow-and-prune`). Grown: {LAYERS["grown"]} layers; those with the largest
dual weighted residual are split, one after the other, until there are {GROWN_BY} after {REFINED:.0%} of the iterations;
then {LAYERS["final"]} of them stay, by sensitivity, after {PRUNED_BY:.0%}. Inserted: the same, with layers of step 0
where the loss is most sensitive to their step. The others have their layers from the start, and as many multiply-adds
as the grown network of the same seed: three forward passes an iteration, nine more for each look of the indicator. All
steps are 1 at the start, but for the inserted ones.

Adam at a constant rate, the same for weights and steps: for each way and data set the one of
{", ".join(map(str, RATES))} with the smallest loss on samples held out, with a seed that is not measured. A figure is
the median of the evaluations in the last twentieth of the arithmetic, or of the seconds, that the shorter of the two
trainings took, on at most 2,000 test samples; the tables have geometric means over the seeds. Seconds are those of one
thread, without evaluation, and decide nothing. Nested spheres: at width 20 every way is right on all after two epochs.

"Over grown's" is the loss over that of the grown network: above 1 the grown one is better. In brackets is the 95 %
t-interval of paired differences of logarithms. "Better" and "worse" are said where it does not hold 1."""


class Watch:
    """A callback of ``fit``: losses and processor seconds of some epochs; the evaluation's own seconds do not count."""

    def __init__(self, problem: Problem, part: tuple[Tensor, Tensor], every: int) -> None:
        self.problem, self.every = problem, every
        self.inputs, self.targets = part
        self.seconds, self.rows = 0.0, list[tuple[int, float, float, float]]()
        self.began = time.process_time()

    @torch.no_grad()
    def __call__(self, event: EpochEnd) -> None:
        self.seconds += time.process_time() - self.began
        if event.epoch % self.every == 0:
            event.model.eval()
            outputs = torch.cat([event.model(part) for part in self.inputs.split(500)])
            loss, right = float(self.problem.loss(outputs, self.targets)), math.nan
            if not self.targets.is_floating_point():
                right = float((outputs.argmax(1) == self.targets).float().mean())
            self.rows.append((event.iteration, self.seconds, loss, right))
            event.model.train()
        self.began = time.process_time()


def train(problem: Problem, way: str, seed: int, lr: float, epochs: int) -> Cell:
    """The figures of one training, on the test part, or on the samples held out with the seed of tuning."""
    parts = problem.samples()
    torch.manual_seed(seed)
    model = problem.make(LAYERS[way])
    watch = Watch(problem, parts["held" if seed == TUNING_SEED else "test"], max(1, epochs // ROWS))
    policies: dict[str, Any] = {}
    if way in REFINING:
        policies["refinement"] = Refinement(GROWN_BY, by=REFINING[way], until=REFINED)
        policies["pruning"] = Pruning(target_blocks=LAYERS["final"], by=PRUNED_BY)
    cell: Cell = {"data": problem.data, "way": way, "seed": seed, "lr": lr, "epochs": epochs}
    try:
        history = fit(
            model,
            parts["train"],
            loss=problem.loss,
            optimizer=torch.optim.Adam(parameter_groups(model, lr)),
            epochs=epochs,
            batch_size=problem.batch,
            seed=seed,
            callbacks=[watch],
            compile="never",
            progress=False,
            **policies,
        )
    except Diverged:
        return {**cell, "torch": torch.__version__}
    depths = np.isfinite(history.iterations["tau"]).sum(1)
    work = multiply_adds(depths.tolist(), problem.forward, problem.batch, {new.iteration for new in history.insertions})
    iterations, seconds, losses, right = (list(column) for column in zip(*watch.rows, strict=True))
    return {
        **cell,
        "torch": torch.__version__,
        "layers": model.time_steps.num_steps,
        "most": int(depths.max()),
        "work": work[np.array(iterations) - 1].tolist(),
        "seconds": [round(s, 3) for s in seconds],
        "loss": [float(f"{loss:.5g}") for loss in losses],
        "accuracy": [] if math.isnan(right[0]) else [round(r, 4) for r in right],
    }


@dataclass(frozen=True)
class Study:
    """The cells of a problem, in a folder."""

    problem: Problem
    out: Path
    rates: Sequence[float]

    def cell(self, way: str, seed: int, lr: float) -> Cell:
        """The figures of one training; those of a finished one are read."""
        problem = self.problem
        path = self.out / "cells" / f"{problem.data}-{way}-lr{lr:g}-{seed}.json"

        def make() -> Cell:
            epochs = problem.epochs
            if way not in REFINING:
                budget = self.measured("grown", seed)["work"][-1]
                epoch = multiply_adds([LAYERS[way]], problem.forward, problem.train)[0]
                more = FURTHER[way] if seed != TUNING_SEED else 1.0
                epochs = math.ceil(more * budget / epoch)
            return train(problem, way, seed, lr, epochs)

        return once(path, make)

    def tuned(self, way: str) -> float:
        """The rate with the smallest loss on the samples held out."""
        return min(self.rates, key=lambda lr: held_out(self.cell(way, TUNING_SEED, lr)))

    def measured(self, way: str, seed: int) -> Cell:
        return self.cell(way, seed, self.tuned(way))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=["run", "report"])
    options.add_argument("--data", nargs="+", help="names of data sets; all unless given")
    options.add_argument("--ways", nargs="+", choices=LAYERS, default=list(LAYERS))
    options.add_argument("--out", type=Path, required=True, help="folder for cells; of the page for report")
    options.add_argument("--cells", type=Path, nargs="+", help="report: folders with cells, or pages made before")
    options.add_argument("--quick", action="store_true", help="tiny networks and data, some seconds")
    given = options.parse_args()
    torch.set_num_threads(1)
    chosen = [p for p in problems(given.quick) if given.data is None or p.data in given.data]
    if given.what == "report":
        plan = {problem.data: (problem.said(), problem.seeds) for problem in chosen}
        print(report(given.cells, given.out, REMARKS, plan, list(LAYERS), TUNING_SEED))
        return
    settle(given.out / "settings.json", quick=given.quick)
    for problem in chosen:
        study = Study(problem, given.out, RATES[-1:] if given.quick else RATES)
        for seed in range(problem.seeds):
            for way in given.ways:
                cell = study.measured(way, seed)
                print(f"{problem.data}, {way}, seed {seed}, lr {cell['lr']:g}: {cell['loss'][-1]:.3g}", flush=True)


if __name__ == "__main__":
    main()
