"""C++ of our own, compiled where it is used first, by the compiler that torch.compile needs, and kept in its cache."""

import inspect
import os
import platform
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def compiler_found() -> bool:
    """Whether there is a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))


def load(source: Path, use: Callable[[str], T], without: str, **options: Any) -> T | None:
    """Compile a file, unless it was before, and take it into use.

    Args:
        source: The file.
        use: Gets the path of the library.
        without: What is true where this fails: the first words of a warning.
        options: Of torch's compiler; those that it does not know yet are left out.

    Returns:
        What ``use`` returned; None where it or the compilation failed, of which a warning tells.
    """
    try:
        from torch._inductor.codecache import CppCodeCache

        known = inspect.signature(CppCodeCache.load_async).parameters
        options = {name: value for name, value in options.items() if name in known}
        # kept libraries are found by the text and the options alone
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        key = f"// torch {torch.__version__}, Python {platform.python_version()}, {processor}\n"
        text = key + source.read_text("utf-8")
        return use(CppCodeCache.load(text, device_type="cpu", **options)._name)
    except Exception as error:  # noqa: BLE001  compilers raise anything, and torch does without
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error: " in line), lines[0])
        warnings.warn(
            f"{without}, as {source.name} did not compile: {reason} (install a current g++ or set CXX; set "
            "TORCHINDUCTOR_CACHE_DIR where the cache cannot be written)",
            stacklevel=3,
        )
        return None
