"""The commands that train many members: ``taulearn reproduce`` and ``taulearn sweep``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .options import UsageError
from .output import say, table

Engine = Literal["serial", "processes"]


def _about(text: str, metavar: str | None = None) -> object:
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Reproduce:
    """Train the members of a paper's suite, and say which of its claims hold."""

    suite: Annotated[
        tyro.conf.Positional[str], _about("herberg2023, antil2022, puettschneider2025 or beyond.", "SUITE")
    ]
    quick: Annotated[bool, _about("Minutes instead of hours: few epochs, two seeds.")] = False
    seeds: Annotated[int | None, _about("Seeds of each setting; the suite's own number unless given.", "INT")] = None
    out: Annotated[
        str | None, _about("Folder of records and results; results/SUITE, or results/SUITE-quick, unless given.", "DIR")
    ] = None
    workers: Annotated[int | None, _about("Processes; one per core unless given.", "INT")] = None
    engine: Annotated[Engine, _about("How members are run.")] = "processes"
    train: Annotated[bool, _about("Train what is missing; --no-train judges what is there.")] = True

    def __call__(self) -> None:
        from ..experiments import suites
        from ..experiments.reproduce import judge, write_claims
        from ..experiments.results import Results
        from ..experiments.runner import run_members
        from ..experiments.watch import Watch

        if self.suite not in suites.NAMES:
            raise UsageError(f"suite must be one of {', '.join(suites.NAMES)}, got {self.suite!r}")
        for name in ("seeds", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name} must be >= 1, got {getattr(self, name)}")
        suite = suites.load(self.suite)
        out = Path(self.out or f"results/{self.suite}{'-quick' * self.quick}")
        if self.train:
            members = suite.members(self.quick, self.seeds)
            say(f"{suite.title}\n{len(members)} members in {out}")
            watch = Watch(members, out)
            outcome = run_members(members, out, engine=self.engine, workers=self.workers, on_event=watch)
            watch.close(outcome)
        judged = judge(suite, Results(out))
        out.mkdir(parents=True, exist_ok=True)
        files = write_claims(judged, out)
        table(
            [
                ("claim", "verdict", "what holds"),
                *((each.id, each.verdict.outcome, each.verdict.sentence) for each in judged),
            ]
        )
        say(f"written: {', '.join(map(str, files))}")
