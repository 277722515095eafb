"""Deep networks as time-discretised dynamical systems whose step sizes are learned.

The public names are resolved on first use (PEP 562), so that `import taulearn` alone imports neither torch nor any
other dependency, and `taulearn --help` answers at once.

Example:
    >>> import taulearn
    >>> taulearn.TimeSteps(4, horizon=2.0).tau.tolist()
    [0.5, 0.5, 0.5, 0.5]
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
        adjoint as adjoint,
        calibration as calibration,
        caputo as caputo,
        data as data,
        diagnostics as diagnostics,
        experiments as experiments,
        export as export,
        fem as fem,
        functional as functional,
        nn as nn,
        optim as optim,
        penalties as penalties,
        report as report,
        training as training,
        wrapping as wrapping,
    )
    from .adaptivity.coarsen import PruneReport as PruneReport, prune as prune
    from .adaptivity.estimate import contribution as contribution
    from .adaptivity.policies import Pruning as Pruning
    from .depth.truncate import truncate as truncate
    from .diagnostics import summary as summary
    from .export import export_model as export_model
    from .nn.time_steps import TimeSteps as TimeSteps
    from .optim import parameter_groups as parameter_groups
    from .saving import load_model as load_model, save_model as save_model
    from .training import History as History, fit as fit
    from .training.attaching import attach as attach
    from .wrapping import unwrap as unwrap, wrap as wrap

__version__ = "0.1.0"

__all__ = [
    "History",
    "PruneReport",
    "Pruning",
    "TimeSteps",
    "__version__",
    "adjoint",
    "attach",
    "calibration",
    "caputo",
    "contribution",
    "data",
    "diagnostics",
    "experiments",
    "export",
    "export_model",
    "fem",
    "fit",
    "functional",
    "load_model",
    "nn",
    "optim",
    "parameter_groups",
    "penalties",
    "prune",
    "report",
    "save_model",
    "summary",
    "training",
    "truncate",
    "unwrap",
    "wrap",
    "wrapping",
]

# Where the names of __all__ live that are not modules themselves.
_HOMES = {
    "History": ".training",
    "PruneReport": ".adaptivity.coarsen",
    "Pruning": ".adaptivity.policies",
    "TimeSteps": ".nn.time_steps",
    "attach": ".training.attaching",
    "contribution": ".adaptivity.estimate",
    "export_model": ".export",
    "fit": ".training",
    "load_model": ".saving",
    "parameter_groups": ".optim",
    "prune": ".adaptivity.coarsen",
    "save_model": ".saving",
    "summary": ".diagnostics",
    "truncate": ".depth.truncate",
    "unwrap": ".wrapping",
    "wrap": ".wrapping",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value: object = getattr(import_module(_HOMES[name], __name__), name)
    elif name in __all__:
        value = import_module(f".{name}", __name__)
    else:
        nearest = get_close_matches(name, __all__, n=1)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
