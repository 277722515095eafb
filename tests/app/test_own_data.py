"""Trainings on data of one's own, by path: all that works with named sets, and refusals where the data changed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from taulearn.app.results import Results
from taulearn.saving import load_model
from taulearn.training import Run

pytestmark = pytest.mark.usefixtures("own_folder")

SMALL = ["--hidden-layers", "3", "--width", "4", "--epochs", "2", "--batch-size", "10", "--lr", "0.1"]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)
Y = (X[:, 0] * X[:, 1] > 0).astype(int)
PIXELS = RNG.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "mine.npz", inputs=X, targets=Y)
    return tmp_path / "mine.npz"


def weights(run):
    return (Path(run) / "model.safetensors").read_bytes()


@pytest.mark.long
def test_all_commands_work_with_a_file(call, path, tmp_path):
    code, out, _ = call("train", "--data", "mine.npz", *SMALL, "--run", "a")
    assert code == 0
    assert "resnet on mine.npz, 3 hidden layers" in out
    run = Run.open("a")
    assert run.config["data"] == str(path)
    assert "1 of 5" in run.decisions["split"]
    assert run.decisions["classes"] == "0, 1"
    assert call("train", "--data", path, *SMALL, "--epochs", 1, "--run", "b")[0] == 0
    assert call("resume", "b", "--epochs", 2)[0] == 0
    assert weights("b") == weights("a")
    assert call("prune", "a", "--keep", "0,2", "--out", "c")[0] == 0
    assert load_model("c").time_steps.origin == (0, 2)
    assert call("prune", "a", "--depth", "2", "--out", "d")[0] == 0
    assert call("report", "a", "b")[0] == 0
    assert "mine.npz" in Path("comparison.html").read_text()
    assert call("export", "a", "--format", "safetensors", "--out", "e")[0] == 0


def test_a_folder_of_runs_is_named_by_the_file(call, path):
    assert call("train", "--data", path, *SMALL, "--epochs", 1)[0] == 0
    assert next(Path("runs").iterdir()).name.startswith("mine-resnet-")


def test_tables_and_images_are_trained_on(call, tmp_path):
    table = pa.table({"a": X[:, 0], "b": X[:, 1], "sign": np.where(Y, "plus", "minus").tolist(), "y": X.sum(axis=1)})
    parquet.write_table(table.drop(["y"]), "kinds.parquet")
    parquet.write_table(table.drop(["sign"]), "values.parquet")
    assert call("train", "--data", "kinds.parquet", "--target", "sign", *SMALL, "--run", "a")[0] == 0
    assert Run.open("a").decisions["classes"] == "minus, plus"
    assert call("train", "--data", "values.parquet", "--target", "y", *SMALL, "--run", "b")[0] == 0
    assert Run.open("b").decisions["loss"] == "mse"
    for i, image in enumerate(PIXELS):
        file = Path("photos") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    v2 = ["--network", "resnet-v2", "--blocks-per-stage", "1", "--channels", "2", "--epochs", "1"]
    code, _, err = call("train", "--data", "photos/", *v2, "--run", "c")
    assert code == 0, err
    assert Run.open("c").decisions["classes"] == "a, b"
    code, out, _ = call("export", "c", "--format", "torch", "--out", "e")
    assert code == 0
    assert "(batch, 3, 4, 4)" in out


def test_data_that_changed_are_refused(call, path):
    assert call("train", "--data", path, *SMALL, "--epochs", 1, "--run", "a")[0] == 0
    before = weights("a")
    np.savez(path, inputs=X + 1e-3, targets=Y)
    for line in (("resume", "a", "--epochs", 2), ("prune", "a", "--keep", 0), ("prune", "a", "--depth", 1)):
        code, _, err = call(*line)
        assert code == 1
        assert "data must be what run 'a' was trained on" in err
        assert "mine.npz" in err
    path.unlink()
    code, _, err = call("resume", "a", "--epochs", 2)
    assert (code, "mine.npz is not there" in err) == (1, True)
    assert weights("a") == before
    np.savez(path, inputs=X, targets=Y)
    assert call("resume", "a", "--epochs", 2)[0] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "nowhere.npz"], "nowhere.npz is not there"),
        (["--data", "mine.npz", "--target", "y"], "--target must be left out"),
        (["--target", "y"], "--target must be left out"),
        (["--data", "folder"], "'./folder'"),
        (["--data", "folder/"], "folder of images"),
        (["--data", "mine.npz", "--network", "resnet-v2"], "(2,)"),
    ],
)
def test_bad_data_are_refused_in_one_line_and_leave_nothing(call, path, options, says):
    Path("folder").mkdir()
    code, out, err = call("train", *options, "--run", "a")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert says in err
    assert not Path("a").exists()


def test_a_sweep_takes_a_path_relative_to_the_working_folder(call, path):
    Path("sizes.toml").write_text(
        "[base]\nhidden_layers = 2\nwidth = 4\nepochs = 1\n[grid]\ndata = ['mine.npz', './mine.npz']"
    )
    code, _, err = call("sweep", "sizes.toml", "--engine", "serial")
    assert code == 0, err
    results = Results("sweeps/sizes")
    assert results.settings == ["data=.-mine.npz", "data=mine.npz"]
    assert {results.config(setting, 0).data for setting in results.settings} == {str(path)}
