"""torch.compile for functions that change with the network."""

import contextlib
import itertools
import os
import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..._errors import first_line

_COUNT = itertools.count()


COMPILE_PAYS_FROM = 40_000
"""Iterations ahead from which "auto" compiles: compiling takes some 20 s and saves about a millisecond an iteration."""


def worth_compiling(mode: str, ahead: int) -> tuple[bool, str]:
    """Whether to compile, and why."""
    if mode == "never":
        return False, "never (as asked)"
    if not _compiler_found():
        why = "eager: no C++ compiler was found (install g++, or set CXX)"
        if mode == "always" or ahead >= COMPILE_PAYS_FROM:
            warnings.warn(f"training runs {why}", stacklevel=6)
        return False, why
    if mode == "always":
        return True, "always (as asked)"
    answer = ahead >= COMPILE_PAYS_FROM
    kind = "compiled" if answer else "eager"
    return answer, f"{kind}: {ahead} iterations ahead, compiling pays from {COMPILE_PAYS_FROM}"


_OPTIONS: dict[str, Any] = {"fallback_random": True}


def _compiler_found() -> bool:
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
    return torch.cuda.is_available() or any(map(shutil.which, compilers))


def compile_once(
    function: Callable[..., Any],
    *,
    fused: bool = False,
    by_columns: bool = False,
    fallback: Callable[..., Any] | None = None,
    failed: Callable[[str], None] | None = None,
) -> Callable[..., Any]:
    """Compile a function for one network structure.

    torch counts recompilations per code object and gives up after a few; each call here makes a code object of its own,
    so that any number of deletions compiles anew. When compilation fails (no C++ compiler, an operator the compiler
    does not know, too many recompilations) the function runs uncompiled from then on, with one warning that says why.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(
        call.__code__.replace(co_name=f"taulearn_step_{next(_COUNT)}"), call.__globals__, None, None, call.__closure__
    )
    ways = _options_of_fused(by_columns=by_columns) if fused else [_OPTIONS]
    plain = function if fallback is None else fallback
    compiled: Callable[..., Any] | None = None
    works = False

    def run(*args: Any) -> Any:
        nonlocal compiled, works
        while ways:
            try:
                if compiled is None:
                    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=ways[0])
                result = compiled(*args)
                works = True
                return result
            except Exception as error:  # compilers raise anything; what is not their fault comes again
                if fused and works:  # it may have changed its arguments, and nothing is compiled any more
                    raise
                del ways[0]
                compiled = None
                reason = first_line(error)
            if not ways:
                if failed is not None:
                    failed(reason)
                warnings.warn(f"training goes on uncompiled, because compilation failed: {reason}", stacklevel=2)
        return plain(*args)

    return run


def _options_of_fused(*, by_columns: bool) -> list[dict[str, Any]]:
    """The options of torch.compile for fused steps, the fastest first; the next are for where those fail."""
    options = dict(_OPTIONS)
    if hasattr(torch.compiler, "skip_all_guards_unsafe"):  # the checks before each call cost as much as a layer
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    if torch.cuda.is_available():
        return [options]
    options["cpp_wrapper"] = True
    options["cpp.min_chunk_size"] = 4096  # smaller kernels are done before a second thread has begun
    with contextlib.suppress(ImportError):  # parts of torch that may move
        from .layout import Layout
        from .products import options as options_of_products

        products = options_of_products()
        return [
            options | more | {"post_grad_custom_post_pass": Layout(by_columns=by_columns, products=bool(more))}
            for more in ([products, {}] if products else [{}])
        ]
    return [options]
