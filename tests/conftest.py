"""Fixtures for the tests of several rooms."""

import gc
import os
from pathlib import Path

import pytest

COLLECTED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are there only where there is a card: ``pytest -m cuda``."""
    config.addinivalue_line("markers", "cuda: on a CUDA device")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note the test, also one that -m leaves out."""
    item.config.stash.setdefault(COLLECTED, []).append(item.nodeid)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: the collector need not look at them again and again (a fifth of the time)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> list[str]:
    """All tests in the files that are run, the long ones included."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """Folder with the real MNIST and Fashion-MNIST files; tests that need it are skipped where there is none."""
    root = Path(os.environ.get("TAULEARN_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {root}: set TAULEARN_DATA to the folder of the real data")
    return root
