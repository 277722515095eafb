"""torch.compile for functions that change with the network."""

import contextlib
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

_COUNT = itertools.count()


def compile_once(
    function: Callable[..., Any], *, fused: bool = False, fallback: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Compile a function for one network structure.

    torch counts recompilations per code object and gives up after a few; each call here makes a code object of its own,
    so that any number of deletions compiles anew. When compilation fails (no C++ compiler, an operator the compiler
    does not know, too many recompilations) the function runs uncompiled from then on, with one warning that says why.

    Args:
        function: A function or bound method of tensors.
        fused: Whether it is a pure function of tensors, always of the same shapes and types: the C++ wrapper is used,
            and nothing is checked before a call.
        fallback: What computes the same where compilation fails. None: ``function``.

    Returns:
        The compiled function.

    Example:
        >>> compile_once(lambda x: x + 1)(torch.zeros(1))
        tensor([1.])
    """

    def call(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(
        call.__code__.replace(co_name=f"taulearn_step_{next(_COUNT)}"), call.__globals__, None, None, call.__closure__
    )
    options: dict[str, Any] = {"fallback_random": True}
    if fused:
        if not torch.cuda.is_available():
            options["cpp_wrapper"] = True
            options["cpp.min_chunk_size"] = 16384  # smaller kernels are done before a second thread has woken
            with contextlib.suppress(ImportError):  # a part of torch that may move
                from ._unfuse import UnfuseSums

                options["post_grad_custom_post_pass"] = UnfuseSums()
        if hasattr(torch.compiler, "skip_all_guards_unsafe"):  # the checks before each call cost as much as a layer
            options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    plain = function if fallback is None else fallback
    failed = False

    def run(*args: Any) -> Any:
        nonlocal failed
        if failed:
            return plain(*args)
        try:
            return compiled(*args)
        except Exception as error:  # noqa: BLE001  compilers raise anything; what is not their fault comes again
            failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"training goes on uncompiled, because compilation failed: {reason}", stacklevel=2)
        return plain(*args)

    return run
