"""A run's folder: the configuration, the record, the weights, the checkpoints, the report."""

import os
import platform
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from ..files import write_bytes
from .history import History

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1


class Run:
    """One run's folder. Made by :meth:`create` or :meth:`open`.

    Attributes:
        path: The folder.
        config: The configuration the run was started with.
        versions: Versions of Python, torch and the package, and the number of threads.
        decisions: How each "auto" was decided.
        result: Gives the model that is saved at the end of the training; None: the trained one.

    Example:
        >>> import tempfile
        >>> run = Run.create(Path(tempfile.mkdtemp()) / "first", {"epochs": 3})
        >>> Run.open(run.path).config
        {'epochs': 3}
    """

    def __init__(self, path: Path, config: dict[str, Any], versions: dict[str, Any], decisions: dict[str, str]) -> None:
        self.path, self.config, self.versions, self.decisions = path, config, versions, decisions
        self.result: Callable[[], "nn.Module"] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process that is sent a run opens its folder."""
        return Run.open, (self.path,)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def history_path(self) -> Path:
        """Where the record lies."""
        return self.path / "history.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoint"

    @property
    def report_path(self) -> Path:
        """Where the report goes."""
        return self.path / "report.html"

    @cached_property
    def history(self) -> History:
        """The record, read once.

        Raises:
            FileNotFoundError: If the run has none yet.
        """
        return History.load(self.history_path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], *, overwrite: bool = False) -> "Run":
        """Make the folder and write its run.toml.

        Args:
            path: The folder, which must not exist or be empty.
            config: The configuration; None values are left out (TOML has none).
            overwrite: Whether the files of an earlier run in this folder are deleted.

        Raises:
            FileExistsError: If the folder is not empty and is not to be overwritten, or holds something that is no run.
            NotADirectoryError: If it is a file.
            OSError: If it cannot be made or written into.
        """
        folder = Path(path)
        run = cls(folder, {k: v for k, v in config.items() if v is not None}, _versions(), {})
        with _explained(folder):
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"run must be a folder, got the file {str(folder)!r}: choose another name")
            if folder.is_dir():
                tidy(folder)
            if folder.is_dir() and any(folder.iterdir()):
                if not overwrite:
                    raise FileExistsError(
                        f"run {str(folder)!r} exists: choose another folder, pass overwrite=True (--overwrite), "
                        f"or go on with it, resume=True (taulearn resume {folder})"
                    )
                cls._clear(folder)
            folder.mkdir(parents=True, exist_ok=True)
            run._write()
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Run":
        """Read a run's folder.

        Raises:
            FileNotFoundError: If there is no run.toml.
            ValueError: If it is damaged or of another format version.
        """
        folder = Path(path)
        file = folder / "run.toml"
        if not file.is_file():
            raise FileNotFoundError(f"run must be a folder with a run.toml, got {str(folder)!r}: there is none in it")
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} must be a TOML file, got a damaged one ({error})") from error
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{file} must have format = {FORMAT}, got {content.get('format')!r}: "
                "the run belongs to another version of taulearn"
            )
        tables = [content.get(name, {}) for name in ("config", "versions", "decisions")]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError(f"{file} must hold the tables config, versions and decisions")
        return cls(folder, *tables)

    def check_resumable(self) -> None:
        """Refuse a run that trained, but whose checkpoints are gone: to resume it would be to train over its results.

        Raises:
            FileNotFoundError: If there is a record or a network, and no checkpoint.
        """
        if any(self.checkpoints.glob("*.safetensors")):
            return
        left = [name for name in ("model.safetensors", "history.safetensors") if (self.path / name).exists()]
        if left:
            raise FileNotFoundError(
                f"run must have a checkpoint to go on from, got {str(self.path)!r} with {' and '.join(left)} but "
                f"without one in {self.checkpoints.name}/: put the checkpoints back, or train anew in another folder"
            )

    def change(self, **settings: Any) -> None:
        """Record settings that were changed when the run was resumed; those it never had are passed over."""
        changed = {name: value for name, value in settings.items() if self.config.get(name, value) != value}
        if changed:
            self.config.update(changed)
            self._write()

    def decide(self, name: str, text: str) -> None:
        """Record how an "auto" was decided."""
        if self.decisions.get(name) != text:
            self.decisions[name] = text
            self._write()

    def retire_model(self) -> None:
        """Take away the model of a training that is gone on with; for when a checkpoint says that it is finished."""
        for name in ("model.json", ".model.json.new"):
            (self.path / name).unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"format": FORMAT, "config": self.config, "versions": self.versions, "decisions": self.decisions}
        write_bytes(self.path / "run.toml", tomli_w.dumps(content).encode())

    @staticmethod
    def _clear(folder: Path) -> None:
        """Delete an earlier run's own files, and nothing else."""
        if not (folder / "run.toml").is_file():
            raise FileExistsError(
                f"run {str(folder)!r} must not be overwritten: it holds files, but no run.toml; choose another folder"
            )
        checkpoints = folder / "checkpoint"
        for file in checkpoints.glob("*.safetensors"):
            file.unlink(missing_ok=True)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        # run.toml goes last: without it the folder is no run, and a second attempt would not dare
        for name in (
            "history.safetensors",
            "model.safetensors",
            "model.json",
            ".model.json.new",
            "report.html",
            "run.toml",
        ):
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Let errors of the file system name the argument and the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        message = f"run must be a folder that can be made and written, got {str(folder)!r} ({error.strerror})"
        raise type(error)(f"{message}: choose another one") from error
    except ValueError as error:  # a zero byte
        raise ValueError(f"run must be the name of a folder, got {str(folder)!r} ({error})") from error


def tidy(folder: Path) -> None:
    """Delete what a process that was killed while it wrote into a run's folder left half-written."""
    for part in [*folder.glob(".*.part"), *(folder / "checkpoint").glob(".*.part")]:
        part.unlink(missing_ok=True)


def _versions() -> dict[str, Any]:
    import torch

    from .. import __version__

    return {
        "taulearn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
