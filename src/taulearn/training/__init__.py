"""Training: ``fit``, the record, checkpoints and run folders."""

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from .._ranks import RankLost as RankLost, RanksDisagree as RanksDisagree
    from .events import (
        Diverged as Diverged,
        EpochEnd as EpochEnd,
        Interrupted as Interrupted,
        StopTraining as StopTraining,
    )
    from .fitting import fit as fit
    from .history import Deletion as Deletion, History as History
    from .metrics import accuracy as accuracy, evaluate as evaluate
    from .run_folder import Run as Run
    from .session import Session as Session

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        ".._ranks": ("RankLost", "RanksDisagree"),
        ".events": ("Diverged", "EpochEnd", "Interrupted", "StopTraining"),
        ".fitting": ("fit",),
        ".history": ("Deletion", "History"),
        ".metrics": ("accuracy", "evaluate"),
        ".run_folder": ("Run",),
        ".session": ("Session",),
    },
)
