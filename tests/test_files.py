"""Files that are whole or absent on every file system, and the same bytes for the same content."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import taulearn
from taulearn.files import read_tensors, tensor_bytes, write_bytes, write_tensors
from taulearn.training import History, Run

UNSUPPORTED = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]
Write = Callable[[Path], Any]


def test_equal_content_gives_equal_bytes():
    metadata = {name: name * 2 for name in ("kind", "format", "digest", "state")}
    reordered = dict(sorted(metadata.items()))
    tensors = {"b": torch.ones(2), "a": torch.arange(3)}
    first = tensor_bytes(tensors, metadata)
    assert all(tensor_bytes(dict(sorted(tensors.items())), reordered) == first for _ in range(20))


def test_metadata_comes_back(tmp_path):
    for metadata in ({}, {"format": "pt"}, {"kind": "k", "format": "1"}):
        for tensors in ({"a": torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.complex128)}):
            write_tensors(tmp_path / "file", tensors, metadata)
            assert read_tensors(tmp_path / "file")[1] == metadata


def failing_sync(monkeypatch: pytest.MonkeyPatch, code: int, kind: Callable[[int], bool]) -> list[int]:
    """Let fsync of folders, or of files, fail; how often it did."""
    fsync, failures = os.fsync, []

    def sync(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            failures.append(code)
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    return failures


def trained(folder: Path) -> None:
    model = taulearn.nn.resnet(2, 3, 2, 2)
    data = torch.randn(4, 2), torch.randint(2, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy
    taulearn.fit(model, data, loss=loss, optimizer=optimizer, epochs=1, run=folder / "run", progress=False)
    assert len(Run.open(folder / "run").history.epochs["iteration"]) == 2
    assert taulearn.load_model(folder / "run").time_steps.num_steps == 2


WRITES: dict[str, Write] = {
    "bytes": lambda folder: write_bytes(folder / "a", b"x"),
    "model": lambda folder: taulearn.save_model(taulearn.nn.resnet(2, 3, 1, 2), folder),
    "record": lambda folder: History().save(folder / "history.safetensors"),
    "run": trained,
    "report": lambda folder: taulearn.report.html.write_page(folder / "report.html", "page"),
    "export": lambda folder: taulearn.export_model(
        taulearn.nn.resnet(2, 3, 1, 2), folder / "export", example_inputs=torch.ones(2, 2), format="safetensors"
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_synced(
    write: Write, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = failing_sync(monkeypatch, code, stat.S_ISDIR)
    write(tmp_path)
    assert failures


@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"export"}))  # Python's own temporary folders are opened there
@pytest.mark.parametrize("code", [errno.EACCES, errno.EISDIR])
def test_a_folder_that_cannot_be_opened(name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, asked = os.open, []

    def windows(path: Any, *arguments: Any, **options: Any) -> int:
        if isinstance(path, str | os.PathLike) and Path(path).is_dir():
            asked.append(path)
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", windows)
    WRITES[name](tmp_path)
    assert asked


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_a_file_system_without_syncing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = failing_sync(monkeypatch, code, lambda mode: True)
    write_bytes(tmp_path / "a", b"new")
    assert len(failures) == 2
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EBADF])
def test_content_that_did_not_reach_the_disk_is_no_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    failing_sync(monkeypatch, code, stat.S_ISREG)
    with pytest.raises(OSError, match=os.strerror(code)) as found:
        write_bytes(tmp_path / "a", b"new")
    assert found.value.errno == code
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_name_that_did_not_reach_the_disk_is_said(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_sync(monkeypatch, code, stat.S_ISDIR)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_bytes(tmp_path / "a", b"new")


@pytest.mark.parametrize("held", [1, 3, 1000])
def test_a_file_that_another_program_holds_open(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, for a while or for good."""
    replace, tries = os.replace, []
    (tmp_path / "a").write_bytes(b"old")

    def busy(source: Any, target: Any, **options: Any) -> None:
        tries.append(target)
        if len(tries) <= held:
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr("taulearn.files.time.sleep", lambda seconds: None)
    if held == 1000:
        with pytest.raises(PermissionError):
            write_bytes(tmp_path / "a", b"new")
    else:
        write_bytes(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old" if held == 1000 else b"new"]


def test_tensors_that_were_read_do_not_hold_on_to_the_file(tmp_path: Path) -> None:
    """Windows does not replace a file that is mapped into memory, and one that is overwritten would change weights."""
    taulearn.save_model(taulearn.nn.resnet(2, 3, 1, 2), tmp_path)
    model = taulearn.load_model(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_suites_go_without_locks_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from taulearn.app.members import Member, locked

    member = Member("a", 0, None, lambda folder: {})
    (member.folder(tmp_path)).parent.mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(member, tmp_path), locked(member, tmp_path):
        assert member.folder(tmp_path).parent.exists()


DTYPES = sorted({d for name in dir(torch) if isinstance(d := getattr(torch, name), torch.dtype)}, key=str)
EVERYDAY = {
    *("torch.bool", "torch.uint8", "torch.uint16", "torch.uint32", "torch.uint64"),
    *("torch.int8", "torch.int16", "torch.int32", "torch.int64", "torch.bfloat16"),
    *(f"torch.float{bits}" for bits in (16, 32, 64)),
    *(f"torch.complex{bits}" for bits in (32, 64, 128)),
    *(f"torch.float8_{kind}" for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")),
}
BITS = {
    "torch.float4_e2m1fn_x2",
    "torch.bcomplex32",
    *(f"torch.bits{kind}" for kind in ("1x8", "2x4", "4x2", "8", "16")),
}
COPIED = EVERYDAY | BITS


def of_type(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any bits, the same each time; truth values have two."""
    generator = torch.Generator().manual_seed(0)
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    flat = torch.randint(high, (*shape, size), dtype=torch.uint8, generator=generator)
    return flat.view(dtype).squeeze(-1)


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().contiguous().unsqueeze(-1).view(torch.uint8)


@pytest.mark.filterwarnings("ignore:B?Complex.* support is experimental", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number_comes_back_or_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {f"{shape}": of_type(dtype, *shape) for shape in ((2, 3), (), (0, 4), (5,))}
    tensors |= {"turned": tensors["(2, 3)"].T, "shared": tensors["(5,)"], "part": tensors["(2, 3)"][:, 1:]}
    if str(dtype) not in COPIED:
        with pytest.raises(TypeError, match=r"'\(2, 3\)'"):
            write_tensors(tmp_path / "file", tensors, {"kind": "test"})
        assert list(tmp_path.iterdir()) == []
        return
    write_tensors(tmp_path / "file", tensors, {"kind": "test"})
    found, metadata = read_tensors(tmp_path / "file")
    assert metadata == {"kind": "test"}
    for name, value in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == value.shape
        assert torch.equal(bits(found[name]), bits(value)), name


def test_complex_numbers_are_pairs_for_other_readers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    value = torch.randn(2, 3, dtype=torch.complex128)
    write_tensors(tmp_path / "file", {"w": value, "conj": value.conj()}, {})
    other = load_file(tmp_path / "file")
    assert torch.equal(torch.view_as_complex(other["w"]), value)
    assert torch.equal(read_tensors(tmp_path / "file")[0]["conj"], value.conj())


class Packed(torch.Tensor):
    """A tensor that holds others, as those of quantised models do."""

    @staticmethod
    def __new__(cls) -> "Packed":
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return Packed()


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


NO_NUMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "layout"),
    "quantized": (quantized, "quantized"),
    "meta": (lambda: torch.ones(3, device="meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "nested"),
    "not yet of any shape": (lambda: torch.nn.LazyLinear(3).weight, "without a shape"),
    "holding others": (Packed, "Packed"),
    "no tensor": (lambda: {"a": 1}, "dict"),
}


@pytest.mark.filterwarnings("ignore:.*(CSR|quantize|nested tensors)")
@pytest.mark.parametrize("name", NO_NUMBERS)
def test_tensors_without_numbers_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, telling = NO_NUMBERS[name]
    value = make()
    with pytest.raises(TypeError, match=f"^tensors must .*({telling}).*'odd': "):
        write_tensors(tmp_path / "file", {"fine": torch.ones(2), "odd": value}, {})
    assert list(tmp_path.iterdir()) == []
