"""Does it help to learn the order of a fractional network? One for the network, or one a layer, against 0.5 as it is.

    python examples/learned_order.py run --out runs/orders
    python examples/learned_order.py report --cells runs/orders --out page

Six hidden layers of width 50 with learned time steps, trained as in ``which_scheme.py``, but longer: 200 epochs on
1,500 samples of maxwell, 8 on 50,000 of fashion-mnist. Optimiser, batches and their order are the same for all ways;
the learning rate is the best of two, on samples held out, with a seed that is not measured. Each cell (data, way,
seed) is a small JSON file; cells that are there are not trained again. ``--quick`` takes some seconds.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _cells import Cell, once, read_cells, settle, write_cells
from _shortening import shown
from which_scheme import HORIZON, PROBLEMS, QUICK, RATES, TUNING_SEED, Problem, arguments, trained

from taulearn.nn import LearnedOrder, fractional_dnn

HIDDEN_LAYERS = 6
ORDERS = {"0.5": 0.5, "one learned": LearnedOrder(0.5), "learned per layer": LearnedOrder(0.5, per="layer")}
TRAININGS = {
    "maxwell": replace(PROBLEMS["maxwell"], epochs=200),
    "fashion-mnist": replace(PROBLEMS["fashion-mnist"], train=50_000, held=10_000),
}


def train(problem: Problem, way: str, rate: float, seed: int) -> Cell:
    build = partial(fractional_dnn, gamma=ORDERS[way], activation="tanh", horizon=HORIZON)
    network, found = trained(problem, build, HIDDEN_LAYERS, rate, seed)
    order = network.scheme.gamma
    return {**found, "orders": list(order) if isinstance(order, tuple) else [order]}


def cell(problems: dict[str, Problem], out: Path, name: str, way: str, seed: int) -> Cell:
    """One training with the better learning rate; those that are there are read."""
    label = f"{name}-{way.replace(' ', '-')}"

    def tried(rate: float) -> Cell:
        path = out / "tried" / f"{label}-lr{rate:g}.json"
        return once(path, lambda: train(problems[name], way, rate, TUNING_SEED))

    def make() -> Cell:
        best = min(RATES, key=lambda rate: tried(rate)["held"])
        told = {"data": name, "way": way, "seed": seed, "values": problems[name].values}
        return {**told, **train(problems[name], way, best, seed)}

    return once(out / "cells" / f"{label}-{seed}.json", make)


def table(cells: list[Cell]) -> list[str]:
    """A row for each way: the figures, the paired difference to 0.5, and the orders at the end."""
    scale = 1e6 if cells[0]["values"] else 1.0
    lines = ["| order | test | minus that with 0.5 | orders at the end |", "|---|---|---|---|"]
    fixed = {c["seed"]: scale * c["test"] for c in cells if c["way"] == "0.5"}
    for way in ORDERS:
        mine = {c["seed"]: c for c in cells if c["way"] == way}
        if not mine:
            continue
        test = {seed: scale * c["test"] for seed, c in mine.items()}
        differences = [test[seed] - fixed[seed] for seed in test.keys() & fixed.keys()]
        orders = [shown(of_layer, 2) for of_layer in zip(*(c["orders"] for c in mine.values()), strict=True)]
        row = [way, shown([*test.values()], 2), shown(differences, 2, signed=True), ", ".join(orders)]
        lines.append("| " + " | ".join(row if way != "0.5" else [*row[:2], "", ""]) + " |")
    return lines


def report(given: argparse.Namespace) -> str:
    """The page: README.md, and the cells of which alone it is made."""
    found = read_cells(given.cells, "data", "way", "seed")
    write_cells(found, given.out)
    lines = [
        "# A learned order",
        "",
        "Made by `python examples/learned_order.py`, from `cells.jsonl` alone (`report --cells "
        "docs/results/learned-order --out",
        "docs/results/learned-order`); what was trained is told there. Mean on the test part over seeds ± half of the",
        "95 % t-interval; less is better. Orders of layers from the first to the last.",
    ]
    for name in dict.fromkeys(each["data"] for each in found):
        mine = [each for each in found if each["data"] == name]
        unit = "loss in millionths" if mine[0]["values"] else "error in percent"
        seeds = ", ".join(map(str, sorted({each["seed"] for each in mine})))
        lines += ["", f"## {name}, {unit}, seeds {seeds}", "", *table(mine)]
    text = "\n".join(lines) + "\n"
    (given.out / "README.md").write_text(text)
    return text


def main() -> None:
    given = arguments(__doc__, TRAININGS)
    torch.set_num_threads(given.threads)
    if given.what == "report":
        print(report(given))
        return
    settle(given.out / "settings.json", quick=given.quick)
    problems = QUICK if given.quick else TRAININGS
    for seed in given.seeds:
        for name in given.data or problems:
            for way in ORDERS:
                found = cell(problems, given.out, name, way, seed)
                print(f"{name}, {way}, seed {seed}: {found['test']:.4g}, orders {found['orders']}", flush=True)


if __name__ == "__main__":
    main()
