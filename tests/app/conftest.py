"""A working folder of its own for the tests of trainings and commands, and a call of these."""

import pytest

from taulearn.app.command_line import main


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Lets a test run in an empty folder, at a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TAULEARN_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def call(capsys):
    """Runs a command in this process; gives its exit code, output and errors."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
