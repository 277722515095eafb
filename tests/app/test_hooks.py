"""Hooks: what a caller changes in a training that no setting stands for."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from taulearn.adaptivity.policies import Pruning
from taulearn.adaptivity.refiner import Refinement
from taulearn.app.config import split_hooks
from taulearn.app.finished_runs import prune_run
from taulearn.app.members import Member, digest, is_finished, run_member
from taulearn.app.results import Results
from taulearn.experiments import TrainConfig, resume, train
from taulearn.training import Run


def from_the_end(tau, model):
    return torch.arange(1.0, len(tau) + 1)


@dataclass(frozen=True)
class Halved:
    """Start with half the steps, never prune, and leave the bias of the first layer at zero."""

    name: str = "halved_steps"

    def check(self, config):
        if config.l1:
            raise ValueError("l1 must be left out with halved_steps")

    def adapt_(self, network, config):
        with torch.no_grad():
            network.time_steps.values.mul_(0.5)

    def pruning(self, config):
        return None if config.prune is None else Pruning(1e-12)

    def refinement(self, config):
        return None if config.refine is None else Refinement(config.refine, by="insert", indicator=from_the_end)

    def restore_(self, network):
        with torch.no_grad():
            network.layers[0].linear.bias.zero_()


def small(folder, **settings):
    return TrainConfig(**{"width": 8, "hidden_layers": 3, "epochs": 2, "run": str(folder), **settings})


def test_network_pruning_and_result_are_what_hooks_say(tmp_path):
    result = train(small(tmp_path / "run", prune=0.9), hooks=Halved(), progress=False)
    assert result.history.iterations["tau"][0] == pytest.approx(np.full(3, 1 / 6))
    assert result.layers == (3, 3)
    assert not result.model.layers[0].linear.bias.any()
    assert train(small(tmp_path / "plain", prune=0.9), progress=False).layers[1] < 3


def test_layers_come_where_hooks_say(tmp_path):
    result = train(small(tmp_path / "run", refine=5), hooks=Halved(), progress=False)
    assert [(new.layer, new.parent, new.step) for new in result.history.insertions] == [(3, 2, 0.0), (4, 3, 0.0)]
    plain = train(small(tmp_path / "plain", refine=5), progress=False)
    assert all(new.step != 0.0 for new in plain.history.insertions)


def test_settings_that_do_not_go_with_them_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="l1 must be left out with halved_steps"):
        train(small(tmp_path / "run", l1=0.1), hooks=Halved(), progress=False)
    with pytest.raises(ValueError, match="l1 must be left out with halved_steps"):
        Member("a", 0, TrainConfig(l1=0.1), hooks=Halved())
    assert not (tmp_path / "run").exists()


def test_run_is_resumed_with_its_own_hooks_alone(tmp_path):
    train(small(tmp_path / "run", epochs=1), hooks=Halved(), progress=False)
    for hooks in (None, Halved("others")):
        with pytest.raises(ValueError, match=r"hooks must be those .*'halved_steps', got"):
            resume(tmp_path / "run", epochs=2, hooks=hooks, progress=False)
    gone_on = resume(tmp_path / "run", epochs=2, hooks=Halved(), progress=False)
    whole = train(small(tmp_path / "whole"), hooks=Halved(), progress=False)
    for name, column in whole.history.iterations.items():
        np.testing.assert_array_equal(gone_on.history.iterations[name], column)
    train(small(tmp_path / "plain", epochs=1), progress=False)
    with pytest.raises(ValueError, match=r"hooks must .*got 'halved_steps'"):
        resume(tmp_path / "plain", epochs=2, hooks=Halved(), progress=False)


def test_what_is_made_of_a_finished_run_needs_no_hooks(tmp_path):
    train(small(tmp_path / "run"), hooks=Halved(), progress=False)
    prune_run(tmp_path / "run", tmp_path / "small", keep=[0, 2])
    assert (tmp_path / "small/model.json").exists()
    with pytest.raises(ValueError, match="halved_steps"):
        TrainConfig.from_toml(tmp_path / "run/run.toml")


def test_members_with_hooks_are_others(tmp_path):
    plain, hooked = (Member("a", 0, small(tmp_path, run=None), hooks=hooks) for hooks in (None, Halved()))
    assert plain.digest == digest(plain.config) != hooked.digest
    run_member(hooked, tmp_path)
    assert is_finished(hooked, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        is_finished(plain, tmp_path)
    results = Results(tmp_path)
    assert results.config("a", 0) == plain.config
    assert results.hooks("a", 0) == "halved_steps"
    assert results.options("a", 0)["halved_steps"] is True
    assert json.loads((tmp_path / "a/seed-0/done.json").read_text())["config"]["halved_steps"] is True


@pytest.mark.parametrize("hooks", [None, Halved("others")])
def test_member_under_way_with_other_hooks_is_not_gone_on_with(tmp_path, hooks):
    config = TrainConfig(width=8, hidden_layers=3, epochs=2)
    folder = Member("a", 0, config).folder(tmp_path)
    train(config.model_copy(update={"run": str(folder)}), hooks=Halved(), progress=False)
    with pytest.raises(ValueError, match="training with other settings"):
        run_member(Member("a", 0, config, hooks=hooks), tmp_path)


def test_runs_of_earlier_versions_are_read(tmp_path):
    """They have the setting as_published, mostly false; where it is true, it is the name of hooks."""
    train(small(tmp_path / "run", epochs=1), progress=False)
    file = tmp_path / "run/run.toml"
    file.write_text(file.read_text().replace("[config]", "[config]\nas_published = false"))
    assert TrainConfig.from_toml(file) == small(None, run=None, epochs=1)
    assert resume(tmp_path / "run", epochs=2, progress=False).history.epochs["iteration"].size == 3
    file.write_text(file.read_text().replace("as_published = false", "as_published = true"))
    with pytest.raises(ValueError, match=r"hooks must be those .*'as_published'"):
        resume(tmp_path / "run", epochs=3, progress=False)


@pytest.mark.parametrize("name", ["tensorbord", "proximl", "average_weight"])
def test_mistyped_setting_is_no_name_of_hooks(tmp_path, name):
    assert split_hooks({name: True, "epochs": 3}) == ({name: True, "epochs": 3}, None)
    train(small(tmp_path / "run", epochs=1), progress=False)
    file = Run.open(tmp_path / "run").path / "run.toml"
    file.write_text(file.read_text().replace("[config]", f"[config]\n{name} = true"))
    with pytest.raises(ValueError, match=f"unknown setting '{name}': did you mean"):
        resume(tmp_path / "run", epochs=2, progress=False)
