"""Progress of a run of many members: one line each, with the time that is left."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .members import Event, Member, is_finished
from .run_members import Outcome


class Watch:
    """Prints what happens to members; on a terminal with one line that is rewritten after each epoch.

    The time left counts epochs, each at the pace of the epochs of its own kind (data, network, depth) where some were
    seen, divided by the number of members that run side by side.

    Example:
        >>> from taulearn.experiments import TrainConfig
        >>> watch = Watch([Member("a", 0, TrainConfig())], "nowhere")
        >>> watch(Event("finished", "a/seed-0", 20, 40.0, "test accuracy 0.9"))
        [1/1] a/seed-0: test accuracy 0.9, 40 s
    """

    def __init__(self, members: Sequence[Member], out: str | Path) -> None:
        self.members = {member.name: member for member in members}
        self.left = {member.name: member.epochs for member in members if not is_finished(member, out)}
        self.total, self.ended = len(self.members), len(self.members) - len(self.left)
        self.running: dict[str, float] = {}
        self.pace: dict[str, list[float]] = {}
        self.terminal = sys.stdout.isatty()
        self._shown = 0.0

    def __call__(self, event: Event) -> None:
        """Take an event in, and print it."""
        name = event.member
        if event.kind == "started":
            self.running[name] = 0.0
        elif event.kind == "epoch":
            if event.epoch > 1:  # the first one has what is done once in it
                self.pace.setdefault(self._kind(name), []).append(event.seconds - self.running.get(name, 0.0))
            self.running[name] = event.seconds
            self.left[name] = max(self.members[name].epochs - event.epoch, 0)
            self._rewrite()
        else:
            self.running.pop(name, None)
            if event.kind == "died":
                self._say(f"{name}: {event.text}")
                return
            if event.kind == "finished" and self._kind(name) not in self.pace:  # an engine that tells no epochs
                self.pace[self._kind(name)] = [event.seconds / max(1, self.members[name].epochs)]
            self.left.pop(name, None)
            self.ended += 1
            what = event.text if event.kind == "finished" else f"{event.kind}: {event.text}"
            count = f"[{self.ended:>{len(str(self.total))}}/{self.total}]"
            self._say(f"{count} {name}: {what}, {event.seconds:.0f} s{self.remaining()}")

    def close(self, outcome: Outcome) -> None:
        """Say how it ended."""
        parts = {"trained": outcome.finished, "finished before": outcome.skipped}
        parts |= {"failed": list(outcome.failed), "trained by another process": outcome.elsewhere}
        self._say(", ".join(f"{len(names)} {what}" for what, names in parts.items() if names))

    def remaining(self) -> str:
        """The time left, in words; empty while nothing is known of it."""
        paces = {kind: sum(last) / len(last) for kind, all_ in self.pace.items() if (last := all_[-50:])}
        if not paces or not self.left:
            return ""
        usual = sum(paces.values()) / len(paces)
        seconds = sum(epochs * paces.get(self._kind(name), usual) for name, epochs in self.left.items())
        return f"; about {duration(seconds / max(1, len(self.running)))} left"

    def _kind(self, name: str) -> str:
        config = self.members[name].config
        return "" if config is None else f"{config.data}/{config.network}/{config.hidden_layers}"

    def _rewrite(self) -> None:
        if self.terminal and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            under_way = ", ".join(f"{name} ({self.left[name]} epochs left)" for name in list(self.running)[:3])
            sys.stdout.write(f"\r\x1b[2K{self.ended}/{self.total} done; {under_way}{self.remaining()}"[:200])
            sys.stdout.flush()

    def _say(self, text: str) -> None:
        sys.stdout.write(("\r\x1b[2K" if self.terminal else "") + text + "\n")
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(42), duration(600), duration(7300)
        ('42 s', '10 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
