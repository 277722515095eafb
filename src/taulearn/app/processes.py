"""One process per core with one thread each: for small networks several times the throughput of one with all cores.

A worker is told one member at a time through a pipe, so that it is known which member a dead worker had; that member is
run again by a new worker, from its checkpoint. Workers ignore the terminal's Ctrl-C and are interrupted by the parent,
once; they end by themselves if the parent dies.
"""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .members import Event, Member, Report
from .run_members import Options

ATTEMPTS = 3
"""How often a member is tried whose worker dies: it may be what kills the worker (memory)."""


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    member: Member | None = None


@dataclass
class _Pool:
    out: Path
    threads: int
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, str(self.out), self.threads), daemon=True)
        with _environment(OMP_NUM_THREADS=str(self.threads)):
            process.start()
        there.close()
        worker = _Worker(process, here)
        self.workers.append(worker)
        return worker

    def remove(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.join()
        self.workers.remove(worker)

    def stop(self, *, interrupt: bool) -> None:
        """End all workers: now, or after the checkpoints of what they are at."""
        for worker in self.workers:
            if worker.member is not None and interrupt:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGINT)
            elif worker.member is None:
                worker.pipe.close()
        for worker in self.workers:
            worker.process.join(timeout=60 if interrupt else 5)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()


def run(members: Sequence[Member], out: Path, report: Report, options: Options) -> None:
    """Run all members in worker processes."""
    queue = deque((member, 1) for member in members)
    attempts: dict[str, int] = {}
    pool = _Pool(out, options.threads)
    interrupted = True
    try:
        for _ in range(min(len(queue), options.workers or os.cpu_count() or 1)):
            pool.start()
        while queue or any(worker.member is not None for worker in pool.workers):
            for worker in pool.workers:
                if worker.member is None and queue:
                    worker.member, number = queue.popleft()
                    attempts[worker.member.name] = number
                    with contextlib.suppress(OSError):  # a worker that died is noticed below
                        worker.pipe.send(worker.member)
            for ready in wait([worker.pipe for worker in pool.workers if worker.member is not None]):
                worker = next(worker for worker in pool.workers if worker.pipe is ready)
                _listen(worker, pool, queue, attempts, report)
        interrupted = False
    finally:
        pool.stop(interrupt=interrupted)


def _listen(
    worker: _Worker,
    pool: _Pool,
    queue: "deque[tuple[Member, int]]",
    attempts: dict[str, int],
    report: Report,
) -> None:
    """Take one message of a worker, or notice its death."""
    member = worker.member
    assert member is not None
    try:
        event: Event = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        pool.remove(worker)
        number, code = attempts[member.name], worker.process.exitcode
        if number < ATTEMPTS:
            report(Event("died", member.name, text=f"its process ended with code {code}; it is run again"))
            queue.appendleft((member, number + 1))
        else:
            report(Event("failed", member.name, text=f"its process ended {ATTEMPTS} times, the last with code {code}"))
        if queue:
            pool.start()
        return
    if event.kind in ("finished", "failed", "skipped"):
        worker.member = None
    report(event)


def _work(pipe: Connection, out: str, threads: int) -> None:
    """The work of one process: members from the pipe, events into it."""
    os.setpgid(0, 0)  # the terminal's Ctrl-C is for the parent, who passes it on
    try:
        import torch

        from .run_members import attempt

        torch.set_num_threads(threads)

        def report(event: Event) -> None:
            try:
                pipe.send(event)
            except OSError:
                raise KeyboardInterrupt from None  # the parent is gone: nobody wants the rest

        while True:
            member: Member = pipe.recv()
            report(attempt(member, Path(out), report))
    except (EOFError, KeyboardInterrupt):
        return


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    """Environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
