"""Settings of convolutional networks and of the stage cost, and a run that is cut."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from taulearn import load_model
from taulearn.app import build
from taulearn.app.config import explain
from taulearn.app.finished_runs import cut_run
from taulearn.experiments import TrainConfig, resume, train
from taulearn.nn import PreActivationBlock
from taulearn.penalties import StageCost
from taulearn.training import Run


def refusal(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        TrainConfig(**settings)
    return explain(caught.value)


CONVOLUTIONAL: dict[str, Any] = {"network": "resnet-v2", "blocks_per_stage": (1, 2), "channels": (2, 3)}


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"channels": 16}, "channels must be left out with network 'resnet'; it belongs to 'resnet-v2'"),
            ({"blocks_per_stage": 16}, "blocks_per_stage must be left out with network 'resnet'; it belongs to"),
            ({"stem_stride": 2}, "stem_stride must be left out with network 'resnet'; it belongs to"),
            ({"network": "resnet-v2", "width": 9}, "width must be left out with network 'resnet-v2', whose shape is"),
            (
                {"network": "resnet-v2", "hidden_layers": 7},
                "hidden_layers must be left out with network 'resnet-v2', wh",
            ),
            (
                {"network": "resnet-v2", "blocks_per_stage": (3, 3)},
                r"blocks_per_stage must be one number or 3 \(channels",
            ),
            (
                {"network": "resnet-v2", "blocks_per_stage": 0},
                "blocks_per_stage must be an integer >= 1, or one for each ",
            ),
            (
                {"network": "resnet-v2", "channels": "a"},
                "channels must be an integer >= 1, or one for each stage, got 'a'",
            ),
            ({"network": "resnet-v2", "bias_ordering": 1.0}, "bias_ordering must be left out with network 'resnet-v2'"),
            ({"stage_cost": -1.0}, "stage_cost must be >= 0, got -1.0"),
            (
                {"stage_cost_schedule": "rising"},
                "stage_cost_schedule must be left out without stage_cost; or give that",
            ),
            ({"stage_factors": (1.0,) * 5}, "stage_factors must be left out without stage_cost"),
            (
                {"stage_cost": 0.1, "stage_factors": (1.0,)},
                "stage_factors must be 5 numbers, one for each intermediate ",
            ),
            (
                {"stage_cost": 0.1, "stage_factors": (1.0, -1.0)},
                "stage_factors must be a finite number >= 0, or one for",
            ),
            ({"stage_cost": 0.1, "depth_losses": True}, "depth_losses must be left out with stage_cost, which records"),
            ({"stage_cost": 0.1, "hidden_layers": 1}, "stage_cost must be left out with one hidden layer, after which"),
            ({"depth_losses": True, "hidden_layers": 1}, "depth_losses must be left out with one hidden layer"),
        ],
        ids=str,
    )
    def test_refused(self, settings: dict[str, Any], message: str) -> None:
        assert re.search(message, refusal(**settings))

    @pytest.mark.parametrize(
        ("settings", "blocks"),
        [
            ({}, 9),
            ({"blocks_per_stage": 2}, 6),
            ({"blocks_per_stage": [1, 2, 3]}, 6),
            ({"channels": 8}, 3),
            ({"blocks_per_stage": 4, "channels": 8}, 4),
            ({"channels": (4, 8)}, 6),
        ],
        ids=str,
    )
    def test_blocks_are_layers(self, settings: dict[str, Any], blocks: int) -> None:
        config = TrainConfig(network="resnet-v2", **settings)
        assert (config.hidden_layers, config.total_time) == (blocks, float(blocks))
        assert TrainConfig.model_validate(config.record()) == config

    def test_the_network_is_that_of_the_settings(self) -> None:
        config = TrainConfig(**CONVOLUTIONAL, init=0.5, stem_stride=2, constraint="simplex", horizon=1.5)
        network = build.make_network(config, build.load_splits(config))
        assert [type(layer) for layer in network.layers] == [PreActivationBlock] * 3
        assert network.time_steps.tau.tolist() == [0.5] * 3
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        with pytest.raises(
            ValueError, match=r"network must not be 'resnet-v2' with data 'digits', whose inputs have shape"
        ):
            build.make_network(config, build.load_splits(TrainConfig(data="sine")))

    def test_the_penalty_is_that_of_the_settings(self) -> None:
        config = TrainConfig(stage_cost=0.3, stage_cost_schedule="falling", stage_factors=(1.0, 2.0, 3.0, 4.0, 5.0))
        (cost,) = build.make_penalties(config, torch.nn.functional.cross_entropy)
        assert isinstance(cost, StageCost)
        assert (cost.weight, cost.factors, cost.differentiated) == (0.3, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, True)
        (cost,) = build.make_penalties(
            TrainConfig(**CONVOLUTIONAL, depth_losses=True), torch.nn.functional.cross_entropy
        )
        assert isinstance(cost, StageCost)
        assert (cost.weight, cost.differentiated) == (0.0, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all three: stage cost, l1 and adaptive pruning."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    config = TrainConfig(
        hidden_layers=6,
        width=16,
        init=(1.0, 0.5, 0.5, 0.02, 0.5, 0.5),
        stage_cost=0.2,
        l1=0.02,
        proximal=True,
        prune=0.05,
        epochs=3,
        lr=0.05,
        run=str(folder),
    )
    result = train(config, progress=False)
    assert result.layers[1] < 6
    assert 3 in [d.layer for d in result.history.deletions]
    return folder


class TestRuns:
    def test_record(self, folder: Path) -> None:
        losses = Run.open(folder).history.iterations["stage_loss"]
        assert losses.shape[1] == 7
        assert np.isnan(losses[:, 0]).all()
        assert np.isnan(losses[-1, 4])
        assert np.isfinite(losses[-1, 1])

    @pytest.mark.parametrize("depth", ["auto", 1])
    def test_cut(self, folder: Path, depth: Any, tmp_path: Path) -> None:
        result = cut_run(folder, tmp_path / "small", depth=depth, tolerance=0.9)
        assert result.report.layers_after == 1
        assert result.chosen_on == "test"
        assert (result.decision is None) == (depth == 1)
        saved = load_model(tmp_path / "small")
        assert saved.time_steps.num_steps == 1
        with pytest.raises(FileExistsError, match="out must be a new folder"):
            cut_run(folder, tmp_path / "small", depth=1)

    def test_nothing_to_cut(self, folder: Path, tmp_path: Path) -> None:
        result = cut_run(folder, tmp_path / "small", depth=load_model(folder).time_steps.num_steps)
        assert not result.report
        assert not (tmp_path / "small").exists()

    def test_convolutional_run(self, tmp_path: Path) -> None:
        """Trained, resumed after its end, cut by stage with new statistics, saved and loaded."""
        config = TrainConfig(**CONVOLUTIONAL, epochs=1, stage_cost=0.1, run=str(tmp_path / "a"))
        result = train(config, progress=False)
        assert result.history.iterations["stage_loss"].shape[1] == 4
        assert resume(tmp_path / "a", progress=False).test == result.test
        cut = cut_run(tmp_path / "a", tmp_path / "small", tolerance=1.0, by_stage=True)
        assert cut.decision is not None
        assert cut.decision.keep == (0, 1)
        x = torch.rand(3, 1, 8, 8)
        assert torch.equal(load_model(tmp_path / "small").eval()(x), cut.model.eval()(x))
