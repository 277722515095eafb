"""The suite of refinement while training: its recipes, where layers come, and its judge on made-up records."""

import numpy as np
import pytest
import torch

from made_up_results import GROWN, SEEDS, MadeUp, of
from taulearn.adaptivity.indicators import indicators
from taulearn.adaptivity.mark_to_refine import largest
from taulearn.app import build
from taulearn.app.config import split_hooks
from taulearn.app.members import run_member
from taulearn.app.results import Results
from taulearn_papers import adaptive
from taulearn_papers.adaptive import DATA, DEEP, PLACES, SHALLOW, SUITE, Refined

MEMBERS = {member.setting: member for member in SUITE.members(True, 1)}


@pytest.fixture(scope="module")
def as_claimed():
    losses = {name: 0.5 if name.endswith("largest") else 1.0 for name in MEMBERS}
    measured = {name: {"train.loss": loss, "test.loss": loss} for name, loss in losses.items()}
    return MadeUp({name: of(GROWN) for name in MEMBERS}, measured)


@pytest.mark.parametrize("claim", SUITE.claims, ids=lambda claim: claim.id)
def test_every_claim_can_hold_and_is_not_judged_without_records(as_claimed, claim):
    verdict = claim.verdict(as_claimed)
    assert verdict.outcome == "holds", verdict.sentence
    factors = {value for figure, value in verdict.figures.items() if "loss" in figure}
    assert factors == {"0.5 (0.5 .. 0.5, n = 3)"}
    assert claim.verdict(MadeUp({})).outcome == "not measured"


class Seeded(MadeUp):
    """One setting differs from seed to seed."""

    def __init__(self, plain, name, factors):
        super().__init__(plain.records, plain.measured)
        self.name, self.factors = name, factors

    def measurements(self, name, seed):
        found = super().measurements(name, seed)
        return {key: loss * self.factors[seed] for key, loss in found.items()} if name == self.name else found


@pytest.mark.parametrize(
    ("factors", "answer"),
    [((0.3, 0.31, 0.32), "does not hold"), ((0.1, 0.5, 2.0), "open"), ((1.0, 1.1, 1.2), "holds")],
)
def test_a_part_is_judged_by_its_interval(as_claimed, factors, answer):
    results = Seeded(as_claimed, "peaks/split/smallest", dict(zip(SEEDS, factors, strict=True)))
    verdict = SUITE.claims[2].verdict(results)
    assert verdict.outcome == ("holds" if answer == "holds" else "holds in part")
    parts = next(each for each in verdict.sentence.split(" — ") if each.startswith(f"{answer}: "))
    assert "peaks: lower than the smallest residuals" in parts


def test_losses_that_are_no_longer_told_from_0_are_level(as_claimed):
    measured = dict(as_claimed.measured)
    for name, loss in (("sine/split/largest", 0.0), ("sine/split/all", 1e-8)):
        measured[name] = {"train.loss": loss, "test.loss": loss}
    verdict = SUITE.claims[2].verdict(MadeUp(as_claimed.records, measured))
    assert verdict.outcome == "holds in part"
    assert "sine: lower than all at once" in verdict.sentence.partition("open: ")[2]


def test_figure_is_drawn(as_claimed):
    assert len(adaptive.figure_losses(as_claimed).axes) == 2 * len(DATA)


def multiply_adds(config):
    """Of a sample in all epochs, counted on the networks; layers come at the end of every eighth of the epochs."""
    depths = [config.hidden_layers] * config.epochs
    if config.refine is not None:
        depths = [min(DEEP, SHALLOW + 8 * epoch // config.epochs) for epoch in range(config.epochs)]
    splits = build.load_splits(config)
    made = {n: build.make_network(config.model_copy(update={"hidden_layers": n}), splits) for n in set(depths)}
    return sum(sum(p.numel() for p in made[n].parameters() if p.ndim == 2) for n in depths)


@pytest.mark.parametrize("data", DATA)
def test_fixed_networks_do_the_work_of_one_that_grows(data):
    for quick in (True, False):
        configs = {member.setting: member.config for member in SUITE.members(quick, 1)}
        wanted = multiply_adds(configs[f"{data}/insert/largest"])
        for name in ("shallow", "deep"):
            config = configs[f"{data}/{name}"]
            fixed = multiply_adds(config)
            assert wanted <= fixed < wanted + fixed / config.epochs, "rounded up to a whole epoch"


def test_quick_suite_is_the_full_one_with_fewer_epochs_and_seeds():
    quick, full = SUITE.members(True), SUITE.members()
    assert {member.setting for member in quick} == {member.setting for member in full}
    longest = [max(member.config.epochs for member in members) for members in (quick, full)]
    assert len(quick) * longest[0] < 0.1 * len(full) * longest[1]


def test_all_members_of_a_comparison_start_alike_and_have_names_that_records_can_carry():
    for setting, member in MEMBERS.items():
        other = MEMBERS[f"{setting.split('/')[0]}/insert/largest"].config
        same = {"width", "activation", "lr", "optimizer", "scheduler", "batch_size", "seed"}
        assert member.config.model_dump(include=same) == other.model_dump(include=same)
        if member.hooks is not None:
            assert split_hooks({member.hooks.name: True}) == ({}, member.hooks.name)


@pytest.mark.parametrize("by", PLACES)
def test_layers_come_where_the_place_says(by):
    member = MEMBERS[f"peaks/{by}/largest"]
    splits = build.load_splits(member.config)
    torch.manual_seed(1)
    network = build.make_network(member.config, splits)
    with torch.no_grad():
        network.time_steps.values.copy_(torch.tensor([0.9, 0.1, -0.8, 0.3, 0.2]))
    batch = splits.train.inputs[:500], splits.train.targets[:500]
    named = {"split": "dual-weighted", "insert": "sensitivity"}[by]
    eta = indicators(network, named, batch, torch.nn.functional.mse_loss).abs().numpy()

    def chosen(place):
        policy = Refined(by, place).refinement(MEMBERS[f"peaks/{by}/{place}"].config)
        found = indicators(network, policy.indicator, policy.data)
        found[eta != eta] = float("nan")
        return policy, largest(found, policy.number)

    wanted = {"largest": [int(np.nanargmax(eta))], "smallest": [int(np.nanargmin(eta))], "first": [0]}
    wanted |= {"longest": [2], "all": [1, 2, 3, 4]}
    for place in PLACES[by]:
        policy, positions = chosen(place)
        assert policy.by == by
        assert policy.target_blocks == DEEP
        assert positions == wanted.get(place, positions)
    if by == "insert":
        assert chosen("random")[1] == chosen("random")[1]
        policies = [Refined(by, "random").refinement(member.config.model_copy(update={"seed": s})) for s in range(9)]
        assert len({largest(indicators(network, policy.indicator), 1)[0] for policy in policies}) > 2


@pytest.mark.long
def test_trainings_part_at_the_first_round_and_end_with_the_same_depth(tmp_path):
    for name in ("sine/insert/first", "sine/insert/smallest", "sine/split/all"):
        run_member(MEMBERS[name], tmp_path)
    results = Results(tmp_path)
    records = {name.rpartition("/")[2]: results.history(name, 0) for name in results.settings}
    depths = {name: record.epochs["layers"].tolist() for name, record in records.items()}
    assert depths["first"] == depths["smallest"] == [5, 5, 6, 6, 7, 7, 8, 8, *[9] * 9]
    assert depths["all"] == [*[5] * 5, *[9] * 12]
    losses = {name: record.epochs["train.loss"] for name, record in records.items()}
    np.testing.assert_array_equal(losses["first"][:3], losses["smallest"][:3])
    assert losses["first"][-1] != losses["smallest"][-1]
    assert next(new.parent for new in records["first"].insertions) == 1
