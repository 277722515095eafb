"""Files that are whole or absent, and the same bytes for the same content."""

import torch

from taulearn.files import read_tensors, tensor_bytes, write_tensors


def test_equal_content_gives_equal_bytes():
    metadata = {name: name * 2 for name in ("kind", "format", "digest", "state")}
    reordered = dict(sorted(metadata.items()))
    tensors = {"b": torch.ones(2), "a": torch.arange(3)}
    first = tensor_bytes(tensors, metadata)
    assert all(tensor_bytes(dict(sorted(tensors.items())), reordered) == first for _ in range(20))


def test_metadata_comes_back(tmp_path):
    for metadata in ({}, {"format": "pt"}, {"kind": "k", "format": "1"}):
        write_tensors(tmp_path / "file", {"a": torch.zeros(1)}, metadata)
        assert read_tensors(tmp_path / "file")[1] == metadata
