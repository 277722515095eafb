"""Ways to get many members trained, behind one function: run(members, out, report, options).

    serial      one after the other, in this process
    processes   one process per core with one thread each

Others are entry points of the group ``taulearn.engines``; the package ``taulearn-papers`` brings two:

    ray         processes on many machines
    vmap        members of equal structure at once, on a GPU

An engine tells what happens by events, lets no member's failure end the others, and on Ctrl-C leaves every member that
is under way with a checkpoint.
"""

import importlib.metadata
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._errors import unknown_name
from .members import Busy, Event, Member, Report, run_member


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

BUILT_IN = ("processes", "serial")
FROM_PAPERS = ("ray", "vmap")
"""What the package ``taulearn-papers`` brings."""

INSTALL_PAPERS = "pip install taulearn-papers (in a clone: pip install ./papers)"


def engine(name: str) -> Engine:
    """The engine of this name.

    Args:
        name: "serial", "processes", or what entry points offer.

    Raises:
        ValueError: If there is none.
        ImportError: If it belongs to a package that is not installed, or cannot be loaded.

    Example:
        >>> engine("proceses")
        Traceback (most recent call last):
        ValueError: engine must be one of 'processes', ..., got 'proceses': did you mean 'processes'?
    """
    if name == "serial":
        return run_one_by_one
    if name == "processes":
        from .processes import run

        return run
    entry = check_installed(name)
    assert entry is not None
    try:
        loaded: Engine = entry.load()
    except Exception as error:
        raise ImportError(f"engine {name!r} cannot be loaded ({entry.value}): {error}") from error
    return loaded


def check_installed(name: str) -> importlib.metadata.EntryPoint | None:
    """The entry point of an engine, None for one of this package; raises as :func:`engine`, but loads nothing."""
    if name in BUILT_IN:
        return None
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group="taulearn.engines")}
    if name in found:
        return found[name]
    if name in FROM_PAPERS:
        raise ImportError(f"engine {name!r} is not installed: {INSTALL_PAPERS}")
    raise unknown_name("engine", name, {*BUILT_IN, *FROM_PAPERS, *found})


def run_one_by_one(members: Sequence[Member], out: Path, report: Report, options: Options) -> None:
    """Run all members.

    Args:
        members: In the order in which they are run.
        out: Folder of the suite.
        report: Called with what happens.
        options: The number of threads counts, that of workers does not.

    Raises:
        KeyboardInterrupt: On Ctrl-C, when the member under way has its checkpoint.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for member in members:
            report(attempt(member, out, report))
    finally:
        torch.set_num_threads(before)


def attempt(member: Member, out: Path, report: Report) -> Event:
    """Run one member, whatever it raises.

    Args:
        member: The member.
        out: Folder of the suite.
        report: Called with what happens on the way.

    Returns:
        How it ended.
    """
    last: list[Event] = []

    def passed_on(event: Event) -> None:
        if event.kind == "finished":
            last.append(event)
        else:
            report(event)

    try:
        run_member(member, out, passed_on)
    except Busy:
        return Event("skipped", member.name, text="another process trains it")
    except Exception as error:  # noqa: BLE001  what goes wrong in one member must not end the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Event("failed", member.name, text=f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})")
    return last[0] if last else Event("finished", member.name, member.epochs)
