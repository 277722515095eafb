"""Deep networks as time-discretised dynamical systems whose step sizes are learned.

The public names are resolved on first use (PEP 562), so that `import taulearn` alone imports neither torch nor any
other dependency, and `taulearn --help` answers at once.

Example:
    >>> import taulearn
    >>> taulearn.TimeSteps(4, horizon=2.0).tau.tolist()
    [0.5, 0.5, 0.5, 0.5]
"""

from typing import TYPE_CHECKING

from ._lazy import lazily

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
    from .adaptivity.criteria import contribution as contribution
    from .adaptivity.estimate import Criterion as Criterion
    from .adaptivity.policies import Pruning as Pruning
    from .adaptivity.refine import RefineReport as RefineReport, refine as refine
    from .adaptivity.refiner import Refinement as Refinement
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

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        ".": (
            *("adjoint", "calibration", "caputo", "data", "diagnostics", "experiments", "export", "fem"),
            *("functional", "nn", "optim", "penalties", "report", "training", "wrapping"),
        ),
        ".adaptivity.coarsen": ("PruneReport", "prune"),
        ".adaptivity.criteria": ("contribution",),
        ".adaptivity.estimate": ("Criterion",),
        ".adaptivity.policies": ("Pruning",),
        ".adaptivity.refine": ("RefineReport", "refine"),
        ".adaptivity.refiner": ("Refinement",),
        ".depth.truncate": ("truncate",),
        ".diagnostics": ("summary",),
        ".export": ("export_model",),
        ".nn.time_steps": ("TimeSteps",),
        ".optim.groups": ("parameter_groups",),
        ".saving": ("load_model", "save_model"),
        ".training": ("History", "fit"),
        ".training.attaching": ("attach",),
        ".wrapping": ("unwrap", "wrap"),
    },
)
__all__ += ["__version__"]
