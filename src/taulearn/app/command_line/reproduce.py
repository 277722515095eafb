"""``taulearn reproduce``: a suite that another distribution offers, by an entry point of the group ``taulearn.suites``.

What an entry point names is an object with a method ``reproduce``, which takes the options. The papers' suites are in
the distribution ``taulearn-papers``.
"""

import importlib.metadata
import warnings
from dataclasses import dataclass
from typing import Annotated, Protocol

import tyro

from ..._errors import unknown_name
from .options import UsageError
from .sweep import Address, EngineChoice, Workers, about, check_engine


class Suite(Protocol):
    """A suite, as entry points of the group name it."""

    def reproduce(self, options: "Reproduce") -> None:
        """Train, judge and draw as the command line says."""


def installed_suites() -> dict[str, Suite]:
    """The suites of all distributions, by name; what cannot be loaded, or has a name again, is left out."""
    found: dict[str, Suite] = {}
    first: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group="taulearn.suites"):
        if entry.name in found:
            warnings.warn(
                f"suite {entry.name!r} is {_of(first[entry.name])}; that {_of(entry)} is left out: "
                "uninstall one of the two",
                stacklevel=2,
            )
            continue
        try:
            suite = entry.load()
            if not callable(getattr(suite, "reproduce", None)):
                raise TypeError(f"it must have a method reproduce, got {type(suite).__name__}")
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever is wrong with one, the others go on
            warnings.warn(
                f"suite {entry.name!r} is left out: {entry.value} cannot be loaded ({type(error).__name__}: {error})",
                stacklevel=2,
            )
        else:
            found[entry.name], first[entry.name] = suite, entry
    return dict(sorted(found.items()))


def _of(entry: importlib.metadata.EntryPoint) -> str:
    """Where an entry point is from, for warnings."""
    return f"{entry.value} of {'an unknown distribution' if entry.dist is None else entry.dist.name}"


@dataclass(frozen=True)
class Reproduce:
    """Train what a paper's claims need, judge them, draw its figures; what is trained already is not trained again."""

    suite: Annotated[
        tyro.conf.Positional[str],
        about("herberg2023, antil2022, puettschneider2025, adaptive, beyond of taulearn-papers; or another.", "SUITE"),
    ]
    quick: Annotated[bool, about("Minutes instead of hours: few epochs, few seeds.")] = False
    seeds: Annotated[int | None, about("Seeds of each setting; the suite's own number unless given.", "INT")] = None
    figure: Annotated[str | None, about("Only this figure, and the trainings that it needs.", "NUMBER")] = None
    table: Annotated[str | None, about("Only this table, and the trainings that it needs.", "NUMBER")] = None
    all: Annotated[
        bool, about("Verdicts, all figures, all tables and the report, as without --figure and --table.")
    ] = False
    out: Annotated[
        str | None, about("Folder of records and results; results/SUITE, or results/SUITE-quick, unless given.", "DIR")
    ] = None
    workers: Workers = None
    engine: EngineChoice = "processes"
    address: Address = None
    data: Annotated[
        tuple[str, ...],
        about("Train on data of your own in the place of named sets, as in cifar10=./FOLDER.", "NAME=PATH"),
    ] = ()
    train: Annotated[bool, about("Train what is missing; --no-train judges what is there.")] = True
    keep: Annotated[str | None, about("Folder for what is worth keeping: verdicts, figures, small records.", "DIR")] = (
        None
    )

    def __call__(self) -> None:
        from ..run_members import INSTALL_PAPERS

        if self.seeds is not None and self.seeds < 1:
            raise UsageError(f"--seeds must be >= 1, got {self.seeds}")
        if self.all and (self.figure or self.table):
            raise UsageError(
                "--all must stand without --figure and --table, which draw one alone: leave one of them out"
            )
        suites = installed_suites()
        if not suites:
            raise UsageError(f"SUITE must be installed, got {self.suite!r}, and there is none: {INSTALL_PAPERS}")
        if self.suite not in suites:
            elsewhere = "" if "herberg2023" in suites else f"; the papers' are not installed: {INSTALL_PAPERS}"
            raise UsageError(f"{unknown_name('SUITE', self.suite, suites)}{elsewhere}")
        check_engine(self.engine, self.workers, self.address)
        suites[self.suite].reproduce(self)
