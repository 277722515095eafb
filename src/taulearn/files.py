"""Files that are whole or absent: written aside, synced, renamed; read with a clear word on what is wrong."""

import errno
import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PACKED = "taulearn"
_VIEWED = "dtypes"
"""The key of the metadata that names the types of tensors which are stored as views of another type."""

_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that cannot sync."""
_NO_FOLDERS = _NO_SYNC | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
"""The same, and errors where folders cannot be opened (Windows) or synced (network and shared folders)."""
_PAUSES = (0.01, 0.05, 0.2, 0.5)
"""Seconds between attempts at a file that another program holds open, as a virus scanner on Windows does."""


def is_path(data: str) -> bool:
    """Whether a data set is given by its path, not by its name: a file of a known kind, or with a slash.

    Example:
        >>> [is_path(data) for data in ("mnist", "mine.npz", "photos/", "./photos")]
        [False, True, True, True]
    """
    ends = data.lower().endswith((".npz", ".parquet", ".csv"))
    return ends or data.startswith((".", "~")) or "/" in data or os.sep in data


def expand_user(path: str | Path) -> Path:
    """With "~" and "~name" taken as that user's folder; where there is no such user the path stays as it is.

    Example:
        >>> expand_user("~no-such-user/mine.npz").as_posix()
        '~no-such-user/mine.npz'
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):  # no such user, or a character that no name of one can have
        return Path(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, so that a crash at any moment leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        move(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def move(aside: Path, path: Path) -> None:
    """Let a file that was written aside take the place of another, or of none."""
    for pause in (*_PAUSES, None):
        try:
            aside.replace(path)
            break
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)
    _sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """Bring an open file's content to the disk, where the file system can be asked to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can be asked to."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDERS:
            raise


def tensor_bytes(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str], argument: str = "tensors") -> bytes:
    """The content of a safetensors file."""
    from safetensors.torch import save

    check_tensors(tensors, argument)
    plain, dtypes = {}, {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous().clone()
        if not _is_held(value.dtype):
            dtypes[name] = str(value.dtype).removeprefix("torch.")
            value = value.unsqueeze(-1).view(_numbers(value.dtype))
        plain[name] = value
    metadata = dict(metadata) | ({_VIEWED: json.dumps(dtypes, sort_keys=True)} if dtypes else {})
    # safetensors writes several metadata entries in no fixed order; as one, equal content gives equal bytes
    packed = {_PACKED: json.dumps(metadata, sort_keys=True)} if len(metadata) > 1 else metadata
    return save(plain, packed)


def check_tensors(tensors: "Mapping[str, Tensor]", argument: str) -> None:
    """Refuse tensors that :func:`tensor_bytes` would refuse, without copying those that it would not."""
    for name, tensor in tensors.items():
        if found := _unwritable(tensor):
            what, remedy = found
            raise TypeError(
                f"{argument} must have a state dict of tensors with numbers of their own, got {what} at "
                f"{name!r}: {remedy}"
            )


def _unwritable(tensor: object) -> tuple[str, str] | None:
    """Why something cannot be written as a tensor, and what to do; None where it can."""
    import torch
    from torch.nn.parameter import is_lazy

    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}", "make it a buffer"
    if is_lazy(tensor):
        return "one without a shape as yet", "call the model once on a batch before"
    if tensor.is_meta:
        return "one on the meta device, without values", "give it some before (to_empty, load_state_dict)"
    if tensor.is_nested:
        return "a nested one", "keep it padded (to_padded_tensor), or out of the state dict (persistent=False)"
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        return (
            f"one of layout {layout}",
            "make it dense (to_dense), or keep it out of the state dict (persistent=False)",
        )
    if tensor.is_quantized:
        return f"a quantized one ({kind})", "save the model before it is quantized, or dequantize it"
    if not _is_copied(tensor.dtype):
        return (
            f"one of type {kind}, which torch itself does not copy",
            "keep the bits in another type, uint8 for instance",
        )
    try:
        hollow = tensor.numel() and not tensor.data_ptr()
    except RuntimeError:
        hollow = True
    return (f"a {type(tensor).__name__} made of others", "turn it into a plain tensor before") if hollow else None


@functools.cache
def _is_copied(dtype: "torch.dtype") -> bool:
    """Whether torch copies such numbers, as it does when a state is loaded."""
    import torch

    try:
        torch.empty(1, dtype=dtype).copy_(torch.empty(1, dtype=dtype).contiguous().clone())
    except (RuntimeError, NotImplementedError):
        return False
    return True


@functools.cache
def _is_held(dtype: "torch.dtype") -> bool:
    """Whether the installed safetensors writes and reads such numbers, a single one included."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    try:
        return bool(load(save({"": torch.empty(1, dtype=dtype)}))[""].dtype == dtype)
    except (KeyError, SafetensorError):
        return False


def _numbers(dtype: "torch.dtype") -> "torch.dtype":
    """The type as which such numbers are stored, with one dimension more: pairs where they are complex, else bytes."""
    import torch

    return {torch.complex128: torch.float64, torch.complex32: torch.float16}.get(dtype, torch.uint8)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write named tensors as safetensors, whole or not at all."""
    write_bytes(path, tensor_bytes(tensors, metadata))


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Read a safetensors file."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            if _PACKED in metadata:
                metadata = {str(k): str(v) for k, v in json.loads(metadata[_PACKED]).items()}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}
        for name, kind in json.loads(metadata.pop(_VIEWED, "{}")).items():
            tensors[name] = tensors[name].view(getattr(torch, kind)).squeeze(-1)
        return tensors, metadata
    except (SafetensorError, AttributeError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a safetensors file, got a damaged one ({error}): restore or delete it"
        ) from error
