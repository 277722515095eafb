"""Members trained at once go the way they go alone."""

import numpy as np
import pytest
import torch

from taulearn.app import build
from taulearn.app.members import Member
from taulearn.app.run_members import run_members
from taulearn.experiments import TrainConfig
from taulearn.saving import load_model
from taulearn.training import History
from taulearn_papers.engines.stacked_networks import Stack
from taulearn_papers.engines.vmap import Group, grouped, why_alone
from taulearn_papers.herberg2023.published_program import AS_PUBLISHED


def members(seeds=(0, 1, 2), hooks=None, **settings):
    common = {"width": 12, "hidden_layers": 4, "epochs": 1, "lr": 0.05}
    return [Member("a", seed, TrainConfig(**common | settings, seed=seed), hooks=hooks) for seed in seeds]


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
        {"constraint": "fixed", "hooks": AS_PUBLISHED},
        {"network": "fractional", "constraint": "dependent", "hooks": AS_PUBLISHED, "memory_from": 0},
        pytest.param({"l1": 0.1, "proximal": True, "compile": "always"}, marks=pytest.mark.long),
    ],
    ids=["penalties", "fractional", "simplex", "fixed", "published", "published-fractional", "compiled"],
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


def test_a_learned_order_has_the_rate_of_the_steps(tmp_path):
    settings = {"network": "fractional", "learn_order": "network", "tau_lr": 0.5, "gamma": 0.3}
    for alone, together in train_both_ways(tmp_path, members(**settings)):
        assert abs(alone.epochs["train.total"][-1] - together.epochs["train.total"][-1]) < 1e-4


@pytest.mark.parametrize("every", ["epoch", 1, 7, 100])
def test_pruned_members_are_regrouped_and_go_on(tmp_path, every):
    some = members(epochs=5, l1=0.05, prune=0.12, prune_every=every, width=16, hidden_layers=6)
    courses = set()
    for alone, together in train_both_ways(tmp_path, some):
        gone = [[(d.iteration, d.layer, d.parameters) for d in record.deletions] for record in (alone, together)]
        assert gone[0] == gone[1] != []
        np.testing.assert_array_equal(np.isnan(together.iterations["tau"]), np.isnan(alone.iterations["tau"]))
        assert abs(alone.epochs["train.total"][-1] - together.epochs["train.total"][-1]) < 1e-3
        courses.add(tuple(d.iteration for d in together.deletions))
    assert len(courses) > 1, "the members must have differed in depth on the way, or nothing was regrouped"


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


def test_members_with_other_hooks_are_not_trained_together():
    plain, published = (members(seeds=(0,), constraint="fixed", hooks=hooks) for hooks in (None, AS_PUBLISHED))
    assert [len(group) for group in grouped([*plain, *published])] == [1, 1]


def test_last_step_of_a_run_is_looked_at_too(tmp_path):
    settings = {"width": 12, "hidden_layers": 4, "epochs": 1, "batch_size": "full", "l1": 1e30}
    some = [Member(name, 0, TrainConfig(**settings, lr=lr)) for name, lr in (("a", 1e-30), ("b", 1e30))]
    for engine in ("serial", "vmap"):
        outcome = run_members(some, tmp_path / engine, engine=engine)
        assert outcome.finished == ["a/seed-0"]
        assert "not finite" in outcome.failed["b/seed-0"]


def no_measurement(folder):
    raise RuntimeError("nothing can be measured here")


def test_member_that_cannot_be_measured_leaves_the_others_alone(tmp_path):
    bad, *good = members()
    outcome = run_members([Member("a", 0, bad.config, no_measurement), *good], tmp_path, engine="vmap")
    assert outcome.finished == ["a/seed-1", "a/seed-2"]
    assert outcome.failed == {"a/seed-0": "RuntimeError: nothing can be measured here"}


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1, 2}], ids=["first", "second", "all"])
def test_member_that_cannot_be_made_leaves_the_others_alone(tmp_path, monkeypatch, bad):
    make_network = build.make_network

    def make(config, splits):
        if config.seed in bad:
            raise RuntimeError("no network of this seed")
        return make_network(config, splits)

    monkeypatch.setattr(build, "make_network", make)
    outcome = run_members(members(), tmp_path, engine="vmap")
    assert outcome.finished == [f"a/seed-{seed}" for seed in (0, 1, 2) if seed not in bad]
    assert outcome.failed == {f"a/seed-{seed}": "RuntimeError: no network of this seed" for seed in bad}


def test_member_without_a_folder_leaves_the_others_alone(tmp_path):
    bad = Member("b", 0, TrainConfig(width=12, hidden_layers=4, epochs=1, lr=0.1))
    (tmp_path / "b").touch()
    outcome = run_members([bad, *members(seeds=(0, 1))], tmp_path, engine="vmap")
    assert outcome.finished == ["a/seed-0", "a/seed-1"]
    assert "b/seed-0" in outcome.failed


def test_group_that_cannot_go_on_is_trained_one_by_one(tmp_path, monkeypatch):
    def advance(stack, index):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Stack, "advance", advance)
    with pytest.warns(UserWarning, match="one by one instead of at once: 2 of 2 members .*out of memory"):
        outcome = run_members(members(seeds=(0, 1)), tmp_path, engine="vmap")
    assert outcome.finished == ["a/seed-0", "a/seed-1"]
    assert not outcome.failed


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"momentum": 0.9},
        {"scheduler": "cosine"},
        {"clip_norm": 1.0},
        {"average_weights": True},
        {"refine": 9},
    ],
)
def test_trainings_that_are_not_plain_sgd_are_run_alone(tmp_path, settings):
    some = members(seeds=(0,), **settings)
    assert why_alone(some[0]) is not None
    assert run_members(some, tmp_path, engine="vmap").finished == ["a/seed-0"]


def test_steps_are_those_that_the_networks_use_and_fixed_layers_do_not_count():
    config = {"network": "fractional", "constraint": "dependent", "lower_bound": 1e-4}
    stack = Stack(Group(members(**config), lambda event: None).trainees, weight_decay=0.0, compiled=False)
    stack.values[stack.step_name][1] = 2.0  # the last one is then T - 6 = -5, of which the network uses 1e-4
    stack.values[stack.step_name][2] = torch.tensor([1e-4, 2.0, 1e-4])
    assert stack.small(stack.tau, 0.01).tolist() == [False, False, True], "neither the first nor the last can go"
    for k, each in enumerate(stack.trainees):
        stack.unstack()
        np.testing.assert_allclose(stack.tau[k], each.model.time_steps.tau.detach(), rtol=1e-6)
