"""Criteria that watch a training, or look at data in its midst; and survivors that stay at 1."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taulearn import Criterion, Pruning, attach, parameter_groups, prune, wrap
from taulearn.adaptivity.controller import Pruner
from taulearn.adaptivity.criteria import Contribution, Influence, Measured, Sensitivity
from taulearn.adaptivity.loss_without import LossWithout
from taulearn.adaptivity.target import SteeredL1
from taulearn.optim import SteepestDescent
from taulearn.penalties import L2
from taulearn.training.batches import make_batches
from training.support import (
    LOSS,
    Crash,
    assert_same_history,
    assert_same_weights,
    crash_after,
    digits,
    network,
    run_fit,
    sgd,
)
from wrapping.hosts import BY_NAME, Block, evaluated


def wrapped(number: int = 6) -> Any:
    torch.manual_seed(0)
    blocks = [Block(12) for _ in range(number)]
    return wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), *blocks, nn.Linear(12, 10)), example_inputs=digits(2)[0])


def adamw(model: Any, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=0.005), weight_decay=decay)


def calibration() -> list[tuple[Tensor, Tensor]]:
    x, z = digits(100)
    return [(x[:60], z[:60]), (x[60:], z[60:])]


@pytest.mark.parametrize("make", [network, wrapped], ids=["network", "wrapped"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_sensitivity_in_a_fit(make: Callable[[], Any], accumulate: int) -> None:
    """|tau dJ/dtau| of each batch before its step, of the data loss alone, in a running mean."""
    model, twin = make(), make()
    for each in (model, twin):
        each.eval()
        for module in each.modules():
            module.p = 0.0  # no dropout
    criterion, (x, z) = Sensitivity(model), digits(200)
    options: dict[str, Any] = {"accumulate": accumulate, "penalties": [L2(0.1)], "epochs": 1, "batch_size": 50}
    run_fit(model, (x, z), sgd(model), pruning=Pruning(1e-9, criterion=criterion), seed=3, **options)
    expected, seen = torch.zeros(model.time_steps.num_steps), []

    def look(inputs: Tensor, targets: Tensor) -> None:
        nonlocal expected
        values = twin.time_steps.values
        (gradient,) = torch.autograd.grad(LOSS(twin(inputs), targets), values)
        seen.append(len(inputs))
        expected = torch.lerp(expected, (gradient * values).detach().abs(), max(0.2, 1 / len(seen)))

    batches: Any = make_batches((x, z), 50, 3, x.device)
    optimizer = sgd(twin)
    for index in batches.order(0).split(50):
        look(x[index], z[index])
        optimizer.zero_grad()
        (LOSS(twin(x[index]), z[index]) + L2(0.1)(twin)).backward()
        optimizer.step()
    assert criterion.number == len(seen) == 4
    torch.testing.assert_close(criterion.values, expected, rtol=1e-4, atol=1e-7)


SEARCHES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "one closure after the other": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4),
    "line search": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe"),
    "trial values": lambda model: SteepestDescent(parameter_groups(model, 10.0)),
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", [Contribution, Influence, Sensitivity])
def test_of_an_optimiser_that_tries_other_points(kind: type[Measured], search: str) -> None:
    """What an iteration measures is what it begins with."""
    (model, twin), (x, z) = (network(dtype=torch.float64, activation="tanh") for _ in range(2)), digits(60)
    criterion, x = kind(model), x.double()
    run_fit(model, (x, z), SEARCHES[search](model), pruning=Pruning(1e-9, criterion=criterion), epochs=1, batch_size=60)
    assert criterion.number == 1
    if kind is Sensitivity:
        values = twin.time_steps.values
        expected = (values * torch.autograd.grad(LOSS(twin(x), z), values)[0]).abs()
        torch.testing.assert_close(criterion.values, expected.float(), rtol=1e-5, atol=0.0)
    else:
        once = kind(twin)
        once.look((x, z))
        torch.testing.assert_close(criterion.values, once.values, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", [Contribution, Influence, Sensitivity])
def test_what_lies_between_two_steps_of_a_loop(kind: type[Measured]) -> None:
    """Evaluation without gradients is not measured; gradients that accumulate are; a copy of the model has no hook."""
    found = []
    for evaluates in (False, True):
        model, (x, z) = network(), digits(40)
        optimizer = torch.optim.SGD(parameter_groups(model, 0.05))
        criterion = kind(model, recording=True)
        session = attach(model, optimizer, pruning=Pruning(1e-9, every=4, criterion=criterion))
        for _ in range(4):
            for half in (slice(0, 20), slice(20, 40)):
                session.loss(LOSS(model(x[half]), z[half]) / 2).backward()
            if evaluates:
                with torch.no_grad():
                    model(10 * x)
                copied = copy.deepcopy(model)
                LOSS(copied(-x), z).backward()
            optimizer.step()
            optimizer.zero_grad()
        session.detach()
        found.append(criterion.values)
        assert bool((criterion.values[1:] > 0).all())
    assert torch.equal(*found)


POLICIES: dict[str, Any] = {
    "influence": lambda: Pruning(target_blocks=3, by=4, criterion="influence"),
    "sensitivity": lambda: Pruning(target_blocks=3, by=4, criterion="sensitivity", survivors="one"),
    "threshold": lambda: Pruning(0.12, criterion="sensitivity"),
    "loss": lambda: Pruning(target_blocks=3, by=4, criterion="loss", data=calibration()),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    def trained(**options: Any) -> tuple[Any, Any]:
        model = wrapped()
        torch.manual_seed(7)
        options = {"pruning": POLICIES[name](), "epochs": 5} | options
        return model, run_fit(model, digits(400), adamw(model), **options)

    model, history = trained()
    assert len(history.deletions) == 3 or name == "threshold"
    assert history.deletions
    with pytest.raises(Crash):
        trained(run=tmp_path / "run", callbacks=[crash_after(2)])
    resumed, record = trained(run=tmp_path / "run", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_states_of_earlier_versions_are_read() -> None:
    """Their keys lay beside the target."""
    flat = {"contributions": torch.arange(5.0), "measurements": 3, "counts": [3] * 5}
    for criterion, state in (("contribution", flat), (None, dict.fromkeys(flat) | {"measurements": 0})):
        model = network()
        pruner = Pruner(Pruning(0.01, criterion=criterion), model, sgd(model), 1, 5)
        pruner.load_state({"target": None, **state})
        if criterion is not None:
            assert torch.equal(pruner.criterion.scores(model), flat["contributions"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another kind"):
        pruner.load_state({"target": None, **flat})
    other = Pruner(Pruning(0.01, criterion="influence"), model, sgd(model), 1, 5)
    with pytest.raises(ValueError, match="another kind"):
        other.load_state({"target": None, **flat})


class TestLoss:
    def test_it_is_taken_when_the_layers_are_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[int, ...]] = []
        scores = LossWithout._scores

        def counted(self: LossWithout, model: Any) -> Tensor:
            calls.append(model.time_steps.origin)
            return scores(self, model)

        monkeypatch.setattr(LossWithout, "_scores", counted)
        model = wrapped()
        policy = Pruning(target_blocks=3, by=4, criterion="loss", data=calibration())
        history = run_fit(model, digits(400), adamw(model), pruning=policy, epochs=5)
        assert len(calls) == len(set(calls)) == 3 + (len(calls) == 4), calls
        gone = [d.layer for d in history.deletions]
        assert calls[1] == tuple(l for l in range(6) if l != gone[0])

    def test_it_leaves_the_training_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same training, to the bit, as one that is told the scores; the loader draws from no generator of it."""
        told: dict[tuple[int, ...], Tensor] = {}
        scores = LossWithout._scores

        def noted(self: LossWithout, model: Any) -> Tensor:
            told[model.time_steps.origin] = scores(self, model)
            return told[model.time_steps.origin]

        class Told(Criterion):
            greedy = True

            def scores(self, model: Any) -> Tensor:
                return told[model.time_steps.origin]

        monkeypatch.setattr(LossWithout, "_scores", noted)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits(60)), batch_size=20, shuffle=True)
        found = []
        for options in ({"criterion": "loss", "data": loader}, {"criterion": Told()}):
            model = wrapped()
            torch.manual_seed(7)
            policy = Pruning(target_blocks=3, by=2, **options)
            found.append((run_fit(model, digits(400), adamw(model), pruning=policy), model))
        assert len(told) >= 3
        assert_same_history(found[0][0], found[1][0])
        assert_same_weights(found[0][1], found[1][1])

    def test_several_that_go_at_one_look_are_chosen_one_after_the_other(self) -> None:
        """As prune does it, which is tested against brute force."""
        model = wrapped()
        policy = Pruning(
            target_blocks=2, by=1, every=5, penalised="none", criterion="loss", data=calibration(), loss=LOSS
        )
        pruner = Pruner(policy, model, adamw(model), 1, 5)
        pruner.begin(None)
        twin = copy.deepcopy(model)
        report = pruner.prune(5)
        expected = prune(twin, budget=2, criterion="loss", data=calibration(), loss=LOSS)
        assert report is not None
        assert sorted(d.layer for d in report.deleted) == sorted(d.layer for d in expected.deleted)

    def test_the_loss_of_fit_is_taken(self) -> None:
        """A model without a loss of its own."""
        model = network()
        policy = Pruning(target_blocks=3, by=1, data=calibration())  # the criterion, where there are data
        assert policy.criterion == "loss"
        assert Pruning(target_blocks=3).criterion is None, "as older checkpoints have it"
        run_fit(model, digits(80), sgd(model), pruning=policy)
        assert model.time_steps.num_steps == 3


class TestSurvivors:
    def test_the_penalty_holds_all_but_what_fades(self) -> None:
        model = network(init=1.0, horizon=5.0)
        penalty = SteeredL1(model.time_steps.values, "one")
        values = torch.tensor([0.9, 1.1, 0.7, 1.0, 2.0])
        assert penalty.proximal(values, 0.1).tolist() == [1.0] * 5
        penalty.set(1.0, [2])
        torch.testing.assert_close(penalty.proximal(values, 0.1), torch.tensor([1.0, 1.0, 0.6, 1.0, 1.0]))

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("criterion", [None, "sensitivity"])
    def test_they_are_1_throughout(self, criterion: str | None, decay: float) -> None:
        """With AdamW, whose momentum and decay would move them; averages too."""
        model = wrapped()
        averaged = torch.optim.swa_utils.AveragedModel(model)
        policy = Pruning(target_blocks=3, by=0.6, criterion=criterion, survivors="one")
        history = run_fit(
            model, digits(400), adamw(model, decay), pruning=policy, epochs=5, averaged=averaged, penalties=[L2(0.01)]
        )
        tau = history.iterations["tau"]
        moved = (tau != 1.0) & ~np.isnan(tau)
        assert moved.any()
        assert moved.sum(1).max() == 1
        assert {int(l) for l in np.flatnonzero(moved.any(0))} == {d.layer for d in history.deletions}
        for each in (model, averaged.module):
            assert each.time_steps.tau.tolist() == [1.0] * 3
        gone = [np.nanmin(tau[:, d.layer]) for d in history.deletions]
        assert max(gone) < 0.5, "they fade"

    @pytest.mark.long
    def test_compiled_steps_hold_them(self) -> None:
        model = network(6, init=1.0, horizon=6.0)
        policy = Pruning(target_blocks=5, by=3, every=5, criterion="share", survivors="one")
        run_fit(model, digits(200), sgd(model), pruning=policy, epochs=4, compile="always")
        assert model.time_steps.tau.tolist() == [1.0] * 5

    def test_a_plain_checkpoint_without_annealing(self, tmp_path: Path) -> None:
        """BERT, a post-norm model: its class loads the folder as it is."""
        model, data = BY_NAME["bert"].wrapped(), BY_NAME["bert"].inputs()
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
        session = attach(model, optimizer, pruning=Pruning(target_blocks=2, survivors="one"), iterations=30)
        for _ in range(30):
            session.loss(model(input_ids=data, labels=data).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        session.detach()
        assert model.time_steps.tau.tolist() == [1.0] * 2
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.config.num_hidden_layers == 2
        assert torch.equal(evaluated(again, data), evaluated(model, data))
