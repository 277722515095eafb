"""Which scheme? All at equal numbers of evaluations of a layer, with learned and with fixed time steps.

    python examples/which_scheme.py run --out runs/schemes
    python examples/which_scheme.py report --cells runs/schemes --out page

Each network has a first layer, which changes the width, and hidden layers that are evaluated 12 times in all: 12 layers
for residual, momentum, verlet and the fractional scheme (of order 0.5, and of a learned order), 6 for midpoint and
heun, 3 for rk4; so a network of rk4 has a quarter of the weights.
Widths, horizon, optimiser, batches and their order are the same. The learning rate is the best of two, on samples held
out, with a seed that is not measured. Each cell (data, scheme, steps, seed) is a small JSON file; cells that are there
are not trained again. ``--quick`` takes some seconds.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _cells import Cell, once, read_cells, settle, write_cells
from _shortening import interval, shown
from torch import Tensor, nn

from taulearn import data, fit, parameter_groups
from taulearn.functional import half_mse_loss
from taulearn.nn import LearnedOrder, TimeVariableNetwork, fractional_dnn, resnet

Samples = tuple[Tensor, Tensor]

EVALUATIONS = 12
STAGES = {"residual": 1, "momentum": 1, "verlet": 1, "midpoint": 2, "heun": 2, "rk4": 4, "fractional": 1}
STAGES["learned order"] = 1
STEPS = {"learned": "free", "fixed": "fixed"}
RATES = (3e-3, 1e-2)
TUNING_SEED = 100
HORIZON = 2.0


def spirals(samples: int, seed: int) -> Samples:
    """Two spirals of one and a half turns, noisy, one class each."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(2, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator).sqrt()
    angle = 3.0 * math.pi * radius + math.pi * classes
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return points + 0.03 * torch.randn(samples, 2, generator=generator), classes


def catalogued(name: str) -> Callable[[str], Samples]:
    return lambda split: tuple(data.load(name, split))


@dataclass(frozen=True)
class Problem:
    """A data set and its trainings.

    Attributes:
        load: The samples of a split, "train" or "test".
        width: Of the hidden layers.
        outputs: Of the network.
        train: Training samples taken.
        held: Further ones, on which the learning rate is chosen.
        test: Test samples taken.
        epochs: Of each training.
        values: Whether targets are values, measured by their loss, not classes, measured by the error in percent.
    """

    load: Callable[[str], Samples]
    width: int
    outputs: int
    train: int
    held: int
    test: int
    epochs: int
    values: bool = False

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return half_mse_loss if self.values else nn.functional.cross_entropy


PROBLEMS = {
    "nested-spheres": Problem(catalogued("nested-spheres"), 3, 2, 1000, 500, 2000, 6),
    "spirals": Problem(lambda split: spirals(4000, int(split == "test")), 8, 2, 1000, 500, 2000, 80),
    "maxwell": Problem(catalogued("maxwell"), 50, 3, 1500, 500, 2000, 40, values=True),
    "fashion-mnist": Problem(catalogued("fashion-mnist"), 50, 10, 6000, 2000, 10_000, 8),
}
QUICK = {"spirals": Problem(lambda split: spirals(400, int(split == "test")), 8, 2, 200, 100, 200, 2)}


def builder_of(scheme: str) -> Callable[..., TimeVariableNetwork]:
    if scheme in ("fractional", "learned order"):
        return partial(fractional_dnn, gamma=0.5 if scheme == "fractional" else LearnedOrder(0.5))
    return partial(resnet, scheme=scheme)


def train(problem: Problem, scheme: str, steps: str, rate: float, seed: int) -> Cell:
    """One training: its measures, and an order that was learned."""
    hidden_layers = 1 + EVALUATIONS // STAGES[scheme]
    build = partial(builder_of(scheme), activation="tanh", horizon=HORIZON, constraint=STEPS[steps])
    network, found = trained(problem, build, hidden_layers, rate, seed)
    return {**found, **({"order": network.scheme.gamma} if scheme == "learned order" else {})}


def trained(
    problem: Problem, build: Callable[..., TimeVariableNetwork], hidden_layers: int, rate: float, seed: int
) -> tuple[TimeVariableNetwork, Cell]:
    """A network after one training, and its measures on held out and test samples, and its time steps."""
    inputs, targets = problem.load("train")
    end = problem.train + problem.held
    held, test = (inputs[problem.train : end], targets[problem.train : end]), problem.load("test")
    torch.manual_seed(seed)
    network = build(inputs[0].numel(), problem.width, problem.outputs, hidden_layers)
    fit(
        network,
        (inputs[: problem.train], targets[: problem.train]),
        loss=problem.loss,
        optimizer=torch.optim.Adam(parameter_groups(network, rate)),
        epochs=problem.epochs,
        batch_size=100,
        seed=seed,
        compile="never",
        progress=False,
    )
    return network, {
        "rate": rate,
        "held": measure(problem, network, held),
        "test": measure(problem, network, (test[0][: problem.test], test[1][: problem.test])),
        "parameters": sum(p.numel() for p in network.parameters()),
        "tau": network.time_steps.tau.tolist(),
    }


@torch.no_grad()
def measure(problem: Problem, network: nn.Module, samples: Samples) -> float:
    """The loss, or the share of wrong answers in percent; less is better."""
    output = network.eval()(samples[0])
    if problem.values:
        return problem.loss(output, samples[1]).item()
    return 100.0 * float((output.argmax(1) != samples[1]).double().mean())


def cell(problems: dict[str, Problem], out: Path, name: str, scheme: str, steps: str, seed: int) -> Cell:
    """One training with the better learning rate; those that are there are read."""

    def tried(rate: float, seed: int) -> Cell:
        path = out / "tried" / f"{name}-{scheme}-{steps}-{seed}-lr{rate:g}.json"
        return once(path, lambda: train(problems[name], scheme, steps, rate, seed))

    def make() -> Cell:
        best = min(RATES, key=lambda rate: tried(rate, TUNING_SEED)["held"])
        told = {"data": name, "scheme": scheme, "steps": steps, "seed": seed}
        return {**told, **train(problems[name], scheme, steps, best, seed), "values": problems[name].values}

    return once(out / "cells" / f"{name}-{scheme}-{steps}-{seed}.json", make)


def figures(cells: Sequence[Cell], name: str, scheme: str, steps: str) -> dict[int, float]:
    wanted = (name, scheme, steps)
    return {c["seed"]: c["test"] for c in cells if (c["data"], c["scheme"], c["steps"]) == wanted}


def table(cells: Sequence[Cell], name: str) -> list[str]:
    """Rows of the schemes: learned and fixed steps, their paired difference, and that to the residual scheme."""
    scale = 1e6 if next(c for c in cells if c["data"] == name)["values"] else 1.0

    def said(values: Iterable[float], signed: bool = False) -> str:
        return shown([scale * value for value in values], 2, signed=signed)

    lines = [
        "| scheme | layers | parameters | learned | fixed | learned - fixed | learned - residual, learned |",
        "|---|---|---|---|---|---|---|",
    ]
    residual = figures(cells, name, "residual", "learned")
    for scheme in STAGES:
        learned, fixed = (figures(cells, name, scheme, steps) for steps in STEPS)
        if not learned or not fixed:
            continue
        one = next(c for c in cells if (c["data"], c["scheme"], c["steps"]) == (name, scheme, "learned"))
        differences = [[learned[s] - other[s] for s in learned.keys() & other.keys()] for other in (fixed, residual)]
        row = [scheme, str(len(one["tau"])), f"{one['parameters']:,}"]
        row += [said(values.values()) for values in (learned, fixed)]
        row += [said(values, signed=True) for values in differences]
        lines.append("| " + " | ".join(row) + " |")
    for steps in STEPS:
        fixed, learned = (figures(cells, name, scheme, steps) for scheme in ("fractional", "learned order"))
        mine = [c for c in cells if (c["data"], c["scheme"], c["steps"]) == (name, "learned order", steps)]
        if fixed and learned:
            difference = said([learned[s] - fixed[s] for s in learned.keys() & fixed.keys()], signed=True)
            orders = shown([c["order"] for c in mine], 3)
            lines += ["", f"Order learned - order 0.5, {steps} steps: {difference}; orders at the end: {orders}."]
    return lines


def draw(cells: Sequence[Cell], names: Sequence[str], path: Path) -> None:
    """Test figures of each scheme, learned and fixed steps side by side, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(names), 3.6), layout="tight")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for place, steps in enumerate(STEPS):
            values = [
                interval(list(found.values())) if (found := figures(cells, name, s, steps)) else None for s in STAGES
            ]
            there = [(i + 0.3 * place, *value) for i, value in enumerate(values) if value]
            x, y, half = zip(*there, strict=True)
            ax.errorbar(x, y, [0.0 if math.isnan(h) else h for h in half], fmt="os"[place], capsize=2, label=steps)
        values = next(c for c in cells if c["data"] == name)["values"]
        ax.set(title=name, ylabel="loss, test" if values else "error in %, test", xticks=range(len(STAGES)))
        ax.set_xticklabels(list(STAGES), rotation=45, ha="right")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def report(given: argparse.Namespace) -> str:
    """The page: README.md, figure.png, and the cells of which alone it is made."""
    found = read_cells(given.cells, "data", "scheme", "steps", "seed")
    write_cells(found, given.out)
    names = list(dict.fromkeys(each["data"] for each in found))
    lines = [
        "# Which scheme?",
        "",
        "Made by `python examples/which_scheme.py`, from `cells.jsonl` alone (`report --cells "
        "docs/results/which-scheme --out",
        "docs/results/which-scheme`); what was trained is told there. Mean on the test part over seeds ± half of the",
        f"95 % t-interval; less is better. Horizon {HORIZON:g}, tanh, Adam, {EVALUATIONS} evaluations of hidden layers "
        "behind the first.",
        "",
        "![figure](figure.png)",
    ]
    for name in names:
        mine = [each for each in found if each["data"] == name]
        seeds = sorted({each["seed"] for each in mine})
        unit = "loss in millionths" if mine[0]["values"] else "error in percent"
        lines += ["", f"## {name}, {unit}, seeds {', '.join(map(str, seeds))}", "", *table(found, name)]
    draw(found, names, given.out / "figure.png")
    text = "\n".join(lines) + "\n"
    (given.out / "README.md").write_text(text)
    return text


def arguments(description: str | None, names: Iterable[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--data", nargs="+", choices=[*names])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the cells; of the page for report")
    parser.add_argument("--cells", type=Path, nargs="+", help="report: folders with cells, or pages made before")
    parser.add_argument("--quick", action="store_true", help="two epochs on 200 samples")
    return parser.parse_args()


def main() -> None:
    given = arguments(__doc__, PROBLEMS)
    torch.set_num_threads(given.threads)
    if given.what == "report":
        print(report(given))
        return
    settle(given.out / "settings.json", quick=given.quick)
    problems = QUICK if given.quick else PROBLEMS
    for name in given.data or problems:
        for seed in given.seeds:
            for scheme in STAGES:
                found = {steps: cell(problems, given.out, name, scheme, steps, seed)["test"] for steps in STEPS}
                print(f"{name}, {scheme}, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main()
