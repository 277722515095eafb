"""Downloads: several mirrors, a progress bar, the content checked before the file gets its name."""

import re
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from .._errors import needs
from ..files import move, sync
from .files import DataError, DataFile, check

_CHUNK = 1 << 16


def download(file: DataFile, root: Path) -> Path:
    """Fetch `file` from the first mirror that delivers the right content.

    The bytes go to a hidden file beside the destination, which is renamed once its content has been checked: an
    interruption leaves no half file.

    Example:
        >>> import tempfile
        >>> file = DataFile(dataset="mnist", path="labels.gz", size=8, md5="", mirrors=())
        >>> download(file, Path(tempfile.mkdtemp()))
        Traceback (most recent call last):
        ConnectionError: labels.gz could not be downloaded ...
    """
    from requests import RequestException

    destination = root / file.path
    destination.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for mirror in file.mirrors:
        url = mirror + destination.name
        part = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.part")
        try:
            _transfer(url, part, file)
            check(file, part)
            move(part, destination)
            return destination
        except RequestException as error:
            failures.append(f"{url}: {_reason(error)}")
        except DataError as error:
            failures.append(f"{url}: {error.reason}")
        finally:
            part.unlink(missing_ok=True)
    raise ConnectionError(
        f"{file.path} could not be downloaded ({'; '.join(failures)}): check the network connection and run "
        f"`taulearn data fetch {file.dataset}` again, put the file at {destination}, or set TAULEARN_DATA to a folder "
        "that has it"
    )


def _reason(error: Exception) -> str:
    """Why a request failed, without the chain of errors that led to it."""
    from requests.exceptions import ProxyError

    response = getattr(error, "response", None)
    if response is not None and response.status_code >= 400:
        return f"status {response.status_code} {response.reason}"
    inner: Any = error
    while True:
        below = getattr(inner, "reason", None) or (inner.args[0] if getattr(inner, "args", None) else None)
        if not isinstance(below, Exception):
            break
        inner = below
    proxy = "proxy: " if isinstance(error, ProxyError) else ""
    return proxy + (re.sub(r"^(<[^>]*>|\w+\(.*?\)): ", "", str(inner)) or type(error).__name__)


def _transfer(url: str, part: Path, file: DataFile) -> None:
    with needs("app", "downloads"):
        import pooch

    bar = _Bar(url)
    # A server that declares a .gz file as an encoding would make requests decompress it without a limit.
    downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=_CHUNK, headers={"Accept-Encoding": "identity"})
    try:
        with part.open("xb") as stream:
            downloader(url=url, output_file=_Limited(stream, file, part), pooch=None)
            stream.flush()
            sync(stream.fileno())
    finally:
        bar.close()


class _Limited:
    """A file that refuses more bytes than the data file can have; gzip makes no content longer by 1/1000 and 1 kB."""

    def __init__(self, stream: BinaryIO, file: DataFile, path: Path) -> None:
        self._stream = stream
        self._file = file
        self._path = path
        self._limit = file.size + file.size // 1000 + 1024 if file.gzipped else file.size
        self._written = 0

    def write(self, chunk: bytes) -> int:
        self._written += len(chunk)
        if self._written > self._limit:
            raise self._file.error(self._path, f"expected at most {self._limit} bytes, found more")
        return self._stream.write(chunk)

    def flush(self) -> None:
        self._stream.flush()


class _Bar:
    """A progress bar for pooch, drawn by rich on stderr; a plain line where that is no terminal."""

    def __init__(self, url: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = "{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(url.rpartition("/")[2], total=None)
        if not console.is_terminal:
            console.print(f"downloading {url}", soft_wrap=True, markup=False, highlight=False)
        self._progress.start()

    @property
    def total(self) -> float | None:
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, total: int) -> None:
        self._progress.update(self._task, total=total or None)

    def update(self, amount: int) -> None:
        self._progress.advance(self._task, amount)

    def reset(self) -> None:
        self._progress.reset(self._task, total=self.total)

    def close(self) -> None:
        self._progress.stop()
