"""A working folder of its own for the tests of trainings and commands."""

import pytest


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Lets a test run in an empty folder, at a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAULEARN_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
