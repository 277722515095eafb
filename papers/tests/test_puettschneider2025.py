"""The suite puettschneider2025: members, measurements of cut networks, the bound in closed form, judges, figures."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from taulearn import data, load_model
from taulearn.app.results import FORMAT, NotMeasured, Results
from taulearn.depth.truncate import truncate
from taulearn.experiments import TrainConfig, train
from taulearn.training import evaluate
from taulearn_papers.puettschneider2025 import SUITE, claims, figures, statistics, trainings as m

SUITE = SUITE
N = 16


class TestMembers:
    def test_both_suites(self) -> None:
        for quick in (False, True):
            found = SUITE.members(quick, None)
            assert len({each.name for each in found}) == len(found)
            assert {each.seed for each in found} == {0, 1, 2}
            for each in found:
                config = each.config
                assert config is not None
                assert (config.constraint, config.init) == ("fixed", 1.0)
                assert config.hidden_layers == int(each.setting.split("/")[1].rpartition("-")[2])
                assert config.stage_cost == (m.WEIGHT if each.setting.endswith("/stage") else 0.0)

    def test_pairs_differ_in_the_stage_cost_alone(self) -> None:
        configs = {each.setting: each.config for each in SUITE.members(True, 1)}
        for name, config in configs.items():
            if name.endswith("/plain"):
                other = configs[name.replace("/plain", "/stage")]
                assert config is not None
                assert other is not None
                assert other.model_copy(update={"stage_cost": 0.0}) == config

    def test_the_full_suite_has_the_papers_sizes(self) -> None:
        configs = [each.config for each in SUITE.members(False, 1)]
        assert {config.data for config in configs if config is not None} == {"mnist", "cifar10"}
        assert {config.hidden_layers for config in configs if config is not None} == {54}
        assert m.kept(54)[1] == 12


def write(out: Path, setting: str, seed: int, row: dict[str, Any]) -> None:
    folder = out / setting / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "measurements.json").write_text(json.dumps(row))
    (folder / "done.json").write_text(json.dumps({"format": FORMAT, "config": None}))


def row(
    accuracy: list[float], relative: list[float], weights: list[float], losses: list[float], **others: Any
) -> dict[str, Any]:
    """Measurements of a network whose input does not count."""
    number = len(accuracy)
    return {
        "depths": list(range(1, number + 1)),
        "test.accuracy": accuracy,
        "train.loss": losses,
        "relative": relative,
        "weights": weights,
        "weights.start": [1.0] * number,
        "stage_cost": 0.5,
        "decay": [0.0] * number,
        "exits": {"thresholds": [0.9, 1.0], "accuracy": [0.8, 0.9], "depth": [3.0, float(number)]},
    } | others


def made_up(out: Path, *, good: bool) -> Results:
    """Networks of 16 layers, of which four are enough with the stage cost; or nothing of the kind."""
    for seed in range(3):
        shift = 0.001 * seed
        rising = [0.1 + 0.05 * k + shift for k in range(N)]
        plain = row(rising, [0.2] * N, [0.9] * N, [2.0 - 0.1 * k for k in range(N)])
        write(out, m.setting("mnist", "dense", N, "plain"), seed, plain)
        flat = [0.5, 0.7, 0.8, 0.896 + shift] + [0.9] * 12
        small = [0.2] * 4 + [1e-3] * 12
        stage = row(flat, small, small, [1.0, 0.5, 0.4, 0.3] + [0.25] * 12) if good else plain
        write(out, m.setting("mnist", "dense", N, "stage"), seed, stage)
        shallow = row([0.5, 0.89], [0.2] * 2, [0.9] * 2, [1.0, 0.5 if good else 0.01])
        write(out, m.setting("mnist", "dense", 2, "stage"), seed, shallow)
    return Results(out)


class TestJudges:
    def test_what_the_claim_says(self, tmp_path: Path) -> None:
        results = made_up(tmp_path, good=True)
        verdict = claims.first_blocks_suffice(results)
        assert verdict.outcome == "holds", verdict.sentence
        assert verdict.figures["mnist, dense-16: accuracy lost by keeping 4 blocks, with stage cost"] == pytest.approx(
            0.003
        )
        assert claims.bound_is_kept(results).outcome == "holds"

    def test_the_opposite(self, tmp_path: Path) -> None:
        results = made_up(tmp_path, good=False)
        assert claims.first_blocks_suffice(results).outcome == "does not hold"
        assert claims.bound_is_kept(results).outcome == "does not hold"

    def test_without_records(self, tmp_path: Path) -> None:
        for claim in SUITE.claims:
            assert claim.verdict(Results(tmp_path)).outcome == "not measured"
        with pytest.raises(NotMeasured, match="no network is finished with and without stage cost"):
            statistics.pairs(Results(tmp_path))

    def test_sides_by_hand(self, tmp_path: Path) -> None:
        w, deep, shallow = 0.5, [1.0, 0.6, 0.4, 0.3], [0.9, 0.5]
        write(tmp_path, "a", 0, row([0.0] * 4, [0.0] * 4, [0.0] * 4, deep))
        write(tmp_path, "b", 0, row([0.0] * 2, [0.0] * 2, [0.0] * 2, shallow, decay=[0.0, 0.05]))
        found = statistics.sides(Results(tmp_path), "a", "b", 2, 0)
        assert found.left == pytest.approx((w * (1.0 + 0.6 + 0.4) + 0.3) / (1 + 3 * w))
        assert found.right == pytest.approx(0.5 + (w * (0.9 - 0.5) + 0.05) / (1 + 3 * w))

    def test_appended_zero_blocks_give_equality(self, tmp_path: Path) -> None:
        """From where the bound comes: the network of M blocks with zero blocks behind it, decay apart."""
        losses = [1.1, 0.7, 0.6]
        write(tmp_path, "deep", 0, row([0.0] * 7, [0.0] * 7, [0.0] * 7, losses + [0.6] * 4))
        write(tmp_path, "shallow", 0, row([0.0] * 3, [0.0] * 3, [0.0] * 3, losses))
        left, right = statistics.sides(Results(tmp_path), "deep", "shallow", 3, 0)
        assert left == pytest.approx(right, rel=1e-12)


class TestFiguresAndTables:
    def test_drawn(self, tmp_path: Path) -> None:
        results = made_up(tmp_path, good=True)
        axes = figures.depths(results).axes
        assert len(axes) == 3
        with_cost, without = axes[0].lines[:2]
        assert with_cost.get_ydata()[3] == pytest.approx(0.897)
        assert without.get_ydata()[0] == pytest.approx(0.101)
        assert [label.get_text() for label in figures.bound(results).axes[0].get_yticklabels()] == [
            "mnist, dense-16, M = 2"
        ]

    def test_tables(self, tmp_path: Path) -> None:
        results = made_up(tmp_path, good=True)
        lines = figures.first_blocks(results).splitlines()
        assert lines[2].split("|")[1:-1][:7] == [
            " mnist, dense ",
            " 16 ",
            " with ",
            " 3 ",
            " 90.00 ± 0.00 ",
            " 70.00 ± 0.00 (2) ",
            " 89.70 ± 0.10 (4) ",
        ]
        assert "| published: MNIST, ResNet-54 | 54 | with |  | 99.62 |  | 99.54 (12) |  |  |" in lines
        assert "80.00 at 3.0" in figures.early_exits(results)
        assert "| mnist, dense-16 | 2 | trained by itself | 0.3206 | 0.5294 | 3 of 3 |" in figures.both_sides(results)
        assert all(len(line.split("|")) == len(lines[0].split("|")) for line in lines)


class TestMeasures:
    @pytest.mark.parametrize("network", ["resnet", "resnet-v2"])
    def test_figures_of_the_cut_networks(self, network: str, tmp_path: Path) -> None:
        shape: dict[str, Any] = {"hidden_layers": 3, "width": 8}
        if network == "resnet-v2":
            shape = {"blocks_per_stage": (1, 2), "channels": (2, 3)}
        config = TrainConfig(
            network=network,  # type: ignore[arg-type]
            epochs=1,
            stage_cost=0.2,
            weight_decay=0.01,
            run=str(tmp_path / "run"),
            **shape,
        )
        result = train(config, progress=False)
        found = m.at_each_depth(result.run.path)
        assert found["depths"] == ([1, 2, 3] if network == "resnet" else [0, 1, 2, 3])
        digits = {split: tuple(data.load("digits", split)) for split in ("train", "test")}
        accuracies = found["test.accuracy" if network == "resnet" else "test.accuracy.running"]
        squared = {
            name: float(p.detach().double().square().sum())
            for name, p in result.model.named_parameters()
            if "time_steps" not in name
        }
        for k in (1, 2, 3):
            twin = copy.deepcopy(load_model(result.run.path))
            truncate(twin, k)
            i = found["depths"].index(k)
            assert accuracies[i] == pytest.approx(evaluate(twin, digits["test"], loss=cross_entropy)["accuracy"])
            assert found["parameters"][i] == sum(p.numel() for p in twin.parameters())
            left = sum(
                value
                for name, value in squared.items()
                if not name.startswith(tuple(f"layers.{l}" for l in range(k, 3)))
            )
            assert found["decay"][i] == pytest.approx(0.005 * left)
            if network == "resnet":
                expected = evaluate(twin, digits["train"], loss=cross_entropy)["loss"]
                assert found["train.loss"][i] == pytest.approx(expected, rel=1e-5)
        name = "layers.1.linear.weight" if network == "resnet" else "layers.1.convolution_1.weight"
        others = squared.get("layers.1.convolution_2.weight", 0.0)
        assert found["weights"][1] == pytest.approx(math.sqrt(squared[name] + others))
        torch.manual_seed(config.seed)
        assert found["weights.start"][1] != found["weights"][1]
        assert len(found["milliseconds"]) == len(found["depths"])
        assert m.at_each_depth(result.run.path, timed=False)["milliseconds"] is None
