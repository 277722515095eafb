"""Members on the machines of a Ray cluster, or on an embedded one in this machine.

Every machine must see the suite's folder under the same path and have the same version of this package. A member whose
worker or machine dies is run again, from its checkpoint, on another one.
"""

import contextlib
import importlib.util
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from taulearn.app.members import Event, Member, Report
from taulearn.app.processes import ATTEMPTS
from taulearn.app.run_members import Options

ANSWER_SECONDS = 10.0
"""How long the machine of a cluster may take to answer."""

JOIN_SECONDS = 30.0
"""How long it may take to join the cluster."""

_JOIN = """
import logging, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(1)
"""


def run(members: Sequence[Member], out: Path, report: Report, options: Options) -> None:
    """Run all members as tasks of one core each."""
    with _cluster(options) as ray:
        task = ray.remote(num_cpus=options.threads, max_retries=ATTEMPTS - 1)(_work)
        names: dict[Any, Member] = {}
        for member in members:
            names[task.remote(member, str(out.resolve()), options.threads)] = member
        try:
            while names:
                ready, _ = ray.wait(list(names), num_returns=1)
                member = names.pop(ready[0])
                report(_result(ray, ready[0], member))
        except KeyboardInterrupt:
            for waiting in names:
                ray.cancel(waiting)
            with contextlib.suppress(Exception):
                ray.wait(list(names), num_returns=len(names), timeout=60)
            raise


def _result(ray: Any, reference: Any, member: Member) -> Event:
    """How a task ended."""
    try:
        event: Event = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        return Event("failed", member.name, text=f"its worker died {ATTEMPTS} times, or the cluster did: {reason}")
    return event


def _work(member: Member, out: str, threads: int) -> Event:
    """The work of one process on a member."""
    import torch

    from taulearn.app.run_members import attempt

    torch.set_num_threads(threads)
    return attempt(member, Path(out), lambda _: None)


@contextlib.contextmanager
def _cluster(options: Options) -> Iterator[Any]:
    """The cluster, left as it was found: one that was made here is stopped."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("ray must be installed for this engine: pip install 'taulearn-papers[ray]'")
    if options.address is not None:
        check_answers(options.address)
    import ray

    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {}
    if options.address is None:
        own = {"num_cpus": options.workers or os.cpu_count(), "include_dashboard": False}
    environment = {"env_vars": {"OMP_NUM_THREADS": str(options.threads)}}
    ray.init(
        address=options.address or "local",
        runtime_env=environment,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **own,
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Refuse the address of a cluster that does not answer, or cannot be joined, in seconds rather than minutes.

    Example:
        >>> check_answers("nowhere")
        Traceback (most recent call last):
        ValueError: address must be HOST:PORT, ray://HOST:PORT or 'auto', got 'nowhere'
    """
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"address must be HOST:PORT, ray://HOST:PORT or 'auto', got {address!r}")
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, f"did not answer within {ANSWER_SECONDS:.0f} s ({error})") from error
    try:
        _join(address)
    except subprocess.TimeoutExpired:
        reason = "something listens there, which may not be Ray"
        raise _no_cluster(address, f"did not answer within {JOIN_SECONDS:.0f} s ({reason})") from None


def _join(address: str) -> None:
    """Join a cluster and leave it, in a process that can be ended: ray.init has no time limit, and may abort."""
    command = [sys.executable, "-P", "-c", _JOIN, address]
    joined = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=JOIN_SECONDS, text=True, check=False
    )
    if joined.returncode:
        reason = joined.stdout.strip() or f"ray.init ended its process with status {joined.returncode}"
        remedy = "give all machines the same versions of Python and Ray, and the same token"
        raise _no_cluster(address, f"cannot be joined ({reason})", remedy)


def _no_cluster(address: str, what: str, remedy: str = "start it with `ray start --head`") -> ConnectionError:
    return ConnectionError(
        f"the Ray cluster at {address} {what}: {remedy}, or leave the address out for one on this machine"
    )
