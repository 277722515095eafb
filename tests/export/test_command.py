"""``taulearn export`` as a user meets it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taulearn import export_model, fit
from taulearn.app.command_line import main
from taulearn.experiments import TrainConfig, resume, train
from taulearn.nn import resnet
from taulearn.saving import load_model
from taulearn.training import EpochEnd

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has lost a layer."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    config = TrainConfig(hidden_layers=4, width=8, epochs=1, init=(0.5, 0.2, 0.2, 0.05), prune=0.1, run=str(folder))
    assert train(config, progress=False).layers == (4, 3)
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def execute(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return execute


def test_torch(run: Path, call: Call) -> None:
    code, out, err = call("export", run, "--format", "torch")
    assert (code, err) == (0, "")
    file = run / "export" / "torch" / "model.pt2"
    assert f"file      {file}" in out
    assert "input     x, float32 (batch, 1, 8, 8)\noutput    output, float32 (batch, 10)\n" in out
    assert "check     differs by at most" in out
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(file).module()(x), load_model(run).eval()(x))
    manifest = json.loads((file.parent / "manifest.json").read_text())
    assert manifest["data"] == "digits"
    assert manifest["classes"] == 10
    assert manifest["layers"] == [0, 1, 2]


def test_onnx(run: Path, call: Call, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'taulearn[onnx]'")
    assert call("export", run, "--out", tmp_path / "out")[0] == 0
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(3, 1, 8, 8)
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(found, load_model(run).eval()(x).detach(), rtol=0, atol=1e-5)


def test_safetensors_and_replacing(run: Path, call: Call, tmp_path: Path) -> None:
    options = ["export", run, "--format", "safetensors", "--out", tmp_path / "out"]
    assert call(*options)[0] == 0
    assert load_model(tmp_path / "out").time_steps.origin == (0, 1, 2)
    code, _, err = call(*options)
    assert code == 1
    assert err.startswith("taulearn: error: out must be a new folder")
    assert call(*options, "--overwrite")[0] == 0


def test_a_run_that_goes_on_is_not_exported(call: Call, tmp_path: Path) -> None:
    """Its network is that of before."""

    def fail(end: EpochEnd) -> None:
        raise ZeroDivisionError

    run = tmp_path / "run"
    train(TrainConfig(hidden_layers=2, width=4, epochs=1, run=str(run)), progress=False)
    assert call("export", run, "--format", "safetensors", "--out", tmp_path / "before")[0] == 0
    with pytest.raises(ZeroDivisionError):
        resume(run, epochs=3, progress=False, callbacks=[fail])
    code, _, err = call("export", run, "--format", "safetensors", "--out", tmp_path / "out")
    assert code == 1
    assert "run must be finished" in err
    assert "is at epoch 1 of 3: `taulearn resume" in err
    resume(run, progress=False)
    assert call("export", run, "--format", "safetensors", "--out", tmp_path / "out")[0] == 0


def test_a_run_of_fit_is_exported_in_python(call: Call, tmp_path: Path) -> None:
    model, x = resnet(2, 3, 1, 2), torch.rand(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"loss": torch.nn.functional.mse_loss, "optimizer": optimizer, "epochs": 1, "progress": False}
    fit(model, (x, x[:, :1]), run=tmp_path / "run", **options)
    code, _, err = call("export", tmp_path / "run")
    assert code == 1
    assert "taulearn.load_model(" in err
    assert "taulearn.export_model(network, out, example_inputs)" in err
    with pytest.raises(FileExistsError, match=r"path must .*got .*run', whose network"):
        export_model(model, tmp_path / "run", x, format="safetensors")


def test_bad_input(run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = call("export", tmp_path)
    assert code == 1
    assert "run must be a folder with a run.toml" in err
    code, _, err = call("export", run, "--format", "torch", "--out", run)
    assert code == 1
    assert "out must not be the folder of a run" in err
    assert call("export", run, "--format", "onx")[0] == 2
    monkeypatch.setattr("taulearn.export.onnx_file.importlib.util.find_spec", lambda name: None)
    code, out, err = call("export", run, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == "taulearn: error: onnx must be installed for format 'onnx': pip install 'taulearn[onnx]'\n"
