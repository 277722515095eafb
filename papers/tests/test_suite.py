"""Verdicts, intervals, and what a suite trains."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from taulearn.app.results import NotMeasured, Results
from taulearn_papers.herberg2023 import SUITE
from taulearn_papers.intervals import interval_of, paired_interval
from taulearn_papers.judging import as_markdown, judge, write_claims
from taulearn_papers.suite import Claim, Suite, Verdict


def test_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=7), rng.normal(size=7)
    found = paired_interval(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose([found.mean, found.low, found.high], [(a - b).mean(), low, high], rtol=1e-12)
    assert found.n == 7


def test_interval_of_one_pair_says_that_it_knows_no_spread():
    found = paired_interval([1.0], [0.5])
    assert found.mean == 0.5
    assert math.isnan(found.low)
    assert "no interval" in str(found)


@pytest.mark.parametrize(
    ("differences", "positive", "within"),
    [
        ([0.004], True, True),
        ([0.004, 0.003], True, True),
        ([-0.03, 0.04], True, True),  # two pairs: the mean decides
        ([0.003, 0.004, 0.005], True, True),
        ([-0.004, 0.004, 0.006], False, False),  # -0.011 .. +0.015
        ([-0.001, 0.002, 0.002], False, True),
        ([0.006, 0.008, 0.009], True, False),  # reaches the bound above
        ([-0.03, 0.02], False, True),
    ],
)
def test_from_three_pairs_on_the_whole_interval_decides(differences, positive, within):
    found = interval_of(differences)
    assert found.positive is positive
    assert found.within(0.01) is within
    assert found.less is {(False, True): True, (True, False): False, (False, False): None}[positive, found.negative]
    mirrored = interval_of([-each for each in differences])
    np.testing.assert_equal(tuple(mirrored), tuple(-found))
    assert mirrored.negative is positive
    assert mirrored.within(0.01) is within
    assert found.worst == (found.mean if found.n < 3 else found.low)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_interval_refuses_what_is_not_paired(a, b):
    with pytest.raises(ValueError, match="same seeds"):
        paired_interval(a, b)


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        ({"a": True, "b": True}, "holds"),
        ({"a": True, "b": False}, "holds in part"),
        ({"a": False, "b": False}, "does not hold"),
        ({"a": None, "b": None}, "open"),
        ({"a": None, "b": True}, "holds in part"),
        ({"a": None, "b": False}, "does not hold"),
        ({"a": np.False_, "b": np.True_}, "holds in part"),
    ],
)
def test_verdict_follows_from_its_parts(parts, outcome):
    verdict = Verdict.of(parts, {})
    assert verdict.outcome == outcome
    words = {True: "holds", False: "does not hold", None: "open"}
    for part, answer in parts.items():
        assert part in dict(each.split(": ") for each in verdict.sentence.split(" — "))[words[answer]].split("; ")


def test_claim_without_records_is_not_measured():
    def missing(results):
        raise NotMeasured("no finished member of a")

    assert Claim("X", "...", missing).verdict(Results("nowhere")).outcome == "not measured"


def test_table_of_verdicts_is_written_three_times_alike(tmp_path):
    claims = tuple(Claim(f"X{k}", "a | b", lambda _, k=k: Verdict.of({"it": k == 1}, {"value": 0.5})) for k in (1, 2))
    judged = judge(Suite("x", "X", lambda quick, seeds: [], claims), Results("nowhere"))
    write_claims(judged, tmp_path)
    table = json.loads((tmp_path / "claims.json").read_text())
    assert [row["verdict"]["outcome"] for row in table] == ["holds", "does not hold"]
    assert (tmp_path / "claims.csv").read_text().splitlines()[1:] == [
        "X1,holds,value,0.5",
        "X2,does not hold,value,0.5",
    ]
    assert as_markdown(judged) == (tmp_path / "claims.md").read_text()
    head = as_markdown(judged).splitlines()[2]
    assert head.replace("\\|", "").count("|") == 4, "a bar in a statement must not split the row"


def test_quick_suite_is_the_full_one_with_fewer_epochs_and_seeds():
    suite = SUITE
    full, quick = suite.members(False, None), suite.members(True, None)
    assert {member.setting for member in full} == {member.setting for member in quick}
    assert {member.config.epochs for member in full if member.config} == {200}
    assert max(member.config.epochs for member in quick if member.config) <= 10
    seeds = {s: sum(member.setting == s for member in full) for s in {member.setting for member in full}}
    assert seeds["mnist/resnet/free"] == 5
    assert seeds["mnist/fractional/free"] == 3
    assert {member.seed for member in suite.members(False, 7)} == set(range(7))


def test_figure_needs_only_its_own_trainings():
    suite = SUITE
    members = suite.needed(suite.members(True, 1), ["4.6"])
    assert {member.setting.rpartition("-")[2] for member in members} == {"pruned"}
    assert len(suite.needed(suite.members(True, 1), [])) == len(suite.members(True, 1))


def test_settings_are_the_papers():
    by_name = {member.name: member.config for member in SUITE.members(False, 1)}
    common = {"hidden_layers": 6, "width": 100, "lr": 0.01, "optimizer": "sgd", "epochs": 200, "init": None}
    for name, config in by_name.items():
        if config is not None and "resnet-" not in name:
            assert {key: getattr(config, key) for key in common} == common, name
    assert by_name["mnist/resnet/l1/seed-0"].l1 == 0.01
    assert by_name["mnist/fractional/horizon/seed-0"].time_horizon == 1.0
    assert by_name["fashion-mnist/resnet/l1-pruned/seed-0"].prune == 0.01
    assert by_name["fashion-mnist/fractional-as-published/free/seed-0"].memory_from == 0
