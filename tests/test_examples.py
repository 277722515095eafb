"""Every example, run with the arguments that a user would give, with one number of each."""

import csv
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    """The output of the example in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The output of the example in this process, where torch need not be imported again."""

    def run_here(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_two_adjoints() -> None:
    output = run("two_adjoints.py")  # as a user would
    errors = [float(error) for error in re.findall(r"equals autograd to (\S+);", output)]
    assert len(errors) == 3
    assert max(errors) < 1e-12
    residual, equal, growing = output.split("\n\n")[:3]
    assert {line.split()[1] for line in residual.splitlines()[4:11]} == {"1.0000"}
    ratios = [[float(line.split()[1]) for line in part.splitlines()[4:11]] for part in (equal, growing)]
    assert max(ratios[0]) == pytest.approx(3.36, abs=0.01)
    assert max(ratios[1]) == pytest.approx(4.63, abs=0.01)


def test_gradient_propagation(run_here: Callable[..., str], tmp_path: Path) -> None:
    run_here("gradient_propagation.py", "--depths", "3", "6", "--width", "4", "--epochs", "1", "--out", str(tmp_path))
    for part in ("largest", "weight", "step"):
        assert (tmp_path / f"propagation_{part}.png").stat().st_size > 10_000
    with (tmp_path / "propagation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 12 * (3 + 6)

    def first(stage: str, scheme: str, steps: str) -> float:
        chosen = [r for r in rows if (r["stage"], r["scheme"], r["steps"]) == (stage, scheme, steps)]
        return float(next(r["largest"] for r in chosen if r["depth"] == "6" and r["layer"] == "0"))

    before = "before training"
    assert first(before, "feedforward", "fixed 1") < 0.1
    assert first(before, "residual", "fixed 1/N") == pytest.approx(1.2, abs=0.3)
    assert first(before, "dense", "fixed 1") > 2**4


def test_maxwell_surrogate(run_here: Callable[..., str]) -> None:
    output = run_here("maxwell_surrogate.py", "--steps", "15", "--width", "10", "--meshes", "2", "4")
    first, last = map(float, re.findall(r"mean squared error (\S+) -> (\S+) in 15 steps", output)[0])
    assert last < 0.5 * first
    coarse, fine = (line.split() for line in output.splitlines()[-2:])
    assert fine[:2] == ["4", "604"]
    assert float(fine[2]) == pytest.approx(5.843e-3, rel=1e-3)
    assert float(coarse[3]) == pytest.approx(float(fine[3]), rel=0.05)


def test_stage_cost(run_here: Callable[..., str]) -> None:
    output = run_here("stage_cost.py")
    left = int(re.findall(r"pruning: (\d+) of 12 layers left", output)[0])
    assert 2 <= left <= 8
    accuracy, depth = map(float, re.findall(r"predict: accuracy (\S+), mean depth (\S+)", output)[0])
    assert accuracy > 0.96
    assert depth < 2.0
    assert "2 layers of" in output or "first layer of" in output


def test_huggingface_trainer(run_here: Callable[..., str]) -> None:
    pytest.importorskip("accelerate", reason="pip install 'taulearn[huggingface]'")
    output = run_here("huggingface_trainer.py", "--epochs", "3")
    assert re.search(r"layers: 8 -> 8, those left: \[0, 1, 2, 3, 4, 5, 6, 7\]", output)
    assert float(re.findall(r"test accuracy: (\S+)", output)[0]) > 0.5


def test_lightning_trainer(run_here: Callable[..., str]) -> None:
    pytest.importorskip("lightning", reason="pip install 'taulearn[lightning]'")
    output = run_here("lightning_trainer.py", "--epochs", "5")
    assert "layers: 8 -> 4" in output
    assert float(re.findall(r"test accuracy: (\S+)", output)[0]) > 0.9


def compared(output: str, out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a comparison, whose table is printed and written alike."""
    table = (out / "table.md").read_text()
    assert table.strip() in output
    rows = json.loads((out / "record.json").read_text())["table"]
    assert len(rows) == table.count("\n|") - 1 == 5
    return {(row["way"], row["target"]): row for row in rows}


QUICK = ("--quick", "--seeds", "1", "--workers", "1", "--out")


def check_comparison(name: str, out: Path) -> None:
    rows = compared(run(name, *QUICK, str(out)), out)
    whole, pruned, small = rows["unpruned", 4], rows["pruned", 2], rows["small", 2]
    assert [whole["blocks"], pruned["blocks"], small["blocks"]] == [4, 2, 2]
    assert pruned["parameters"] == small["parameters"] + 2, "one step a block"
    assert whole["accuracy"] > 0.5
    assert pruned["accuracy"] > 0.5
    assert rows["Torch-Pruning", 2]["parameters"] < whole["parameters"]


@pytest.mark.long  # test_prune_a_transformer goes the same way
def test_prune_a_resnet(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="pip install torch-pruning")
    check_comparison("prune_a_resnet.py", tmp_path)
    members = {path: path.stat().st_mtime_ns for path in (tmp_path / "members").iterdir()}
    run("prune_a_resnet.py", *QUICK, str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "members").iterdir()} == members, "finished ones stay"


def test_prune_a_transformer(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="pip install torch-pruning")
    check_comparison("prune_a_transformer.py", tmp_path)


def test_every_example_is_run() -> None:
    tested = set(re.findall(r'(?:run|run_here|check_comparison)\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("[!_]*.py")}
