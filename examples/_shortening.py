"""What the examples of pretrained models share: ways of shortening, one loop that trains all, the cells, the page.

A way is how blocks are chosen, how they go, and what the rest is healed by:

    whole                    nothing goes; the fine-tuned model is also the teacher
    random                   as many blocks with random weights, with the best of some learning rates
    top, every-other         the last blocks go, or equally spaced ones
    influence, loss, ..      the blocks go at once, before healing, by this criterion of ``taulearn.prune``
    sensitivity-faded, ..    they are faded out one after the other early in healing: ``taulearn.Pruning``
    loss-branch, ..          attention and MLP go separately, as many as there are in the blocks that would go
    ..+teacher               healed with ``taulearn.penalties.Distillation`` from the whole model of the same seed

Everybody starts from the same trained model, and gets the same batches in the same order, the same optimiser and the
same number of steps. One training gives the figures of all budgets: 0 (nothing was trained: for faded ways the blocks
went at once), 1/4, 1/2, 1 and 2 epochs. Each cell (task, blocks kept, way, seed) is a small JSON file, written when
it is done; cells that are there are not trained again.
"""

import argparse
import json
import math
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _cells import Cell, once, read_cells, settle, write_cells
from scipy.stats import t as student
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from taulearn import Criterion, Pruning, attach, parameter_groups, prune, unwrap, wrap

Batch = dict[str, torch.Tensor]

BUDGETS = (0.0, 0.25, 0.5, 1.0, 2.0)
SIMPLE = ("top", "every-other", "influence", "loss")
FADED = ("contribution-faded", "sensitivity-faded", "loss-faded")
BEFORE = 0.1
"""Faded blocks are gone after this share of the training, which is 0.2 epochs: before the first budget."""


@dataclass(frozen=True)
class Case:
    """A trained model and a task: all that differs between the examples.

    Attributes:
        task: Its name in the cells.
        measure: What is measured on data that was not trained on.
        higher: Whether more of it is better.
        layers: Number of blocks of the trained model.
        blocks: Their names, as ``taulearn.wrap`` takes them.
        trained: The trained model, from which all ways start; a fresh copy.
        random: A model of so many blocks with random weights.
        load: A model that ``save_pretrained`` wrote.
        epoch: The batches of one epoch in the order that a generator says.
        calibration: Some training batches for the criteria, drawn by a number.
        evaluate: The measure on the "dev" and the "test" part; choices are made on the first.
        sample: So many inputs, for example inputs and times.
        lr: Learning rate of healing.
        random_lrs: Those tried for random weights.
        batches: Number of batches of an epoch.
        survivors: Of ``taulearn.Pruning``: "one" where steps do not fold into the weights (post-norm blocks).
        weight_decay: Of healing.
        tau_lr: Learning rate of time steps that fade.
        teacher_weight: Weight of the distillation.
        temperature: Of the distillation.
        criteria: Criteria of the example's own by name, made from calibration batches.
    """

    task: str
    measure: str
    higher: bool
    layers: int
    blocks: str
    trained: Callable[[], nn.Module]
    random: Callable[[int], nn.Module]
    load: Callable[[Path], nn.Module]
    epoch: Callable[[torch.Generator], list[Batch]]
    calibration: Callable[[int], list[Batch]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    sample: Callable[[int], Batch]
    lr: float
    random_lrs: tuple[float, ...]
    batches: int
    survivors: str
    weight_decay: float = 0.01
    tau_lr: float = 5e-3
    teacher_weight: float = 1.0
    temperature: float = 2.0
    criteria: Mapping[str, Callable[[list[Batch]], Criterion]] = field(default_factory=dict)


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


@dataclass(frozen=True)
class Way:
    """A way by its name, CHOICE[-branch][-faded][+teacher]."""

    name: str

    @property
    def choice(self) -> str:
        return self.name.partition("+")[0].removesuffix("-faded").removesuffix("-branch")

    @property
    def per(self) -> str:
        return "branch" if "-branch" in self.name else "block"

    @property
    def faded(self) -> bool:
        return "-faded" in self.name

    @property
    def taught(self) -> bool:
        return self.name.endswith("+teacher")


def wrapped(case: Case, model: nn.Module, per: str = "block") -> nn.Module:
    return wrap(model, case.blocks, example_inputs=without_labels(case.sample(2)), per=per)


def steps_kept(case: Case, model: nn.Module, kept: int) -> int:
    """Time steps of so many blocks of a wrapped model: one a block, or one a branch."""
    return kept * model.time_steps.num_steps // case.layers


def chosen(case: Case, way: Way, kept: int, seed: int) -> list[int]:
    """The blocks, or branches, that a way keeps of the trained model."""
    if way.choice == "top":
        return list(range(kept))
    if way.choice == "every-other":
        return [i * case.layers // kept for i in range(kept)]
    if way.choice[0].isdigit():  # named: 0.2.5
        return [int(position) for position in way.choice.split(".")]
    model = wrapped(case, case.trained(), way.per)
    budget = steps_kept(case, model, kept)
    return list(prune(model, budget=budget, **criterion_of(case, way, seed)).kept)


def criterion_of(case: Case, way: Way, seed: int, *, watching: bool = False) -> dict[str, Any]:
    """The criterion of a way, and its data, for ``prune``, or for ``Pruning``, which watches the training."""
    if way.choice in case.criteria:
        return {"criterion": case.criteria[way.choice](case.calibration(seed))}
    data = None if watching and way.choice != "loss" else case.calibration(seed)
    return {"criterion": way.choice, "data": data}


def shortened(case: Case, positions: Sequence[int], per: str = "block") -> nn.Module:
    """The trained model without the other blocks or branches: a plain model."""
    model = wrapped(case, case.trained(), per)
    prune(model, keep=positions)
    return unwrap(model)


def heal(
    case: Case,
    model: nn.Module,
    seed: int,
    *,
    lr: float | None = None,
    pruning: Pruning | None = None,
    teacher: nn.Module | None = None,
    budgets: Sequence[float] = BUDGETS,
    after: Callable[[int, int], None] | None = None,
) -> tuple[list[Cell], list[int]]:
    """Train a model, with ``pruning`` a wrapped one; its figures at the budgets above 0, and the blocks left.

    ``after`` is called after each step, with its number from 1 and the number of all.
    """
    steps = round(budgets[-1] * case.batches)
    moments = {round(budget * case.batches): budget for budget in budgets[1:]}
    lr, found, penalties = lr or case.lr, [], []
    if teacher is not None:
        from taulearn.penalties import Distillation

        penalties = [Distillation(teacher, case.teacher_weight, temperature=case.temperature)]
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    if hasattr(model, "time_steps"):
        groups = parameter_groups(model, lr, case.tau_lr, case.weight_decay)
    else:
        training = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": training, "lr": lr, "weight_decay": case.weight_decay}]
    optimizer = torch.optim.AdamW(groups)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)))
    session = None
    if pruning is not None:
        session = attach(model, optimizer, pruning=pruning, penalties=penalties, iterations=steps)

    step = 0
    while step < steps:
        for batch in case.epoch(order):
            model.train()
            inputs, labels = without_labels(batch), batch["labels"]
            with torch.autocast("cpu", torch.bfloat16):  # the teacher answers in it, too
                outputs = model(**batch)
                if session is not None:
                    loss = session.loss(outputs.loss, outputs=outputs, inputs=inputs, targets=labels)
                else:
                    told = (p(model, inputs, labels, outputs=outputs) for p in penalties)
                    loss = sum(told, outputs.loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if after is not None:
                after(step, steps)
            if step in moments:
                found.append({"budget": moments[step], **case.evaluate(model)})
    if session is None:
        return found, list(range(case.layers))
    session.detach()
    return found, list(model.time_steps.origin)


@dataclass(frozen=True)
class Study:
    """The cells of a case, in a folder."""

    case: Case
    out: Path
    save: bool = False  # whether the shortened models are kept

    def cell(self, kept: int, way: str, seed: int) -> Cell:
        """The figures of one training; those of a finished one are read."""
        kept = self.case.layers if way == "whole" else kept
        path = self.out / "cells" / f"{self.case.task}-{kept}-{way}-{seed}.json"

        def make() -> Cell:
            began = time.process_time()
            figures = self.train(kept, way, seed)
            seconds = round(time.process_time() - began)
            name = {"task": self.case.task, "kept": kept, "way": way, "seed": seed}
            return {**name, **figures, "processor_seconds": seconds, "torch": torch.__version__}

        return once(path, make)

    def train(self, kept: int, way: str, seed: int) -> Cell:
        case = self.case
        if way == "random":
            return self._random(kept, seed)
        how = Way(way)
        teacher = self.teacher(seed) if how.taught else None
        if way == "whole":
            model, positions = case.trained(), list(range(case.layers))
        else:
            positions = chosen(case, how, kept, seed)
            model = shortened(case, positions, how.per)
        start = [{"budget": 0.0, **case.evaluate(model)}]
        if how.faded:
            model = wrapped(case, case.trained(), how.per)
            policy = Pruning(
                target_blocks=steps_kept(case, model, kept),
                by=BEFORE,
                survivors=case.survivors,
                **criterion_of(case, how, seed, watching=True),
            )
            figures, left = heal(case, model, seed, pruning=policy, teacher=teacher)
            unwrap(model)
        elif (same := self._same(kept, how, positions, seed)) is not None:
            return same
        else:
            figures, left = heal(case, model, seed, teacher=teacher)[0], positions
        if self.save or way == "whole":
            model.save_pretrained(self.out / "models" / f"{case.task}-{kept}-{way}-{seed}")
        return {"blocks": left, "blocks_at_0": positions, "lr": case.lr, "figures": start + figures}

    def _same(self, kept: int, how: Way, positions: list[int], seed: int) -> Cell | None:
        """What a cell found that trained the same: the same blocks, cut off and healed in the same way."""
        for path in sorted((self.out / "cells").glob(f"{self.case.task}-{kept}-*-{seed}.json")):
            cell = json.loads(path.read_text())
            other = Way(cell["way"])
            alike = (other.per, other.faded, other.taught) == (how.per, False, how.taught)
            if alike and cell["way"] != "random" and cell["blocks"] == positions:
                return {name: cell[name] for name in ("blocks", "blocks_at_0", "lr", "figures")}
        return None

    def _random(self, kept: int, seed: int) -> Cell:
        """Random weights, with the best of some learning rates."""

        def train(seed: int, lr: float) -> Cell:
            torch.manual_seed(seed)
            model = self.case.random(kept)
            start = [{"budget": 0.0, **self.case.evaluate(model)}]
            figures, _ = heal(self.case, model, seed, lr=lr)
            return {"blocks": [], "lr": lr, "figures": start + figures}

        return self.with_best_rate(f"{self.case.task}-{kept}-random", seed, self.case.random_lrs, train)

    def with_best_rate(self, name: str, seed: int, rates: Sequence[float], train: Callable[[int, float], Cell]) -> Cell:
        """What ``train`` finds with the learning rate that was the best on the dev part with seed 0."""

        def tried(seed: int, lr: float) -> Cell:
            return once(self.out / "tried" / f"{name}-{seed}-lr{lr:g}.json", lambda: train(seed, lr))

        at_0 = {lr: tried(0, lr) for lr in rates}
        best = (max if self.case.higher else min)(rates, key=lambda lr: at_0[lr]["figures"][-1]["dev"])
        return tried(seed, best)

    def teacher(self, seed: int) -> nn.Module:
        """The whole model that was fine-tuned with this seed."""
        case = self.case
        self.cell(case.layers, "whole", seed)
        return case.load(self.out / "models" / f"{case.task}-{case.layers}-whole-{seed}")

    @torch.no_grad()
    def times(self, depths: Sequence[int], repeats: int = 60) -> Cell:
        """Milliseconds of a forward pass, in float32: the median of interleaved repetitions.

        By depth; for ways that keep branches by the way, as the first seed chose them.
        """
        models = {str(depth): self.case.random(depth).eval() for depth in depths}
        for path in sorted((self.out / "cells").glob(f"{self.case.task}-*-branch*-0.json")):
            cell = json.loads(path.read_text())
            models[cell["way"]] = shortened(self.case, cell["blocks"], "branch").eval()
        result: Cell = {"threads": torch.get_num_threads(), "machine": platform.machine()}
        for size in (1, 32):
            inputs, taken = without_labels(self.case.sample(size)), {name: list[float]() for name in models}
            for _ in range(repeats):
                for name, model in models.items():
                    began = time.perf_counter()
                    model(**inputs)
                    taken[name].append(1e3 * (time.perf_counter() - began))
            result[f"batch {size}"] = {n: round(statistics.median(values[5:]), 3) for n, values in taken.items()}
        path = self.out / "times" / f"{self.case.task}.json"
        path.unlink(missing_ok=True)
        return once(path, lambda: result)


def default_ways() -> list[str]:
    return ["whole", *SIMPLE[:2], "random", *SIMPLE[2:], *FADED, *(f"{way}+teacher" for way in (*FADED, *SIMPLE))]


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that both examples have."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ways", nargs="+")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--keep", type=int, nargs="+", help="blocks afterwards")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, help="folder for cells and models; of the page for report")
    options.add_argument("--cells", type=Path, nargs="+", help="report: folders with cells, or pages made before")
    options.add_argument("--save", action="store_true", help="keep the shortened models")
    options.add_argument("--quick", action="store_true", help="a tiny model, some seconds")
    return options


def run(study: Study, given: argparse.Namespace) -> None:
    """Train what is missing, cell by cell; by seed first, so that an interrupted run has whole seeds."""
    case = study.case
    settings = {"layers": case.layers, "batches": case.batches, "lr": case.lr, "teacher_weight": case.teacher_weight}
    settle(given.out / f"settings-{case.task}.json", **settings, tau_lr=case.tau_lr, weight_decay=case.weight_decay)
    for kept in given.keep:
        for seed in given.seeds:
            for way in given.ways or default_ways():
                figures = study.cell(kept, way, seed)
                last = ", ".join(f"{each['test']:.4f}" for each in figures["figures"])
                print(f"{case.task}, {case.layers} to {kept} blocks, {way}, seed {seed}: {last}", flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of the 95 % t-interval (NaN for a single value)."""
    n = len(values)
    half = math.nan if n < 2 else student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), half


def shown(values: Sequence[float], digits: int, signed: bool = False) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """The cells of one task and one depth: figures by way, budget and seed."""

    cells: list[Cell]
    page: "Page"

    def figures(self, way: str, budget: float) -> dict[int, float]:
        return {
            cell["seed"]: figure["test"]
            for cell in self.cells
            if cell["way"] == way
            for figure in cell["figures"]
            if figure["budget"] == budget
        }

    def ways(self) -> list[str]:
        there = {cell["way"] for cell in self.cells}
        return [w for w in self.page.ways if w in there] + sorted(there - set(self.page.ways))

    def differences(self, way: str, other: str, budget: float) -> list[float]:
        mine, others = self.figures(way, budget), self.figures(other, budget)
        return [mine[seed] - others[seed] for seed in sorted(mine.keys() & others.keys())]

    def best_simple(self, way: str, budget: float) -> str | None:
        """The best of the simple ways, those with a teacher among them if this one has one, on this one's seeds."""
        simple = self.page.simple
        others = [*simple, *(f"{each}+teacher" for each in simple if way.endswith("+teacher"))]
        seeds = self.figures(way, budget).keys()
        found = {other: self.figures(other, budget) for other in others}
        means = {o: statistics.fmean(f[s] for s in seeds) for o, f in found.items() if seeds and seeds <= f.keys()}
        return (max if self.page.higher else min)(means, key=means.__getitem__) if means else None


def kept_blocks(cells: Sequence[Cell], way: str) -> str:
    """The blocks that stayed, of each seed where they differ; of branches a: attention, m: MLP."""
    seen = []
    for cell in (c for c in cells if c["way"] == way):
        names = [f"{i // 2}{'am'[i % 2]}" if "-branch" in way else str(i) for i in cell["blocks"]]
        seen.append(" ".join(names))
    return ", ".join(dict.fromkeys(seen)) or "new"


def milliseconds(times: Cell | None, cell: Cell, size: int) -> float | None:
    """Of a forward pass of the cell's model, where it was measured."""
    measured = (times or {}).get(f"batch {size}", {})
    return measured.get(cell["way"] if "-branch" in cell["way"] else str(len(cell["blocks"]) or cell["kept"]))


def section(table: Table, times: Cell | None) -> list[str]:
    """The two tables of one task and depth."""
    measure, higher = table.page.measure, table.page.higher
    digits = 2 if higher else 4
    first = next(cell for cell in table.cells if cell["way"] != "whole")
    budgets = [figure["budget"] for figure in first["figures"]]
    head = " | ".join(f"{budget:g} epochs" for budget in budgets)
    lines = [
        f"| way | blocks | seeds | {head} | ms, batch 1 | ms, batch 32 |",
        "|---|---|---|" + "---|" * (len(budgets) + 2),
    ]
    for way in table.ways():
        mine = [cell for cell in table.cells if cell["way"] == way]
        figures = [shown(list(table.figures(way, budget).values()), digits) for budget in budgets]
        found = (milliseconds(times, mine[0], size) for size in (1, 32))
        taken = ["" if ms is None else f"{ms:.1f}" for ms in found]
        row = [way, kept_blocks(mine, way), str(len(mine)), *figures, *taken]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        f"Paired differences in {measure} to the best simple way at that budget "
        f"({'more' if higher else 'less'} is better):",
        "",
        f"| way | {head} |",
        "|---|" + "---|" * len(budgets),
    ]
    for way in (w for w in table.ways() if table.page.compared(w)):
        row = []
        for budget in budgets:
            best = table.best_simple(way, budget)
            row.append("" if best is None else f"{shown(table.differences(way, best, budget), digits, True)} ({best})")
        lines.append(f"| {way} | " + " | ".join(row) + " |")
    return lines


def draw(tables: dict[str, Table], times: dict[str, Cell], page: "Page", path: Path) -> None:
    """For each task and depth: the measure over milliseconds, where they were measured, and over the budgets."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = 2 if times else 1
    figure = Figure(figsize=(6 * columns + 1.5, 4.6 * len(tables)), layout="constrained")
    axes = figure.subplots(len(tables), columns, squeeze=False)
    for (name, table), (*lefts, right) in zip(tables.items(), axes, strict=True):
        measured = times.get(table.cells[0]["task"])
        ways = table.ways()
        budgets = [figure["budget"] for figure in table.cells[0]["figures"]]
        bases = list(dict.fromkeys(way.partition("+")[0] for way in ways))
        palette = colormaps["tab10" if len(bases) <= 10 else "tab20"]
        for place, way in enumerate(ways):
            base, _, taught = way.partition("+")
            style = {"color": palette(bases.index(base) % palette.N), "marker": "s" if taught else "o"}
            rows = [list(table.figures(way, budget).values()) for budget in budgets]
            means, halves = zip(*(interval(row) for row in rows), strict=True)
            right.plot(range(len(budgets)), means, linestyle="--" if taught else "-", label=way, **style, markersize=4)
            ms = milliseconds(measured, next(cell for cell in table.cells if cell["way"] == way), 32)
            for left in lefts if ms is not None else ():
                aside = 1 + 0.012 * (place - len(ways) / 2) * (way != "whole")
                half = 0.0 if math.isnan(halves[-1]) else halves[-1]
                left.errorbar(ms * aside, means[-1], yerr=half, linestyle="none", capsize=2, **style)
        label = f"{page.measure}, test"
        for left in lefts:
            left.set(title=name, ylabel=f"{label}, {budgets[-1]:g} epochs")
            left.set_xlabel("milliseconds, batch of 32, equal ones side by side")
            left.set_xlim(left=0)
        right.set(
            title=page.training if lefts else f"{name}, {page.training}",
            xlabel="epochs",
            ylabel=label,
            xticks=range(len(budgets)),
        )
        right.set_xticklabels([f"{budget:g}" for budget in budgets])
        shortest = [v for way in ways for b in budgets[1:] for v in table.figures(way, b).values() if way != "random"]
        room = 0.05 * (max(shortest) - min(shortest)) + 1e-9
        right.set_ylim(min(shortest) - room, max(shortest) + room)  # budget 0 and random weights lie far off
        for ax in (*lefts, right):
            ax.grid(alpha=0.3)
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)


def missing(
    cells: Sequence[Cell], tasks: Mapping[str, Sequence[int]], ways: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """What of the plan has not run: task, depth and way with the seeds that lack."""
    there = {(c["task"], c["kept"], c["way"], c["seed"]) for c in cells}
    whole = {(c["task"], c["seed"]) for c in cells if c["way"] == "whole"}
    lines = []
    for task, depths in tasks.items():
        for kept in depths:
            for way in ways:
                lack = [
                    seed
                    for seed in seeds
                    if ((task, seed) not in whole if way == "whole" else (task, kept, way, seed) not in there)
                ]
                if lack:
                    lines.append(f"- {task}, {kept} kept, {way}: seeds {', '.join(map(str, lack))}")
    return lines


@dataclass(frozen=True)
class Page:
    """What a page says besides its figures.

    Attributes:
        title: Its title.
        remarks: What was done, and how the page is made.
        measure: See :class:`Case`.
        higher: See :class:`Case`.
        plan: The depths by task.
        ways: In the order of their rows.
        simple: Those with which others are compared.
        compared: Which others.
        training: What the training is called.
    """

    title: str
    remarks: str
    measure: str
    higher: bool
    plan: Mapping[str, Sequence[int]]
    ways: Sequence[str] = tuple(default_ways())
    simple: Sequence[str] = SIMPLE
    compared: Callable[[str], bool] = lambda way: "-faded" in way or way.startswith("random")
    training: str = "healing"


def report(given: argparse.Namespace, page: Page) -> str:
    """The page: README.md, figure.png, and the cells and times of which alone it is made."""
    cells = read_cells(given.cells, "task", "kept", "way", "seed")
    write_cells(cells, given.out)
    files = [path for place in given.cells for path in sorted((place / "times").glob("*.json"))]
    times: dict[str, Cell] = {path.stem: json.loads(path.read_text()) for path in files}
    for task, figures in times.items():
        (given.out / "times").mkdir(exist_ok=True)
        (given.out / "times" / f"{task}.json").write_text(json.dumps(figures) + "\n")
    whole = [cell for cell in cells if cell["way"] == "whole"]
    tables: dict[str, Table] = {}
    for task, kept in dict.fromkeys((c["task"], c["kept"]) for c in cells if c["way"] != "whole"):
        mine = [c for c in cells if (c["task"], c["kept"]) == (task, kept) and c["way"] != "whole"]
        mine += [c for c in whole if c["task"] == task]
        tables[f"{task}, {next((c['kept'] for c in whole if c['task'] == task), '?')} to {kept} blocks"] = Table(
            mine, page
        )
    lines = [
        f"# {page.title}",
        "",
        textwrap.fill(page.remarks, 120, break_on_hyphens=False),
        "",
        "![figure](figure.png)",
    ]
    for name, table in tables.items():
        lines += ["", f"## {name}", "", *section(table, times.get(table.cells[0]["task"]))]
    lack = missing(cells, page.plan, page.ways, given.seeds)
    lines += ["", "## Not run", "", *(lack or ["Nothing: all cells of the plan are there."])]
    threads = {f"{t['threads']} thread{'s' * (t['threads'] > 1)}, {t['machine']}" for t in times.values()}
    versions = {c["torch"] for c in cells}
    lines += [
        "",
        f"Mean over seeds ± half of the 95 % t-interval, on the test part. Times: float32, "
        f"{', '.join(threads) or 'not measured'}. torch {', '.join(sorted(versions))}.",
    ]
    draw(tables, times, page, given.out / "figure.png")
    text = "\n".join(lines) + "\n"
    (given.out / "README.md").write_text(text)
    return text
