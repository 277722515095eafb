"""The judges of claims P1 and P2, with their thresholds, which were written down before the runs."""

import numpy as np

from taulearn.app.results import Results

from ..intervals import paired_interval
from ..suite import Verdict
from .statistics import Pair, at_depth, bounds, pairs, per_layer
from .trainings import kept

NEARLY = 0.01
"""The first blocks reach "nearly" the accuracy of the whole within one point, as "similar" is read in all suites."""

VANISHED = 0.01
"""A block has vanished when it adds less than this share of the state's norm: the threshold of pruning."""

WITHOUT_WEIGHT = 0.1
"""The weights of a block have vanished when their norm is below this share of what it was at the start: weight decay
alone takes less in the time of these trainings wherever the gradient keeps a block in use."""

MOST = 0.5
"""Blocks behind the first M "vanish" when more than half of them do."""


def first_blocks_suffice(results: Results) -> Verdict:
    """P1: the first M blocks alone, M being two ninths of all as in the paper; and what the others still do."""
    parts: dict[str, bool] = {}
    figures: dict[str, float | str] = {}
    for pair in pairs(results):
        M = kept(pair.depth)[1]
        seeds = results.seeds(pair.name("stage"), pair.name("plain"))
        losses = {each: [_lost(results, pair.name(each), seed, M) for seed in seeds] for each in ("stage", "plain")}
        difference = paired_interval(losses["plain"], losses["stage"])
        parts[f"{pair.title}: the first {M} blocks reach nearly the full accuracy"] = (
            float(np.mean(losses["stage"])) <= NEARLY
        )
        parts[f"{pair.title}: they lose less than without stage cost"] = difference.positive
        figures |= {
            f"{pair.title}: accuracy lost by keeping {M} blocks, with stage cost": float(np.mean(losses["stage"])),
            f"{pair.title}: the same without": float(np.mean(losses["plain"])),
            f"{pair.title}: without - with": str(difference),
        }
        for what, share in (("contributions", _contributions), ("weights", _weights)):
            found = {
                each: float(np.mean([share(results, pair, each, seed, M) for seed in seeds]))
                for each in ("stage", "plain")
            }
            parts[f"{pair.title}: {what} of the blocks behind them vanish"] = (
                found["stage"] > MOST and found["stage"] > found["plain"]
            )
            figures |= {
                f"{pair.title}: share of deeper blocks whose {what} vanished, with stage cost": found["stage"],
                f"{pair.title}: share of deeper blocks whose {what} vanished, without": found["plain"],
            }
    return Verdict.of(parts, figures)


def _lost(results: Results, name: str, seed: int, M: int) -> float:
    """Test accuracy of the whole minus that of the first M blocks."""
    accuracy = at_depth(results, name, seed, "test.accuracy")
    return accuracy[max(accuracy)] - accuracy[M]


def _contributions(results: Results, pair: Pair, treatment: str, seed: int, M: int) -> float:
    relative = per_layer(results, pair.name(treatment), seed, "relative")
    return float(np.mean(relative[M:] < VANISHED))


def _weights(results: Results, pair: Pair, treatment: str, seed: int, M: int) -> float:
    now, start = (per_layer(results, pair.name(treatment), seed, key) for key in ("weights", "weights.start"))
    return float(np.mean((now < WITHOUT_WEIGHT * start)[M:]))


def bound_is_kept(results: Results) -> Verdict:
    """P2: both sides of the bound, for each network and each M; means over the seeds."""
    parts: dict[str, bool] = {}
    figures: dict[str, float | str] = {}
    for title, M, trained, found in bounds(results):
        left, right = np.mean(np.asarray(found), axis=0).tolist()
        own = "" if trained else " (its own first blocks)"
        parts[f"{title}, M = {M}{own}"] = all(each.left <= each.right for each in found)
        figures[f"{title}, M = {M}{own}: left side"] = left
        figures[f"{title}, M = {M}{own}: right side"] = right
    return Verdict.of(parts, figures)
