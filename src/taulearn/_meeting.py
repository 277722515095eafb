"""How processes find each other: those that torchrun started, or for which torch.distributed was initialised."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ._errors import first_line
from ._ranks import TIMEOUT

_PATIENCE = timedelta(hours=24)


def groups() -> tuple[Any, Any]:
    """Groups for gradients and for control of the processes that torchrun started, or that know each other already.

    None twice where this process is alone.
    """
    if not dist.is_available():
        return None, None
    if not dist.is_initialized():
        environment = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        if not environment <= os.environ.keys() or int(os.environ["WORLD_SIZE"]) < 2:
            return None, None
        _initialise()
    if dist.get_world_size() == 1:
        return None, None
    try:
        gradients, control = dist.new_group(timeout=TIMEOUT), dist.new_group(backend="gloo", timeout=_PATIENCE)
        dist.monitored_barrier(control, TIMEOUT)  # one that is refused at once must not leave while another connects
        return gradients, control
    except RuntimeError as error:
        raise ConnectionError(f"the processes of this training do not find each other: {first_line(error)}") from error


def _initialise() -> None:
    """Join the processes named in the environment, as torchrun sets it."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(timeout=TIMEOUT)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise ConnectionError(
                f"{where}, where the processes of this training are to meet, is in use by another program: choose "
                "another port (torchrun --master-port, or MASTER_PORT), or let torchrun find one (--standalone)"
            ) from error
        raise ConnectionError(
            f"the processes of this training do not find each other at {where}: {first_line(error)}. Start all of "
            "them, and choose another MASTER_PORT where another program listens there"
        ) from error
