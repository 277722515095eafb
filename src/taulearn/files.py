"""Files that are whole or absent: written aside, synced, renamed; read with a clear word on what is wrong."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

_PACKED = "taulearn"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, so that a crash at any moment leaves the old file or the new one.

    Args:
        path: Where; its folder must exist.
        content: What.

    Raises:
        OSError: If it cannot be written; nothing is left behind and the old file stands.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> write_bytes(path, b"x")
        >>> path.read_bytes()
        b'x'
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file.

    Args:
        tensors: Any devices and strides; shared storage is written once per name.
        metadata: Strings beside them.

    Returns:
        The bytes.

    Example:
        >>> import torch
        >>> len(tensor_bytes({"a": torch.zeros(2)}, {})) > 8
        True
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # safetensors writes several metadata entries in no fixed order; as one, equal content gives equal bytes
    packed = {_PACKED: json.dumps(dict(metadata), sort_keys=True)} if len(metadata) > 1 else dict(metadata)
    return serialise(plain, packed)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors as safetensors, whole or not at all.

    Args:
        path: Where.
        tensors: Any devices and strides; shared storage is written once per name.
        metadata: Strings beside them.

    Raises:
        OSError: If the file cannot be written.
    """
    write_bytes(path, tensor_bytes(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: Where.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            if _PACKED in metadata:
                metadata = {str(k): str(v) for k, v in json.loads(metadata[_PACKED]).items()}
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} must be a safetensors file, got a damaged one ({error}): restore or delete it"
        ) from error
