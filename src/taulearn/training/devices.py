"""Whether a device is there and computes, and on what machine."""

import os
import platform
from pathlib import Path

import torch

from .._errors import first_line


def usable_device(argument: str, device: torch.device | str) -> torch.device:
    """The device that a caller names, after it has computed something."""
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        float(torch.ones(2, device=found).sum())
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = _reason(error)
        raise ValueError(
            f"{argument} must be one that is there, got {str(device)!r} ({reason}): "
            f"{'cpu and cuda are' if torch.cuda.is_available() else 'cpu is'} there; or leave it out"
        ) from error
    return found


def machine() -> str:
    """The machine that computes: system, processor, cores, GPU."""
    parts = [f"{platform.system()} {platform.machine()}", _processor(), f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(filter(None, parts))


def _processor() -> str:
    """The processor's model: Linux says it in a file, elsewhere Python may know."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _reason(error: BaseException) -> str:
    """torch's reason, as far as it is one."""
    text = first_line(error).rstrip(".")
    if text.startswith("Expected one of"):
        return "torch knows no such device"
    return "torch here has no such backend" if "aten::" in text or isinstance(error, ImportError) else text[:100]
