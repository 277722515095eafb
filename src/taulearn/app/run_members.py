"""All members of a suite or a sweep: the finished ones skipped, the rest handed to an engine, failures collected.

Engines are ways to get many members trained, behind one function, run(members, out, report, options):

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
from dataclasses import dataclass, field
from pathlib import Path

from .._errors import unknown_name
from .members import Busy, Event, Member, Report, is_finished, run_member


@dataclass
class Outcome:
    """How a run of many members ended."""

    finished: list[str] = field(default_factory=list)  # names of the members that are finished now
    skipped: list[str] = field(default_factory=list)  # names of those that were finished before
    failed: dict[str, str] = field(default_factory=dict)  # what went wrong, by name
    elsewhere: list[str] = field(default_factory=list)  # names of those that another process trains


def run_members(
    members: Sequence[Member],
    out: str | Path,
    *,
    engine: str = "processes",
    workers: int | None = None,
    threads: int = 1,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Outcome:
    """Run the members that are not finished.

    Args:
        members: In the order in which they are run; each name once.
        out: Their folder, made if missing.
        engine: "serial" or "processes"; "ray" or "vmap", which ``taulearn-papers`` brings.
        workers: Number of processes. None: one per core.
        threads: CPU threads of each.
        address: Address of a Ray cluster.
        on_event: Called with what happens, in this process.

    Returns:
        What became of them.

    Raises:
        ValueError: If the engine is unknown, a name occurs twice, or something else lies in a member's folder.
        KeyboardInterrupt: On Ctrl-C, when the members under way have their checkpoints; the next call goes on there.

    Example:
        >>> import tempfile
        >>> from taulearn.experiments import TrainConfig
        >>> members = [Member("small", seed, TrainConfig(width=8, epochs=1, seed=seed)) for seed in (0, 1)]
        >>> run_members(members, tempfile.mkdtemp(), engine="serial").finished
        ['small/seed-0', 'small/seed-1']
    """
    run = engine_named(engine)
    names = [member.name for member in members]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"members must have different names, got {', '.join(sorted(repeated))} more than once")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [member for member in members if not is_finished(member, folder)]
    waiting = {member.name for member in todo}
    outcome = Outcome(skipped=[name for name in names if name not in waiting])

    def follow(event: Event) -> None:
        if event.kind == "finished":
            outcome.finished.append(event.member)
        elif event.kind == "failed":
            outcome.failed[event.member] = event.text
        elif event.kind == "skipped":
            outcome.elsewhere.append(event.member)
        on_event(event)

    if todo:
        run(todo, folder, follow, Options(workers, threads, address))
    return outcome


@dataclass(frozen=True)
class Options:
    """Options of engines, besides the members."""

    workers: int | None = None  # number of processes; None: one per core
    threads: int = 1  # CPU threads of each member
    address: str | None = None  # address of a Ray cluster; None: Ray's own choice, a cluster in this machine


Engine = Callable[[Sequence[Member], Path, Report, Options], None]

BUILT_IN = ("processes", "serial")
FROM_PAPERS = ("ray", "vmap")
"""The engines that the package ``taulearn-papers`` brings."""

INSTALL_PAPERS = "pip install taulearn-papers (in a clone: pip install ./papers)"


def engine_named(name: str) -> Engine:
    """The engine of this name.

    Example:
        >>> engine_named("proceses")
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
    except (Exception, SystemExit) as error:
        raise ImportError(f"engine {name!r} cannot be loaded ({entry.value}): {error}") from error
    return loaded


def check_installed(name: str) -> importlib.metadata.EntryPoint | None:
    """The entry point of an engine, None for one of this package; raises as :func:`engine_named`, but loads nothing."""
    if name in BUILT_IN:
        return None
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group="taulearn.engines")}
    if name in found:
        return found[name]
    if name in FROM_PAPERS:
        raise ImportError(f"engine {name!r} is not installed: {INSTALL_PAPERS}")
    raise unknown_name("engine", name, {*BUILT_IN, *FROM_PAPERS, *found})


def run_one_by_one(members: Sequence[Member], out: Path, report: Report, options: Options) -> None:
    """Run all members in this process; the number of threads counts, that of workers does not."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for member in members:
            report(attempt(member, out, report))
    finally:
        torch.set_num_threads(before)


def attempt(member: Member, out: Path, report: Report) -> Event:
    """Run one member, whatever it raises."""
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
