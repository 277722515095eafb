"""Data of one's own: arrays, tables, folders of images; and what is wrong with them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import csv, parquet

from taulearn import data
from taulearn.data.own_data import own_data

X = np.arange(60.0).reshape(20, 3)
Y = np.arange(20) % 2
BYTES = np.random.default_rng(0).integers(0, 256, (20, 5, 4, 3), dtype=np.uint8)
SPLIT = {"x_train": X[:14], "y_train": Y[:14], "x_test": X[14:], "y_test": Y[14:]}


def save(folder: Path, name: str = "mine.npz", **arrays: object) -> Path:
    np.savez(folder / name, **arrays)  # type: ignore[arg-type]
    return folder / name


def write(folder: Path, columns: dict[str, object], name: str = "mine.parquet") -> Path:
    table = pa.table(columns)
    (csv.write_csv if name.endswith(".csv") else parquet.write_table)(table, folder / name)
    return folder / name


def draw(folder: Path, images: dict[str, np.ndarray], mode: str | None = None) -> Path:
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        (image if mode is None else image.convert(mode)).save(folder / name)
    return folder


def test_arrays_with_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    save(tmp_path, "train.npz", X=X[:14], Y=Y[:14])
    save(tmp_path, "test.npz", X=X[14:], Y=Y[14:, None])
    keys = zip(("train_inputs", "train_targets", "test_inputs", "test_targets"), SPLIT.values(), strict=True)
    for path in (save(tmp_path, "a.npz", **SPLIT), save(tmp_path, "b.npz", **dict(keys)), tmp_path):
        train, test = data.load(path), data.load(f"{path}/" if path.is_dir() else str(path), "test")
        assert train.inputs.dtype == torch.float32
        assert train.targets.dtype == torch.int64
        np.testing.assert_array_equal(np.concatenate([train.inputs, test.inputs]), X)
        np.testing.assert_array_equal(np.concatenate([train.targets, test.targets]), Y)
        assert len(test.inputs) == 6


def test_without_test_data_a_fifth_of_each_class_is_kept_for_it_always_the_same(tmp_path: Path) -> None:
    inputs, targets = np.arange(100.0)[:, None], np.repeat([3, -1, 7], [50, 40, 10])
    path = save(tmp_path, inputs=inputs, targets=targets)
    train, test = data.load(path), data.load(path, "test")
    assert sorted(np.concatenate([train.inputs, test.inputs]).ravel().tolist()) == inputs.ravel().tolist()
    assert test.targets.bincount().tolist() == [8, 10, 2]
    values = np.array([-1, 3, 7])
    for samples in (train, test):
        np.testing.assert_array_equal(values[samples.targets], targets[samples.inputs.ravel().long()])
    assert not torch.equal(test.inputs.diff(dim=0), torch.full((19, 1), 5.0))
    assert torch.equal(data.load(path, "test").inputs, test.inputs)


@pytest.mark.parametrize("number", [2, 3, 4, 5, 9])
def test_few_values_are_split_too(tmp_path: Path, number: int) -> None:
    path = save(tmp_path, x=X[:number, 0], y=X[:number, 1])
    counts = [len(data.load(path, split).inputs) for split in ("train", "test")]
    assert sum(counts) == number
    assert counts[1] == max(1, round(number / 5))
    assert data.load(path).targets.shape[1:] == (1,)


def test_bytes_are_images_wherever_the_channels_stand(tmp_path: Path) -> None:
    first, last = save(tmp_path, "a.npz", x=BYTES.transpose(0, 3, 1, 2), y=Y), save(tmp_path, "b.npz", x=BYTES, y=Y)
    stored = data.load(last, as_uint8=True).inputs
    assert stored.dtype == torch.uint8
    assert stored.shape == (16, 3, 5, 4)
    scaled = data.load(first).inputs
    assert torch.equal(scaled, stored / 255)
    assert any(np.array_equal(stored[0].permute(1, 2, 0), image) for image in BYTES)
    grey = own_data(save(tmp_path, "c.npz", x=BYTES[..., 0], y=Y))
    assert (grey.shape, grey.kind) == ((1, 5, 4), "images")
    assert own_data(save(tmp_path, "d.npz", x=BYTES[:, 0, :, 0], y=Y)).kind == "classification"


@pytest.mark.parametrize("name", ["mine.parquet", "mine.csv"])
def test_a_table_has_one_target_and_the_rest_as_inputs(tmp_path: Path, name: str) -> None:
    columns = {"a": X[:, 0], "kind": ["no", "yes"] * 10, "b": np.arange(20), "c": Y == 1}
    path = write(tmp_path, columns if name == "mine.csv" else columns | {"__index_level_0__": np.arange(20)}, name)
    with pytest.raises(data.DataError, match="column 'kind', found string"):
        data.load(path, target="b")
    own = own_data(path, "kind")
    assert (own.shape, own.classes, own.notes["classes"]) == ((3,), 2, "no, yes")
    train = data.load(path, target="kind")
    rows = train.inputs[:, 1].long()
    np.testing.assert_array_equal(train.inputs, np.stack([X[:, 0], np.arange(20), Y], axis=1)[rows])
    np.testing.assert_array_equal(train.targets, Y[rows])


def test_floating_point_columns_are_values(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": np.arange(10), "y": np.arange(10) / 4})
    own = own_data(path, "y")
    assert (own.kind, own.classes) == ("regression", None)
    assert torch.equal(own.parts["train"].targets, own.parts["train"].inputs / 4)


def test_a_folder_of_folders_of_images(tmp_path: Path) -> None:
    images = {f"{'cat' if i % 2 else 'ant'}/{i}.png": image for i, image in enumerate(BYTES)}
    (draw(tmp_path / "all", images) / ".hidden").mkdir()
    train, test = data.load(tmp_path / "all"), data.load(tmp_path / "all", "test", as_uint8=True)
    assert (len(train.inputs), len(test.inputs)) == (16, 4)
    by_bytes = {image.transpose(2, 0, 1).tobytes(): i % 2 for i, image in enumerate(BYTES)}
    assert [by_bytes[image.numpy().tobytes()] for image in test.inputs] == test.targets.tolist()
    assert 0 <= train.inputs.min() < 0.02 < 0.98 < train.inputs.max() <= 1
    for split, chosen in (("train", [0, 1, 2]), ("test", [3, 4]), ("validation", [5])):
        kept = {name: image[..., 0] for i, (name, image) in enumerate(images.items()) if i in chosen}
        draw(tmp_path / "split" / split, kept)
    own = own_data(tmp_path / "split")
    assert own.samples == {"train": 3, "validation": 1, "test": 2}
    assert own.shape == (1, 5, 4)
    np.testing.assert_array_equal(own.parts["train"].inputs[:, 0], BYTES[[0, 2, 1], ..., 0])
    assert own.parts["train"].targets.tolist() == [0, 0, 1]


def test_the_digest_tells_other_data_apart_and_not_other_places(tmp_path: Path) -> None:
    other = X.copy()
    other[7, 1] += 1e-3
    (tmp_path / "elsewhere").mkdir()
    paths = (save(tmp_path, x=X, y=Y), save(tmp_path / "elsewhere", x=X, y=Y), save(tmp_path, "o.npz", x=other, y=Y))
    digests = [own_data(path).notes["digest of the data"] for path in paths]
    assert digests[0] == digests[1] != digests[2]


def test_a_name_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "photos"):
        draw(tmp_path / name, {"a/1.png": BYTES[0], "a/2.png": BYTES[1], "b/1.png": BYTES[2], "b/2.png": BYTES[3]})
    assert data.load("digits").inputs.shape == (1442, 1, 8, 8)
    assert data.load("./digits").inputs.shape == data.load(Path("photos")).inputs.shape == (3, 3, 5, 4)
    with pytest.raises(ValueError, match=r"name must be .*'\./photos'"):
        data.load("photos")
    entry = data.Generated(name="a/b", kind="images", samples={}, shape=(), generate=lambda split: data.load("digits"))
    with pytest.raises(ValueError, match=r"entry must .*'a/b'"):
        data.register(entry)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.uint8)


BAD_ARRAYS = {
    "objects": ({"x": np.array([{}, {}]), "y": Y[:2]}, ("pickle", "numpy.savez")),
    "names": ({"a": X, "b": Y}, ("inputs and targets", "found a, b")),
    "no-test": ({"x_train": X, "y_train": Y}, ("x_train, y_train",)),
    "lengths": ({"x": X, "y": Y[:3]}, ("(20, 3)", "(3,)")),
    "number": ({"x": np.float64(3.0), "y": Y}, ("()",)),
    "empty": ({"x": X[:0], "y": Y[:0]}, ("(0, 3)",)),
    "no-values": ({"x": X[:, :0], "y": Y}, ("(20, 0)",)),
    "text": ({"x": X.astype(str), "y": Y}, ("inputs", "<U")),
    "complex": ({"x": X * 1j, "y": Y}, ("complex128",)),
    "nan": ({"x": np.where(X == 7, np.nan, X), "y": Y}, ("inputs", "nan", "row 2")),
    "too-large": ({"x": X * 1e300, "y": Y}, ("inf", "row 0")),
    "nan-targets": ({"x": X, "y": np.where(Y == 1, np.inf, X[:, 0])}, ("targets", "inf", "row 1")),
    "one-hot": ({"x": X, "y": np.eye(2, dtype=int)[Y]}, ("(20, 2)", "int64")),
    "cube": ({"x": X, "y": np.ones((20, 2, 2))}, ("(20, 2, 2)",)),
    "one-class": ({"x": X, "y": 0 * Y + 5}, ("two classes", "5")),
    "one-sample": ({"x": X[:1], "y": X[:1, 0]}, ("two samples", "1")),
    "rare-class": ({"x": X[:5], "y": ["a", "b", "c", "d", "e"]}, ("none of",)),
    "new-class": (SPLIT | {"y_test": Y[14:] + 1}, ("none of 2",)),
    "shapes": (SPLIT | {"x_test": X[14:, :2]}, ("(14, 3)", "(6, 2)")),
    "kinds": (SPLIT | {"y_test": X[14:, 0]}, ("int64 (14,)", "float32 (6, 1)")),
}


@pytest.mark.parametrize(("arrays", "says"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_do_not_do(tmp_path: Path, arrays: dict[str, object], says: tuple[str, ...]) -> None:
    refused(save(tmp_path, **arrays), says)


TWICE = pa.Table.from_arrays([pa.array(X[:, 0]), pa.array(X[:, 1]), pa.array(Y)], names=["a", "a", "y"])
BAD_TABLES = {
    "no-target": ({"a": X[:, 0], "y": Y}, None, ("target must", "'a', 'y'")),
    "unknown": ({"age": X[:, 0], "kind": Y}, "knid", ("target must", "'knid'", "'kind'?")),
    "missing": ({"a": [1.0, None, None], "y": [0, 1, 0]}, "y", ("'a'", "2 missing")),
    "missing-target": ({"a": [1.0, 2.0, 3.0], "y": [0, 1, None]}, "y", ("'y'", "1 missing")),
    "text": ({"a": ["x", "z"], "y": [0, 1]}, "y", ("'a'", "string")),
    "list": ({"a": [1, 2], "y": [[0], [1]]}, "y", ("'y'", "list")),
    "nan": ({"a": [1.0, np.inf], "y": [0, 1]}, "y", ("'a'", "inf", "row 1")),
    "alone": ({"y": Y}, "y", ("'y'", "none")),
    "twice": (TWICE, "y", ("'a' twice",)),
    "no-rows": ({"a": X[:0, 0], "y": Y[:0]}, "y", ("(0, 1)",)),
}


@pytest.mark.parametrize(("columns", "target", "says"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_do_not_do(tmp_path: Path, columns: object, target: str | None, says: tuple[str, ...]) -> None:
    parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / "mine.parquet")
    refused(tmp_path / "mine.parquet", says, target)


BAD_FOLDERS = {
    "nothing": ({}, ("no such folder",)),
    "flat": ({"1.png": ones(4, 4)}, ("no such folder",)),
    "one-class": ({f"a/{i}.png": ones(4, 4) for i in range(3)}, ("two classes", "a")),
    "sizes": ({"a/1.png": ones(4, 5), "b/1.png": ones(4, 6)}, ("1.png", "5 x 4", "6 x 4")),
    "colours": ({"a/1.png": ones(4, 5), "b/1.png": ones(4, 5, 3)}, ("5 x 4 grey", "5 x 4 RGB")),
    "alpha": ({"a/1.png": ones(4, 5, 4), "b/1.png": ones(4, 5, 4)}, ("1.png", "RGBA")),
    "deep": ({"a/1.png": ones(4, 5), "b/c/1.png": ones(4, 5)}, ("none in 'b'",)),
}


@pytest.mark.parametrize(("images", "says"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folders_that_do_not_do(tmp_path: Path, images: dict[str, np.ndarray], says: tuple[str, ...]) -> None:
    refused(draw(tmp_path, images), says)


@pytest.mark.parametrize("name", ["a.npz", "a.parquet", "a.csv", "photos/a/1.png", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"nonsense \xff\xfe", b"PK\x03\x04PAR1\x89PNG"])
def test_files_that_are_damaged(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    top = tmp_path / Path(name).parts[0]
    refused(top, (Path(name).name, "expected"), "y" if top.suffix in (".parquet", ".csv") else None)


def test_paths_and_targets_that_do_not_go(tmp_path: Path) -> None:
    refused(save(tmp_path, x=X, y=Y), ("target must", "'y'"), "y")
    refused(tmp_path, ("target must", "'y'"), "y")
    with pytest.raises(ValueError, match=r"target must .*'digits'"):
        data.load("digits", target="y")
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz is not there: .*\.parquet"):
        data.load(tmp_path / "nowhere.npz")


def test_what_is_too_large_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    says = ("memory", "GiB")
    refused(save(tmp_path, x=X, y=Y), says)
    refused(write(tmp_path, {"a": X[:, 0], "y": Y}), says, "y")
    refused(write(tmp_path, {"a": X[:, 0], "y": Y}, "mine.csv"), says, "y")
    refused(draw(tmp_path / "images", {"a/1.png": BYTES[0], "b/1.png": BYTES[1]}), says)


@pytest.mark.parametrize(("module", "says"), [("pyarrow", "taulearn[parquet]"), ("PIL", "Pillow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, says: str) -> None:
    path = write(tmp_path, {"a": Y}) if module == "pyarrow" else draw(tmp_path, {"a/1.png": BYTES[0]})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        data.load(path, target="a" if module == "pyarrow" else None)
    assert says in str(caught.value)
    assert "pip install" in str(caught.value)


def refused(path: Path, says: tuple[str, ...], target: str | None = None) -> None:
    with pytest.raises(ValueError, match=r".+: .+") as caught:
        data.load(path, target=target)
    message = str(caught.value)
    missing = [fact for fact in (str(path) if "target" not in message else "", *says) if fact not in message]
    assert not missing, message
