"""Measurements that members of the tests' suites take; worker processes import them from here."""

import os
import signal
import time
from pathlib import Path


def die_once(folder: Path) -> dict[str, int]:
    """Kill the own process at the first attempt, as a machine that runs out of memory would."""
    marker = folder / "first attempt"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"attempt": 2}


def die(folder: Path) -> dict[str, int]:
    """Kill the own process at every attempt."""
    with (folder / "attempts").open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def fail(folder: Path) -> dict[str, int]:
    """Something is wrong with this member."""
    raise ValueError("nothing can be measured here")


def threads(folder: Path) -> dict[str, int]:
    """The number of threads torch computes with, and the process."""
    import torch

    time.sleep(0.2)
    return {"threads": torch.get_num_threads(), "process": os.getpid()}
