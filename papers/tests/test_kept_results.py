"""Kept records: verdicts and figures can be made again from them alone, and are those that are kept beside them."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from taulearn_papers.judging import judge
from taulearn_papers.packed_results import results_in

FOLDERS = [Path(__file__).parent / "stored" / "herberg2023-quick"]
FOLDERS += sorted(each.parent for each in Path(__file__).parents[1].glob("results/*/records.npz"))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")


def suite_of(folder):
    return import_module(f"taulearn_papers.{folder.name.removesuffix('-quick')}").SUITE


@every_folder
def test_verdicts_follow_from_the_records(folder):
    stored = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    suite = suite_of(folder)
    members = suite.members(folder.name.endswith("-quick"), None)
    computed = judge(suite, results_in(folder / "records.npz"), members)
    assert [each.id for each in computed] == [each["id"] for each in stored]
    for found, wanted in zip(computed, stored, strict=True):
        assert found.verdict.outcome == wanted["verdict"]["outcome"], found.id
        assert found.verdict.sentence == wanted["verdict"]["sentence"]
        assert found.verdict.figures.keys() == wanted["verdict"]["figures"].keys()
        for name, value in found.verdict.figures.items():
            expected = wanted["verdict"]["figures"][name]
            assert value == (pytest.approx(expected, rel=1e-6) if isinstance(value, float) else expected), name


@every_folder
def test_records_draw_every_figure(folder):
    results = results_in(folder / "records.npz")
    for number, draw in suite_of(folder).figures.items():
        assert draw(results).axes, number
