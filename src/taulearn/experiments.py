"""Trainings described by their settings alone: read, check, run and resume them, one or many.

The names are resolved on first use, so that reading and checking settings does not import torch.

Example:
    >>> from taulearn.experiments import TrainConfig
    >>> TrainConfig(hidden_layers=8).lr
    0.01
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._errors import needs

if TYPE_CHECKING:
    from .app.config import TrainConfig as TrainConfig
    from .app.members import Member as Member
    from .app.results import Results as Results
    from .app.run_members import run_members as run_members
    from .app.train import Result as Result, resume as resume, train as train

__all__ = ["Member", "Result", "Results", "TrainConfig", "resume", "run_members", "train"]

_HOMES = {
    "Member": ".app.members",
    "Result": ".app.train",
    "Results": ".app.results",
    "TrainConfig": ".app.config",
    "resume": ".app.train",
    "run_members": ".app.run_members",
    "train": ".app.train",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs("app", "trainings described by settings"):
        value: object = getattr(import_module(_HOMES[name], __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
