"""Ways to get many members trained, behind one function: run(members, out, report, workers, ...).

    serial      one after the other, in this process
    processes   one process per core with one thread each
    ray         processes on many machines
    vmap        members of equal structure at once, on a GPU

An engine tells what happens by events, lets no member's failure end the others, and on Ctrl-C leaves every member that
is under way with a checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..._errors import unknown_name
from ..members import Report
from ..suite import Member


@dataclass(frozen=True)
class Options:
    """What engines are told besides the members.

    Attributes:
        workers: Number of processes; None: one per core.
        threads: CPU threads of each member.
        address: Address of a Ray cluster; None: Ray's own choice, a cluster in this machine.
    """

    workers: int | None = None
    threads: int = 1
    address: str | None = None


Engine = Callable[[Sequence[Member], Path, Report, Options], None]

_HOMES = {"processes": ".processes", "ray": ".ray", "serial": ".serial", "vmap": ".vmap"}


def engine(name: str) -> Engine:
    """The engine of this name.

    Args:
        name: "serial", "processes", "ray" or "vmap".

    Raises:
        ValueError: If there is none.

    Example:
        >>> engine("proceses")
        Traceback (most recent call last):
        ValueError: engine must be one of 'processes', ..., got 'proceses': did you mean 'processes'?
    """
    if name not in _HOMES:
        raise unknown_name("engine", name, _HOMES)
    found: Engine = import_module(_HOMES[name], __name__).run
    return found
