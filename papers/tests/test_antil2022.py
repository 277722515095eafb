"""The suite antil2022: members, measurements against closed forms, judges on made-up records, figures."""

import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import made_up_gradients
import taulearn
from taulearn.app.results import FORMAT, NotMeasured, Results
from taulearn.data import maxwell
from taulearn.experiments import TrainConfig, train
from taulearn.files import write_tensors
from taulearn.nn import resnet
from taulearn.saving import load_model, save_model
from taulearn.training import History
from taulearn_papers.antil2022 import SUITE, claims, figures, measurements, stability, trainings as m
from taulearn_papers.suite import Verdict

SUITE = SUITE


class TestMembers:
    def test_names_differ_and_every_setting_of_the_article_is_there(self) -> None:
        for quick in (False, True):
            found = SUITE.members(quick, None)
            assert len({each.name for each in found}) == len(found)
        settings = {each.setting for each in SUITE.members(False, None)}
        assert len([each for each in settings if each.startswith("maxwell/")]) == 16
        assert {m.mesh(n) for n in (4, 7, 10, 13, 16, 19, 22, 25, 28, 31)} <= settings
        assert {m.reduction("ones"), m.reduction("uniform"), "stability"} <= settings

    def test_networks_are_those_of_the_article(self) -> None:
        configs = {each.setting: each.config for each in SUITE.members(False, 1)}
        fractional = configs[m.setting("6-50", "fractional", "learned", "ordered")]
        assert isinstance(fractional, TrainConfig)
        assert (fractional.hidden_layers, fractional.width, fractional.activation) == (6, 50, "smooth_relu")
        assert (fractional.memory_from, fractional.gamma, fractional.init, fractional.bias_ordering) == (
            0,
            0.5,
            1.0,
            10.0,
        )
        assert (fractional.optimizer, fractional.batch_size, fractional.epochs) == ("steepest_descent", "full", 1000)
        fixed = configs[m.setting("2-50", "resnet", "fixed", "plain")]
        assert (fixed.hidden_layers, fixed.constraint, fixed.init, fixed.bias_ordering) == (2, "fixed", 1.0, 0.0)
        reduced = configs[m.reduction("uniform")]
        assert (reduced.hidden_layers, reduced.width, reduced.init, reduced.bias_ordering) == (5, 10, "uniform", 10.0)
        toy = configs[m.toy("peaks", "resnet", "learned")]
        assert (toy.optimizer, toy.lr, toy.batch_size, toy.epochs) == ("adam", 0.01, 500, 1500)

    def test_seeds_are_counted(self) -> None:
        assert {each.seed for each in SUITE.members(False, None) if each.config} == {0, 1, 2, 3, 4}
        assert {each.seed for each in SUITE.members(True, 3) if each.config} == {0, 1, 2}

    def test_figures_and_tables_name_settings_that_exist(self) -> None:
        everything = SUITE.members(True, 1)
        for number in (*SUITE.figures, *SUITE.tables):
            assert 0 < len(SUITE.needed(everything, [number])) < len(everything)


class Shifted(nn.Module):
    """The exact solution plus a constant, as a network."""

    def __init__(self, shift: tuple[float, float, float]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, inputs: Tensor) -> Tensor:
        return maxwell.solution(inputs[:, :3]) + self.shift


class TestMeasures:
    def test_errors_of_a_shifted_solution_are_the_shift(self) -> None:
        field = measurements.field_of(Shifted((0.3, 0.4, -0.1)))
        square = measurements.square_errors(field(measurements.square_points()))
        size = math.sqrt(0.26)
        assert square == pytest.approx({"rms_outside": size, "max_outside": size, "rms_inside": size}, rel=1e-5)
        inside = measurements.inside_errors(field)
        assert inside["mean_error"] == pytest.approx(0.5, rel=1e-5)
        assert (inside["u3_min"], inside["u3_max"]) == pytest.approx((-0.1, -0.1), abs=1e-6)

    def test_relative_error_on_the_test_samples(self) -> None:
        _, targets = taulearn.data.load("maxwell", "test")
        expected = 0.3 * math.sqrt(len(targets)) / targets.double().norm().item()
        assert measurements.relative_test_error(Shifted((0.3, 0.0, 0.0))) == pytest.approx(expected, rel=1e-5)

    def test_course_reads_the_record(self) -> None:
        loss, total = np.linspace(2, 1, 150), np.linspace(3, 1, 150)
        loss[7] = 5.0
        found = measurements.course(History({"loss": loss, "total": total}))
        assert found["mse"] == {"10": loss[9], "100": loss[99], "end": 1.0}
        assert found["mse_rises"] == 1
        assert found["largest_rise"] < 0
        total[50] *= 2
        assert measurements.course(History({"loss": loss, "total": total}))["largest_rise"] > 0.9

    def test_surrogate_and_reduction_of_a_short_training(self, tmp_path: Path) -> None:
        member = next(each for each in SUITE.members(True, 1) if each.setting == m.reduction("ones"))
        assert member.config is not None
        settings = {"epochs": 5, "compile": "never", "run": str(tmp_path / "run")}
        run = train(member.config.model_copy(update=settings), progress=False).run.path
        found = json.loads(json.dumps(measurements.surrogate(run, meshes=(2, 3))))
        assert set(found["cube"]) == {"2", "3"}
        assert found["cube"]["2"] == pytest.approx(found["cube"]["3"], rel=0.1)
        assert (run / measurements.SQUARE).exists()
        model = load_model(run)
        with torch.no_grad():
            model.time_steps.values[2:4] = torch.tensor([0.0, 1e-3])
        save_model(model, run)
        row = json.loads(json.dumps(measurements.reduction(run, further=2)))
        assert row["near_zero"] == [2, 3]
        assert row["after"]["near_zero"] == pytest.approx(row["before"], rel=1e-2)
        assert row["after"]["paper"] != pytest.approx(row["before"], rel=1e-3)
        assert row["further"]["whole"] < row["before"]
        assert row["shown"] == "near_zero"
        assert load_model(run / measurements.REDUCED).time_steps.origin == (0, 1, 4)


class TestStability:
    @pytest.mark.parametrize(
        ("a", "b", "z"), [(0.3, 2.0, 1.5), (0.5, 1.0, 0.0), (0.5, 2.0, 2.0), (0.8, 2.0, 3.0), (1, 1, 4)]
    )
    def test_mittag_leffler_against_mpmath(self, a: float, b: float, z: float) -> None:
        with mpmath.workdps(30):
            expected = mpmath.nsum(lambda k: mpmath.mpf(z) ** k / mpmath.gamma(a * k + b), [0, mpmath.inf], method="d")
        assert stability.mittag_leffler(a, b, z) == pytest.approx(float(expected), rel=1e-12)

    def test_the_linear_problem_attains_the_bound(self) -> None:
        bound = stability.mittag_leffler(0.5, 2.0, 1.0)
        errors = [bound - stability.distance_ratio("linear", 0.5, 1.0, steps) for steps in (100, 200, 400)]
        assert 0 < errors[2] < 0.6 * errors[1] < 0.4 * errors[0]  # from below, the first order of the explicit scheme
        assert errors[2] < 0.01 * bound

    def test_printed_growth_fails_for_the_linear_problem(self) -> None:
        assert stability.distance_ratio("linear", 0.5, 1.0, 200) > stability.printed_constant(0.5, 1.0)

    def test_negative_argument(self) -> None:
        with pytest.raises(ValueError, match="z must be >= 0, got -1"):
            stability.mittag_leffler(0.5, 1.0, -1.0)


def finish(out: Path, setting: str, seed: int, row: dict, history: History | None = None) -> None:
    """A finished member without a training."""
    folder = out / setting / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "measurements.json").write_text(json.dumps(row))
    note = {
        "format": FORMAT,
        "setting": setting,
        "seed": seed,
        "digest": "none",
        "config": None,
        "test": {},
        "seconds": 1.0,
    }
    (folder / "done.json").write_text(json.dumps(note))
    if history is not None:
        history.save(folder / "history.safetensors")


def surrogate_row(mse: float, cube: float, outside: float, tau: list[float], **other: object) -> dict:
    return {
        "mse": {"10": 10 * mse, "100": 3 * mse, "end": mse},
        "largest_rise": -1e-9,
        "mse_rises": 3,
        "test_error": cube,
        "tau": tau,
        "cube": {"4": cube, "31": 1.01 * cube},
        "square": {"rms_outside": outside, "max_outside": outside, "rms_inside": outside},
        "inside": {"u3_min": -0.004, "u3_max": 0.006, "mean_error": cube, "max_error": cube, "relative_error": 0.01},
        **other,
    }


def article(out: Path, seeds: int = 3) -> Results:
    """Records in which everything is as the article says."""
    exact = maxwell.solution(measurements.square_points())
    for seed in range(seeds):
        noise = 1 + 0.01 * seed
        for size in m.SIZES:
            for scheme in m.SCHEMES:
                for kind in m.STEPS:
                    for order in m.ORDERS:
                        mse = 1e-4 * (1 if kind == "learned" else 4 if size == "6-50" else 2) * noise
                        mse *= 1.5 if scheme == "fractional" else 1.0
                        cube = (2e-3 if size == "2-50" else 4e-3) * (0.5 if scheme == "fractional" else 1.0) * noise
                        outside = cube * (1 if kind == "learned" else 1.5)
                        tau = list(figures.PRINTED[size, scheme, order])
                        inside = {"u3_min": -0.005, "u3_max": 0.0077, "relative_error": 0.01, "max_error": 1.0}
                        inside["mean_error"] = 1.0 if scheme == "fractional" else 0.5 + 0.01 * seed
                        row = surrogate_row(mse, cube, outside, tau, inside=inside)
                        name = m.setting(size, scheme, kind, order)
                        epochs = {"iteration": np.arange(4), "train.loss": np.array([np.nan, 3, 2, 1]) * mse}
                        tall = np.array([3.0, 2.0, 1.0]) * mse
                        history = History({"loss": tall, "total": tall, "tau": np.tile(tau, (3, 1))}, epochs)
                        finish(out, name, seed, row, history)
                        if (size, order) == ("2-50", "plain"):  # what figures 4 and 5 show
                            values = {"values": (exact + outside * (seed + 1)).float()}
                            write_tensors(out / name / f"seed-{seed}" / measurements.SQUARE, values, {})
        for start in m.STARTS:
            row = {
                "tau": [0.9, 0.01, 0.5, 0.02, 0.0],
                "near_zero": [1, 3, 4],
                "shown": "near_zero",
                "before": 0.07,
                "after": {"near_zero": 0.07, "paper": 0.07, "smallest": 0.07},
                "further": {"whole": 0.06, "near_zero": 0.06, "paper": 0.06},
            }
            finish(out, m.reduction(start), seed, row)
            folder = out / m.reduction(start) / f"seed-{seed}"
            network = resnet(7, 10, 3, 5, init=row["tau"])
            save_model(network, folder)
            taulearn.prune(network, keep=[0, 2])
            save_model(network, folder / measurements.REDUCED)
    for n, error in ((1, 2.3e-2), (2, 1.2e-2), (4, 5.8e-3), (31, 8e-4)):
        finish(out, m.mesh(n), 0, {"n": n, "h": math.sqrt(3) / n, "l2": error, "hcurl": 5 * error, "dofs": 1})
    rows = [{"problem": "linear", "gamma": 0.5, "lipschitz": 1.0, "ratio": 1.0, "bound": 1.1, "printed": 1.2}]
    finish(out, "stability", 0, {"rows": rows})
    finish(out, "gradients/examples", 0, made_up_gradients.examples())
    for seed in range(seeds):
        for setting, row in made_up_gradients.members(seed).items():
            finish(out, setting, seed, row)
    return Results(out)


class TestJudges:
    def test_all_claims_hold_on_records_as_the_article_tells(self, tmp_path: Path) -> None:
        results = article(tmp_path)
        verdicts = {claim.id: claim.verdict(results) for claim in SUITE.claims}
        assert {name: verdict.outcome for name, verdict in verdicts.items()} == dict.fromkeys(verdicts, "holds"), [
            verdict.sentence for verdict in verdicts.values()
        ]
        assert list(verdicts) == ["A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8"]
        for verdict in verdicts.values():
            json.dumps(dict(verdict.figures), allow_nan=False)

    def change(self, out: Path, setting: str, seeds: int = 3, **changes: object) -> Results:
        for seed in range(seeds):
            file = out / setting / f"seed-{seed}" / "measurements.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return Results(out)

    def part(self, verdict: Verdict, words: str) -> bool:
        good, _, bad = verdict.sentence.partition("does not hold: ")
        assert (words in good) != (words in bad), verdict.sentence
        return words in good

    def test_a1_sees_fixed_steps_that_win_and_an_objective_that_rises(self, tmp_path: Path) -> None:
        article(tmp_path)
        name = m.setting("6-50", "fractional", "learned", "plain")
        results = self.change(tmp_path, name, mse={"10": 1e-4, "100": 1e-4, "end": 1.0}, largest_rise=1e-3)
        verdict = claims.learned_trains_faster(results)
        assert verdict.outcome == "holds in part"
        assert not self.part(verdict, "faster with learned steps (fractional 6-50 plain)")
        assert self.part(verdict, "faster with learned steps (resnet 6-50 plain)")
        assert not self.part(verdict, "decreases monotonically")

    def test_a2_sees_an_error_that_deletion_raises(self, tmp_path: Path) -> None:
        article(tmp_path)
        after = {"near_zero": 0.07, "paper": 0.7, "smallest": 0.08}
        results = self.change(tmp_path, m.reduction("ones"), near_zero=[1], after=after)
        verdict = claims.network_reduces(results)
        assert not self.part(verdict, "deleting the article's three layers keeps the error (tau = 1 at the start)")
        assert not self.part(verdict, "tau_1 and tau_3 and tau_4 near 0 (tau = 1 at the start)")
        assert self.part(verdict, "deleting the layers near 0 keeps the error (tau = 1 at the start)")
        assert self.part(verdict, "deleting the article's three layers keeps the error (tau random at the start)")

    def test_a3_sees_other_steps(self, tmp_path: Path) -> None:
        article(tmp_path)
        results = self.change(tmp_path, m.setting("6-50", "resnet", "learned", "plain"), tau=[1, 2, 3, 4, 5, -1])
        verdict = claims.steps_are_those_of_the_table(results)
        assert not self.part(verdict, "values (resnet 6-50 plain)")
        assert not self.part(verdict, "all steps of 6-50 are positive")
        assert self.part(verdict, "values (resnet 2-50 plain)")

    def test_a4_sees_a_network_that_is_no_better_and_one_that_is_not_stable(self, tmp_path: Path) -> None:
        article(tmp_path)
        self.change(tmp_path, m.setting("2-50", "resnet", "fixed", "plain"), cube={"4": 0.01, "31": 0.01})
        results = self.change(tmp_path, m.setting("6-50", "resnet", "fixed", "plain"), cube={"4": 0.01, "31": 0.02})
        verdict = claims.networks_against_elements(results)
        assert not self.part(verdict, "every network 2-50 beats the finite elements for n = 4")
        assert self.part(verdict, "every network 2-50 beats the finite elements for n = 2")
        assert self.part(verdict, "some network 2-50 beats the finite elements for n = 4")
        assert not self.part(verdict, "stay stable")
        assert self.part(verdict, "order 1")

    def test_a5_and_a6_see_a_residual_network_that_is_better_outside_and_worse_inside(self, tmp_path: Path) -> None:
        article(tmp_path)
        name = m.setting("2-50", "resnet", "learned", "plain")
        results = self.change(
            tmp_path,
            name,
            square={"rms_outside": 1e-6},
            inside={"u3_min": 0, "u3_max": 0, "mean_error": 9.0, "relative_error": 1.0},
        )
        assert not self.part(claims.fractional_extrapolates(results), "than ResNet with learned steps")
        assert not self.part(claims.third_component_is_small(results), "ResNet with learned steps does better")

    def test_one_seed_is_judged_by_its_sign(self, tmp_path: Path) -> None:
        verdict = claims.learned_trains_faster(article(tmp_path, seeds=1))
        assert verdict.outcome == "holds"
        assert any("no interval" in str(value) for value in verdict.figures.values())

    def test_nothing_is_claimed_without_records(self, tmp_path: Path) -> None:
        assert {claim.verdict(Results(tmp_path)).outcome for claim in SUITE.claims} == {"not measured"}


class TestFiguresAndTables:
    def test_all_are_made_from_records(self, tmp_path: Path) -> None:
        results = article(tmp_path, seeds=2)
        for number, draw in SUITE.figures.items():
            figure = draw(results)
            file = tmp_path / f"{number}.png"
            figure.savefig(file, dpi=40)
            assert file.stat().st_size > 5000
        assert len(SUITE.figures["3"](results).axes) == 4
        assert len(SUITE.figures["3"](results).axes[3].lines) == 9  # eight networks and the finite elements

    def test_table_1_stands_beside_the_printed_one(self, tmp_path: Path) -> None:
        text = figures.table_1(article(tmp_path))
        assert "| 6-50 ResNet | tau_0 | 0.92 | 0.92 ± 0.00 | 3 |" in text
        assert "| tau_5 | 0.04 | 0.04" in text
        assert len(text.splitlines()) == 2 + 4 * 6 + 4 * 2

    def test_missing_records_are_named(self, tmp_path: Path) -> None:
        for make in (*SUITE.figures.values(), *SUITE.figures.values()):
            with pytest.raises(NotMeasured):
                make(Results(tmp_path))
