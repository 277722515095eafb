"""The commands of ``taulearn``: each a dataclass whose fields are its arguments, and whose call does it."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro

from .one_line_errors import check_names, in_one_line
from .options import UsageError, numbers_option, option_groups, settings_from, settings_in, spelled
from .output import figure, say, table, watched
from .reproduce import Reproduce
from .sweep import Sweep, about

Processes = Annotated[
    int | None, about("Train in so many processes of this machine, each with its share of every batch.", "INT")
]
RunFolder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="Folder of the run.")]


class Command(Protocol):
    """The interface of every command."""

    def __call__(self) -> None:
        """Do it."""


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted training from its last checkpoint."""

    run: RunFolder
    epochs: Annotated[
        Any,
        about("Number of epochs in all, to train longer than was planned; as it was unless given."),
        numbers_option("INT", int, spaces=False),
    ] = None
    processes: Processes = None

    def __call__(self) -> None:
        if self.epochs is not None and not (isinstance(self.epochs, int) and self.epochs >= 1):
            raise UsageError(f"--epochs must be an integer >= 1, got {self.epochs!r}")
        from ...training import Run
        from ..train import resume

        run = Run.open(self.run)
        # A record that is missing or damaged is no obstacle: the checkpoints hold it, too.
        with contextlib.suppress(FileNotFoundError, ValueError):
            epochs = self.epochs or run.config.get("epochs")
            say(f"{len(run.history.epochs['iteration']) - 1} of {epochs} epochs are done")
        watched(lambda on_start: resume(self.run, epochs=self.epochs, on_start=on_start))


@dataclass(frozen=True)
class Prune:
    """Delete layers of a trained network, and compare it before and after."""

    run: RunFolder
    threshold: Annotated[
        float | None, about("Delete layers whose share of sum |tau| is smaller; 0.01 unless given.", "FLOAT")
    ] = None
    keep: Annotated[
        Any,
        about("Keep these layers, by their numbers at the start, instead."),
        numbers_option("INT,...", int, spaces=False),
    ] = None
    depth: Annotated[
        str | None,
        about(
            "Keep the first layers instead: so many, or as few as lose no more accuracy on the validation data "
            "than --tolerance allows.",
            "INT|auto",
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        about(
            "For --depth auto: accuracy that may be lost, 0.002 (0.2 points) unless given; without classes, the "
            "share by which the loss may grow.",
            "FLOAT",
        ),
    ] = None
    by_stage: Annotated[
        bool, tyro.conf.arg(help="For --depth auto: keep the first layers of each stage, which all remain.")
    ] = False
    out: Annotated[str | None, about("Folder for the pruned network; RUN/pruned unless given.", "DIR")] = None
    overwrite: Annotated[bool, tyro.conf.arg(help="Replace a network that is in that folder.")] = False

    def __call__(self) -> None:
        given = [f"--{name}" for name in ("threshold", "keep", "depth") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} must not be given together: leave all but one out")
        if self.depth != "auto" and (self.tolerance is not None or self.by_stage):
            name = "--by-stage" if self.by_stage else "--tolerance"
            raise UsageError(f"{name} must be left out without --depth auto")
        if self.depth is not None:
            self._cut(self.depth)
            return
        keep = self.keep if self.keep is None or isinstance(self.keep, tuple) else (self.keep,)
        if keep is not None and not all(isinstance(layer, int) for layer in keep):
            raise UsageError(f"--keep must name layers by number, got {', '.join(map(str, keep))}: for instance 0,2,5")
        from ..finished_runs import prune_run

        out = Path(self.run) / "pruned" if self.out is None else Path(self.out)
        result = prune_run(self.run, out, threshold=self.threshold, keep=keep, overwrite=self.overwrite)
        _compare(result, out)
        if not result.report and result.least is not None:
            layer, share = result.least
            say(f"layer {layer} has the smallest share, {share:.3g}: a larger --threshold, or --keep, deletes it")

    def _cut(self, depth: str) -> None:
        if depth != "auto" and not depth.isdecimal():
            raise UsageError(f"--depth must be a number of layers or auto, got {depth!r}")
        from ..finished_runs import cut_run

        out = Path(self.run) / "pruned" if self.out is None else Path(self.out)
        result = cut_run(
            self.run,
            out,
            depth="auto" if depth == "auto" else int(depth),
            tolerance=0.002 if self.tolerance is None else self.tolerance,
            by_stage=self.by_stage,
            overwrite=self.overwrite,
        )
        if result.decision is not None:
            data = {"test": "test data: this set has no validation data", "validation": "validation data"}
            say(f"{result.decision.profile}\n\n{result.decision} ({data[result.chosen_on]})")
        _compare(result, out)


def _compare(result: Any, out: Path) -> None:
    """Say what was deleted, and how the network was before and is now."""
    say(result.report)
    if result.report:
        rows = [figure(name, value, result.after[name]) for name, value in reversed(result.before.items())]
        table([*rows, ("network", str(out))])


@dataclass(frozen=True)
class Report:
    """Draw the report of a run anew, or one report that compares several runs."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...", help="Folders of the runs.")
    ]
    out: Annotated[
        str | None,
        about("The file; report.html in the run's folder unless given, comparison.html here for several runs.", "FILE"),
    ] = None

    def __call__(self) -> None:
        if not self.runs:
            raise UsageError("report needs the folder of a run: taulearn report RUN ...")
        from ...report import write_html
        from ...training import Run

        if self.out is not None and Path(self.out).is_dir():
            file = Path(self.out) / "report.html"
            raise UsageError(f"--out must be a file, got the folder {self.out!r}: write for instance --out {file}")
        runs = [Run.open(folder) for folder in self.runs]
        default = runs[0].report_path if len(runs) == 1 else Path("comparison.html")
        say(f"report: {write_html(runs, default if self.out is None else self.out)}")


@dataclass(frozen=True)
class Export:
    """Write the network of a run as a file (onnx and torch run without this package) and check it on random inputs."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    format: Annotated[
        Literal["onnx", "torch", "safetensors"],
        tyro.conf.arg(
            help="onnx: for onnxruntime and others; torch: for torch.export.load; safetensors: weights and "
            "architecture, for taulearn.load_model."
        ),
    ] = "onnx"
    out: Annotated[str | None, about("Folder for the files; RUN/export/FORMAT unless given.", "DIR")] = None
    overwrite: Annotated[bool, tyro.conf.arg(help="Replace an export that is in that folder.")] = False

    def __call__(self) -> None:
        from ..finished_runs import export_run

        out = Path(self.run) / "export" / self.format if self.out is None else Path(self.out)
        exported = export_run(self.run, out, format=self.format, overwrite=self.overwrite)
        table([*exported.rows(), ("manifest", str(exported.manifest))])


@dataclass(frozen=True)
class Data:
    """List the data sets, download one, or verify its files."""

    action: Annotated[
        tyro.conf.Positional[Literal["list", "fetch", "verify"]],
        tyro.conf.arg(help="list: what there is and where; fetch: download and check; verify: check."),
    ] = "list"
    names: Annotated[tyro.conf.Positional[tuple[str, ...]], about("Data sets to fetch or verify.", "NAME ...")] = ()
    root: Annotated[
        str | None, about("Folder of the files; $TAULEARN_DATA or the user's cache unless given.", "DIR")
    ] = None

    def __call__(self) -> None:
        if self.action == "list" and self.names:
            raise UsageError(f"data list takes no names, got {' '.join(self.names)}: did you mean fetch or verify?")
        if self.action != "list" and not self.names:
            raise UsageError(f"data {self.action} needs the name of a data set: `taulearn data list` has them")
        from ... import data

        if self.action == "list":
            rows = [("name", "kind", "samples", "input", "classes", "location")]
            for row in data.describe(root=self.root):
                samples = ", ".join(f"{number:,} {split}" for split, number in row.samples.items())
                shape = " x ".join(map(str, row.shape))
                rows.append((row.name, row.kind, samples, shape, str(row.classes or "-"), row.location))
            table(rows)
            return
        for name in self.names:
            files = (data.fetch if self.action == "fetch" else data.verify)(name, root=self.root)
            where = f"{len(files)} files in {files[0].parent} are in order" if files else "built in, there is no file"
            say(f"{name}: {where}")


def commands(defaults: Mapping[str, Any]) -> dict[str, type]:
    """All commands, by name."""
    file = about("Settings to start from: a run's run.toml, or TOML with one key for each option.", "FILE")
    train = make_dataclass(
        "Train",
        [
            ("config", Annotated[str | None, file], field(default=None)),
            ("processes", Processes, field(default=None)),
            *option_groups(defaults),
        ],
        frozen=True,
        namespace={"__call__": _train, "__doc__": "Train a network with learned time steps, and prune it on the way."},
    )
    return {
        "train": train,
        "resume": Resume,
        "prune": Prune,
        "report": Report,
        "export": Export,
        "reproduce": Reproduce,
        "sweep": Sweep,
        "data": Data,
    }


def parse(argv: list[str]) -> Command:
    """The command that a line stands for; options come before the settings of a file that it names."""

    def parsed(defaults: Mapping[str, Any]) -> Any:
        kinds = commands(defaults)
        check_names(argv, kinds)
        union: Any = reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()))
        with in_one_line():
            return tyro.cli(
                union,
                prog="taulearn",
                description="Neural networks that learn their time steps and prune their own layers while they train.",
                args=argv,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
            )

    command = parsed({})
    file = getattr(command, "config", None)
    return command if file is None else parsed(settings_in(file))


def _train(options: Any) -> None:
    config = settings_from(options)
    from ..train import train

    try:
        watched(lambda on_start: train(config, on_start=on_start))
    except ValueError as error:
        raise ValueError(spelled(str(error))) from error
    except ArithmeticError as error:
        raise ArithmeticError(spelled(str(error))) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise type(error)(spelled(str(error))) from error
