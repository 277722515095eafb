"""`taulearn reproduce`: what it refuses, and what it writes from records that are there."""

import json
import re
import shutil
import tomllib
import zipfile
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from taulearn.app.command_line import main, reproduce as command
from taulearn.app.members import Member
from taulearn.experiments import TrainConfig
from taulearn_papers.packed_results import results_in
from taulearn_papers.suite import Claim, Suite, Verdict
from taulearn_papers.suite_report import facets

STORED = Path(__file__).parent / "stored" / "herberg2023-quick" / "records.npz"


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        code = main(["reproduce", *arguments])
        return code, *capsys.readouterr()

    return called


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("herberg2024", "'antil2022', 'beyond', 'herberg2023'"),
        ("herberg2024", "did you mean 'herberg2023'?"),
        ("herberg2023 --figure 4.7", "--figure must be one of 4.1, 4.2"),
        ("herberg2023 --table 1", "--table must be one of as-published"),
        ("herberg2023 --seeds 0", "--seeds must be >= 1"),
        ("herberg2023 --workers 0", "--workers must be >= 1"),
        ("herberg2023 --engine serial --workers 2", "--workers must be left out with --engine serial"),
        ("herberg2023 --address localhost:6379", "--address must be left out with --engine processes"),
        (
            "herberg2023 --engine ray --address localhost:6379 --workers 2",
            "--workers must be left out with --address, got 2",
        ),
        ("herberg2023 --engine threads", "threads"),
        ("herberg2023 --data cifar10=./", "NAME one of fashion-mnist, mnist"),
        ("herberg2023 --data mnist=./nothing", "--data must be NAME=PATH"),
        ("herberg2023 --data mnist", "--data must be NAME=PATH"),
        ("beyond --data cifar10=./ fashion-mnist=./nothing", "got 'fashion-mnist=./nothing'"),
        ("herberg2023 --all --figure 4.1", "--all must stand without --figure and --table"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(call, tmp_path, line, message):
    code, _, err = call(*line.split())
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_without_records_nothing_is_measured(call, tmp_path):
    code, out, _ = call("herberg2023", "--no-train", "--out", "empty")
    assert code == 0
    claims = json.loads((tmp_path / "empty/claims.json").read_text())
    assert {claim["verdict"]["outcome"] for claim in claims} == {"not measured"}
    assert "figure 4.1 is missing: no finished member of mnist/resnet/free" in out


def test_kept_records_give_verdicts_figures_and_a_report(call, tmp_path):
    shutil.copy(STORED, tmp_path / "records.npz")
    code, out, _ = call("herberg2023", "--no-train", "--out", "records.npz", "--keep", "kept")
    assert code == 0
    assert "H1     holds" in out
    assert (tmp_path / "claims.md").read_text().count("| holds |") >= 2
    assert {file.suffix for file in (tmp_path / "figures").iterdir()} == {".png", ".svg"}
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    with zipfile.ZipFile(tmp_path / "kept/records.npz") as again, zipfile.ZipFile(STORED) as stored:
        assert again.namelist() == stored.namelist()  # Python's versions write other headers
        for name in stored.namelist():
            assert again.read(name) == stored.read(name), name
    assert sum(file.stat().st_size for file in (tmp_path / "kept").iterdir()) < 2e6
    provenance = json.loads((tmp_path / "kept/provenance.json").read_text())
    assert provenance["members"] == sum(provenance["settings"].values())


def test_one_figure_is_drawn_alone_and_the_same_each_time(call, tmp_path):
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(STORED, tmp_path / name / "records.npz")
        code, _, _ = call("herberg2023", "--no-train", "--out", f"{name}/records.npz", "--figure", "4.4")
        assert code == 0
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / name).rglob("figure-*")})
    assert set(drawn[0]) == {"figure-4.4.png", "figure-4.4.svg"}
    assert drawn[0] == drawn[1]


def sick(folder):
    raise ValueError("it is sick")


@pytest.fixture
def small(monkeypatch):
    """In the place of a suite, one of two short trainings; with one that fails, "b/seed-1", where ``failing``."""

    def put(failing=False):
        def members(quick, seeds):
            trained = [Member("a", s, TrainConfig(width=8, epochs=1, l1=0.1, seed=s)) for s in range(seeds or 2)]
            return [*trained, *[Member("b", 1, TrainConfig(width=8, epochs=1, seed=1), sick)] * failing]

        claims = (
            Claim("X1", "it learns", lambda results: Verdict.of({"two seeds": len(results.seeds("a")) == 2}, {})),
            Claim("X2", "all learn", lambda results: Verdict.of({"both": results.seeds("a") + results.seeds("b")}, {})),
        )
        suite = Suite("beyond", "Small", members, claims[: 1 + failing])
        monkeypatch.setattr(command, "installed_suites", lambda: {"beyond": suite})

    return put


def test_small_suite_is_trained_judged_and_gone_on_with(call, tmp_path, small):
    small()
    code, out, _ = call("beyond", "--engine", "serial", "--quick")
    assert code == 0
    assert "2 trained" in out
    assert "X1     holds" in out
    assert (tmp_path / "results/beyond-quick/report.html").exists()
    assert "2 finished before" in call("beyond", "--engine", "serial", "--quick")[1]
    assert "1 trained, 2 finished before" in call("beyond", "--engine", "serial", "--quick", "--seeds", "3")[1]


def test_data_of_ones_own_stand_in_for_a_named_set(call, tmp_path, small):
    small()
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.random((40, 5), np.float32), y=np.arange(40) % 2)
    arguments = ("beyond", "--engine", "serial", "--data", "digits=./mine.npz", "--out", "out")
    code, out, _ = call(*arguments, "--keep", "kept")
    assert code == 0
    assert "2 trained" in out
    assert results_in(tmp_path / "out").history("a", 0).epochs["iteration"][-1] == 4  # 32 of 40 samples, by tens
    assert "2 finished before" in call(*arguments)[1]
    assert tomllib.loads((tmp_path / "kept/recipe.toml").read_text())["a"]["data"] == "./mine.npz"
    with zipfile.ZipFile(tmp_path / "kept/records.npz") as records:
        assert not any(str(tmp_path).encode() in records.read(name) for name in records.namelist())


def test_failed_members_are_said_with_every_verdict_that_lacks_them(call, tmp_path, small):
    small(failing=True)
    arguments = ("beyond", "--engine", "serial", "--out", "out")
    code, out, err = call(*arguments)
    assert code == 1
    assert "1 member failed" in err
    assert "it is sick" in out
    assert "X2     not measured" in out
    assert (tmp_path / "out/report.html").exists()
    code, out, _ = call(*arguments, "--no-train", "--seeds", "4")
    assert code == 0
    assert "preliminary, 2 of 4 members are missing: a/seed-2, a/seed-3" in out.replace("\n", " ")
    claims = json.loads((tmp_path / "out/claims.json").read_text())
    assert claims[0]["verdict"]["sentence"].startswith("preliminary, 2 of 4")


@pytest.mark.parametrize("fault", ["version", "record", "note"])
def test_members_that_cannot_be_read_are_left_out_of_the_rest(call, tmp_path, small, fault):
    small()
    arguments = ("beyond", "--engine", "serial", "--out", "out")
    assert call(*arguments)[0] == 0
    spoiled = tmp_path / "out/a/seed-1"
    if fault == "record":
        (spoiled / "history.safetensors").write_bytes(b"damaged")
    elif fault == "note":
        (spoiled / "done.json").write_text("{")
    else:
        note = json.loads((spoiled / "done.json").read_text())
        (spoiled / "done.json").write_text(json.dumps(note | {"format": 99}))
    code, out, _ = call(*arguments, "--no-train", "--keep", "kept")
    assert code == 0
    assert "a/seed-1 is left out of report and kept records: " in out
    report = (tmp_path / "out/report.html").read_text()
    assert "a/seed-0" in report
    assert "a/seed-1" not in report
    assert results_in(tmp_path / "kept/records.npz").seeds("a") == [0]
    assert json.loads((tmp_path / "kept/provenance.json").read_text())["settings"] == {"a": 1}


def test_recipe_and_filters_come_from_what_was_trained(call, tmp_path, small):
    small()
    assert call("beyond", "--engine", "serial", "--out", "out", "--keep", "kept")[0] == 0
    recipe = tomllib.loads((tmp_path / "kept/recipe.toml").read_text())
    assert recipe == {"a": {"seeds": [0, 1], "width": 8, "epochs": 1, "l1": 0.1}}
    shown = unescape(re.search("data-facets='([^']*)'", (tmp_path / "out/report.html").read_text())[1])
    expected = {"data": "digits", "network": "resnet", "depth": "6", "steps": "free", "penalty": "l1", "pruned": "no"}
    assert json.loads(shown) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"penalty": "none", "steps": "free"}),
        ({"l1": 0.1, "proximal": True, "prune": 0.1}, {"penalty": "l1, proximal", "pruned": "yes"}),
        ({"l1": 0.1, "time_horizon": 1.0}, {"penalty": "l1 + time horizon"}),
        ({"hidden_layers": 12, "group_lasso": 0.1}, {"penalty": "group lasso", "depth": "12"}),
    ],
)
def test_filters(options, expected):
    found = facets(TrainConfig(**options))
    assert {name: found[name] for name in expected} == expected


def test_filters_tell_hooks():
    assert facets(TrainConfig(constraint="fixed"), "as_published")["network"] == "resnet, as published"
