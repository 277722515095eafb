"""Exported files are checked against the model, whatever its inputs and outputs look like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taulearn
from taulearn.export import api, export_model
from taulearn.export.arguments import arguments
from taulearn.nn import resnet
from wrapping import hosts

onnx = pytest.importorskip("onnx", reason="pip install 'taulearn[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'taulearn[onnx]'")


MASK = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, -torch.inf], [0.0, -torch.inf, 0.0, 0.0, 0.0, 0.0]])


def masked() -> tuple[nn.Module, dict[str, Tensor]]:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(hosts.Block(6) for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return torch.softmax(x + mask, 1)

    torch.manual_seed(0)
    example = {"x": torch.rand(2, 6), "mask": MASK}
    return taulearn.wrap(Outer(), "blocks.*", example_inputs=example, init=0.5), example


def with_answers(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Files give something else than they hold."""
    write = api.write_program

    def changed(*args: Any, **options: Any) -> Any:
        run = write(*args, **options)
        return lambda inputs: [change(each) for each in run(inputs)]

    monkeypatch.setattr(api, "write_program", changed)


def test_infinite_entries_of_the_example_stay_in_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random masks are masks, so that the check compares numbers."""
    model, example = masked()
    drawn = arguments(model, example).of_batch(5).values["mask"]
    assert torch.equal(drawn.isinf(), MASK.isinf()[torch.arange(5) % 2])
    exported = export_model(model, tmp_path, example, format="torch")
    assert exported.difference <= 1e-6 < 0.1 < exported.size
    with_answers(monkeypatch, lambda each: torch.full_like(each, 5.0))
    with pytest.raises(ValueError, match="must agree with the model to 1e-05"):
        export_model(model, tmp_path, example, format="torch")


def test_nan_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that gives NaN where the model gives next to nothing; a model that gives nothing else."""
    model = resnet(2, 3, 1, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-6)
    with_answers(monkeypatch, lambda each: each * torch.nan)
    with pytest.raises(ValueError, match="got other shapes, or NaN or infinity elsewhere, in a batch of 1"):
        export_model(model, tmp_path, torch.rand(3, 2), format="torch")
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    for written in ("torch", "safetensors"):
        with pytest.raises(ValueError, match=r"model must give numbers on random inputs .* got NaN alone in 'output'"):
            export_model(model, tmp_path, torch.rand(3, 2), format=written)
    assert not list(tmp_path.iterdir())


class Returning(nn.Module):
    """Returns something made of the state of two blocks."""

    def __init__(self, make: Callable[[Tensor, Tensor | None], Any]) -> None:
        super().__init__()
        self.blocks, self.make = nn.ModuleList(hosts.Block(6) for _ in range(2)), make

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.make(x, offset)


def returning(make: Callable[[Tensor, Tensor | None], Any]) -> nn.Module:
    torch.manual_seed(0)
    return taulearn.wrap(Returning(make), "blocks.*", init=0.5)


@pytest.mark.parametrize("written", ["onnx", "torch", "safetensors"])
def test_a_model_without_tensors_to_compare(written: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model must return a tensor, .* got a tuple with none"):
        export_model(returning(lambda x, _: ((x,),)), tmp_path / "out", torch.rand(2, 6), format=written)
    assert not list(tmp_path.iterdir())


def test_a_model_that_draws_random_numbers(tmp_path: Path) -> None:
    model = returning(lambda x, _: x + torch.rand_like(x))
    with pytest.raises(ValueError, match="model must give the same twice in evaluation mode"):
        export_model(model, tmp_path, torch.rand(2, 6), format="torch")


def test_one_sample_of_a_fixed_batch_stays_one(tmp_path: Path) -> None:
    model, x = resnet(64, 6, 10, 3).eval(), torch.rand(1, 1, 8, 8)
    for written in ("onnx", "torch"):
        exported = export_model(model, tmp_path / written, x, format=written, dynamic_batch=False)
        assert exported.inputs[0].shape == (1, 1, 8, 8)
        assert exported.outputs[0].shape == (1, 10)
    torch.testing.assert_close(torch.export.load(exported.files[0]).module()(x), model.eval()(x))


def test_one_sample_does_not_make_a_batch_of_other_inputs(tmp_path: Path) -> None:
    example = {"x": torch.rand(1, 6), "offset": torch.rand(2)}
    exported = export_model(returning(lambda x, c: x + c.sum()), tmp_path, example, format="onnx")
    assert [str(each) for each in exported.inputs] == ["x, float32 (batch, 6)", "offset, float32 (2)"]


def test_an_output_named_like_an_input(tmp_path: Path) -> None:
    exported = export_model(returning(lambda x, _: {"x": x, "y": 2 * x}), tmp_path, torch.rand(2, 6))
    session = onnxruntime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    assert (
        [each.name for each in session.get_outputs()] == [each.name for each in exported.outputs] == ["x_output", "y"]
    )


def test_another_format_replaces_the_first(tmp_path: Path) -> None:
    model = resnet(64, 6, 10, 3).eval()
    (tmp_path / "notes.txt").touch()
    export_model(model, tmp_path, torch.rand(2, 1, 8, 8), format="safetensors")
    (tmp_path / "model.json").write_text("{}")  # changed since: it is the user's
    export_model(model, tmp_path, torch.rand(2, 1, 8, 8), format="torch")
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "model.json", "model.pt2", "notes.txt"}
