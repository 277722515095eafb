"""``--processes``: a command that runs in several processes of this machine, which train one network together."""

import logging
import os
import sys

from .options import UsageError


def started_here(processes: int) -> bool:
    """Whether this process is to start others, rather than to be one of them.

    Raises:
        UsageError: If the number is none.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        return False
    if processes < 1:
        raise UsageError(f"--processes must be an integer >= 1, got {processes}")
    return processes > 1


def launch(processes: int, arguments: list[str]) -> int:
    """Run the line in so many processes, and return the exit code: the first that is not 0.

    One that ends ends the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the commands say what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="taulearn",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "taulearn", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    except SignalException:  # which the processes got, too
        return 130
    return 0
