"""Claim A7: growth and recursions against independent derivatives, the judge on made-up measurements."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.func import jacrev

import made_up_gradients
from made_up_gradients import PARTS
from taulearn import data
from taulearn_papers.antil2022 import gradients
from taulearn_papers.antil2022.claims import gradients_are_damped, is_damped
from taulearn_papers.intervals import paired_interval

SCHEMES = ("feedforward", "residual", "dense", "fractional")


def probe(samples=1):
    return data.load("digits", split="test").inputs[:samples].double()


class TestMeasure:
    def test_a_tiny_training_is_exact_and_json(self):
        found = gradients.measure(Path(), scheme="fractional", seed=1, depths=(3,), epochs=1)
        rows = json.loads(json.dumps(found, allow_nan=False))["rows"]
        assert [(row["start"], row["depth"]) for row in rows] == [("1", 3), ("1/N", 3)]
        for row in rows:
            for errors in (row["errors before"], row["fixed"]["errors"], row["learned"]["errors"]):
                assert max(errors[part] for part in gradients.PARTS) < 1e-12
                assert errors["tau, as printed"] > 1e-2
            start = 1.0 if row["start"] == "1" else 1 / 3
            assert row["fixed"]["tau"] == pytest.approx([start] * 3)
            assert row["learned"]["tau"][0] < row["learned"]["tau"][2]
            assert row["fixed"]["growth"] != row["before"] != row["learned"]["growth"]

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_recursions_are_exact(self, scheme):
        network = gradients.build(scheme, "1", "learned", 5, seed=0)
        with torch.no_grad():
            network.time_steps.values.copy_(torch.linspace(0.3, 1.4, 5))
        errors = gradients.errors(network, probe())
        assert max(errors[part] for part in gradients.PARTS) < 1e-13

    def test_another_recursion_is_seen(self, monkeypatch):
        recursions = gradients._RECURSIONS | {"residual": gradients._RECURSIONS["feedforward"]}
        monkeypatch.setattr(gradients, "_RECURSIONS", recursions)
        errors = gradients.errors(gradients.build("residual", "1", "fixed", 4, seed=0), probe())
        assert min(errors.values()) > 0.1

    def test_growth_against_hand_written_layers(self):
        """A residual network of two layers past the first: y_3 = g_2(g_1(y_1)), g(y) = y + tau tanh(W y + b)."""
        network, tau = gradients.build("residual", "1/N", "fixed", 3, seed=2), 1 / 3
        (W1, b1), (W2, b2) = ((l.linear.weight.detach(), l.linear.bias.detach()) for l in list(network.layers)[1:])
        y = network.states(probe())[0][0].detach()

        def last(y, W1, b1, t1, W2, b2, t2):
            middle = y + t1 * torch.tanh(W1 @ y + b1)
            return middle + t2 * torch.tanh(W2 @ middle + b2)

        t = torch.tensor(tau, dtype=torch.float64)
        J = jacrev(last, argnums=tuple(range(7)))(y, W1, b1, t, W2, b2, t)
        found = gradients.growth(network, probe())
        assert found["propagator"] == pytest.approx(math.log10(torch.linalg.matrix_norm(J[0], 2)), abs=1e-10)
        for part, i in (("W", 1), ("b", 2), ("tau", 3)):
            assert found[part] == pytest.approx(math.log10(J[i].norm() / J[i + 3].norm()), abs=1e-10)

    def test_what_is_not_finite_is_none(self):
        network = gradients.build("residual", "1", "fixed", 3, seed=0)
        with torch.no_grad():
            network.layers[1].linear.weight.fill_(torch.nan)
        assert set(gradients.growth(network, probe()).values()) == {None}
        assert set(gradients.errors(network, probe()).values()) == {None}

    def test_saturated_layers_whose_derivatives_are_zero_both_ways(self):
        network = gradients.build("dense", "1", "fixed", 4, seed=0)
        with torch.no_grad():
            network.layers[2].linear.bias.fill_(100.0)
        errors = gradients.errors(network, probe())
        assert errors["W"] == pytest.approx(0.0, abs=1e-14)
        assert errors["b"] == pytest.approx(0.0, abs=1e-14)
        assert gradients.by_autograd(network, probe())["W"][2].norm() == 0.0

    def test_fixed_and_learned_start_from_the_same_weights(self):
        fixed, learned = (gradients.build("dense", "1", kind, 3, seed=4) for kind in gradients.KINDS)
        assert torch.equal(fixed.layers[2].linear.weight, learned.layers[2].linear.weight)
        trained = [any(p.requires_grad for p in each.time_steps.parameters()) for each in (fixed, learned)]
        assert trained == [False, True]

    def test_example_63_by_hand(self):
        assert gradients.example_63(0.5) == {"far": [50.5, 50.5, 101.0], "near": [0.5, 0.5, 2.0]}


class MadeUp:
    """Results of three seeds in memory."""

    def __init__(self, seeds=3):
        self.measured = {("gradients/examples", 0): made_up_gradients.examples()}
        for seed in range(seeds):
            for name, row in made_up_gradients.members(seed).items():
                self.measured[name, seed] = row

    def seeds(self, name):
        return sorted(seed for other, seed in self.measured if other == name)

    def measurements(self, name, seed):
        return copy.deepcopy(self.measured[name, seed])

    def rows(self, scheme):
        return [
            row
            for seed in self.seeds(f"gradients/{scheme}")
            for row in self.measured[f"gradients/{scheme}", seed]["rows"]
        ]


def failing(results):
    """The parts that do not hold."""
    verdict = gradients_are_damped(results)
    json.dumps(dict(verdict.figures), allow_nan=False)
    _, _, bad = verdict.sentence.partition("does not hold: ")
    return set(bad.split("; ")) - {""}


class TestJudge:
    @pytest.mark.parametrize("seeds", [1, 2, 3])
    def test_everything_holds(self, seeds):
        verdict = gradients_are_damped(MadeUp(seeds))
        assert verdict.outcome == "holds", verdict.sentence
        for scheme in SCHEMES:
            assert f"the recursions are exact to 1e-10 ({scheme})" in verdict.sentence
        for kind in ("vanishing", "exploding"):
            assert f"learned steps damp {kind} gradients (residual, W)" in verdict.sentence
        assert "learned steps damp exploding gradients (feedforward" not in verdict.sentence
        name = "log10 growth over the depth, fixed, learned, difference, feedforward from 1, tau"
        assert str(verdict.figures[name]).startswith("N = 8: -4")

    @pytest.mark.parametrize("error", [1e-9, None])
    @pytest.mark.parametrize("kind", ["fixed", "learned"])
    def test_a_recursion_that_is_off(self, kind, error):
        results = MadeUp()
        results.rows("dense")[1][kind]["errors"]["b"] = error
        assert failing(results) == {"the recursions are exact to 1e-10 (dense)"}

    def test_the_printed_recursion_that_is_off(self):
        results = MadeUp()
        results.rows("fractional")[0]["errors before"]["tau, as printed"] = 0.1
        assert failing(results) == {"the recursion is exact for tau, as printed (fractional)"}

    @pytest.mark.parametrize(("start", "kind"), [("1", "exploding"), ("1/N", "vanishing")])
    def test_gradients_that_are_not_damped_at_one_depth(self, start, kind):
        results = MadeUp()
        for row in results.rows("residual"):
            if row["start"] == start and row["depth"] == 32:
                row["learned"]["growth"]["W"] = 0.95 * row["fixed"]["growth"]["W"]
        assert failing(results) == {f"learned steps damp {kind} gradients (residual, W)"}

    def test_gradients_that_turn_from_vanishing_to_exploding(self):
        results = MadeUp()
        for row in results.rows("feedforward"):
            row["learned"]["growth"]["tau"] *= -2.5
        assert failing(results) == {"learned steps damp vanishing gradients (feedforward, tau)"}

    def test_gradients_that_grow_by_little_are_not_judged(self):
        results = MadeUp()
        for row in results.rows("residual"):
            row["fixed"]["growth"]["propagator"], row["learned"]["growth"]["propagator"] = 0.5, 0.6
        assert failing(results) == set()
        assert "(residual, propagator)" not in gradients_are_damped(results).sentence

    def test_structural_growth_that_stays(self):
        """Damping beyond 2^(N-j-2) takes little of what a deep dense network's gradients grow by."""
        results = MadeUp()
        for row in results.rows("dense"):
            row["fixed"]["growth"]["W"], row["learned"]["growth"]["W"] = 1.2, 0.6
        assert failing(results) == {"learned steps damp exploding gradients (dense, W)"}
        name = "log10 growth over the depth, fixed, learned, difference, dense from 1, W"
        assert "N = 32: +9.93, +9.33" in str(gradients_are_damped(results).figures[name])  # 29 log10(2) = 8.73

    def test_fixed_steps_that_are_not_finite_are_left_out_and_said(self):
        results = MadeUp()
        results.rows("dense")[0]["fixed"]["growth"]["W"] = None
        for row in results.rows("dense"):
            row["fixed"]["growth"]["b"] = None
            row["fixed"]["growth"]["tau"] = None if row["depth"] == 32 else 20.0
        verdict = gradients_are_damped(results)
        name = "log10 growth over the depth, fixed, learned, difference, dense beyond 2^(N-j-2) from 1, "
        assert "n = 2)" in str(verdict.figures[name + "W"])
        assert verdict.figures[name + "b"] == "N = 8: not finite; N = 32: not finite"
        assert "learned steps damp exploding gradients (dense, tau, not finite for N = 32)" in verdict.sentence
        assert failing(results) == set()

    def test_learned_steps_that_are_not_finite_damp_nothing(self):
        results = MadeUp()
        results.rows("feedforward")[0]["learned"]["growth"]["W"] = None
        assert failing(results) == {"learned steps damp vanishing gradients (feedforward, W)"}

    def test_training_that_diverged_says_nothing_about_the_recursions(self):
        results = MadeUp()
        results.rows("feedforward")[0]["learned"] |= {"loss": None, "errors": dict.fromkeys(PARTS)}
        assert failing(results) == set()
        assert gradients_are_damped(results).figures["trainings that diverged, feedforward"] == 1.0

    def test_examples(self):
        results = MadeUp()
        results.measured["gradients/examples", 0]["6.3"]["0.01"]["near"][2] = 0.02
        results.measured["gradients/examples", 0]["6.8"]["fractional"] = 0.1
        assert failing(results) == {
            "example 6.3: a small step damps, and of its own layer shrinks the W- and b-parts alone",
            "example 6.8: the closed forms, with a_{l-1,k}",
        }

    def test_an_interval_that_reaches_zero_is_no_damping(self):
        assert not is_damped(paired_interval([0.1, 3.0, 0.2], [2.0, 2.0, 2.0]), 2.0)
