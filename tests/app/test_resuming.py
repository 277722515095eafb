"""Trainings that are resumed after their run.toml was edited, or for more epochs."""

import shutil
import tomllib
from pathlib import Path

import pytest

from taulearn.app.command_line import main
from taulearn.experiments import TrainConfig, resume, train
from taulearn.training import Run

pytestmark = pytest.mark.usefixtures("own_folder")

SMALL = {"hidden_layers": 4, "width": 8, "epochs": 2, "batch_size": 100}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, not to be touched."""
    folder = tmp_path_factory.mktemp("trained") / "a"
    train(TrainConfig(**SMALL, run=str(folder)), progress=False)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "a"))


def edit(run, **settings):
    opened = Run.open(run)
    opened.config.update(settings)
    opened._write()


def weights(run):
    return (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.1}, r"got lr = 0.1 \(was 0.01\): put them back, or start a new run"),
        ({"seed": 3}, r"got seed = 3 \(was 0\)"),
        ({"l1": 0.5}, r"got l1 = 0.5 \(was 0.0\)"),
        ({"prune": 0.1}, r"got prune = 0.1 \(was None\)"),
        ({"hidden_layers": 5}, r"got hidden_layers = 5 \(was 4\)"),
        ({"width": [8, 8, 8, 4]}, r"got width = \[8, 8, 8, 4\] \(was 8\)"),
        ({"compile": "never"}, r"got compile = 'never' \(was 'auto'\)"),
        ({"lr": 0.1, "data": "sine"}, r"got data = 'sine' \(was 'digits'\), lr = 0.1 \(was 0.01\)"),
    ],
)
def test_edited_settings_are_refused(run, settings, message):
    """A mixture went on, and the record held the edited values."""
    edit(run, **settings)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        resume(run, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_settings_that_do_not_decide_the_iterates_may_be_edited(run):
    before = weights(run)
    edit(run, threads=1, checkpoint_every=3, trace="thinned", device="cpu")
    resume(run, progress=False)
    assert weights(run) == before
    assert Run.open(run).config["checkpoint_every"] == 3


def test_more_epochs_give_what_they_would_have_given_at_once(run, tmp_path):
    train(TrainConfig(**SMALL | {"epochs": 4}, run=str(tmp_path / "whole")), progress=False)
    result = resume(run, epochs=4, progress=False)
    assert (result.config.epochs, result.history.num_iterations) == (4, 60)
    assert weights(run) == weights(tmp_path / "whole")
    config = tomllib.loads((run / "run.toml").read_text())["config"]
    assert config == tomllib.loads((tmp_path / "whole" / "run.toml").read_text())["config"]
    assert resume(run, progress=False).history.num_iterations == 60


def test_a_network_of_one_layer_is_gone_on_with(tmp_path):
    """Its one time step had stride 0, of which no digest was taken."""
    one = TrainConfig(**SMALL | {"hidden_layers": 1, "epochs": 1}, run=str(tmp_path / "one"))
    train(one, progress=False)
    assert resume(tmp_path / "one", epochs=2, progress=False).history.num_iterations == 30


def test_epochs_raised_in_the_file_are_more_epochs(run):
    edit(run, epochs=3)
    assert resume(run, progress=False).history.num_iterations == 45


def test_epochs_on_the_command_line(run, capsys):
    assert main(["resume", str(run), "--epochs", "3"]) == 0
    assert capsys.readouterr().out.startswith("2 of 3 epochs are done\n")
    assert Run.open(run).config["epochs"] == 3
    assert main(["resume", str(run), "--epochs", "1"]) == 1
    assert "epochs must be at least 3, the number that are done, got 1" in capsys.readouterr().err
    for nonsense in ("0", "x", "1.5"):
        assert main(["resume", str(run), "--epochs", nonsense]) == 2
        assert "--epochs must be an integer >= 1, got" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "step"])
def test_epochs_stay_where_a_schedule_is_laid_out_over_them(tmp_path, scheduler):
    train(TrainConfig(**SMALL, scheduler=scheduler, run=str(tmp_path / "b")), progress=False)
    with pytest.raises(ValueError, match=f"epochs must stay 2 with scheduler '{scheduler}', whose learning rates are"):
        resume(tmp_path / "b", epochs=4, progress=False)
    assert Run.open(tmp_path / "b").config["epochs"] == 2
    assert resume(tmp_path / "b", progress=False).history.num_iterations == 30


def test_a_run_whose_checkpoints_were_removed_is_refused(run, capsys):
    """`taulearn resume` trained over the finished network."""
    shutil.rmtree(run / "checkpoint")
    before = weights(run)
    assert main(["resume", str(run)]) == 1
    assert weights(run) == before
    assert "run must have a checkpoint to go on from" in capsys.readouterr().err


def test_resuming_draws_no_setting_that_older_checkpoints_lack(run, monkeypatch):
    """A setting that a later version adds has its default in the run."""
    import taulearn.app.train as resuming

    found = resuming.read_start(run / "checkpoint")
    older = {name: value for name, value in found[0].config.items() if name != "memory"}
    monkeypatch.setattr(resuming, "read_start", lambda _: (type(found[0])(found[0].terms, older), found[1]))
    assert resume(run, progress=False).history.num_iterations == 30
