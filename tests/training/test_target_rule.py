"""A target: which layers go and when, and how the weight of the penalty is steered, by itself."""

from typing import Any

import pytest

from taulearn.adaptivity.target import Target


def target(penalised: str = "next", number: int = 6, excess: float = 3.0, **options: Any) -> Target:
    defaults = {"begin": 100, "deadline": 400, "every": 10, "costs": [1.0] * number, "excess": excess}
    return Target(penalised, **defaults | options)


def schedule(controller: Target, scores: list[float], fixed: list[int] | None = None) -> list[tuple[int, int]]:
    """Iterations and numbers of the layers that go, with scores that do not change."""
    origin, gone = list(range(len(scores))), []
    for iteration in range(10, 501, 10):
        now = [scores[l] for l in origin]
        held = [origin.index(l) for l in fixed or [] if l in origin]
        gone += [(iteration, origin[i]) for i in controller.deletions(iteration, origin, now, held)]
        origin = [l for l in origin if l not in [layer for _, layer in gone]]
    return gone


def test_layers_go_one_after_the_other_and_no_more_than_asked_for() -> None:
    scores = [0.3, 0.5, 0.2, 0.6, 0.1, 0.4]
    assert schedule(target("none"), scores) == [(200, 4), (300, 2), (400, 0)]
    assert schedule(target("next"), scores) == [(200, 4), (300, 2), (400, 0)]
    assert schedule(target("all"), scores) == [(300, 4), (350, 2), (400, 0)]
    assert schedule(target("none"), scores, fixed=[4, 0]) == [(200, 2), (300, 5), (400, 1)]


@pytest.mark.parametrize("penalised", ["next", "all", "none"])
def test_layers_that_have_vanished_go_early_but_not_all_at_once(penalised: str) -> None:
    """At most one is ahead of the schedule, so that the others can make up for it."""
    assert schedule(target(penalised), [1e-3, 1.0, 1e-3, 1.0, 1e-3, 1e-3]) == [(100, 0), (200, 2), (300, 4)]


def test_at_least_one_layer_stays() -> None:
    assert [layer for _, layer in schedule(target("none", 3, 2.0), [0.1, 0.2, 0.3])] == [0, 1]


def test_a_latency_is_reached_by_the_least_share_per_millisecond() -> None:
    controller = target("none", costs=[1.0, 4.0, 1.0, 2.0], excess=4.5, whole=10.0)
    assert schedule(controller, [0.3, 0.4, 0.2, 0.9]) == [(370, 1), (400, 2)]
    assert controller.gone == 5.0
    assert controller.reached


@pytest.mark.parametrize("penalised", ["next", "all", "none"])
def test_the_layer_that_stays_is_one_that_may(penalised: str) -> None:
    """Where the target cannot be reached without the dear layers, a cheap one stays, whatever its score."""
    controller = target(penalised, costs=[1.0, 5.0], excess=4.5)
    assert [layer for _, layer in schedule(controller, [0.1, 10.0])] == [1]
    assert controller.reached
    controller = target(penalised, costs=[1.0, 5.0, 1.0, 5.0], excess=10.8)
    assert sorted(layer for _, layer in schedule(controller, [0.1, 10.0, 0.2, 11.0])) == [0, 1, 3]
    assert controller.reached
    controller = target(penalised, costs=[1.0, 5.0, 2.0], excess=5.5)
    assert [layer for _, layer in schedule(controller, [0.1, 10.0, 50.0], fixed=[2])] == [0, 1]


def test_alpha_follows_the_rate_at_which_the_step_must_shrink() -> None:
    """By hand: the next layer has to be gone at 200, a look is 10 iterations, lr is 0.5."""
    controller, origin = target(), [0, 1, 2, 3, 4, 5]
    scores = [0.5, 0.2, 0.3, 0.6, 0.7, 0.8]
    controller.steer(90, origin, [1.0] * 6, scores, [], 0.5)
    assert (controller.alpha, controller.chosen) == (0.0, ())
    controller.steer(100, origin, [1.0] * 6, scores, [], 0.5)
    assert controller.chosen == (1,)
    assert controller.alpha == pytest.approx(1.0 / 100 / 0.5)
    controller.steer(110, origin, [1.0, 0.96, 1.0, 1.0, 1.0, 1.0], scores, [], 0.5)
    assert controller.alpha == pytest.approx(0.02 + 0.5 * (0.96 / 90 - 0.004) / 0.5)
    before = controller.alpha
    controller.steer(120, origin, [1.0, 0.5, 1.0, 1.0, 1.0, 1.0], scores, [], 0.5)
    assert controller.alpha == pytest.approx(max(0.0, before + 0.5 * (0.5 / 80 - 0.046) / 0.5))
    controller.steer(130, origin, [1.0, -0.5, 1.0, 1.0, 1.0, 1.0], [0.5, 0.9, 0.3, 0.6, 0.7, 0.8], [], 0.5)
    assert controller.chosen == (1,), "a layer that was begun with is gone through with"
    controller.steer(195, origin, [1.0, 1e4, 1.0, 1.0, 1.0, 1.0], scores, [], 0.5)
    assert controller.alpha == pytest.approx(0.25 * (1e4 + 5) / 6 / (10 * 0.5))
    controller.gone = 3.0
    controller.steer(200, origin, [1.0] * 6, scores, [], 0.5)
    assert (controller.alpha, controller.chosen, controller.penalised_among(origin)) == (0.0, (), [])


def test_a_penalty_on_all_steps_is_steered_by_the_sum_of_those_that_go() -> None:
    controller, tau = target("all"), [1.0, 0.4, 0.5, 1.0, 0.6, 1.0]
    controller.steer(100, range(6), tau, tau, [], 0.1)
    assert controller.chosen == (1, 2, 4)
    assert controller.alpha == pytest.approx(1.5 / 300 / (3 * 0.1))
    assert controller.penalised_among(range(6)) == list(range(6))
