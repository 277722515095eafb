"""Names, splits, the folder that data lie in, and what the module imports."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from taulearn import data
from taulearn.data import catalog
from taulearn.data.catalog import CATALOGUE
from taulearn.data.samples import Generated, Samples


def test_every_data_set_of_the_first_release_is_there() -> None:
    first = {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "peaks", "sine", "nested-spheres"}
    assert first <= set(data.names())


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if isinstance(entry, Generated)])
def test_entries_say_what_they_hold(name: str) -> None:
    entry = CATALOGUE[name]
    for split, count in entry.samples.items():
        inputs, targets = data.load(name, split)
        assert inputs.shape == (count, *entry.shape)
        assert len(targets) == count
        if entry.classes is not None:
            assert targets.unique().tolist() == list(range(entry.classes))


@pytest.mark.parametrize(
    "action", [lambda root: data.load("mnist", root=root, download=False), lambda root: data.verify("mnist", root=root)]
)
def test_a_missing_file_is_named_with_the_remedy(action, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        action(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz") in message
    assert "`taulearn data fetch mnist`" in message
    assert "TAULEARN_DATA" in message
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_the_argument_then_the_environment_then_the_cache(
    miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": miniature.data})
    argument, environment, cache = tmp_path / "argument", tmp_path / "environment", tmp_path / "cache"
    monkeypatch.setattr("pooch.os_cache", lambda project: cache / project)
    monkeypatch.setenv("TAULEARN_DATA", str(environment))
    for folder in (argument, environment, cache / "taulearn"):
        miniature.write(folder)
    assert data.verify("mini", root=str(argument))[0].is_relative_to(argument)
    assert data.verify("mini")[0].is_relative_to(environment)
    monkeypatch.setenv("TAULEARN_DATA", "")
    assert data.verify("mini")[0].is_relative_to(cache / "taulearn")
    monkeypatch.delenv("TAULEARN_DATA")
    assert data.verify("mini")[0].is_relative_to(cache / "taulearn")


def test_the_tilde_is_the_home_folder(miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": miniature.data})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TAULEARN_DATA", "~/data")
    miniature.write(tmp_path / "data")
    assert data.load("mini", download=False).inputs.shape == (6, 1, 3, 5)


def test_images_are_scaled_unless_asked_otherwise(miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CATALOGUE", {"mini": miniature.data})
    miniature.write(tmp_path)
    stored = data.load("mini", root=tmp_path, as_uint8=True)
    scaled = data.load("mini", root=tmp_path)
    assert stored.inputs.dtype == torch.uint8
    assert scaled.inputs.dtype == torch.float32
    assert torch.equal(scaled.inputs, stored.inputs.float() / 255)


def test_describe_says_where_data_lie(miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"digits": CATALOGUE["digits"], "mini": miniature.data, "cifar10": CATALOGUE["cifar10"]}
    monkeypatch.setattr(catalog, "CATALOGUE", entries)
    miniature.write(tmp_path)
    assert [row.location for row in data.describe(root=tmp_path)] == ["built in", f"{tmp_path}/mini/raw", "not there"]
    (tmp_path / "mini/raw/t10k-labels-idx1-ubyte.gz").unlink()
    row = data.describe(root=tmp_path)[1]
    assert row == ("mini", "images", {"train": 6, "test": 4}, (1, 3, 5), 10, f"{tmp_path}/mini/raw (3 of 4 files)")


def test_a_data_set_is_added_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = Samples(torch.ones(2, 7), torch.ones(2, 3))
    entry = Generated(
        name="ones", kind="regression", samples={"train": 2, "test": 2}, shape=(7,), generate=lambda split: ones
    )
    monkeypatch.setattr(catalog, "CATALOGUE", dict(CATALOGUE))
    data.register(entry)
    assert data.load("ones") is ones
    assert data.fetch("ones") == ()
    assert data.names()[-1] == "ones"
    with pytest.raises(ValueError, match="entry must have a name of its own, got 'ones'"):
        data.register(entry)
    with pytest.raises(ValueError, match="samples must count the splits 'train' and 'test', got none for 'test'"):
        data.register(replace(entry, name="half", samples={"train": 2}))
    with pytest.raises(TypeError, match="entry must be a DataSet, got Samples"):
        data.register(ones)  # type: ignore[arg-type]
    assert "half" not in data.names()


def test_importing_and_loading_what_is_built_in_and_arrays_stays_light(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.ones((4, 2)), y=[0, 1, 0, 1])
    code = (
        "import sys; from taulearn import data; data.load('digits'); data.load('peaks');"
        f"data.load({str(tmp_path / 'mine.npz')!r});"
        "print(*{'pooch', 'sklearn', 'rich', 'requests', 'scipy', 'matplotlib', 'pyarrow', 'PIL'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
