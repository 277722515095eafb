"""The Maxwell recipes from their settings alone: optimisers, the start of the steps, resumption."""

import numpy as np
import pytest
import torch

from taulearn.app import build
from taulearn.experiments import TrainConfig, resume, train
from taulearn.optim import SteepestDescent
from taulearn.training import Interrupted, Run

SMALL = {
    "data": "maxwell",
    "hidden_layers": 3,
    "width": 8,
    "activation": "smooth_relu",
    "loss": "half_mse",
    "init": 1.0,
    "batch_size": "full",
    "optimizer": "steepest_descent",
    "lr": 1.0,
    "epochs": 12,
    "compile": "never",
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"network": "fractional"},
        {"bias_ordering": 10.0},
        {"constraint": "fixed"},
        {"constraint": "simplex", "init": 1 / 3},
    ],
)
def test_steepest_descent_never_rises(tmp_path, settings) -> None:
    config = TrainConfig(**SMALL | settings, precision="float64", run=str(tmp_path / "run"))
    total = train(config, progress=False).history.iterations["total"]
    assert len(total) == 12  # one step per epoch
    assert (np.diff(total) <= 0).all()
    assert total[-1] < total[0]


@pytest.mark.parametrize(
    "settings", [{"optimizer": "lbfgs", "lr": 1.0}, {"optimizer": "adam", "lr": 0.01, "batch_size": 500, "epochs": 2}]
)
def test_other_optimisers_learn_it_too(tmp_path, settings) -> None:
    loss = train(TrainConfig(**SMALL | settings, run=str(tmp_path / "run")), progress=False).history.iterations["loss"]
    assert loss[-1] < 0.3 * loss[0]


def test_lbfgs_on_full_batches_takes_an_iteration_per_step() -> None:
    splits = build.load_splits(config := TrainConfig(**SMALL | {"optimizer": "lbfgs", "lr": 1.0}))
    group = build.make_optimizer(config, build.make_network(config, splits)).param_groups[0]
    assert (group["max_iter"], group["line_search_fn"]) == (1, "strong_wolfe")
    config = TrainConfig(optimizer="lbfgs", batch_size=100)
    group = build.make_optimizer(config, build.make_network(config, splits)).param_groups[0]
    assert (group["max_iter"], group["line_search_fn"]) == (20, None)


def test_steepest_descent_by_name() -> None:
    config = TrainConfig(**SMALL | {"tau_lr": 0.5})
    optimizer = build.make_optimizer(config, build.make_network(config, build.load_splits(config)))
    assert type(optimizer) is SteepestDescent
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("weights", 1.0), ("tau", 0.5)]
    assert build.batch_size(config, 12_000) == 12_000


@pytest.mark.parametrize("network", ["resnet", "fractional"])
def test_uniform_steps_follow_the_seed_and_leave_the_weights(network: str) -> None:
    def made(**settings):
        config = TrainConfig(**SMALL | {"network": network} | settings)
        torch.manual_seed(config.seed)
        return build.make_network(config, build.load_splits(config))

    drawn, again, other, ones = made(init="uniform"), made(init="uniform"), made(init="uniform", seed=1), made()
    tau = drawn.time_steps.tau
    assert ((tau > 0) & (tau < 1)).all()
    assert torch.equal(tau, again.time_steps.tau)
    assert not torch.equal(tau, other.time_steps.tau)
    assert torch.equal(drawn.head.weight, ones.head.weight)


def test_resumed_run_takes_the_same_steps(tmp_path) -> None:
    whole = train(TrainConfig(**SMALL, run=str(tmp_path / "whole")), progress=False)

    def stop(end) -> None:
        if end.epoch == 5:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(TrainConfig(**SMALL, run=str(tmp_path / "parts")), progress=False, callbacks=[stop])
    rest = resume(tmp_path / "parts", progress=False)
    assert Run.open(tmp_path / "parts").config["optimizer"] == "steepest_descent"
    np.testing.assert_array_equal(rest.history.iterations["total"], whole.history.iterations["total"])
    np.testing.assert_array_equal(rest.history.iterations["tau"], whole.history.iterations["tau"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("network", "optimizer"), [("resnet", "steepest_descent"), ("fractional", "steepest_descent"), ("resnet", "lbfgs")]
)
def test_compiled_steps_are_the_eager_ones(tmp_path, network: str, optimizer: str) -> None:
    runs = {}
    for mode in ("never", "always"):
        settings = SMALL | {
            "network": network,
            "optimizer": optimizer,
            "compile": mode,
            "bias_ordering": 10.0,
            "epochs": 8,
        }
        runs[mode] = train(TrainConfig(**settings, precision="float64", run=str(tmp_path / mode)), progress=False)
    eager, compiled = (runs[mode].history.iterations for mode in ("never", "always"))
    np.testing.assert_allclose(compiled["total"], eager["total"], rtol=1e-10)
    np.testing.assert_allclose(compiled["tau"], eager["tau"], rtol=1e-9)
    assert Run.open(tmp_path / "always").decisions["step"] == "compiled objective and gradient"
