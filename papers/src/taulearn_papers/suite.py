"""Parts of a suite: members that are trained and measured, claims that are judged, figures that are drawn.

A member is one training (or one measurement) with its seed. A claim is a function from the records of the members to a
verdict, with thresholds that were written down, with their reasons, before the training. No verdict is typed in.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from taulearn.app.command_line.reproduce import Reproduce
    from taulearn.app.members import Member
    from taulearn.app.results import Results
    from taulearn.training.history import Array

Outcome = Literal["holds", "holds in part", "does not hold", "open", "not measured"]


Parts = dict[str, bool]
Figures = dict[str, float | str]

SEPARATOR = " — "
"""Between what holds and what does not, in the sentence of a verdict."""


@dataclass(frozen=True)
class Verdict:
    """The answer of the records to a claim.

    Args:
        outcome: "holds", "holds in part", "does not hold", "open" or "not measured".
        sentence: One sentence that says which parts hold.
        figures: The measured figures behind it, by name.

    Example:
        >>> Verdict.of({"MNIST": True, "Fashion-MNIST": False}, {"difference": 0.01}).sentence
        'holds: MNIST — does not hold: Fashion-MNIST'
    """

    outcome: Outcome
    sentence: str
    figures: Mapping[str, float | str] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, bool | None], figures: Mapping[str, float | str]) -> "Verdict":
        """The verdict on a claim that has parts: all hold, some do, none does, or the records tell of none.

        Args:
            parts: For each part of the claim, in words, whether it holds; None where the records do not tell.
            figures: The measured figures.

        Raises:
            ValueError: If there is no part.
        """
        if not parts:
            raise ValueError("parts must hold at least one part of the claim, got none")
        found: dict[Outcome, list[str]] = {"holds": [], "open": [], "does not hold": []}
        for part, holds in parts.items():
            found["open" if holds is None else "holds" if holds else "does not hold"].append(part)
        there = [answer for answer, of in found.items() if of]
        outcome: Outcome = there[0] if len(there) == 1 else "holds in part" if found["holds"] else "does not hold"
        return cls(outcome, SEPARATOR.join(f"{each}: {'; '.join(found[each])}" for each in there), dict(figures))


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper and the function that judges it.

    Attributes:
        id: Short name, for instance "H1".
        statement: What is claimed, and where.
        judge: From records to the verdict; raises :class:`~taulearn.app.results.NotMeasured` where they are
            missing.

    Example:
        >>> from taulearn.app.results import Results
        >>> claim = Claim("X1", "two seeds were trained", lambda r: Verdict.of({"two": len(r.seeds("a")) == 2}, {}))
        >>> claim.verdict(Results("nowhere")).outcome
        'not measured'
    """

    id: str
    statement: str
    judge: "Callable[[Results], Verdict]"

    def verdict(self, results: "Results") -> Verdict:
        """The verdict; "not measured" where records are missing.

        Args:
            results: The records.
        """
        from taulearn.app.results import NotMeasured

        try:
            return self.judge(results)
        except NotMeasured as missing:
            return Verdict("not measured", str(missing))


@dataclass(frozen=True)
class Suite:
    """The reproduction of one paper.

    Attributes:
        name: As on the command line.
        title: The paper.
        members: From (quick, number of seeds or None for the suite's own) to the members, the most telling first.
        claims: What is judged.
        figures: Functions from records to matplotlib figures, by their numbers in the paper.
        tables: Functions from records to Markdown tables, by their numbers in the paper.
        needs: Patterns of the settings that a figure or a table needs, by its number; without any, all of them.
        shown: What makes the arrays that a figure shows besides records, by its number.
        kept: Patterns of the columns of records that are kept, such as "epoch/*"; a long suite does not keep all.

    Example:
        >>> from taulearn_papers.herberg2023 import SUITE as suite
        >>> len(suite.needed(suite.members(True, 1), ["4.1"])), len(suite.needed(suite.members(True, 1), []))
        (8, 43)
    """

    name: str
    title: str
    members: "Callable[[bool, int | None], list[Member]]"
    claims: tuple[Claim, ...]
    figures: "Mapping[str, Callable[[Results], Figure]]" = field(default_factory=dict)
    tables: "Mapping[str, Callable[[Results], str]]" = field(default_factory=dict)
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shown: "Mapping[str, Callable[[Results], Mapping[str, Array]]]" = field(default_factory=dict)
    kept: tuple[str, ...] = ("*",)

    def reproduce(self, options: "Reproduce") -> None:
        """Train, judge and draw, as ``taulearn reproduce`` does.

        Args:
            options: Those of the command line.
        """
        from .reproduce import reproduce

        reproduce(self, options)

    def needed(self, members: "Sequence[Member]", numbers: Collection[str]) -> "list[Member]":
        """The members that figures and tables need.

        Args:
            members: Of this suite.
            numbers: Of the figures and tables; none means everything.
        """
        if not numbers or not all(number in self.needs for number in numbers):
            return list(members)
        patterns = [pattern for number in numbers for pattern in self.needs[number]]
        return [member for member in members if any(fnmatchcase(member.setting, pattern) for pattern in patterns)]


def generalisation(folder: Path) -> dict[str, float]:
    """Loss and accuracy of the trained network on the training data and on the test data.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig, train
        >>> result = train(TrainConfig(width=8, epochs=1, run=tempfile.mkdtemp()), progress=False)
        >>> sorted(generalisation(result.run.path))
        ['test.accuracy', 'test.loss', 'train.accuracy', 'train.loss']
    """
    from taulearn.app import build
    from taulearn.app.train import settings_of
    from taulearn.saving import load_model
    from taulearn.training import Run, evaluate

    config = settings_of(Run.open(folder))
    splits = build.load_splits(config)
    loss = build.make_loss(config, classes=splits.classes is not None)[1]
    model = load_model(folder)
    return {
        f"{name}.{figure}": value
        for name, split in (("train", splits.train), ("test", splits.test))
        for figure, value in evaluate(model, tuple(split), loss=loss).items()
    }
