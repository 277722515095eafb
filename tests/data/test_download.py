"""Downloads from a server on this machine: mirrors, damage on the way, interruptions."""

import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from taulearn import data
from taulearn.data import catalog
from taulearn.data.idx import IdxImages

IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"


@dataclass
class Site:
    """A web server: what it answers by address, what it was asked."""

    address: str = ""
    content: dict[str, bytes] = field(default_factory=dict)
    declared_length: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            body = site.content.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(site.declared_length.get(self.path, len(body))))
            if "gzip" in self.headers.get("Accept-Encoding", ""):
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def mini(miniature, site: Site, monkeypatch: pytest.MonkeyPatch) -> IdxImages:
    """The miniature in the catalogue, served by the second of its two mirrors."""
    for path, payload in miniature.payloads.items():
        site.content["/second/" + path.rpartition("/")[2]] = gzip.compress(payload)
    entry = replace(miniature.data, mirrors=(f"{site.address}/first/", f"{site.address}/second/"))
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": entry})
    return entry


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_load_fetches_what_the_split_needs_from_the_mirror_that_has_it(mini, miniature, site, tmp_path: Path) -> None:
    inputs, targets = data.load("mini", root=tmp_path)
    assert torch.equal(inputs, torch.from_numpy(miniature.images["train"])[:, None].float() / 255)
    assert targets.tolist() == miniature.labels["train"].tolist()
    assert site.asked == [f"/{mirror}/{name}" for name in (IMAGES, LABELS) for mirror in ("first", "second")]
    assert left_in(tmp_path) == [IMAGES, LABELS]
    data.load("mini", root=tmp_path)
    assert len(site.asked) == 4


def test_fetch_completes_and_checks_all_files(mini, site, tmp_path: Path) -> None:
    data.load("mini", "test", root=tmp_path)
    paths = data.fetch("mini", root=tmp_path)
    assert len(paths) == 4
    assert all(path.is_file() for path in paths)
    assert data.verify("mini", root=tmp_path) == paths
    assert data.describe(root=tmp_path)[0].location == str(tmp_path / "mini" / "raw")


def test_fetch_names_a_damaged_file_that_was_there(mini, site, tmp_path: Path) -> None:
    path = data.fetch("mini", root=tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=f"{path}: .*: delete the file and run `taulearn data fetch mini`"):
        data.fetch("mini", root=tmp_path)
    path.unlink()
    data.fetch("mini", root=tmp_path)


def test_recompressed_content_is_accepted(mini, miniature, site, tmp_path: Path) -> None:
    payload = miniature.payloads[f"mini/raw/{IMAGES}"]
    site.content[f"/second/{IMAGES}"] = gzip.compress(payload, compresslevel=1, mtime=7)
    assert data.load("mini", root=tmp_path).inputs.shape == (6, 1, 3, 5)


@pytest.mark.parametrize("damage", ["truncated", "cut-off", "other", "endless", "page"])
def test_damage_on_the_way_sends_to_the_next_mirror(damage: str, mini, miniature, site, tmp_path: Path) -> None:
    good = site.content[f"/second/{IMAGES}"]
    payload = miniature.payloads[f"mini/raw/{IMAGES}"]
    first = f"/first/{IMAGES}"
    site.content[first] = {
        "truncated": good[:-9],
        "cut-off": good[:20],
        "other": gzip.compress(payload[:-1] + bytes([payload[-1] ^ 1])),
        "endless": good + bytes(1_000_000),
        "page": b"<html>moved</html>",
    }[damage]
    if damage == "cut-off":
        site.declared_length[first] = len(good)
    data.load("mini", root=tmp_path)
    assert f"/second/{IMAGES}" in site.asked
    assert left_in(tmp_path) == [IMAGES, LABELS]


def test_an_unreachable_proxy_is_named(mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": replace(mini, mirrors=("http://mirror.invalid/",))})
    with pytest.raises(ConnectionError, match=r"mirror.invalid/[^ ]*: proxy: .*refused"):
        data.load("mini", root=tmp_path)


def test_without_a_connection_the_reason_is_short(mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": replace(mini, mirrors=("http://127.0.0.1:1/",))})
    with pytest.raises(ConnectionError) as caught:
        data.load("mini", root=tmp_path)
    message = str(caught.value)
    assert "refused" in message
    assert "Connection object" not in message
    assert "Max retries" not in message
    assert "or set TAULEARN_DATA to a folder that has it" in message


def test_without_a_good_mirror_every_reason_is_given_and_nothing_is_left(mini, miniature, site, tmp_path: Path) -> None:
    site.content[f"/first/{IMAGES}"] = b"<html>"
    del site.content[f"/second/{IMAGES}"]
    with pytest.raises(ConnectionError) as caught:
        data.load("mini", root=tmp_path)
    message = str(caught.value)
    assert f"{site.address}/first/{IMAGES}: expected content that begins with 00000803" in message
    assert "404" in message
    assert "`taulearn data fetch mini`" in message
    assert str(tmp_path / "mini" / "raw" / IMAGES) in message
    assert left_in(tmp_path) == []


def test_an_endless_answer_is_cut(mini, site, tmp_path: Path) -> None:
    for mirror in ("first", "second"):
        site.content[f"/{mirror}/{IMAGES}"] = bytes(1_000_000)
    with pytest.raises(ConnectionError, match="expected at most 1130 bytes, found more"):
        data.load("mini", root=tmp_path)


@pytest.mark.parametrize("moment", ["pooch.HTTPDownloader.__call__", "taulearn.data.download.check", "os.fsync"])
@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interruption_leaves_nothing(moment, reason, mini, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **keywords: object) -> None:
        if "output_file" in keywords:
            keywords["output_file"].write(b"half")
        raise reason

    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupt)
        with pytest.raises((KeyboardInterrupt, OSError)):
            data.load("mini", root=tmp_path)
    assert left_in(tmp_path) == []
    data.load("mini", root=tmp_path)


def test_the_file_has_its_name_only_once_it_is_checked(mini, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(file: object, path: Path) -> None:
        assert path.name.startswith(".")
        assert path.name.endswith(".part")
        assert not (tmp_path / "mini" / "raw" / IMAGES).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("taulearn.data.download.check", look)
    with pytest.raises(KeyboardInterrupt):
        data.load("mini", root=tmp_path)


def test_without_a_terminal_one_plain_line_per_file(mini, tmp_path: Path, capsys) -> None:
    data.load("mini", root=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("downloading http://127.0.0.1") == 4
    assert len(captured.err.splitlines()) == 4


def test_on_a_terminal_a_bar_reaches_the_end(mini, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    data.load("mini", root=tmp_path)
    error = capsys.readouterr().err
    assert IMAGES in error
    size = (tmp_path / "mini" / "raw" / IMAGES).stat().st_size
    assert f"{size}/{size} bytes" in error


def test_real_labels_through_the_whole_path(real_data_root: Path, site: Site, tmp_path: Path, monkeypatch) -> None:
    official = catalog.CATALOGUE["mnist"]
    for file in official.files("test"):
        site.content["/" + file.path.rpartition("/")[2]] = file.find(real_data_root).read_bytes()
    monkeypatch.setattr(catalog, "CATALOGUE", {"mnist": replace(official, mirrors=(f"{site.address}/",))})
    inputs, targets = data.load("mnist", "test", root=tmp_path)
    assert inputs.shape == (10_000, 1, 28, 28)
    assert targets[:5].tolist() == [7, 2, 1, 0, 4]
