"""Consoles and redirected output without UTF-8: nothing that is said may end a command or a training."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import taulearn
from taulearn import data, diagnostics, summary
from taulearn._streams import plain_output, printable
from taulearn.app.command_line import main
from taulearn.training import History, Run

ENCODINGS = ["cp1252", "ascii", "latin-1", "koi8-r", "utf-8"]
SMALL = ("--hidden-layers", "3", "--width", "4", "--epochs", "1", "--batch-size", "800")


class Console(io.TextIOWrapper):
    """Text in some encoding, and what a terminal says that it is one."""

    def __init__(self, encoding: str, *, errors: str = "strict", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors=errors)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def consoles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def make(encoding: str, **options: Any) -> tuple[Console, Console]:
        both = Console(encoding, **options), Console(encoding, **options)
        monkeypatch.setattr(sys, "stdout", both[0])
        monkeypatch.setattr(sys, "stderr", both[1])
        return both

    yield make
    monkeypatch.undo()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "Größe τ"
    taulearn.experiments.train(
        taulearn.experiments.TrainConfig(hidden_layers=3, width=4, epochs=1, batch_size=800, run=str(folder)),
        progress=False,
    )
    return folder


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_commands_end_well_on_any_console(encoding: str, trained: Path, tmp_path: Path, consoles: Any) -> None:
    lines = [
        ("--help",),
        ("train", "--help"),
        ("data",),
        ("train", *SMALL, "--run", str(tmp_path / "a → b")),
        ("resume", str(trained)),
        ("report", str(trained), "--out", str(tmp_path / "r.html")),
        ("prune", str(trained), "--keep", "0,1", "--out", str(tmp_path / "é")),
        ("export", str(trained), "--out", str(tmp_path / "export"), "--format", "safetensors"),
    ]
    for line in lines:
        out, errors = consoles(encoding)
        code = main(line)
        assert (code, errors.text()) == (0, ""), line
        assert out.text()
        assert out.errors == "strict", "as it was found"
    shown = "τ" if encoding == "utf-8" else "tau"
    out, _ = consoles(encoding)
    assert main(["resume", str(trained)]) == 0
    assert f"{shown} free" in out.text()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_are_said_on_any_console(encoding: str, consoles: Any) -> None:
    for line, code in ((("resume", "nïrgends τ"), 1), (("trän",), 2), (("reproduce", "Köhne"), 2)):
        _, errors = consoles(encoding)
        assert main(line) == code
        assert errors.text().startswith("taulearn: error: ")


def test_what_the_user_chose_for_strange_letters_is_left(consoles: Any) -> None:
    out, _ = consoles("ascii", errors="xmlcharrefreplace")
    with plain_output():
        sys.stdout.write("τ")
    assert out.text() == "&#964;"


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", "tau -> \\xe9\\u0416"), ("cp1252", "tau -> é\\u0416")])
def test_plain_letters(encoding: str, expected: str) -> None:
    assert printable("τ → éЖ", Console(encoding)) == expected


def test_streams_without_an_encoding_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    with plain_output():
        sys.stdout.write("τ")
    assert sys.stdout.getvalue() == "τ"
    assert printable("τ", sys.stdout) == "τ"


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(-1) == target).double().mean()


@pytest.mark.parametrize("terminal", [False, True], ids=["redirected", "a terminal"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_progress_in_a_program_of_ones_own(encoding: str, terminal: bool, consoles: Any) -> None:
    """Whose metric has a name that the console cannot show."""
    model = taulearn.nn.resnet(2, 3, 2, 3, init=[1.0, 0.0, 1.0])
    samples = torch.randn(6, 2), torch.randint(2, (6,))
    out, _ = consoles(encoding, terminal=terminal)
    history = taulearn.fit(
        model,
        samples,
        validation=samples,
        loss=nn.functional.cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        epochs=2,
        metrics={"précision→": accuracy},
        pruning=taulearn.Pruning(0.01),
        compile="never",
    )
    assert len(history.deletions) == 1
    assert "cision" in out.text()


def test_what_prints_is_plain() -> None:
    model = taulearn.nn.resnet(2, 3, 2, 4, init=[1.0, 0.0, 1.0, 0.5])
    x, y = torch.randn(6, 2), torch.randint(2, (6,))
    report = taulearn.prune(model)
    loss = nn.functional.cross_entropy
    things: list[Any] = [
        report,
        model,
        summary(model, x),
        summary(taulearn.wrap(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))), example_inputs=x)),
        History(),
        data.load("digits"),
        taulearn.Pruning(target_blocks=1),
        taulearn.penalties.L1(0.1),
        diagnostics.depth_profile(model, x, y, loss),
        diagnostics.gradient_propagation(model, x),
    ]
    for thing in things:
        assert f"{thing}{thing!r}".isascii(), thing


def test_files_are_the_same_in_any_locale(tmp_path: Path) -> None:
    program = """
import sys
from taulearn.app.command_line import main
sys.exit(main(["train", "--hidden-layers", "2", "--width", "4", "--epochs", "1", "--run", "run"]))
"""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.isascii()
    assert "τ" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert Run.open(tmp_path / "run").config["width"] == 4
