"""Shared by the comparisons: ways to a smaller network at equal training budgets, their figures, and the table.

unpruned        the deep network, trained as it is
pruned          the deep network wrapped by taulearn, pruned to a small depth while it trains
small           a network of that depth, trained from scratch as it is
small, steps    the same with learned time steps as the pruned one has them, to see what these do by themselves
small, taught   the small network with the unpruned one as its teacher, whose training and answers come on top
grown           from the smallest of the depths to a larger one, blocks split by taulearn while it trains; without units
                of displacement, which new blocks would lack
Torch-Pruning   the deep network, channels pruned while it trains, until a forward pass takes no longer than that of the
                small network (batch of 32); the package torch-pruning, group magnitudes, five times until the same
                epoch by which taulearn has pruned

Everybody gets the same epochs, batches, learning rates and weight decay. Members train side by side, one thread each; a
member that is finished is not trained again, one that was interrupted goes on where it was.
"""

import argparse
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _cells import Cell, once, settle
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from taulearn import Pruning, Refinement, data, fit, load_model, parameter_groups, unwrap, wrap
from taulearn.penalties import Distillation
from taulearn.wrapping import fold_units, wrapping_of

BATCHES = (1, 32)
WAYS = ("pruned", "small", "small, steps", "Torch-Pruning")


@dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
        title: Heading of the table.
        make: A fresh network of so many blocks.
        blocks: Depth of the deep network.
        targets: The small depths.
        data: Name of the data set.
        samples: Training samples taken; None: all.
        epochs: For everybody.
        batch_size: Samples per step.
        optimizer: From parameter groups with learning rates.
        lr: Largest learning rate of the cycle.
        tau_lr: The same of the time steps.
        weight_decay: Of everything but the time steps.
        units: Of the time steps.
        pruning: Options of ``taulearn.Pruning`` besides the target.
        channels: Options of Torch-Pruning's pruner for a network.
        device: Where to train.
        ways: Besides the unpruned network, for each target.
        names: Of the blocks in the network, as ``taulearn.wrap`` takes them.
    """

    title: str
    make: Callable[[int], nn.Module]
    blocks: int
    targets: tuple[int, ...]
    data: str
    samples: int | None
    epochs: int
    batch_size: int
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    lr: float
    tau_lr: float
    weight_decay: float
    units: str
    pruning: dict[str, Any]
    channels: Callable[[nn.Module], dict[str, Any]]
    device: str = "cpu"
    ways: tuple[str, ...] = WAYS
    names: str = "blocks.*"


def load(study: Study, split: str) -> tuple[Tensor, Tensor]:
    samples = data.load(study.data, split)
    inputs, targets = samples.inputs, samples.targets
    if split == "train" and study.samples is not None:
        inputs, targets = inputs[: study.samples], targets[: study.samples]
    mean, deviation = inputs.mean(), inputs.std()
    return ((inputs - mean) / deviation).to(study.device), targets.to(study.device)


def members(study: Study, seeds: int) -> list[tuple[str, int, int]]:
    """Way, number of blocks and seed; what others are compared with comes first."""
    ways = [("unpruned", study.blocks)]
    ways += [(way, k) for k in study.targets for way in study.ways if way != "grown" or k > min(study.targets)]
    return [(way, blocks, seed) for seed in range(seeds) for way, blocks in ways]


def train_by_fit(study: Study, model: nn.Module, seed: int, folder: Path | None, **options: Any) -> Any:
    """Train a wrapped model; goes on where it was if it was interrupted."""
    train = load(study, "train")
    groups = parameter_groups(model, study.lr, study.tau_lr, study.weight_decay)
    optimizer = study.optimizer(groups)
    steps = study.epochs * math.ceil(len(train[0]) / study.batch_size)
    cycle = OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps + 1, cycle_momentum=False)
    torch.manual_seed(seed)
    return fit(
        model,
        train,
        loss=cross_entropy,
        optimizer=optimizer,
        scheduler=cycle,
        epochs=study.epochs,
        batch_size=study.batch_size,
        seed=seed,
        run=folder,
        resume=folder is not None and (folder / "run.toml").exists(),
        compile="never",
        progress=False,
        **options,
    )


def train_member(study: Study, out: Path, member: tuple[str, int, int]) -> Cell:
    """Train one network and return its figures; those of a finished one are read."""
    name = "{}-{}-seed{}".format(*member).lower().replace(", ", "-")
    return once(out / "members" / f"{name}.json", lambda: _train(study, out, name, *member))


def _train(study: Study, out: Path, name: str, way: str, blocks: int, seed: int) -> Cell:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began, example = time.perf_counter(), load(study, "test")[0][:2]
    depth = min(study.targets) if way == "grown" else blocks if way.startswith("small") else study.blocks
    model = study.make(depth).to(study.device)
    deletions: list[Any] = []
    if way == "Torch-Pruning":
        train_with_torch_pruning(study, model, blocks, seed)
    else:
        learned = way in ("pruned", "small, steps", "grown")
        units = "steps" if way == "grown" else study.units  # no new block has a unit of displacement
        steps = {"units": units} if learned else {"constraint": "fixed"}
        wrap(model, study.names, example_inputs=example, **steps)
        options: dict[str, Any] = {}
        if way == "pruned":
            options["pruning"] = Pruning(target_blocks=blocks, **study.pruning)
        elif way == "grown":
            options["refinement"] = Refinement(blocks, until=study.pruning["by"])
        elif way == "small, taught":
            teacher = load_model(out / "runs" / f"unpruned-{study.blocks}-seed{seed}", study.make(study.blocks))
            options["penalties"] = Distillation(teacher.to(study.device), 1.0)
        history = train_by_fit(study, model, seed, out / "runs" / name, **options)
        deletions = [[d.iteration, d.layer, d.share] for d in history.deletions]
    seconds = time.perf_counter() - began
    figures = {"way": way, "target": blocks, "seed": seed, "seconds": seconds, "deletions": deletions}
    figures |= {"accuracy": accuracy(model, load(study, "test"))}
    if wrapping_of(model) is not None:
        fold_units(model)
        figures |= {"tau": model.time_steps.tau.tolist()}
        if not learned:
            unwrap(model)
    figures |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": sum(1 for name, _ in model.named_modules() if matches(name, study.names)),
    }
    reference = study.make(study.blocks).to(study.device)
    figures |= {f"relative ms {b}": relative_time(study, model, reference, b) for b in BATCHES}
    return figures


def matches(name: str, pattern: str) -> bool:
    """As ``taulearn.wrap`` reads patterns: part by part."""
    return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)


@torch.no_grad()
def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    model.eval()
    right = [(model(x).argmax(1) == z).sum() for x, z in zip(*(t.split(500) for t in test), strict=True)]
    return float(torch.stack(right).sum() / len(test[0]))


def train_with_torch_pruning(study: Study, model: nn.Module, blocks: int, seed: int, times: int = 5) -> None:
    """The usual loop; channels go at equal distances until the epoch by which taulearn has deleted its blocks."""
    inputs, targets = load(study, "train")
    limit = relative_time(study, study.make(blocks).to(study.device), study.make(study.blocks).to(study.device), 32)
    ratio = ratio_for(study, limit)
    pruner = channel_pruner(study, model, ratio, times)
    per_epoch = math.ceil(len(inputs) / study.batch_size)
    steps, by = study.epochs * per_epoch, study.pruning.get("by", 0.6)
    end = round(by * steps) if isinstance(by, float) else by * per_epoch
    moments = {round(end * (k + 1) / times) for k in range(times)}

    def make_optimizer() -> torch.optim.Optimizer:
        group = {"params": list(model.parameters()), "lr": study.lr, "weight_decay": study.weight_decay}
        return study.optimizer([group])

    clock = make_optimizer()
    cycle = OneCycleLR(clock, study.lr, total_steps=steps + 1, cycle_momentum=False)
    optimizer = make_optimizer()
    generator = torch.Generator().manual_seed(seed)
    model.train()
    step = 0
    for _ in range(study.epochs):
        for index in torch.randperm(len(inputs), generator=generator).to(inputs.device).split(study.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = clock.param_groups[0]["lr"]
            optimizer.zero_grad()
            cross_entropy(model(inputs[index]), targets[index]).backward()
            optimizer.step()
            clock.step()
            cycle.step()
            step += 1
            if step in moments:
                pruner.step()
                optimizer = make_optimizer()
                model.train()


def channel_pruner(study: Study, model: nn.Module, ratio: float, times: int) -> Any:
    import torch_pruning

    return torch_pruning.pruner.BasePruner(
        model,
        load(study, "test")[0][:2],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        iterative_steps=times,
        **study.channels(model),
    )


def ratio_for(study: Study, limit: float) -> float:
    """The smallest share of channels without which a forward pass takes no longer than the limit, else the fastest."""
    taken = {}
    for ratio in (k / 8 for k in range(1, 8)):
        torch.manual_seed(0)
        model = study.make(study.blocks).to(study.device)
        channel_pruner(study, model, ratio, 1).step()
        taken[ratio] = relative_time(study, model, study.make(study.blocks).to(study.device), 32, repeats=20)
        if taken[ratio] <= limit:
            return ratio
    return min(taken, key=taken.__getitem__)


def clock(study: Study) -> float:
    """Seconds: of the processor, of which other members take none, or of the wall once a device has done its work."""
    if study.device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def relative_time(study: Study, model: nn.Module, reference: nn.Module, batch: int, repeats: int = 40) -> float:
    """Time of a forward pass over that of the reference: the smallest of interleaved repetitions."""
    test = load(study, "test")[0]
    inputs = test[torch.arange(batch) % len(test)]
    times: list[list[float]] = [[], []]
    model.eval()
    reference.eval()
    for _ in range(repeats + 3):
        for taken, each in zip(times, (model, reference), strict=True):
            began = clock(study)
            each(inputs)
            taken.append(clock(study) - began)
    return min(times[0][3:]) / min(times[1][3:])


@torch.no_grad()
def unpruned_milliseconds(study: Study, batch: int) -> float:
    model = study.make(study.blocks).to(study.device).eval()
    inputs = load(study, "test")[0][:1].repeat(batch, 1, 1, 1)
    taken = []
    for _ in range(40):
        began = clock(study)
        model(inputs)
        taken.append(1e3 * (clock(study) - began))
    return min(taken)


def report(study: Study, found: list[dict[str, Any]], out: Path) -> str:
    """The Markdown table; also writes it, and a record with everything."""
    torch.set_num_threads(1)
    whole = {batch: unpruned_milliseconds(study, batch) for batch in BATCHES}
    lines = [
        f"| {study.title} | seeds | accuracy | parameters | blocks | ms, batch 1 | ms, batch 32 |",
        "|---|---|---|---|---|---|---|",
    ]
    table = []
    for way, blocks in dict.fromkeys((each["way"], each["target"]) for each in found):
        rows = [each for each in found if (each["way"], each["target"]) == (way, blocks)]
        label = {
            "unpruned": "unpruned",
            "pruned": f"taulearn, pruned to {blocks}",
            "small": f"{blocks} blocks from scratch",
            "small, steps": f"{blocks} blocks from scratch, steps learned",
            "small, taught": f"{blocks} blocks from scratch, with a teacher",
            "grown": f"taulearn, grown from {min(study.targets)} to {blocks}",
        }
        figures = {
            name: [row[name] for row in rows]
            for name in ("accuracy", "parameters", "blocks", *(f"relative ms {b}" for b in BATCHES))
        }
        mean = {name: statistics.fmean(values) for name, values in figures.items()}
        spread = statistics.stdev(figures["accuracy"]) if len(rows) > 1 else math.nan
        accuracy = f"{100 * mean['accuracy']:.2f}" + (f" ± {100 * spread:.2f}" if len(rows) > 1 else "")
        milliseconds = {b: mean[f"relative ms {b}"] * whole[b] for b in BATCHES}
        table.append({"way": way, "target": blocks, "seeds": len(rows), "spread": spread, **mean})
        cells = [label.get(way, f"Torch-Pruning, towards the speed of {blocks}"), len(rows), accuracy]
        cells += [f"{mean['parameters']:,.0f}", f"{mean['blocks']:g}", *(f"{ms:.2f}" for ms in milliseconds.values())]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"{study.epochs} epochs for everybody, {study.samples or 'all'} training samples, batches of "
        f"{study.batch_size}; test accuracy in percent, mean ± standard deviation over seeds. Times: "
        f"{'one thread, ' + platform.machine() if study.device == 'cpu' else study.device}, relative to the unpruned "
        "network in the same process.",
    ]
    if "grown" in study.ways:
        lines += [
            "",
            "A teacher's training and answers come on top. The grown network alone has no units of displacement.",
        ]
    text = "\n".join(lines)
    record = {"settings": settings(study), "torch": torch.__version__, "whole ms": whole}
    record |= {"table": table, "members": found}
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    (out / "record.json").write_text(json.dumps(record, indent=1))
    return text


def settings(study: Study) -> dict[str, Any]:
    """What can be written down of a comparison."""
    found = {k: v for k, v in vars(study).items() if isinstance(v, int | float | str | tuple | dict | None)}
    return found | {"data": Path(study.data).name}  # of one's own not where it lay


def run(study: Study, *, seeds: int, workers: int, out: Path) -> None:
    settle(out / "settings.json", **settings(study))
    todo, found = members(study, seeds), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        apply = map if workers == 1 else pool.map
        for teachers in (True, False):  # what others learn from comes first
            now = [member for member in todo if (member[0] == "unpruned") == teachers]
            for figures in apply(functools.partial(train_member, study, out), now):
                found.append(figures)
                print(
                    f"{figures['way']}, {figures['blocks']} blocks, seed {figures['seed']}: "
                    f"accuracy {figures['accuracy']:.4f}, {figures['seconds']:.0f} s",
                    flush=True,
                )
    print("\n" + report(study, found, out))


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that both comparisons have."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--workers", type=int, default=2, help="members that train side by side, one thread each")
    options.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / Path(sys.argv[0]).stem.replace("_", "-"),
        help="folder for members, table.md and record.json (default: %(default)s)",
    )
    options.add_argument("--data", default="fashion-mnist")
    options.add_argument("--samples", type=int, help="training samples; all unless given")
    options.add_argument("--epochs", type=int)
    options.add_argument("--blocks", type=int)
    options.add_argument("--targets", type=int, nargs="+")
    options.add_argument("--width", type=int)
    options.add_argument("--device", default="cpu")
    options.add_argument("--quick", action="store_true", help="a tiny network on the digits, some seconds")
    return options
