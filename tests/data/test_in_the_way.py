"""Something else than a file in a data file's place: folders as archives unpack, broken links, unreadable files."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taulearn import data
from taulearn.app.command_line import main
from taulearn.data import catalog
from taulearn.data.cifar import CIFAR10
from taulearn.data.files import DataError
from taulearn.data.idx import FASHION_MNIST, MNIST

IMAGES = "mini/raw/train-images-idx3-ubyte.gz"


@pytest.fixture
def mini(miniature: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": miniature.data})
    return miniature


def in_folders(miniature: Any, root: Path, outer: str, inner: str | None, *, compressed: bool) -> None:
    """Each file in a folder; ``{}`` is its name without .gz, None its own name."""
    for path, payload in miniature.payloads.items():
        name = Path(path).stem
        folder = root / Path(path).parent / outer.format(name)
        folder.mkdir(parents=True)
        (folder / (inner or "{}").format(name)).write_bytes(gzip.compress(payload) if compressed else payload)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("outer", ["{}", "{}.gz"])
@pytest.mark.parametrize("inner", ["{}", "{}.gz", "some-name", "{}.idx"])
def test_a_folder_with_the_file_in_it(mini: Any, tmp_path: Path, outer: str, inner: str, compressed: bool) -> None:
    in_folders(mini, tmp_path, outer, inner, compressed=compressed)
    inputs, _ = data.load("mini", root=tmp_path, as_uint8=True)
    assert torch.equal(inputs[:, 0], torch.from_numpy(mini.images["train"]))
    assert len(data.verify("mini", root=tmp_path)) == 4


def test_the_file_of_the_right_name_among_others(mini: Any, tmp_path: Path) -> None:
    in_folders(mini, tmp_path, "{}", "{}", compressed=False)
    folder = (tmp_path / IMAGES).with_suffix("")
    for other in (".DS_Store", "README", "train-labels-idx1-ubyte"):
        (folder / other).write_text("other")
    assert len(data.load("mini", root=tmp_path).inputs) == 6


def test_a_file_beside_an_empty_folder_is_taken(mini: Any, tmp_path: Path) -> None:
    mini.write(tmp_path)
    (tmp_path / IMAGES).with_suffix("").mkdir()
    assert len(data.load("mini", root=tmp_path).inputs) == 6


def test_another_content_in_the_folder_is_noticed(mini: Any, tmp_path: Path) -> None:
    in_folders(mini, tmp_path, "{}", "{}", compressed=False)
    ((tmp_path / IMAGES).with_suffix("") / "train-images-idx3-ubyte").write_bytes(b"other")
    with pytest.raises(DataError, match="delete the file"):
        data.load("mini", root=tmp_path)


def empty(path: Path) -> None:
    path.mkdir()


def crowded(path: Path) -> None:
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(name)


def nested(path: Path) -> None:
    (path / "folder" / "folder").mkdir(parents=True)


def broken(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def circular(path: Path) -> None:
    path.symlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [empty, crowded, nested, broken, circular, pipe])
@pytest.mark.parametrize("which", ["mnist", "mnist decompressed", "fashion-mnist", "cifar10", "cifar100"])
def test_what_is_in_the_way_is_named_with_the_remedy(
    make: Callable[[Path], None], which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is downloaded."""
    name = which.split(maxsplit=1)[0]
    place = tmp_path / catalog.CATALOGUE[name].files("train")[0].path
    place = place.with_suffix("") if "decompressed" in which else place
    place.parent.mkdir(parents=True, exist_ok=True)
    make(place)
    monkeypatch.setattr("taulearn.data.download.download", lambda *_: pytest.fail("downloaded"))
    for action in (data.load, data.fetch, data.verify):
        with pytest.raises(DataError, match=r"expected a file, found (a folder|a link|neither)") as found:
            action(name, root=tmp_path)
        assert str(place) in str(found.value)
        assert f"taulearn data fetch {name}" in str(found.value)
    assert main(["data", "list", "--root", str(tmp_path)]) == 0
    rows = {row.name: row.location for row in data.describe(root=tmp_path)}
    assert rows[name] == f"{place} is no file"


@pytest.mark.parametrize("entry", [MNIST, FASHION_MNIST, CIFAR10], ids=lambda entry: entry.name)
def test_a_file_that_may_not_be_read_is_named_with_the_remedy(
    entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in entry.files("train"):
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_bytes(b"\x1f\x8b")

    def forbidden(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(PermissionError, match=r"cannot be read \(Permission denied\): .*TAULEARN_DATA"):
        data.load(entry.name, root=tmp_path)
