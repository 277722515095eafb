"""Sweeps: what a file means, what is refused, what they leave."""

import csv
import re
import shutil
import tomllib
from html import escape

import pytest

from taulearn.app.command_line import main
from taulearn.app.results import Results
from taulearn.app.run_members import run_members
from taulearn.app.sweep import load_sweep, make_sweep
from taulearn.app.sweep_report import rows, write_report, write_table


def sweep_of(text):
    return make_sweep("test", tomllib.loads(text))


def test_grid_times_list_times_seeds():
    sweep = sweep_of(
        """
        seeds = [3, 5]
        [base]
        epochs = 2
        [grid]
        l1 = [0.0, 0.1]
        hidden_layers = [2, 3]
        [[list]]
        label = "residual"
        [[list]]
        label = "fractional"
        network = "fractional"
        gamma = 0.3
        """
    )
    assert len(sweep.members) == 2 * 4 * 2
    assert sweep.varied == ("label", "l1", "hidden_layers", "network", "gamma")
    assert {member.seed for member in sweep.members} == {3, 5}
    first = sweep.members[0]
    assert first.name == "residual/l1=0.0/hidden_layers=2/seed-3"
    assert (first.config.epochs, first.config.l1) == (2, 0.0)
    assert [m.config.gamma for m in sweep.members if m.config.network == "fractional"] == [0.3] * 8


def test_values_of_any_kind_make_names():
    sweep = sweep_of('[grid]\nwidth = [[8, 4], 16]\nconstraint = ["free", "fixed"]\n[base]\nhidden_layers = 2')
    assert sweep.members[0].setting == "width=8-4/constraint=free"
    assert sweep.members[0].config.width == (8, 4)


def test_settings_in_base_and_an_entry_are_those_of_the_entry():
    sweep = sweep_of("[base]\nl1 = 0.1\n[[list]]\nlabel = 'as base'\n[[list]]\nlabel = 'strong'\nl1 = 0.5")
    assert [member.config.l1 for member in sweep.members] == [0.1, 0.5]


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ({"seeds": 99_999_999_999}, "99,999,999,999 (1 setting, 99,999,999,999 seeds)"),
        ({"seeds": 10**30}, f"{10**30:,} (1 setting"),
        (
            {"seeds": 2, "grid": dict.fromkeys(("l1", "l2", "lr", "gamma", "momentum"), [0.1] * 1000)},
            f"{2 * 10**15:,} ({10**15:,} settings, 2 seeds)",
        ),
    ],
    ids=["seeds", "more seeds than a range can count", "grid"],
)
def test_too_many_trainings_are_counted_before_they_are_made(spec, number, monkeypatch):
    def refuse(*_):
        raise AssertionError("made before it was counted")

    monkeypatch.setattr("taulearn.app.sweep.range", refuse, raising=False)
    monkeypatch.setattr("itertools.product", refuse)
    with pytest.raises(ValueError, match=re.escape(f"must have at most 10,000 trainings, got {number}")):
        make_sweep("test", spec)


def test_file_that_is_not_there_or_no_toml(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_sweep(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("seeds = ")
    with pytest.raises(ValueError, match="must be a TOML file"):
        load_sweep(tmp_path / "a.toml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    text = "seeds = 2\n[base]\nepochs = 2\nwidth = 8\n[grid]\nhidden_layers = [2, 3]\nlr = [0.05, 1e30]"
    sweep = sweep_of(text)
    return sweep, out, run_members(sweep.members, out, engine="serial")


def test_row_of_a_member_that_cannot_be_read_says_why(trained, tmp_path):
    sweep, out, _ = trained
    shutil.copytree(out, tmp_path / "out")
    member = sweep.members[0]
    (member.folder(tmp_path / "out") / "history.safetensors").write_bytes(b"damaged")
    found = rows(sweep, Results(tmp_path / "out"))[0]
    assert found["status"] == "unreadable"
    assert "damaged" in found["error"]


def test_table_has_a_row_for_every_member_also_for_those_that_failed(trained, tmp_path, monkeypatch):
    sweep, out, outcome = trained
    assert len(outcome.failed) == 4
    table = rows(sweep, Results(out), outcome.failed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = write_table(table, tmp_path)
    written = list(csv.DictReader(file.read_text().splitlines()))
    assert [(row["hidden_layers"], row["lr"], row["seed"]) for row in written[:2]] == [
        ("2", "0.05", "0"),
        ("2", "1e+30", "0"),
    ]
    assert [row["status"] for row in written].count("failed") == 4
    assert [row["error"] for row in written] == [outcome.failed.get(member.name, "") for member in sweep.members]
    assert all(row["error"].startswith("Diverged: ") == (row["status"] == "failed") for row in written)
    history = Results(out).history("hidden_layers=2/lr=0.05", 0)
    assert float(written[0]["test.accuracy"]) == pytest.approx(history.epochs["validation.accuracy"][-1], abs=1e-6)
    assert written[0]["layers"] == "2"


def test_table_is_parquet_too_where_it_can_be(trained, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    sweep, out, outcome = trained
    file = write_table(rows(sweep, Results(out), outcome.failed), tmp_path)
    found = parquet.read_table(file.with_suffix(".parquet")).to_pylist()
    written = list(csv.DictReader(file.read_text().splitlines()))
    assert [str(row["lr"]) for row in found] == [row["lr"] for row in written]
    assert len(found) == 8
    assert [row["error"] for row in found] == [row["error"] for row in written]


def test_report_lists_every_member_and_draws_what_can_be_drawn(trained):
    sweep, out, outcome = trained
    page = write_report(sweep, Results(out), rows(sweep, Results(out), outcome.failed), out).read_text()
    assert page.count("<tr data-facets") == 8
    assert page.count("data:image/png") == 2
    assert "href='hidden_layers=2/lr=0.05/seed-0/report.html'" in page
    assert "href='hidden_layers=2/lr=1e" not in page
    assert all(escape(text) in page for text in outcome.failed.values())
    assert "<th scope='col'>error</th>" in page


def test_report_has_no_column_of_errors_where_none_failed(trained, tmp_path):
    sweep, out, _ = trained
    page = write_report(sweep, Results(out), rows(sweep, Results(out)), tmp_path).read_text()
    assert "<th scope='col'>status</th>" in page
    assert "<th scope='col'>error</th>" not in page


def test_command_trains_skips_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "depth.toml").write_text("[base]\nepochs = 1\nwidth = 8\n[grid]\nhidden_layers = [2, 3]")
    assert main(["sweep", "depth.toml", "--engine", "serial"]) == 0
    assert "2 trained" in capsys.readouterr().out
    assert main(["sweep", "depth.toml", "--engine", "serial"]) == 0
    assert "2 finished before" in capsys.readouterr().out
    assert main(["sweep", "nowhere.toml"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(["sweep", "depth.toml", "--address", "localhost:1"]) == 2
    assert "--address must be left out" in capsys.readouterr().err
    assert main(["sweep", "depth.toml", "--workers", "0"]) == 2
    assert "--workers must be >= 1" in capsys.readouterr().err
