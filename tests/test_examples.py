"""Every example, run as a user would, with one number of each."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_two_adjoints() -> None:
    output = run("two_adjoints.py")
    errors = [float(error) for error in re.findall(r"equals autograd to (\S+);", output)]
    assert len(errors) == 3
    assert max(errors) < 1e-12
    residual, equal, growing = output.split("\n\n")[:3]
    assert {line.split()[1] for line in residual.splitlines()[4:11]} == {"1.0000"}
    ratios = [[float(line.split()[1]) for line in part.splitlines()[4:11]] for part in (equal, growing)]
    assert max(ratios[0]) == pytest.approx(3.36, abs=0.01)
    assert max(ratios[1]) == pytest.approx(4.63, abs=0.01)


def test_gradient_propagation(tmp_path: Path) -> None:
    run("gradient_propagation.py", "--depths", "3", "6", "--width", "4", "--epochs", "1", "--out", str(tmp_path))
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


def test_maxwell_surrogate() -> None:
    output = run("maxwell_surrogate.py", "--steps", "15", "--width", "10", "--meshes", "2", "4")
    first, last = map(float, re.findall(r"mean squared error (\S+) -> (\S+) in 15 steps", output)[0])
    assert last < 0.5 * first
    coarse, fine = (line.split() for line in output.splitlines()[-2:])
    assert fine[:2] == ["4", "604"]
    assert float(fine[2]) == pytest.approx(5.843e-3, rel=1e-3)
    assert float(coarse[3]) == pytest.approx(float(fine[3]), rel=0.05)


def test_stage_cost() -> None:
    output = run("stage_cost.py")
    left = int(re.findall(r"pruning: (\d+) of 12 layers left", output)[0])
    assert 2 <= left <= 8
    accuracy, depth = map(float, re.findall(r"predict: accuracy (\S+), mean depth (\S+)", output)[0])
    assert accuracy > 0.96
    assert depth < 2.0
    assert "2 layers of" in output or "first layer of" in output


def test_every_example_is_run() -> None:
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
