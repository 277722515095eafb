"""Exported files against the models they came from, run without this package."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn.export import check, export_model
from taulearn.nn import densenet, feedforward, fractional_dnn, resnet, resnet_v2
from wrapping import hosts

onnx = pytest.importorskip("onnx", reason="pip install 'taulearn[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'taulearn[onnx]'")


def steps(number: int) -> list[float]:
    """Steps of which those at the even positions are kept below."""
    return [0.3 + 0.1 * (i % 3) for i in range(number)]


def pruned(model: nn.Module, keep: list[int]) -> nn.Module:
    taulearn.prune(model, keep=keep)
    return model


def images(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(number)).to(dtype)


def convolutional() -> nn.Module:
    """Residual blocks with batch normalisation whose statistics are not those at the start."""
    torch.manual_seed(0)

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *(block() for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.append(nn.Linear(4, 3))
    taulearn.wrap(model, example_inputs=images(2), init=0.5)
    for _ in range(3):
        model(images(8) * 3)
    return model


def built(make: Callable[..., nn.Module], keep: list[int], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return pruned(make(64, 12, 10, 6, init=steps(6), horizon=sum(steps(6)), **options), keep)

    return build


def wrapped(name: str) -> tuple[Callable[[], nn.Module], Callable[[], Any]]:
    host = hosts.BY_NAME[name]
    return lambda: pruned(host.wrapped(init=steps(4)), [0, 2, 3]), host.inputs


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "residual": (built(resnet, [0, 2, 4]), lambda: images(2)),
    "fractional": (built(fractional_dnn, [0, 1, 3, 4]), lambda: images(2)),
    "fractional float64": (
        built(fractional_dnn, [0, 1, 3, 4], dtype=torch.float64),
        lambda: images(2, torch.float64),
    ),
    "simplex": (built(resnet, [0, 2, 4], constraint="simplex"), lambda: images(2)),
    "feedforward": (lambda: feedforward(64, 12, 10, 4), lambda: images(2)),
    "dense": (lambda: densenet(64, 12, 10, 4, init=steps(4)), lambda: images(2)),
    "convolutional": (lambda: pruned(convolutional(), [0, 2, 3]), lambda: images(1)),
    "resnet_v2": (lambda: pruned(resnet_v2(3, 5, 1, (4, 6)), [0, 2, 3, 5]), lambda: images(2)),
    "vit": wrapped("vit"),
    "resnet of transformers": (
        lambda: pruned(hosts.BY_NAME["resnet"].wrapped(init=steps(4)), [0, 2, 3]),
        hosts.BY_NAME["resnet"].inputs,
    ),
    "encoder": wrapped("encoder"),
    "bert": wrapped("bert"),
    "gpt2": wrapped("gpt2"),
    "llama": wrapped("llama"),
}
QUICK = {"residual", "fractional", "convolutional", "vit"}
every_case = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in CASES]
)


def fresh(example: Any, number: int) -> Tensor:
    """Inputs that neither the export nor its check have seen."""
    generator = torch.Generator().manual_seed(10 + number)
    if not example.is_floating_point():
        return torch.randint(3, hosts.VOCABULARY - 1, (number, *example.shape[1:]), generator=generator)
    return torch.rand(number, *example.shape[1:], generator=generator).to(example.dtype)


@every_case
@pytest.mark.parametrize("written", ["onnx", "torch"])
def test_file_computes_what_the_model_computes(case: str, written: str, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    model, example = make(), inputs()
    before = copy.deepcopy(model.state_dict())
    training = model.training
    exported = export_model(model, tmp_path, example, format=written)
    assert model.training == training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for number in (1, 5):
        x = fresh(example, number)
        expected = hosts.evaluated(model, x)
        if written == "onnx":
            session = onnxruntime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        else:
            output = torch.export.load(exported.files[0]).module()(x)
            found = output if isinstance(output, Tensor) else output[0]
        assert found.dtype == expected.dtype
        tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert exported.difference <= 1e-5


@pytest.mark.parametrize("case", ["residual", "fractional", "convolutional", "vit", "bert", "llama"])
def test_safetensors_loads_as_the_model(case: str, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    model, example = make(), inputs()
    export_model(model, tmp_path, example, format="safetensors")
    host = None if case in ("residual", "fractional") else copy.deepcopy(model)
    loaded = taulearn.load_model(tmp_path, host=host)
    x = fresh(example, 5)
    torch.testing.assert_close(hosts.evaluated(loaded, x), hosts.evaluated(model, x), rtol=0, atol=1e-6)


def test_manifest(tmp_path: Path) -> None:
    model = CASES["residual"][0]()
    exported = export_model(model, tmp_path, images(2), format="onnx", about={"data": "digits"})
    content = json.loads(exported.manifest.read_text())
    assert content["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert content["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 10]}]
    assert (content["scheme"], content["layers"], content["data"]) == ("residual", [0, 2, 4], "digits")
    assert content["time_steps"] == model.time_steps.tau.tolist()
    assert content["check"]["largest_difference"] == exported.difference < 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *content["sha256"]}


def test_onnx_file_names_the_batch_and_nothing_of_this_machine(tmp_path: Path) -> None:
    exported = export_model(CASES["convolutional"][0](), tmp_path, CASES["convolutional"][1](), format="onnx")
    graph = onnx.load(exported.files[0]).graph
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert shapes == [["batch", 1, 8, 8], ["batch", 3]]
    assert [v.name for v in (*graph.input, *graph.output)] == ["input", "output"]
    content = exported.files[0].read_bytes()
    assert b".py" not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_program_of_torch_holds_no_example(tmp_path: Path) -> None:
    secret = torch.full((2, 1, 8, 8), 0.123)
    exported = export_model(CASES["residual"][0](), tmp_path, secret, format="torch")
    assert secret.numpy().tobytes()[:64] not in exported.files[0].read_bytes()
    assert torch.export.load(exported.files[0]).example_inputs is None


def test_files_run_without_this_package(tmp_path: Path) -> None:
    program = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {"x": numpy.ones((3, 1, 8, 8), "float32")})[0].shape, "torch" in sys.modules)
"""
    exported = export_model(CASES["fractional"][0](), tmp_path, images(2), format="onnx")
    command = [sys.executable, "-c", program, str(exported.files[0])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "(3, 10) False\n"


def test_several_arguments_and_outputs(tmp_path: Path) -> None:
    """A mask among the inputs, a constant, and an output of two tensors and something else."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(hosts.Block(6) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor, twice: bool = False) -> dict[str, Any]:
            for block in self.blocks:
                x = block(x)
            return {"state": x * mask * (2 if twice else 1), "name": "two", "kept": mask.sum(-1)}

    torch.manual_seed(0)
    example = {"x": torch.randn(2, 6), "mask": torch.tensor([[1.0] * 6, [0.0] * 6]), "twice": True}
    model = taulearn.wrap(Two(), "blocks.*", example_inputs=example, init=0.5)
    exported = export_model(model, tmp_path, example, format="onnx")
    assert [each.name for each in exported.inputs] == ["x", "mask"]
    assert [str(each) for each in exported.outputs] == ["state, float32 (batch, 6)", "kept, float32 (batch)"]
    session = onnxruntime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    x, mask = torch.randn(5, 6), torch.rand(5, 6)
    model.eval()
    with torch.no_grad():
        expected = model(x, mask, twice=True)
    found = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(found[0], expected["state"].numpy(), atol=1e-5)
    np.testing.assert_allclose(found[1], expected["kept"].numpy(), atol=1e-5)


def test_large_weights_lie_beside_the_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.export.onnx_file.EMBEDDED", 1000)
    exported = export_model(CASES["residual"][0](), tmp_path, images(2), format="onnx")
    assert [file.name for file in exported.files] == ["model.onnx", "model.onnx.data"]
    assert exported.files[1].stat().st_size >= 64 * 12 * 4
    session = onnxruntime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": images(3).numpy()})[0].shape == (3, 10)


@torch.library.custom_op("taulearn_tests::strange", mutates_args=())
def strange(x: Tensor) -> Tensor:
    return 2 * x


@strange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return strange(self.linear(x))


class Branching(Strange):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


class OfTwo(Strange):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.arange(2.0).unsqueeze(1)


def with_block(kind: type[nn.Module]) -> nn.Module:
    return taulearn.wrap(nn.Sequential(nn.Linear(4, 6), kind(), kind()), ["1", "2"])


@pytest.mark.parametrize(
    ("kind", "written", "message"),
    [
        (Strange, "onnx", r"operators that ONNX knows, got taulearn_tests\.strange: .* or use format='torch'"),
        (Branching, "onnx", r"torch\.export can trace, got a Sequential .*torch\.where or torch\.cond"),
        (OfTwo, "torch", r"it fixes the size of the batch.*dynamic_batch=False"),
    ],
)
def test_models_that_cannot_be_expressed(
    kind: type[nn.Module], written: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export_model(with_block(kind), tmp_path / "a" / "b", torch.randn(2, 4), format=written)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert "def forward" not in "".join(capsys.readouterr())


def test_a_batch_that_is_fixed_can_be_exported_as_such(tmp_path: Path) -> None:
    exported = export_model(with_block(OfTwo), tmp_path, torch.randn(2, 4), format="torch", dynamic_batch=False)
    assert exported.inputs[0].shape == (2, 4)


def test_a_file_that_does_not_agree_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(CASES["residual"][0](), tmp_path, images(2), format="torch")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    answers = check.answers
    monkeypatch.setattr(check, "answers", lambda *args: [1.0001 * each for each in answers(*args)])
    with pytest.raises(ValueError, match=r"must agree with the model to 1e-05 .*use 'onnx' or 'safetensors'"):
        export_model(CASES["residual"][0](), tmp_path, images(2) + 10, format="torch")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taulearn.export import onnx_file

    find = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda each: None if each == name else find(each))
    with pytest.raises(ImportError, match=rf"^{name} must be installed .*pip install 'taulearn\[onnx\]'$"):
        export_model(CASES["residual"][0](), tmp_path, images(2))


def test_bad_input(tmp_path: Path) -> None:
    model = CASES["residual"][0]()
    with pytest.raises(ValueError, match="got one of bfloat16"):
        export_model(resnet(64, 12, 10, 2, dtype=torch.bfloat16), tmp_path, images(2, torch.bfloat16))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="path must be a folder"):
        export_model(model, tmp_path / "file", images(2), format="torch")
    with pytest.raises(NotADirectoryError, match="path must be a folder"):
        export_model(model, tmp_path / "file" / "sub", images(2), format="torch")
