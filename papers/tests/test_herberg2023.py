"""The judges of the suite herberg2023, on records that were made up so that the answer is known."""

from pathlib import Path

import numpy as np
import pytest

from made_up_results import GROWN, I, MadeUp, changed, of, record
from taulearn.app.results import NotMeasured
from taulearn.training import History
from taulearn.training.history import Deletion
from taulearn.training.thinned_records import numbers, thinned
from taulearn_papers.herberg2023 import SUITE, claims, statistics as q
from taulearn_papers.herberg2023.trainings import DATA, NETWORKS, TREATMENTS, setting
from taulearn_papers.packed_results import results_in

HUMP = 1.0 + 0.25 * np.exp(-(((np.log(I) - np.log(2500)) / 0.6) ** 2))
RIPPLE = 0.04 * np.sin(I / 400) * (I > 900) * (I < 9000)


def with_sum(total):
    """Steps with a given sum, nearly all of it in the first."""
    return np.where(np.arange(6) == 0, total - 0.05, np.where(np.arange(6) == 5, 0.04, 0.0025))


def turns(times):
    """Three turns, all alike up to a machine that gets slower."""
    return {name: [seconds, 1.1 * seconds, 1.2 * seconds] for name, seconds in times.items()}


def steps(*last):
    """Steps that go from 1/6 to these."""
    return 1 / 6 + (np.array(last) - 1 / 6) * (I / I[-1])


@pytest.fixture(scope="module")
def as_claimed():
    """Records in which everything is as the paper says."""
    zeroed = np.where(np.arange(6) == 2, 1.0 / (1 + (I / 500) ** 2), GROWN)
    bounded = np.clip(GROWN / GROWN.sum(1, keepdims=True) - np.where(np.arange(6) == 1, I / 900, 0.0), -0.02, None)
    near = bounded / bounded.sum(1, keepdims=True)
    sparse = np.where(np.arange(6) == 3, 1e-5, near)
    sparse = sparse / sparse.sum(1, keepdims=True)
    small = with_sum(HUMP + RIPPLE)
    sinking = np.where(np.arange(6) == 5, 1 / 6 - I / 1000.0, GROWN)
    records = {}
    for data in DATA:
        for network in NETWORKS:
            for name in TREATMENTS:
                loss = {"l1": 0.33, "horizon": 0.4}.get(name, 0.3)
                accuracy = {"fixed": 0.8, "free": 0.9}.get(name, 0.897)
                tau = {"l1": zeroed, "horizon": near, "l1-horizon": sparse}.get(name, GROWN)
                if network == "fractional":
                    tau = {"l1": GROWN * 0.8, "horizon": small, "l1-horizon": small, "dependent": sinking}.get(
                        name, GROWN
                    )
                    accuracy -= 0.01 * (name == "horizon")
                records[setting(data, network, name)] = of(
                    tau, accuracy=accuracy, loss=loss, penalty=0.02 * ("l1" in name)
                )
    gone = [Deletion(3000 + 600 * k, 6 + k, layer, 0.009, 10_101) for k, layer in enumerate((2, 3, 1, 4))]
    for name in ("l1-pruned", "l1-horizon-pruned"):
        records[setting(DATA[0], "resnet", name)] = of(GROWN, accuracy=0.897, deletions=gone)
    for depth in (12, 24):
        for name in ("l1", "l1-pruned"):
            records[setting(DATA[0], f"resnet-{depth}", name)] = of(GROWN, accuracy=0.897, deletions=gone)
    times = {"never": 1.0, "each epoch": 1.01, "each iteration": 1.02, "2 layers": 0.5, "4 layers": 0.8}
    measured = {f"time/resnet-{n}": turns(times | {"never": n / 6}) for n in (6, 12, 24)}
    return MadeUp(records, measured)


JUDGES = {
    "H1": claims.learned_beats_fixed,
    "H2": claims.similar_accuracy_larger_loss,
    "H3": claims.horizon_restricts_fractional,
    "H4": claims.residual_steps,
    "H5": claims.fractional_steps,
    "H6": claims.pruning_succeeds,
    "H7": claims.regularised_beats_fixed,
    "H8": claims.depth_is_found,
}


def parts_of(verdict):
    good, _, bad = verdict.sentence.partition("does not hold: ")
    return good.removeprefix("holds: ").rstrip("; "), bad


@pytest.mark.parametrize("claim", JUDGES)
def test_every_claim_holds_where_everything_is_as_claimed(as_claimed, claim):
    verdict = JUDGES[claim](as_claimed)
    assert verdict.outcome == "holds", parts_of(verdict)[1]


@pytest.mark.parametrize("claim", JUDGES)
def test_no_claim_is_judged_without_records(claim):
    with pytest.raises(NotMeasured):
        JUDGES[claim](MadeUp({}))


@pytest.mark.parametrize(
    ("claim", "name", "instead", "fails"),
    [
        ("H1", "mnist/resnet/free", {"accuracy": 0.79}, "resnet on mnist"),
        ("H7", "mnist/fractional/l1", {"accuracy": 0.79}, "fractional with l1 on mnist"),
        ("H2", "mnist/resnet/l1", {"accuracy": 0.87, "loss": 0.33, "penalty": 0.02}, "similar accuracy on mnist"),
        ("H2", "mnist/resnet/l1", {"accuracy": 0.897, "loss": 0.29}, "larger test loss with l1 and horizon on mnist"),
        ("H2", "mnist/resnet/l1", {"accuracy": 0.897, "loss": 0.29}, "larger training loss with penalties with l1"),
        (
            "H2",
            "mnist/resnet/l1",
            {"accuracy": 0.897, "loss": 0.29, "penalty": 0.1},
            "larger training loss on the data",
        ),
        ("H3", "mnist/fractional/horizon", {"loss": 0.35}, "lower accuracy in the first half of the epochs on mnist"),
        ("H3", "mnist/fractional/horizon", {"loss": 0.35}, "smallest largest step on mnist"),
        ("H3", "mnist/fractional/horizon", {"accuracy": 0.85, "loss": 0.29}, "larger test loss throughout on mnist"),
        ("H4", "fashion-mnist/resnet/l1", {}, "some steps go to zero and stay (l1)"),
        ("H4", "fashion-mnist/resnet/horizon", {}, "sum = 1 in most iterations (horizon)"),
        ("H4", "fashion-mnist/resnet/horizon", {}, "negative steps after a bit more than 100 iterations (horizon)"),
        ("H5", "fashion-mnist/fractional/horizon", {}, "the sum comes back to 1 (horizon)"),
        ("H5", "fashion-mnist/fractional/horizon", {}, "horizon damps the growth"),
        ("H5", "fashion-mnist/fractional/l1", {"accuracy": 0.95}, "better without l1"),
        ("H5", "fashion-mnist/fractional/horizon", {"accuracy": 0.95}, "better without horizon"),
        ("H5", "fashion-mnist/fractional/l1-horizon", {"accuracy": 0.95}, "better without l1-horizon"),
        ("H5", "fashion-mnist/fractional/dependent", {"accuracy": 0.85}, "it does not blow up"),
        ("H5", "fashion-mnist/fractional/dependent", {}, "the raw dependent step passes through zero"),
        ("H5", "fashion-mnist/fractional/l1-horizon", {}, "tau_1 to tau_4 get close to zero (l1-horizon)"),
        ("H6", "fashion-mnist/resnet/l1-pruned", {"accuracy": 0.897}, "layers are deleted (l1)"),
        ("H6", "fashion-mnist/resnet/l1-pruned", {"accuracy": 0.897}, "each deletion removes 10,101 variables"),
        (
            "H6",
            "fashion-mnist/resnet/l1-pruned",
            {"accuracy": 0.897},
            "the network that pruning leaves with l1 is faster",
        ),
        ("H6", "fashion-mnist/resnet/l1-pruned", {"accuracy": 0.88}, "accuracy is kept within a point (l1)"),
        ("H8", "fashion-mnist/resnet-24/l1-pruned", {"accuracy": 0.897}, "the number of layers left does not depend"),
        (
            "H8",
            "fashion-mnist/resnet-12/l1-pruned",
            {"accuracy": 0.88},
            "from 12 layers accuracy is kept within a point",
        ),
        ("H8", "fashion-mnist/resnet-12/l1-pruned", {"accuracy": 0.88}, "neither does the accuracy"),
    ],
)
def test_a_part_that_is_not_as_claimed_is_found(as_claimed, claim, name, instead, fails):
    before = JUDGES[claim](as_claimed).sentence.partition("does not hold: ")[2]
    assert fails not in before
    after = JUDGES[claim](changed(as_claimed, name, of(GROWN, **instead)))
    assert after.outcome == "holds in part"
    assert fails in parts_of(after)[1]


@pytest.mark.parametrize(
    ("claim", "name", "tau", "fails"),
    [
        ("H4", "resnet/free", steps(*[0.3] * 6), "tau_0 far larger (free)"),
        ("H4", "resnet/dependent", steps(-9, 0.1, 0.1, 0.1, 0.1, 0.1), "tau_0 far larger (dependent)"),
        ("H4", "resnet/l1-horizon", GROWN, "sum = 1 in most iterations (l1-horizon)"),
        ("H5", "fractional/free", steps(3, 1, 1, 1, 0.1, 1), "all steps grow without regularisation"),
        ("H5", "fractional/free", steps(3, 1, 4, 1, 1, 1), "tau_0 is the largest without regularisation"),
        ("H5", "fractional/l1", GROWN * 1.1, "l1 damps the growth"),
        ("H5", "fractional/l1", np.where(np.arange(6) == 2, 1 / (1 + I), GROWN * 0.8), "l1 brings no step to zero"),
        ("H5", "fractional/horizon", with_sum(HUMP), "the sum oscillates on its way (horizon)"),
        (
            "H5",
            "fractional/horizon",
            with_sum(1 + (HUMP + RIPPLE - 1) * (I > 3000)),
            "the sum exceeds 1 near iteration",
        ),
        ("H5", "fractional/horizon", with_sum(0.98 + RIPPLE * 0.8), "the sum comes back to 1 (horizon)"),
        ("H5", "fractional/horizon", with_sum(0.98 + RIPPLE * 0.8), "the sum oscillates on its way (horizon)"),
    ],
)
def test_steps_that_are_not_as_claimed_are_found(as_claimed, claim, name, tau, fails):
    treatment = name.partition("/")[2]
    records = of(tau, accuracy={"free": 0.9}.get(treatment, 0.887))
    after = JUDGES[claim](changed(as_claimed, f"fashion-mnist/{name}", records))
    assert fails in parts_of(after)[1]


def test_negative_step_of_large_magnitude_is_small(as_claimed):
    records = of(steps(3.5, 1.5, 1.5, 1.4, 1.3, -8.2), accuracy=0.897)
    verdict = JUDGES["H4"](changed(as_claimed, "fashion-mnist/resnet/dependent", records))
    assert verdict.outcome == "holds"
    assert verdict.figures["tau_0 over the next largest step, dependent"].startswith("2.33")
    assert verdict.figures["|tau_0| over the next largest magnitude, dependent"].startswith("0.42")


@pytest.mark.parametrize(
    ("claim", "network", "times", "fails"),
    [
        ("H6", 6, {"each iteration": 1.2}, "after each iteration costs nothing noticeable"),
        ("H6", 6, {"each epoch": 1.2}, "after each epoch costs nothing noticeable"),
        ("H6", 6, {"2 layers": 0.99}, "the network that pruning leaves with l1 is faster"),
        ("H8", 6, {"2 layers": 0.99}, "time is saved from every size"),
        ("H8", 24, {"never": 2.0}, "the time saved grows with the size"),
    ],
)
def test_times_are_looked_at(as_claimed, claim, network, times, fails):
    measured = as_claimed.measured | {
        f"time/resnet-{network}": as_claimed.measured[f"time/resnet-{network}"] | turns(times)
    }
    assert fails in parts_of(JUDGES[claim](MadeUp(as_claimed.records, measured)))[1]


def test_cost_that_turns_do_not_tell_from_a_noticeable_one_counts(as_claimed):
    never = as_claimed.measured["time/resnet-6"]["never"]
    shaken = {"each iteration": [a * b for a, b in zip(never, (1.0, 1.06, 1.0), strict=True)]}
    measured = as_claimed.measured | {"time/resnet-6": as_claimed.measured["time/resnet-6"] | shaken}
    fails = "after each iteration costs nothing noticeable"
    assert fails in parts_of(JUDGES["H6"](MadeUp(as_claimed.records, measured)))[1]


@pytest.mark.parametrize(
    ("deletions", "fails"),
    [
        ([(5, 10_101)], "only layers 0 and 5 remain"),
        ([(2, 999), (3, 10_101), (1, 10_101), (4, 10_101)], "each deletion removes 10,101 variables"),
    ],
)
def test_deletions_are_looked_at(as_claimed, deletions, fails):
    gone = [Deletion(3000, 5, layer, 0.009, parameters) for layer, parameters in deletions]
    name = "fashion-mnist/resnet/l1-pruned"
    verdict = claims.pruning_succeeds(changed(as_claimed, name, of(GROWN, accuracy=0.897, deletions=gone)))
    assert fails in parts_of(verdict)[1]


def test_difference_within_the_noise_of_three_seeds_does_not_count(as_claimed):
    noisy = [record(GROWN, accuracy=0.8 + shift, seed=seed) for seed, shift in enumerate((0.002, -0.003, 0.02))]
    verdict = claims.learned_beats_fixed(changed(as_claimed, "mnist/resnet/free", noisy))
    assert "resnet on mnist" in parts_of(verdict)[1]


@pytest.mark.parametrize(
    ("claim", "name", "fails"),
    [
        ("H2", "resnet/l1", "similar accuracy on fashion-mnist"),
        ("H5", "fractional/dependent", "it does not blow up"),
        ("H6", "resnet/l1-pruned", "accuracy is kept within a point (l1)"),
        ("H8", "resnet-12/l1-pruned", "from 12 layers accuracy is kept within a point"),
        ("H8", "resnet-12/l1-pruned", "neither does the accuracy"),
    ],
)
def test_accuracy_is_not_kept_where_the_interval_reaches_a_point(as_claimed, claim, name, fails):
    name = f"fashion-mnist/{name}"
    changes = (0.013, -0.013, 0.0)  # the mean stays
    shaken = [
        record(
            I * 0 + as_claimed.records[name][0].iterations["tau"],
            accuracy=0.897 + change,
            seed=seed,
            loss=0.33 if claim == "H2" else 0.3,
            penalty=0.02 * (claim == "H2"),
            deletions=as_claimed.records[name][seed].deletions,
        )
        for seed, change in enumerate(changes)
    ]
    assert fails in parts_of(JUDGES[claim](changed(as_claimed, name, shaken)))[1]


@pytest.mark.parametrize("total", [1, 150, 3000, 120_000])
def test_thinning_twice_is_thinning_once(total):
    tau = np.sin(np.arange(total)[:, None] / 300.0 + np.arange(3))
    tau[total // 2 :, 1] = np.nan
    whole = History({"loss": np.arange(total, dtype=float), "tau": tau}, {}, [])
    fine, coarse = thinned(whole), thinned(whole, coarse=True)
    assert fine.num_iterations <= min(total, 2300)
    assert coarse.num_iterations <= 230
    for again, wanted in (
        (thinned(fine), fine),
        (thinned(fine, coarse=True), coarse),
        (thinned(coarse, coarse=True), coarse),
    ):
        for name, column in wanted.iterations.items():
            np.testing.assert_array_equal(again.iterations[name], column)
    kept = numbers(coarse)
    assert {1, total} <= set(kept)
    if total > 1:
        assert {total // 2, total // 2 + 1} <= set(kept), "before and after the deletion"
    for layer in range(3):
        negative = np.flatnonzero(tau[:, layer] < 0)
        if len(negative):
            assert negative[0] + 1 in kept


def test_shares_of_iterations_survive_thinning():
    tau = np.where(np.arange(10_000)[:, None] < 2_500, 1.0, 0.2)
    whole = History({"loss": np.zeros(10_000), "tau": tau}, {}, [])
    for record_ in (whole, thinned(whole), thinned(whole, coarse=True)):
        share = q.share_of_iterations(record_, np.abs(q.sums(record_) - 1.0) < 0.05)
        assert share == pytest.approx(0.25, abs=0.012)


def test_stay_below_a_bound_is_counted_from_the_end():
    small = np.zeros((100, 3))
    small[:, 0] = 1.0
    small[:40, 1] = 1.0
    small[90:, 2] = 1.0
    found = q.small_for(History({"loss": np.zeros(100), "tau": small}), 0.01)
    np.testing.assert_allclose(found, [0.0, 0.6, 0.0])


def test_reversals_leave_noise_out():
    x = np.linspace(0, 6 * np.pi, 500)
    noise = np.random.default_rng(0).normal(0, 0.005, 500)
    assert q.reversals(np.sin(x) + noise, 0.1) == 6
    assert q.reversals(np.linspace(0, 1, 500) + noise, 0.1) == 0


STORED = Path(__file__).parent / "stored" / "herberg2023-quick" / "records.npz"


def test_stored_members_are_those_of_the_suite():
    results = results_in(STORED)
    wanted = {member.setting: member.digest for member in SUITE.members(True, 1)}
    for name in results.settings:
        assert results.done(name, 0)["digest"] == wanted[name], name
