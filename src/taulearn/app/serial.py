"""Members one after the other, in this process."""

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from ..members import Busy, Event, Report, run_member
from ..suite import Member
from . import Options


def run(members: Sequence[Member], out: Path, report: Report, options: Options) -> None:
    """Run all members.

    Args:
        members: In the order in which they are run.
        out: Folder of the suite.
        report: Called with what happens.
        options: The number of threads counts, that of workers does not.

    Raises:
        KeyboardInterrupt: On Ctrl-C, when the member under way has its checkpoint.
    """
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
