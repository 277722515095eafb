"""A member, one of many trainings or measurements: trained or gone on with, measured, noted as finished."""

import contextlib
import hashlib
import json
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..files import write_bytes
from .config import TrainConfig, split_hooks
from .results import DONE, FORMAT, MEASUREMENTS

if TYPE_CHECKING:
    from .train import Hooks

Measure = Callable[[Path], Mapping[str, Any]]

_SETTING = re.compile(r"[\w.=+-]+(/[\w.=+-]+)*", re.ASCII)
_WITHOUT_EFFECT = {"run", "overwrite", "threads", "checkpoint_every", "tensorboard"}


@dataclass(frozen=True)
class Member:
    """One training of a suite or a sweep, with what is measured on it.

    Args:
        setting: Name of the setting, parts separated by slashes, for instance "mnist/resnet/free"; a setting's members
            differ in their seeds alone.
        seed: The seed, which ``config`` has, too.
        config: What is trained. None: the member only measures.
        measure: Called with the member's folder after the training, returns figures as JSON takes them; a function of a
            module, so that it can be sent to another process. None: nothing is measured.
        hooks: What is to change in the training that no setting stands for, as for :func:`train`. None: nothing.

    Raises:
        ValueError: If the setting's name does not do, the seed is not that of ``config``, there is nothing to do, or
            the settings do not go with the hooks.

    Example:
        >>> Member("mnist/resnet/free", 3, TrainConfig(data="mnist", seed=3)).folder("results").as_posix()
        'results/mnist/resnet/free/seed-3'
    """

    setting: str
    seed: int
    config: TrainConfig | None
    measure: Measure | None = None
    hooks: "Hooks | None" = None

    def __post_init__(self) -> None:
        if not _SETTING.fullmatch(self.setting) or any(set(part) == {"."} for part in self.setting.split("/")):
            raise ValueError(
                f"setting must be names of letters, digits and . _ = + - separated by slashes, got {self.setting!r}"
            )
        if self.config is not None and self.config.seed != self.seed:
            raise ValueError(f"seed must be that of config, {self.config.seed}, got {self.seed}")
        if self.config is None and self.measure is None:
            raise ValueError(f"member {self.name} must have a config to train or something to measure, got neither")
        if self.hooks is not None and self.config is not None:
            self.hooks.check(self.config)

    @property
    def name(self) -> str:
        """Setting and seed, which no other member of the suite has."""
        return f"{self.setting}/seed-{self.seed}"

    @property
    def epochs(self) -> int:
        """How long it takes, in epochs; a measurement counts as one."""
        return 1 if self.config is None else self.config.epochs

    def folder(self, out: str | Path) -> Path:
        """Where the member is kept.

        Args:
            out: Folder of the suite.
        """
        return Path(out) / self.setting / f"seed-{self.seed}"

    @property
    def digest(self) -> str:
        """The settings that are not at their defaults, by which a finished member is known to be this one."""
        return digest(self.config, None if self.hooks is None else self.hooks.name)


def digest(config: TrainConfig | None, hooks: str | None = None) -> str:
    """A short hash of the settings that are not at their defaults, but for those that do not change the result.

    Settings that later versions add leave it as it is.

    Example:
        >>> digest(TrainConfig(threads=1)) == digest(TrainConfig())
        True
    """
    if config is None:
        return "none"
    values = config.model_dump(mode="json", exclude_defaults=True, exclude=_WITHOUT_EFFECT)
    values |= {} if hooks is None else {hooks: True}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


Kind = Literal["started", "epoch", "finished", "failed", "skipped", "died"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a member."""

    # "epoch": one more is done; "skipped": another process is at it; "died": the process that trained it did
    kind: Kind
    member: str  # its name
    epoch: int = 0  # number of finished epochs
    seconds: float = 0.0  # how long the member has taken, in this sitting
    text: str = ""  # what to tell


Report = Callable[[Event], None]


class Busy(Exception):
    """Another process trains this member."""


def is_finished(member: Member, out: str | Path) -> bool:
    """Whether a member needs nothing more."""
    file = member.folder(out) / DONE
    if not file.exists():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if content.get("format") != FORMAT or content.get("digest") != member.digest:
        raise ValueError(
            f"{member.folder(out)} holds a finished member with other settings or of another version: "
            "choose another folder (--out), or delete this one"
        )
    return True


def run_member(member: Member, out: str | Path, report: Report = lambda _: None) -> None:
    """Train and measure one member, unless it is finished; what an earlier sitting began is gone on with."""
    folder = member.folder(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(member, out):
        if is_finished(member, out):
            return
        report(Event("started", member.name))
        began = time.perf_counter()
        test: dict[str, float] = {}
        if member.config is not None:
            test = _train(member, folder, lambda n: report(Event("epoch", member.name, n, time.perf_counter() - began)))
        report(conclude(member, folder, test, time.perf_counter() - began))


def conclude(member: Member, folder: Path, test: Mapping[str, float], seconds: float) -> Event:
    """Measure a trained member, note that it is finished, and delete what only an unfinished one needs."""
    began = time.perf_counter()
    folder.mkdir(exist_ok=True)
    if member.measure is not None:
        write_bytes(folder / MEASUREMENTS, json.dumps(dict(member.measure(folder)), indent=1).encode())
    seconds += time.perf_counter() - began
    write_bytes(folder / DONE, json.dumps(_note(member, dict(test), seconds), indent=1).encode())
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    words = ", ".join(f"test {name} {value:.4g}" for name, value in reversed(list(test.items())))
    return Event("finished", member.name, member.epochs, seconds, words)


def _train(member: Member, folder: Path, report: Callable[[int], None]) -> dict[str, float]:
    """Train into the folder, or go on there."""
    from ..training import Run
    from .train import resume, settings_of, train

    assert member.config is not None
    own = member.config.model_copy(update={"run": str(folder), "overwrite": True})
    hooks, callbacks = member.hooks, [lambda end: report(end.epoch)]
    if any((folder / "checkpoint").glob("*.safetensors")):
        run = Run.open(folder)
        if digest(settings_of(run), split_hooks(run.config)[1]) != member.digest:
            raise ValueError(
                f"{folder} holds a training with other settings: choose another folder (--out), or delete this one"
            )
        try:
            return resume(folder, hooks=hooks, progress=False, callbacks=callbacks).test
        except ValueError as error:
            warnings.warn(f"{folder} is trained anew: its checkpoints cannot be gone on with ({error})", stacklevel=2)
    return train(own, hooks=hooks, progress=False, callbacks=callbacks).test


def _note(member: Member, test: dict[str, float], seconds: float) -> dict[str, Any]:
    import torch

    from .. import __version__
    from ..training.devices import machine
    from .train import record_of

    return {
        "format": FORMAT,
        "setting": member.setting,
        "seed": member.seed,
        "digest": member.digest,
        "config": None if member.config is None else record_of(member.config, member.hooks),
        "test": test,
        "seconds": round(seconds, 1),
        "versions": {"taulearn": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }


@contextlib.contextmanager
def locked(member: Member, out: str | Path) -> Iterator[None]:
    """Hold a member's lock, which ends with the process; where there are no locks (Windows), go on without."""
    folder = member.folder(out)
    file = folder.parent / f".{folder.name}.lock"
    with file.open("w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except BlockingIOError:
            raise Busy(str(file)) from None
        except OSError:
            pass
        yield
        with contextlib.suppress(PermissionError):  # Windows deletes no open file
            file.unlink(missing_ok=True)
