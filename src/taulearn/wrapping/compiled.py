"""Training steps of wrapped blocks on a CPU, in place and in one pass, by step.cpp.

By torch's operations a step goes six times through the state of a block, and keeps one state more for the backward
pass; beside small convolutions that is 3 to 7 % of a training step.
"""

import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _native

SOURCE = Path(__file__).with_name("step.cpp")
COMPILE = ("auto", "always", "never")
LEAST = 2**13
"""Elements of a state from which "auto" compiles: what stays in a first-level cache of 32 kB gains nothing."""


def least_elements(compile: str) -> float:  # noqa: A002  as in fit
    """The size of a state from which steps are taken by step.cpp.

    Args:
        compile: "auto", "always" or "never".

    Example:
        >>> least_elements("always"), least_elements("never")
        (0, inf)
    """
    if compile == "always":
        return 0
    return LEAST if compile == "auto" and _native.compiler_found() else float("inf")


@functools.cache
def load() -> Callable[..., bool] | None:
    """The function of step.cpp; None where it cannot be compiled, of which a warning tells."""
    return _native.load(
        SOURCE,
        _function,
        "wrapped blocks are trained some per cent slower",
        extra_flags=("-ffp-contract=fast",),  # as in torch.lerp
        needs_vec_isa=False,  # finding out what the processor has takes as long as the rest
    )


def _function(path: str) -> Callable[..., bool]:
    loader = importlib.machinery.ExtensionFileLoader("taulearn_step", path)
    spec = importlib.util.spec_from_loader("taulearn_step", loader, origin=path)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    step: Callable[..., bool] = module.step
    return step
