"""All members of a suite or a sweep: the finished ones skipped, the rest handed to an engine, failures collected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .engines import Options, engine as engine_named
from .members import Event, Member, is_finished


@dataclass
class Outcome:
    """How a run of many members ended.

    Attributes:
        finished: Names of the members that are finished now.
        skipped: Names of those that were finished before.
        failed: What went wrong, by name.
        elsewhere: Names of those that another process trains.
    """

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)


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
