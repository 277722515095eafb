"""Fixtures for the tests of several rooms."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """Folder with the real MNIST and Fashion-MNIST files; tests that need it are skipped where there is none."""
    root = Path(os.environ.get("TAULEARN_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {root}: set TAULEARN_DATA to the folder of the real data")
    return root
