"""Every example, run with the arguments that a user would give, with one number of each."""

import csv
import importlib
import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

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
        monkeypatch.syspath_prepend(str(EXAMPLES))
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
    output = run_here("stage_cost.py", "--epochs", "12")
    left = int(re.findall(r"pruning: (\d+) of 12 layers left", output)[0])
    assert 2 <= left <= 8
    accuracy, depth = map(float, re.findall(r"predict: accuracy (\S+), mean depth (\S+)", output)[0])
    assert accuracy > 0.96
    assert depth < 2.0
    assert "2 layers of" in output or "first layer of" in output


def test_huggingface_trainer(run_here: Callable[..., str]) -> None:
    pytest.importorskip("accelerate", reason="pip install 'taulearn[huggingface]'")
    output = run_here("huggingface_trainer.py", "--epochs", "2")
    assert re.search(r"layers: 8 -> 8, those left: \[0, 1, 2, 3, 4, 5, 6, 7\]", output)
    assert float(re.findall(r"test accuracy: (\S+)", output)[0]) > 0.4


def test_lightning_trainer(run_here: Callable[..., str]) -> None:
    pytest.importorskip("lightning", reason="pip install 'taulearn[lightning]'")
    output = run_here("lightning_trainer.py", "--epochs", "5")
    assert "layers: 8 -> 4" in output
    assert float(re.findall(r"test accuracy: (\S+)", output)[0]) > 0.9


def compared(output: str, out: Path, number: int = 5) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a comparison, whose table is printed and written alike."""
    table = (out / "table.md").read_text()
    assert table.strip() in output
    rows = json.loads((out / "record.json").read_text())["table"]
    assert len(rows) == table.count("\n|") - 1 == number
    return {(row["way"], row["target"]): row for row in rows}


QUICK = ("--quick", "--seeds", "1", "--workers", "1", "--out")


def check_comparison(run: Callable[..., str], name: str, out: Path) -> None:
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
    check_comparison(run, "prune_a_resnet.py", tmp_path)
    members = {path: path.stat().st_mtime_ns for path in (tmp_path / "members").iterdir()}
    run("prune_a_resnet.py", *QUICK, str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "members").iterdir()} == members, "finished ones stay"


@pytest.mark.long
def test_cifar10_resnet(run_here: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="pip install torch-pruning")
    rows = compared(run_here("cifar10_resnet.py", *QUICK, str(tmp_path)), tmp_path, 12)
    for (way, target), row in rows.items():
        assert row["blocks"] == (8 if way in ("unpruned", "Torch-Pruning") else target), way
        assert row["accuracy"] > 0.5, way
    assert rows["small, steps", 4]["parameters"] == rows["small", 4]["parameters"] + 4, "one step a block"
    assert rows["grown", 6]["parameters"] > rows["small, taught", 4]["parameters"]
    assert rows["Torch-Pruning", 6]["parameters"] < rows["unpruned", 8]["parameters"]


@pytest.mark.long
def test_prune_a_transformer(run_here: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="pip install torch-pruning")
    check_comparison(run_here, "prune_a_transformer.py", tmp_path)


def shortened_by(
    ways: tuple[str, ...], name: str, out: Path, run_here: Callable[..., str], *options: str
) -> dict[str, Any]:
    """The cells that an example of pretrained models writes in its quick mode, by way; the page holds them all."""
    pytest.importorskip("transformers", reason="pip install 'taulearn[huggingface]'")
    arguments = ("run", "--quick", "--save", "--seeds", "0", "--out", str(out), *options, "--ways", *ways)
    run_here(name, *arguments)
    files = {path: path.read_text() for path in (out / "cells").glob("*.json")}
    times = [path.stat().st_mtime_ns for path in files]
    run_here(name, *arguments)
    assert [path.stat().st_mtime_ns for path in files] == times, "cells that are there are not trained again"
    cells = {cell["way"]: cell for cell in map(json.loads, files.values())}
    assert cells.keys() == set(ways)
    page = out / "page"
    for place in (out, page):  # from the cells, and from the page alone
        given = ("--quick", "--seeds", "0", "--cells", str(place), "--out", str(page), *options)
        table = run_here(name, "report", *given)
        assert table.strip() == (page / "README.md").read_text().strip()
        for way, cell in cells.items():
            figures = [each["test"] for each in cell["figures"]]
            row = next(line for line in table.splitlines() if line.startswith(f"| {way} |"))
            assert [float(entry) for entry in row.split("|")[4:-3]] == pytest.approx(figures, abs=0.006)
    assert (page / "figure.png").stat().st_size > 10_000
    return cells


def check_plain(folder: Path, blocks: int) -> None:
    """A checkpoint of so many blocks, without time steps."""
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == blocks
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert {int(number) for name in names for number in re.findall(r"layers?\.(\d+)\.", name)} == set(range(blocks))
    assert not any("time_steps" in name for name in names)


@pytest.mark.long
def test_shorten_minilm(run_here: Callable[..., str], tmp_path: Path) -> None:
    ways = ("whole", "every-other", "random", "sensitivity-faded+teacher")
    cells = shortened_by(ways, "shorten_minilm.py", tmp_path, run_here)
    assert cells["every-other"]["blocks"] == [0, 2]
    for way in ways:
        assert cells[way]["figures"][-1]["test"] > 85
    for way in ("every-other", "sensitivity-faded+teacher"):
        check_plain(tmp_path / "models" / f"toy-2-{way}-0", 2)


@pytest.mark.long  # test_shorten_minilm goes the same way
def test_shorten_language_model(run_here: Callable[..., str], tmp_path: Path) -> None:
    ways = ("whole", "top", "loss-faded")
    cells = shortened_by(ways, "shorten_language_model.py", tmp_path, run_here)
    before, after = (cells["top"]["figures"][k]["test"] for k in (0, -1))
    assert cells["whole"]["figures"][0]["test"] < before
    assert after < before - 0.2
    assert len(cells["loss-faded"]["blocks"]) == 2
    check_plain(tmp_path / "models" / "text-2-loss-faded-0", 2)


@pytest.mark.long  # test_shorten_minilm goes the same way
@pytest.mark.parametrize(("model", "annealed", "task"), [("minilm", True, "toy"), ("lm", False, "text")])
def test_deepen_pretrained(model: str, annealed: bool, task: str, run_here: Callable[..., str], tmp_path: Path) -> None:
    ways = ("inserted", "stacked", "last")
    cells = shortened_by(ways, "deepen_pretrained.py", tmp_path, run_here, "--model", model)
    blocks, steps = cells["inserted"]["blocks"], cells["inserted"]["steps"]
    assert sorted(blocks) == list(range(6)), "two came in"
    assert cells["stacked"]["blocks"] == blocks, "the same places"
    assert cells["inserted"]["figures"][0] == cells["last"]["figures"][0], "a block with step 0 changes nothing"
    new = [l >= 4 for l in blocks]
    assert all(step == 1.0 for step, is_new in zip(steps, new, strict=True) if annealed or not is_new)
    assert annealed or all(0.0 < abs(step) < 1.0 for step, is_new in zip(steps, new, strict=True) if is_new)
    for way, depth in (("inserted", 6), ("stacked", 6), ("last", 4)):
        check_plain(tmp_path / "models" / f"{task}-6-{way}-0", depth)


def test_which_scheme(run_here: Callable[..., str], tmp_path: Path) -> None:
    arguments = ("run", "--quick", "--seeds", "0", "1", "--out", str(tmp_path))
    run_here("which_scheme.py", *arguments)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    run_here("which_scheme.py", *arguments)
    assert {path: path.stat().st_mtime_ns for path in files} == files, "cells that are there are not trained again"
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")]
    assert len(cells) == 8 * 2 * 2
    evaluations = {"residual": 1, "momentum": 1, "verlet": 1, "midpoint": 2, "heun": 2, "rk4": 4}
    evaluations |= {"fractional": 1, "learned order": 1}
    for cell in cells:
        assert (len(cell["tau"]) - 1) * evaluations[cell["scheme"]] == 12
        assert (len(set(cell["tau"])) == 1) == (cell["steps"] == "fixed")
        assert ("order" in cell) == (cell["scheme"] == "learned order")
    page = tmp_path / "page"
    for place in (tmp_path, page):
        text = run_here("which_scheme.py", "report", "--cells", str(place), "--out", str(page))
        for scheme in evaluations:
            row = next(line for line in text.splitlines() if line.startswith(f"| {scheme} |"))
            found = [cell["test"] for cell in cells if (cell["scheme"], cell["steps"]) == (scheme, "learned")]
            assert float(row.split("|")[4].split("±")[0]) == pytest.approx(sum(found) / 2, abs=0.006)


@pytest.mark.long
def test_learned_order(run_here: Callable[..., str], tmp_path: Path) -> None:
    run_here("learned_order.py", "run", "--quick", "--seeds", "0", "1", "--out", str(tmp_path))
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")]
    assert sorted(len(cell["orders"]) for cell in cells) == [1, 1, 1, 1, 6, 6]
    assert all((cell["orders"] == [0.5]) == (cell["way"] == "0.5") for cell in cells)
    page = tmp_path / "page"
    for place in (tmp_path, page):
        text = run_here("learned_order.py", "report", "--cells", str(place), "--out", str(page))
        for way in ("0.5", "one learned", "learned per layer"):
            row = next(line for line in text.splitlines() if line.startswith(f"| {way} |"))
            found = [cell["test"] for cell in cells if cell["way"] == way]
            assert float(row.split("|")[2].split("±")[0]) == pytest.approx(sum(found) / 2, abs=0.006)


def test_cells_are_those_of_one_kind_of_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cells = importlib.import_module("_cells")
    path = tmp_path / "new" / "settings.json"
    for _ in range(2):
        cells.settle(path, epochs=3, targets=(6, 3))
    with pytest.raises(SystemExit, match=r"--out .* epochs 3, not 5"):
        cells.settle(path, epochs=5, targets=(6, 3))
    with pytest.raises(SystemExit, match=r"stride None, not 2"):
        cells.settle(path, epochs=3, targets=(6, 3), stride=2)
    cells.once(tmp_path / "cells" / "b.json", lambda: {"way": "b", "seed": 10})
    cells.once(tmp_path / "cells" / "a.json", lambda: {"way": "a", "seed": 9})
    assert [each["way"] for each in cells.read_cells([tmp_path], "seed", "way")] == ["a", "b"]
    cells.write_cells([{"way": "c", "seed": 9}, {"way": "a", "seed": 9}], tmp_path / "page")
    assert len(cells.read_cells([tmp_path, tmp_path / "page"], "way", "seed")) == 3


def test_intervals_of_shortening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shortening = importlib.import_module("_shortening")
    figures = {"top": (80.0, 82.0, 84.0), "influence": (70.0, 71.0, 99.0), "sensitivity-faded": (82.0, 83.0, 87.0)}
    figures["influence+teacher"] = (90.0, 90.0, 90.0)
    cells = [
        {
            "task": "t",
            "kept": 3,
            "way": way,
            "seed": seed,
            "blocks": [0, 1, 2],
            "figures": [{"budget": 2.0, "test": value}],
        }
        for way, values in figures.items()
        for seed, value in enumerate(values)
    ]
    more, less = (shortening.Page("", "", "", higher, {}) for higher in (True, False))
    table = shortening.Table(cells, more)
    quantile = 4.302652729911275  # of Student's distribution with two degrees of freedom, at 0.975
    values = figures["sensitivity-faded"]
    mean, half = shortening.interval(values)
    assert mean == pytest.approx(84.0)
    assert half == pytest.approx(quantile * 7**0.5 / 3**0.5)
    assert table.best_simple("sensitivity-faded", 2.0) == "top"
    assert shortening.Table(cells, less).best_simple("sensitivity-faded", 2.0) == "influence"
    assert table.best_simple("influence+teacher", 2.0) == "influence+teacher"
    differences = table.differences("sensitivity-faded", "top", 2.0)
    assert differences == [2.0, 1.0, 3.0]
    assert shortening.shown(differences, 2, signed=True) == f"+2.00 ± {quantile / 3**0.5:.2f}"
    times = {"batch 1": {"3": 2.0, "loss-branch": 1.5}, "batch 32": {"3": 20.0}}
    assert shortening.milliseconds(times, cells[0], 32) == 20.0
    assert shortening.milliseconds(times, {"way": "loss-branch", "kept": 3}, 1) == 1.5
    assert shortening.milliseconds(None, cells[0], 32) is None
    lack = shortening.missing(cells, {"t": (3,)}, ["top", "loss", "whole"], [0, 1, 2, 3])
    assert lack == [
        "- t, 3 kept, top: seeds 3",
        "- t, 3 kept, loss: seeds 0, 1, 2, 3",
        "- t, 3 kept, whole: seeds 0, 1, 2, 3",
    ]


@pytest.mark.parametrize(
    "names", [("peaks",), pytest.param(("nested-spheres", "maxwell", "digits"), marks=pytest.mark.long)]
)
def test_grow_and_prune(names: tuple[str, ...], run_here: Callable[..., str], tmp_path: Path) -> None:
    quick = ("--quick", "--data", *names)
    run_here("grow_and_prune.py", "run", *quick, "--out", str(tmp_path))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    gone = next(path for path in files if path.name == f"{names[0]}-final-lr0.01-1.json")
    before = json.loads(gone.read_text())
    gone.unlink()
    run_here("grow_and_prune.py", "run", *quick, "--out", str(tmp_path))
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert {path for path in files if again[path] != files[path]} == {gone}, "the others are not trained again"
    after = json.loads(gone.read_text())
    assert (after["loss"], after["work"]) == (before["loss"], before["work"])

    cells = [json.loads(path.read_text()) for path in files]
    measured = {(c["data"], c["way"], c["seed"]): c for c in cells if c["seed"] != 100}
    assert len(measured) == len(names) * 5 * 2
    for (name, way, seed), cell in measured.items():
        assert cell["layers"] == {"deep": 6, "shallow": 2}.get(way, 4)
        assert cell["most"] == (6 if way in ("grown", "inserted") else cell["layers"])
        if way != "inserted":
            assert cell["work"][-1] >= measured[name, "grown", seed]["work"][-1], "nobody gets less"
    if names == ("peaks",):
        two, three = 2 * 4 + 16 + 4, 2 * 4 + 2 * 16 + 4  # of one sample, by the layers, of width 4
        assert measured["peaks", "shallow", 0]["work"][:2] == [6 * 20 * 3 * two, 12 * 20 * 3 * two]
        first = 3 * 20 * (4 * two + 2 * three)  # layers come after the iterations 4 and 6, where the indicator looks
        assert measured["peaks", "grown", 0]["work"][0] == first + 9 * 20 * (two + three)

    page = tmp_path / "page"
    for place in (tmp_path, page):  # from the cells, and from the page alone
        text = run_here("grow_and_prune.py", "report", *quick, "--cells", str(place), "--out", str(page))
        assert text.strip() == (page / "README.md").read_text().strip()
        rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]
        assert [row[0] for row in rows] == len(names) * ["way", "grown", "deep", "shallow", "final", "inserted"]
        for name, row in zip(names, rows[1::6], strict=True):
            losses = [measured[name, "grown", seed]["loss"][-1] for seed in (0, 1)]
            assert float(row[6]) == pytest.approx((losses[0] * losses[1]) ** 0.5, rel=0.006)
    assert (page / "figure.png").stat().st_size > 10_000


def test_multiply_adds_of_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    growing = importlib.import_module("grow_and_prune")
    for problem in growing.problems(quick=True):
        inputs = problem.samples()["train"][0][:1]
        for depth in (2, 5):
            with FlopCounterMode(display=False) as counter:
                problem.make(depth)(inputs)
            assert problem.forward(depth) == counter.get_total_flops() / 2
    found = growing.multiply_adds([1, 1, 2, 1], lambda depth: 7 + depth, 10, looks={2})
    assert found.tolist() == [240, 480 + 720, 1200 + 270, 1470 + 240]


def test_figures_of_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    page = importlib.import_module("_growing_page")
    cell = {"work": [50, 96, 98, 100, 110], "loss": [9.0, 3.0, 1.0, 2.0, 8.0]}
    assert page.at(cell, "work", 100) == 2.0, "the median of 96, 98 and 100"
    assert page.at(cell, "work", 80) == 9.0, "the last one before"
    assert page.held_out({"lr": 1.0}) == math.inf
    mean, low, high = page.ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    half = math.log(2) * 4.302652729911275 / 3**0.5  # Student's distribution, two degrees of freedom, at 0.975
    assert (mean, low, high) == pytest.approx((4.0, 4.0 * math.exp(-half), 4.0 * math.exp(half)))
    said = {page.judged(found)[1] for found in ((2.0, 1.1, 3.0), (0.5, 0.3, 0.9), (1.0, 0.9, 1.2))}
    assert said == {"better", "worse", "undecided"}


def test_every_example_is_run() -> None:
    tested = set(re.findall(r'(?:run|run_here|shortened_by)(?:\(|\(ways, |, )"(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("[!_]*.py")}
