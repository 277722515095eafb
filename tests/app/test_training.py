"""Trainings from their settings alone."""

import pytest
import torch

from taulearn.app import build, memory_estimate
from taulearn.app.finished_runs import prune_run
from taulearn.experiments import TrainConfig, resume, train
from taulearn.nn import resnet
from taulearn.saving import load_model
from taulearn.training import Run

pytestmark = pytest.mark.usefixtures("own_folder")

SMALL = {"hidden_layers": 4, "width": 8, "epochs": 1, "batch_size": 100}


def small(path, **settings):
    return TrainConfig(**{**SMALL, "run": str(path), **settings})


def weights(path):
    return (path / "model.safetensors").read_bytes()


def test_result_agrees_with_what_was_written(tmp_path):
    result = train(small(tmp_path / "a", init=(0.5, 0.2, 0.2, 0.05), prune=0.1), progress=False)
    run = Run.open(tmp_path / "a")
    assert result.layers == (4, 3)
    assert result.parameters[1] == sum(p.numel() for p in load_model(run.path).parameters())
    assert result.test["accuracy"] == run.history.epochs["validation.accuracy"][-1]
    assert run.decisions["loss"] == "cross_entropy"
    assert (run.path / "report.html").stat().st_size > 10_000


def test_settings_that_are_recorded_give_the_same_bits(tmp_path):
    train(small(tmp_path / "a", seed=3, momentum=0.9), progress=False)
    train(
        TrainConfig.from_toml(tmp_path / "a" / "run.toml").model_copy(update={"run": str(tmp_path / "b")}),
        progress=False,
    )
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "onecycle", "average_weights": True, "init": (0.5, 0.2, 0.2, 0.05), "prune": 0.1},
        {"scheduler": "cosine", "optimizer": "adam", "tau_lr": 0.1},
    ],
)
def test_resumed_run_ends_as_the_whole_one(tmp_path, monkeypatch, settings):
    whole, halved = small(tmp_path / "a", epochs=3, **settings), small(tmp_path / "b", epochs=3, **settings)
    train(whole, progress=False)

    import taulearn.training.loop as loop

    at_epoch_end = loop.Loop._end_of_epoch

    def cut(self, epoch, interrupted):
        if epoch == 2:
            raise KeyboardInterrupt
        return at_epoch_end(self, epoch, interrupted)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_end_of_epoch", cut)
        with pytest.raises(KeyboardInterrupt):
            train(halved, progress=False)
    assert resume(tmp_path / "b", progress=False).history.num_iterations == 45
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_averaged_weights_are_kept_and_evaluated(tmp_path):
    last = train(small(tmp_path / "a"), progress=False)
    averaged = train(small(tmp_path / "b", average_weights=True), progress=False)
    assert averaged.history.iterations["loss"].tolist() == last.history.iterations["loss"].tolist()
    assert averaged.test["loss"] != last.test["loss"]
    assert averaged.test["loss"] < averaged.history.epochs["validation.loss"][0]
    kept = load_model(tmp_path / "b").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in averaged.model.state_dict().items())


def test_every_penalty_with_a_weight_is_recorded(tmp_path):
    names = ["l1", "elastic_net", "time_horizon", "weight_elastic_net", "bias_ordering"]
    result = train(small(tmp_path / "a", **dict.fromkeys(names, 0.1)), progress=False)
    assert [name for name in result.history.iterations if "penalty" in name] == [f"penalty.{name}" for name in names]
    weights = [getattr(penalty, "weight", None) for penalty in build.make_penalties(TrainConfig(time_horizon=0.5))]
    assert weights == [0.5]


def test_scheduler_changes_the_course(tmp_path):
    constant = train(small(tmp_path / "a", epochs=3), progress=False).history.iterations["tau"]
    falling = train(small(tmp_path / "b", epochs=3, scheduler="step"), progress=False).history.iterations["tau"]
    assert (constant[:16] == falling[:16]).all()
    assert (constant[17:] != falling[17:]).any()


@pytest.mark.parametrize(
    ("settings", "loss"),
    [({"data": "sine"}, "mse"), ({"data": "sine", "loss": "half_mse", "precision": "float64"}, "half_mse")],
)
def test_values_are_learned_with_squares(tmp_path, settings, loss):
    result = train(small(tmp_path / "a", **settings), progress=False)
    assert list(result.test) == ["loss"]
    assert build.make_loss(result.config, classes=False)[0] == loss
    assert Run.open(tmp_path / "a").decisions["validation"] == "the validation data"
    assert next(result.model.parameters()).dtype == getattr(torch, result.config.precision)


def test_folder_is_named_after_the_run_and_counted():
    names = [train(small("x").model_copy(update={"run": None}), progress=False).run.name for _ in range(2)]
    assert [name.rpartition("-")[2] for name in names] == ["1", "2"]
    assert all(name.startswith("digits-resnet-2") for name in names)


def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    train(small(tmp_path / "a", threads=before + 1), progress=False)
    assert Run.open(tmp_path / "a").versions["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_earlier_run_survives_a_refused_setting(tmp_path):
    train(small(tmp_path / "a"), progress=False)
    before = weights(tmp_path / "a")
    with pytest.raises(ValueError, match="optimizer"):
        train(small(tmp_path / "a", optimizer="adm", overwrite=True), progress=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        train(small(tmp_path / "a"), progress=False)
    assert weights(tmp_path / "a") == before


@pytest.mark.parametrize(
    "name", ["adadelta", "adafactor", "Adam", "asgd", "lbfgs", "nadam", "rmsprop", "rprop", "SGD", "steepest_descent"]
)
def test_every_optimizer_can_be_made(name):
    model = resnet(2, 3, 1, 4)
    optimizer = build.make_optimizer(TrainConfig(optimizer=name, lr=0.5), model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)


def test_steps_have_their_own_rate_and_no_decay():
    optimizer = build.make_optimizer(TrainConfig(tau_lr=0.3, weight_decay=0.1, momentum=0.9), resnet(2, 3, 1, 4))
    rows = [(group["lr"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups]
    assert rows == [(0.01, 0.1, 0.9), (0.3, 0.0, 0.9)]


@pytest.mark.parametrize(
    ("name", "rates"),
    [("none", [1.0] * 6), ("step", [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]), ("cosine", [1.0, 0.933, 0.75, 0.5, 0.25, 0.067])],
)
def test_schedule_over_six_epochs(name, rates):
    config = TrainConfig(scheduler=name, epochs=6, lr=1.0)
    optimizer = build.make_optimizer(config, resnet(2, 3, 1, 4))
    scheduler = build.make_scheduler(config, optimizer, 60)
    seen = []
    for _ in rates:
        seen.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert seen == pytest.approx(rates, abs=1e-3)


def test_memory_and_tolerance_reach_the_network(tmp_path):
    config = small(tmp_path / "a", network="fractional", hidden_layers=8, memory="fast", tolerance=1e-3)
    scheme = train(config, progress=False).model.scheme
    assert (scheme.memory, scheme.tolerance) == ("fast", 1e-3)
    assert 0 < scheme.kernel_error <= 1e-3, "fast memory was used"
    assert Run.open(tmp_path / "a").config["memory"] == "fast"


def test_estimated_parameters_are_those_of_the_network():
    for settings in ({}, {"width": (5, 4, 3)}):
        config = TrainConfig(**{"hidden_layers": 3, "width": 7} | settings)
        widths = list(config.width) if isinstance(config.width, tuple) else config.width
        made = sum(p.numel() for p in resnet(11, widths, 2, 3).parameters())
        assert memory_estimate.parameters(config, 11, 2) == made


@pytest.mark.parametrize("place", ["/proc/foo", "file/a", "a" * 300])
def test_folder_that_cannot_be_made_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^run must .*got '{place}' \(.*\)"):
        train(small(place), progress=False)


def test_default_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(NotADirectoryError, match=r"run must be given, because the folder 'runs/.*\(Not a directory\)"):
        train(small("x").model_copy(update={"run": None}), progress=False)


def test_run_made_in_python_is_not_resumed_by_its_settings(tmp_path):
    Run.create(tmp_path / "a", {"epochs": 3})
    with pytest.raises(ValueError, match=r"run must have been made by `taulearn train`.*taulearn.fit"):
        resume(tmp_path / "a")


def test_pruning_afterwards_leaves_the_run_as_it_is(tmp_path):
    train(small(tmp_path / "a"), progress=False)
    before = weights(tmp_path / "a")
    pruned = prune_run(tmp_path / "a", tmp_path / "b", keep=[0, 3])
    assert [d.layer for d in pruned.report.deleted] == [1, 2]
    assert pruned.before.keys() == pruned.after.keys() == {"loss", "accuracy"}
    assert load_model(tmp_path / "b").time_steps.origin == (0, 3)
    assert pruned.least is not None
    assert pruned.least[0] == 3
    assert weights(tmp_path / "a") == before


def test_layers_are_named_by_their_numbers_at_the_start(tmp_path):
    train(small(tmp_path / "a", init=(0.5, 0.05, 0.2, 0.2), prune=0.1), progress=False)
    assert load_model(tmp_path / "a").time_steps.origin == (0, 2, 3)
    pruned = prune_run(tmp_path / "a", tmp_path / "b", keep=[3, 0])
    assert [d.layer for d in pruned.report.deleted] == [2]
    with pytest.raises(ValueError, match=r"keep must .*got \[0, 1\]"):
        prune_run(tmp_path / "a", tmp_path / "c", keep=[0, 1])


def test_pruning_an_unfinished_run_says_how_to_finish_it(tmp_path):
    Run.create(tmp_path / "a", small("a").record())
    with pytest.raises(FileNotFoundError, match=r"run must be finished.*taulearn resume"):
        prune_run(tmp_path / "a", tmp_path / "b")


def test_refinement_by_settings(tmp_path):
    config = TrainConfig(
        hidden_layers=3,
        width=8,
        epochs=4,
        refine=5,
        refine_until=2,
        prune_blocks=2,
        prune_by=4,
        run=str(tmp_path / "run"),
    )
    result = train(config, progress=False)
    assert result.layers == (3, 2)
    assert [each.epoch for each in result.history.insertions] == [1, 2]
    assert result.history.epochs["layers"].max() == 5


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"refine": 400}, "refine must .*refine_until"),
        ({"prune_blocks": 1, "constraint": "dependent"}, "target_blocks"),
    ],
)
def test_a_target_out_of_reach_is_refused_before_there_is_a_run(tmp_path, settings, part):
    with pytest.raises(ValueError, match=part):
        train(small(tmp_path / "run", **settings), progress=False)
    assert not list(tmp_path.iterdir())
