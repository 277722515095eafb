"""Models with numbers of every type: saved, loaded, trained with and gone on with, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from taulearn import Pruning, export_model, fit, load_model, parameter_groups, prune, save_model, wrap
from taulearn.training import Run
from test_files import DTYPES, EVERYDAY, bits, of_type
from training.support import Crash, assert_same_history, assert_same_weights, crash_after

COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Spectral(nn.Module):
    """A residual block in frequencies; a buffer of complex numbers, and a scale of no dimension."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, dtype=dtype) * 0.1)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.register_buffer("phase", torch.polar(torch.ones(5), torch.arange(5.0)).to(dtype).conj())

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.irfft(torch.fft.rfft(x) * self.w * self.scale * self.phase, n=8)


def spectral(dtype: torch.dtype, seed: int = 0, blocks: int = 4) -> Any:
    torch.manual_seed(seed)
    host = nn.Sequential(nn.Linear(4, 8, dtype=COMPLEX[dtype]), *(Spectral(dtype) for _ in range(blocks)))
    return wrap(
        host, [str(number + 1) for number in range(blocks)], example_inputs=torch.randn(2, 4, dtype=COMPLEX[dtype])
    )


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(20, size, dtype=COMPLEX[dtype], generator=generator) for size in (4, 8))


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_weights_come_back_also_pruned(dtype: torch.dtype, tmp_path: Path) -> None:
    model = spectral(dtype)
    prune(model, keep=[0, 2])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, host=spectral(dtype, seed=1))
    assert_same_weights(loaded, model)
    assert loaded.state_dict()["1.w"].dtype == dtype
    x = problem(dtype)[0]
    assert torch.equal(loaded(x), model(x))


def test_complex_weights_of_another_precision_are_no_host(tmp_path: Path) -> None:
    save_model(spectral(torch.complex128), tmp_path)
    with pytest.raises(ValueError, match=r"host must .*complex128"):
        load_model(tmp_path, host=spectral(torch.complex64))


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_weights_go_on_with_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    def trained(folder: Path, **options: Any) -> Any:
        model = spectral(dtype)
        optimizer = torch.optim.Adam(parameter_groups(model, lr=0.01))
        averaged = AveragedModel(model)
        history = fit(
            model,
            problem(dtype),
            loss=nn.functional.mse_loss,
            optimizer=optimizer,
            epochs=4,
            batch_size=10,
            pruning=Pruning(target_blocks=2, by=3, criterion="share"),
            averaged=averaged,
            compile="never",
            progress=False,
            run=folder,
            **options,
        )
        return model, averaged, history

    model, averaged, history = trained(tmp_path / "whole")
    assert model.time_steps.num_steps == 2
    with pytest.raises(Crash):
        trained(tmp_path / "cut", callbacks=[crash_after(3)])
    resumed, resumed_average, record = trained(tmp_path / "cut", resume=True)
    assert_same_weights(resumed, model)
    assert_same_weights(resumed_average, averaged)
    assert_same_history(record, history)
    assert_same_weights(load_model(tmp_path / "cut", host=spectral(dtype)), model)


class Holder(nn.Module):
    """A block with a buffer."""

    def __init__(self, buffer: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("held", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def holding(*buffers: Any) -> Any:
    torch.manual_seed(0)
    return wrap(nn.Sequential(*(Holder(buffer) for buffer in buffers)), example_inputs=torch.ones(1, 3))


SHAPES = [(2, 3), (), (0,)]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if str(d) in EVERYDAY], ids=str)
def test_a_model_with_buffers_of_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = holding(*(of_type(dtype, *shape) for shape in SHAPES))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, host=holding(*(torch.zeros(shape, dtype=dtype) for shape in SHAPES)))
    for number in range(len(SHAPES)):
        ours, theirs = (each.state_dict()[f"{number}.held"] for each in (loaded, model))
        assert ours.dtype == dtype
        assert torch.equal(bits(ours), bits(theirs))


def test_what_no_file_can_hold_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    for buffer in (torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.empty(2, dtype=torch.int4)):
        model = holding(buffer, torch.zeros(1))
        with pytest.raises(TypeError, match=r"^model must .*'0.held'"):
            save_model(model, tmp_path / "model")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = torch.ones(4, 3), torch.ones(4, 3)
        with pytest.raises(TypeError, match=r"^model.* must .*0.held'"):
            fit(model, data, loss=nn.functional.mse_loss, optimizer=optimizer, epochs=1, run=tmp_path / "run")
        assert list(tmp_path.iterdir()) == []


def test_a_scheduler_that_no_checkpoint_can_keep_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    model = holding(torch.zeros(1), torch.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler.note = object()
    data = torch.ones(4, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"scheduler/note holds a object"):
        fit(
            model,
            data,
            loss=nn.functional.mse_loss,
            optimizer=optimizer,
            epochs=1,
            run=tmp_path / "run",
            scheduler=scheduler,
        )
    assert not (tmp_path / "run").exists()


def test_files_from_before_are_read(tmp_path: Path) -> None:
    """With one entry of metadata, and with several."""
    from safetensors.torch import save_file

    from taulearn.files import read_tensors

    value = {"a": torch.arange(3), "b": torch.randn(2, dtype=torch.complex64)}
    for metadata in ({"kind": "k"}, {"taulearn": '{"format": "1", "kind": "k"}'}):
        save_file(value, tmp_path / "old", metadata)
        tensors, found = read_tensors(tmp_path / "old")
        assert found["kind"] == "k"
        assert all(torch.equal(tensors[name], each) for name, each in value.items())


@pytest.mark.parametrize("kind", ["nonsense", "load", "float32"])
def test_a_type_that_does_not_fit_is_damage(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from taulearn.files import read_tensors

    save_file({"a": torch.zeros(2, 3, dtype=torch.uint8)}, tmp_path / "file", {"dtypes": f'{{"a": "{kind}"}}'})
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(tmp_path / "file")


def test_a_network_of_complex_blocks_is_recorded_whole(tmp_path: Path) -> None:
    model = spectral(torch.complex128)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.01), momentum=0.9)
    data = problem(torch.complex128)
    fit(model, data, loss=nn.functional.mse_loss, optimizer=optimizer, epochs=1, run=tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").history.num_iterations == 1
    found = export_model(model, tmp_path / "export", example_inputs=data[0][:2], format="safetensors")
    assert found.path == tmp_path / "export"
