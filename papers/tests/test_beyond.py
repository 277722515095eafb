"""The judges of the suite beyond the papers, on records that were made up so that the answer is known."""

import pytest

from made_up_results import GROWN, MadeUp, changed, of
from taulearn.training.history import Deletion
from taulearn_papers import beyond

GONE = [Deletion(3000, 5, layer, 0.009, 10_101) for layer in (1, 2)]


@pytest.fixture(scope="module")
def as_expected():
    records = {}
    for data, horizons in beyond.HORIZONS.items():
        for number, T in enumerate(horizons):
            for name in beyond.TREATMENTS:
                step = {"fixed": 0.02, "free": 0.001, "simplex": 0.01}[name]
                records[f"{data}/horizon/T={T:g}/{name}"] = of(GROWN, accuracy=0.85 + step * number)
        for name in beyond.PENALTIES:
            gone = {"none": [], "l1": GONE[:1], "l2": []}.get(name, GONE)
            if name not in ("none", "simplex"):
                records[f"{data}/penalty/{name}/whole"] = of(GROWN, accuracy=0.88)
            records[f"{data}/penalty/{name}/pruned"] = of(GROWN, accuracy=0.88, deletions=gone)
    for name in ("fashion-mnist/fractional", "cifar10/convolutional/l1-proximal"):
        records[f"{name}/whole"] = of(GROWN, accuracy=0.87)
        records[f"{name}/pruned"] = of(GROWN, accuracy=0.87, deletions=GONE)
    records["cifar10/convolutional/free"] = of(GROWN, accuracy=0.87)
    gap = {name: 0.02 if name.endswith("pruned") else 0.05 for name in records}
    measured = {name: {"train.accuracy": 0.88 + each, "test.accuracy": 0.88} for name, each in gap.items()}
    for name, first in {"stage": [0.2, 0.6, 0.695], "plain": [0.2, 0.3, 0.4]}.items():
        vanished = [1.0] * 2 + [0.0 if name == "stage" else 1.0] * 7
        records[f"cifar10/resnet-v2-9/{name}"] = []
        measured[f"cifar10/resnet-v2-9/{name}"] = {
            "depths": list(range(10)),
            "test.accuracy": first + [0.7] * 7,
            "relative": vanished,
            "weights": vanished,
            "weights.start": [1.0] * 9,
        }
    return MadeUp(records, measured)


@pytest.mark.parametrize("claim", beyond.SUITE.claims, ids=lambda claim: claim.id)
def test_every_claim_can_hold_and_is_not_judged_without_records(as_expected, claim):
    verdict = claim.verdict(as_expected)
    assert verdict.outcome == "holds", verdict.sentence
    assert claim.verdict(MadeUp({})).outcome == "not measured"


@pytest.mark.parametrize(
    ("number", "name", "instead", "fails"),
    [
        (0, "fashion-mnist/horizon/T=8/free", {"accuracy": 0.95}, "free steps make T matter less than a point"),
        (1, "cifar10/penalty/l2/pruned", {"accuracy": 0.88, "deletions": GONE}, "l2 deletes none on cifar10"),
        (
            1,
            "fashion-mnist/penalty/l1-proximal/pruned",
            {"accuracy": 0.88},
            "the proximal step deletes most on fashion-mnist",
        ),
        (2, "fashion-mnist/fractional/pruned", {"accuracy": 0.8, "deletions": GONE}, "accuracy is kept within a point"),
        (4, "cifar10/convolutional/l1-proximal/pruned", {"accuracy": 0.87}, "layers are deleted"),
        (4, "cifar10/convolutional/free", {"accuracy": 0.9}, "within a point of cifar10/convolutional/free"),
    ],
)
def test_a_part_that_is_not_so_is_found(as_expected, number, name, instead, fails):
    verdict = beyond.SUITE.claims[number].verdict(changed(as_expected, name, of(GROWN, **instead)))
    assert fails in verdict.sentence.partition("does not hold: ")[2]


def test_convolutional_networks_have_their_blocks_and_few_seeds():
    found = [each for each in beyond.members() if each.config.network == "resnet-v2"]
    assert len(found) == 5 * beyond.FEW_SEEDS
    for each in found:
        config = each.config
        assert config.hidden_layers == 27
        assert config.init == 1.0
        steps = "fixed" if "resnet-v2-27" in each.name else "free"
        assert (config.constraint, config.prune is not None) == (steps, "pruned" in each.name)


def test_gap_that_does_not_shrink_is_found(as_expected):
    measured = dict(as_expected.measured) | {
        "fashion-mnist/fractional/pruned": {"train.accuracy": 0.95, "test.accuracy": 0.88}
    }
    verdict = beyond.gap_after_pruning(MadeUp(as_expected.records, measured))
    assert verdict.outcome == "holds in part"
    assert "smaller gap, fashion-mnist/fractional" in verdict.sentence.partition("does not hold: ")[2]


def test_figures_are_drawn(as_expected):
    for draw in beyond.SUITE.figures.values():
        assert draw(as_expected).axes
