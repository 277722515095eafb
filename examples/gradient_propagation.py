"""Whether learned time steps damp vanishing and exploding gradients (Antil, Diaz, Herberg 2022, section 6).

Trains feedforward, residual, dense and fractional networks of several depths on the digits, with fixed and with learned
steps, and measures before and after how the last state depends on the earlier ones and on the parameters:

    python examples/gradient_propagation.py --out gradients

writes gradients/propagation.csv (every layer of every network) and one figure per quantity. Longer training:
``--epochs 30``; the default keeps to about a minute.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from taulearn import data, fit, nn
from taulearn.diagnostics import GradientPropagation, gradient_propagation, propagation_figure
from taulearn.training import Diverged

BUILDERS: dict[str, Callable[..., nn.TimeVariableNetwork]] = {
    "feedforward": nn.feedforward,
    "residual": nn.resnet,
    "dense": nn.densenet,
    "fractional": nn.fractional_dnn,
}
# Steps of 1/N make a feedforward gradient vanish like N^-N, whatever the weights.
STEPS = {
    "feedforward": ["fixed 1", "learned from 1"],
    "residual": ["fixed 1", "learned from 1", "fixed 1/N", "learned from 1/N"],
    "dense": ["fixed 1", "learned from 1"],
    "fractional": ["fixed 1", "learned from 1", "fixed 1/N", "learned from 1/N"],
}
PARTS = {"largest": "s_max(d y_N / d y)", "weight": "norm(d y_N / d W)", "step": "norm(d y_N / d tau)"}

Panels = dict[str, dict[str, dict[str, list[GradientPropagation]]]]


def build(scheme: str, steps: str, depth: int, width: int) -> nn.TimeVariableNetwork:
    torch.manual_seed(0)
    size = 1.0 if steps.endswith(" 1") else 1.0 / depth
    constraint = "fixed" if steps.startswith("fixed") else "free"
    return BUILDERS[scheme](
        64, width, 10, depth, activation="tanh", init=size, constraint=constraint, dtype=torch.float64
    )


def train(network: nn.TimeVariableNetwork, samples: data.Samples, epochs: int, lr: float) -> str:
    """Train in place; the mean loss of the last epoch."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    try:
        history = fit(
            network,
            (samples.inputs.double(), samples.targets),
            loss=cross_entropy,
            optimizer=optimizer,
            epochs=epochs,
            compile="never",
            progress=False,
        )
    except Diverged:
        return "diverged"
    return f"{history.epochs['train.loss'][-1]:.3g}"


def write(path: Path, panels: Panels) -> None:
    fields = ["largest", "smallest", "state", "weight", "bias", "step"]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["stage", "scheme", "steps", "depth", "layer", "tau", *fields])
        for stage, columns in panels.items():
            for scheme, curves in columns.items():
                for steps, results in curves.items():
                    for r in results:
                        values = torch.stack([getattr(r, field).median(dim=1).values for field in fields], dim=1)
                        for layer, row in enumerate(values.tolist()):
                            table.writerow([stage, scheme, steps, len(values), layer, r.tau[layer].item(), *row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--out", type=Path, default=Path("gradients"))
    arguments = parser.parse_args()

    samples = data.load("digits")
    probe = data.load("digits", split="test").inputs[:3].double()
    panels: Panels = {stage: {scheme: {} for scheme in BUILDERS} for stage in ("before training", "after training")}
    print("s_max(d y_N / d y_1), dense relative to its structural growth 2^(N-2)")
    print(f"{'scheme':12} {'steps':17} {'depth':>5} {'before':>9} {'after':>9} {'train loss':>10}")
    for scheme, kinds in STEPS.items():
        for steps in kinds:
            for depth in arguments.depths:
                network = build(scheme, steps, depth, arguments.width)
                results = [gradient_propagation(network, probe)]
                loss = train(network, samples, arguments.epochs, arguments.lr)
                results.append(gradient_propagation(network, probe))
                for stage, result in zip(panels, results, strict=True):
                    panels[stage][scheme].setdefault(steps, []).append(result)
                before, after = (float((r.largest.median(dim=1).values / r.structural_growth)[0]) for r in results)
                print(f"{scheme:12} {steps:17} {depth:5} {before:9.2e} {after:9.2e} {loss:>10}", flush=True)

    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "propagation.csv", panels)
    for part in PARTS:
        path = arguments.out / f"propagation_{part}.png"
        propagation_figure(panels, part=part, relative=True).savefig(path)
        print(f"{PARTS[part]}: {path}")


if __name__ == "__main__":
    main()
