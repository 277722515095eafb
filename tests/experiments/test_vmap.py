"""Members trained at once go the way they go alone."""

import numpy as np
import pytest

from taulearn.experiments import TrainConfig
from taulearn.experiments.engines.vmap import grouped, why_alone
from taulearn.experiments.runner import run_members
from taulearn.experiments.suite import Member
from taulearn.saving import load_model
from taulearn.training import History


def members(seeds=(0, 1, 2), **settings):
    common = {"width": 12, "hidden_layers": 4, "epochs": 1, "lr": 0.05}
    return [Member("a", seed, TrainConfig(**common | settings, seed=seed)) for seed in seeds]


def histories(folder, seeds=(0, 1, 2)):
    return [History.load(folder / f"a/seed-{seed}/history.safetensors") for seed in seeds]


def train_both_ways(path, some):
    for engine in ("serial", "vmap"):
        outcome = run_members(some, path / engine, engine=engine)
        assert not outcome.failed
    return zip(histories(path / "serial"), histories(path / "vmap"), strict=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"l1": 0.01, "time_horizon": 1.0, "weight_decay": 1e-3, "tau_lr": 0.1},
        {"network": "fractional", "constraint": "dependent"},
        {"constraint": "simplex"},
        {"constraint": "fixed"},
        pytest.param({"l1": 0.1, "proximal": True, "compile": "always"}, marks=pytest.mark.long),
    ],
    ids=["penalties", "fractional", "simplex", "fixed", "compiled"],
)
def test_loss_is_that_of_the_single_run(tmp_path, settings):
    for alone, together in train_both_ways(tmp_path, members(**settings)):
        assert abs(alone.epochs["train.total"][-1] - together.epochs["train.total"][-1]) < 1e-4
        np.testing.assert_allclose(together.iterations["tau"], alone.iterations["tau"], atol=1e-4)
        assert alone.iterations.keys() == together.iterations.keys()
        assert alone.epochs.keys() == together.epochs.keys()
        for name in ("iteration", "layers", "parameters"):
            np.testing.assert_array_equal(together.epochs[name], alone.epochs[name])
        np.testing.assert_allclose(together.epochs["validation.loss"], alone.epochs["validation.loss"], atol=1e-4)


@pytest.mark.parametrize("every", ["epoch", 7])
def test_pruned_members_are_regrouped_and_go_on(tmp_path, every):
    some = members(epochs=5, l1=0.05, prune=0.12, prune_every=every, width=16, hidden_layers=6)
    depths = set()
    for alone, together in train_both_ways(tmp_path, some):
        gone = [[(d.iteration, d.layer, d.parameters) for d in record.deletions] for record in (alone, together)]
        assert gone[0] == gone[1] != []
        np.testing.assert_array_equal(np.isnan(together.iterations["tau"]), np.isnan(alone.iterations["tau"]))
        assert abs(alone.epochs["train.total"][-1] - together.epochs["train.total"][-1]) < 1e-3
        depths.add(tuple(together.epochs["layers"].tolist()))
    assert len(depths) > 1, "the members must have differed in depth on the way, or nothing was regrouped"


def test_learning_rates_differ_within_a_group(tmp_path):
    rates = {"slow": 0.01, "fast": 0.2}
    slow, fast = (Member(name, 0, TrainConfig(width=8, epochs=1, lr=lr)) for name, lr in rates.items())
    assert len(grouped([slow, fast])) == 1
    for engine in ("serial", "vmap"):
        run_members([slow, fast], tmp_path / engine, engine=engine)
    for name in ("slow", "fast"):
        alone, together = (
            History.load(tmp_path / engine / name / "seed-0/history.safetensors") for engine in ("serial", "vmap")
        )
        assert abs(alone.epochs["train.loss"][-1] - together.epochs["train.loss"][-1]) < 1e-4


def test_what_is_left_is_an_ordinary_run(tmp_path):
    run_members(members(seeds=(0, 1), prune=0.3), tmp_path, engine="vmap")
    folder = tmp_path / "a/seed-0"
    network = load_model(folder)
    history = History.load(folder / "history.safetensors")
    assert network.time_steps.num_steps == history.epochs["layers"][-1]
    assert (folder / "report.html").exists()
    assert run_members(members(seeds=(0, 1), prune=0.3), tmp_path, engine="serial").skipped == ["a/seed-0", "a/seed-1"]


def test_member_that_diverges_leaves_the_others_alone(tmp_path):
    good, bad = members(seeds=(0, 1)), Member("b", 0, TrainConfig(width=12, hidden_layers=4, epochs=1, lr=1e30))
    outcome = run_members([good[0], bad, good[1]], tmp_path, engine="vmap")
    assert set(outcome.finished) == {"a/seed-0", "a/seed-1"}
    assert "not finite" in outcome.failed["b/seed-0"]


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adam"}, {"momentum": 0.9}, {"scheduler": "cosine"}, {"clip_norm": 1.0}, {"average_weights": True}],
)
def test_trainings_that_are_not_plain_sgd_are_run_alone(tmp_path, settings):
    some = members(seeds=(0,), **settings)
    assert why_alone(some[0]) is not None
    assert run_members(some, tmp_path, engine="vmap").finished == ["a/seed-0"]
