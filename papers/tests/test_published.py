"""The imitated faults are the published ones, and nothing else changes."""

import numpy as np
import pytest
import torch

from made_up_results import GROWN, MadeUp, record
from taulearn import caputo
from taulearn.adaptivity.coarsen import prune
from taulearn.app import build
from taulearn.app.command_line import main
from taulearn.app.train import make_network
from taulearn.experiments import Member, TrainConfig, resume, train
from taulearn.nn import TimeSteps, fractional_dnn, resnet
from taulearn.saving import load_model
from taulearn.training import History
from taulearn_papers.herberg2023 import figures as suite
from taulearn_papers.herberg2023.published_program import AS_PUBLISHED, PublishedFractional, PublishedSteps, pruning
from taulearn_papers.herberg2023.trainings import PUBLISHED


def networks(**settings):
    """The same network by the formulas and with the published faults."""
    config = TrainConfig(width=6, hidden_layers=3, **settings)
    splits = build.load_splits(config)
    made = []
    for published in (False, True):
        torch.manual_seed(0)
        made.append(make_network(config, splits, AS_PUBLISHED if published else None))
    return made, splits.train.inputs[:5].float()


def gradient_of_steps(network, x):
    network.zero_grad()
    network(x).square().sum().backward()
    return network.time_steps.values.grad


@pytest.mark.parametrize(
    "settings",
    [{"constraint": "dependent"}, {"constraint": "fixed"}, {"network": "fractional", "memory_from": 0}],
    ids=["dependent", "fixed", "fractional"],
)
def test_outputs_are_those_of_the_formulas(settings):
    (formulas, published), x = networks(**settings)
    torch.testing.assert_close(published(x), formulas(x), rtol=1e-6, atol=1e-7)
    assert type(published.time_steps) is PublishedSteps
    AS_PUBLISHED.restore_(published)
    assert type(published.time_steps) is TimeSteps
    torch.testing.assert_close(published(x), formulas(x), rtol=1e-6, atol=1e-7)


def test_of_fixed_steps_the_first_alone_is_fixed():
    (formulas, published), x = networks(constraint="fixed")
    assert not isinstance(formulas.time_steps.values, torch.nn.Parameter)
    gradient = gradient_of_steps(published, x)
    assert gradient[0] == 0
    assert (gradient[1:] != 0).all()


def test_dependent_step_lets_no_gradient_through():
    (formulas, published), x = networks(constraint="dependent")
    free = resnet(x[0].numel(), 6, 10, 3)
    free.load_state_dict({**formulas.state_dict(), "time_steps.values": formulas.time_steps.tau.detach()})
    by_step = gradient_of_steps(free, x)
    torch.testing.assert_close(gradient_of_steps(formulas, x), by_step[:-1] - by_step[-1])
    torch.testing.assert_close(gradient_of_steps(published, x), by_step[:-1])


def test_fractional_weights_let_no_gradient_through():
    """Against the recursion written out, with weights that are constants, in float64."""
    torch.manual_seed(0)
    network = fractional_dnn(3, 4, 2, 4, gamma=0.4, memory_from=0, dtype=torch.float64, init=[0.3, 0.2, 0.4, 0.1])
    x, steps = torch.randn(5, 3, dtype=torch.float64), PublishedSteps(network.time_steps)
    network.time_steps, network.scheme = steps, PublishedFractional(0.4, memory_from=0)
    found = gradient_of_steps(network, x)
    tau = steps.values.detach().clone().requires_grad_()
    a = caputo.l1_weights(tau.detach(), 0.4)
    gain = torch.exp(torch.lgamma(torch.tensor(1.6, dtype=torch.float64)))
    states = [torch.zeros(5, 4, dtype=torch.float64)]  # y_0 with P_0 = 0
    for l, layer in enumerate(network.layers):
        f = layer(x if l == 0 else states[-1])
        memory = sum((a[l, j] * (states[j + 1] - states[j]) for j in range(l)), torch.zeros(()))
        states.append(states[-1] - memory + tau[l] ** 0.4 * gain * f)
    network.head(states[-1]).square().sum().backward()
    torch.testing.assert_close(found, tau.grad, rtol=1e-10, atol=1e-12)
    full = fractional_dnn(3, 4, 2, 4, gamma=0.4, memory_from=0, dtype=torch.float64)
    full.load_state_dict(network.state_dict())
    assert (gradient_of_steps(full, x) - found).abs().max() > 0.01 * found.abs().max(), "the fault must matter"


@pytest.mark.parametrize(
    ("tau", "left"),
    [
        ([1.0, 0.001, -0.5, 0.3], (0, 1, 3)),  # the small one triggers, the most negative one goes
        ([1.0, 0.02, -0.5, 0.3], (0, 1, 2, 3)),  # no share below the threshold
        ([1.0, 0.001, 0.0005, 0.3], (0, 1, 3)),  # one layer at a time
    ],
)
def test_published_rule_of_pruning(tau, left):
    network = resnet(2, 3, 1, 4, init=tau)
    policy = pruning(0.01)
    prune(network, policy.threshold, criterion=policy.criterion)
    assert network.time_steps.origin == left


def test_published_training_differs_and_leaves_an_ordinary_network(tmp_path):
    losses = {}
    for published in (False, True):
        folder = tmp_path / str(published)
        config = TrainConfig(run=str(folder), constraint="dependent", width=8, epochs=2, lr=0.05)
        train(config, hooks=AS_PUBLISHED if published else None, progress=False)
        losses[published] = History.load(folder / "history.safetensors").epochs["train.loss"][-1]
        assert type(load_model(folder).time_steps) is TimeSteps
    assert losses[True] != losses[False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "as_published must be left out with these settings"),
        ({"network": "densenet"}, "as_published must be left out with these settings"),
        ({"network": "fractional"}, "memory_from must be 0 with as_published"),
        ({"prune": 0.01, "prune_every": 5}, "prune_every must be left out with as_published"),
        ({"constraint": "dependent", "l1": 0.01, "proximal": True}, "proximal must be left out with as_published"),
        ({"constraint": "dependent", "refine": 9}, "refine must be left out with as_published"),
        ({"constraint": "dependent", "prune_blocks": 3}, "prune_blocks must be left out with as_published"),
    ],
)
def test_settings_that_the_faults_do_not_touch_are_refused(settings, message):
    config = TrainConfig(**settings)
    with pytest.raises(ValueError, match=message):
        train(config, hooks=AS_PUBLISHED, progress=False)
    with pytest.raises(ValueError, match=message):
        Member("a", 0, config, hooks=AS_PUBLISHED)


def test_settings_alone_do_not_tell_the_faults():
    with pytest.raises(ValueError, match="as_published"):
        TrainConfig(as_published=True)


def test_run_is_resumed_with_the_faults_alone(tmp_path, capsys):
    config = TrainConfig(run=str(tmp_path / "run"), constraint="dependent", width=8, epochs=1, lr=0.05)
    train(config, hooks=AS_PUBLISHED, progress=False)
    with pytest.raises(ValueError, match=r"hooks must be those .*'as_published', got None.*hooks=\.\.\."):
        resume(tmp_path / "run", epochs=2, progress=False)
    assert main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 1
    assert "taulearn.experiments.resume(run, hooks=...)" in capsys.readouterr().err
    gone_on = resume(tmp_path / "run", epochs=2, hooks=AS_PUBLISHED, progress=False)
    at_once = train(
        config.model_copy(update={"run": str(tmp_path / "other"), "epochs": 2}), hooks=AS_PUBLISHED, progress=False
    )
    np.testing.assert_array_equal(gone_on.history.iterations["tau"], at_once.history.iterations["tau"])


class Uneven(MadeUp):
    """Results in memory whose settings have different numbers of seeds."""

    def seeds(self, *names):
        super().seeds(*names)
        return list(range(min(len(self.records[name]) for name in names)))


def made_up_results():
    """All settings of the table, five seeds by the formulas and three as published, which lose 0.1."""
    found = {}
    for _, own, published in suite.pairs():
        formulas = [(0, 0.80), (1, 0.81), (2, 0.82), (3, 0.95), (4, 0.95)]
        found[own] = [record(GROWN, accuracy=each, seed=seed, loss=0.3, penalty=0.02) for seed, each in formulas]
        found[published] = [
            record(GROWN, accuracy=each - 0.1, seed=seed, loss=0.4, penalty=0.05) for seed, each in formulas[:3]
        ]
    return Uneven(found)


def columns_of(table):
    head, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    assert {len(line) for line in lines} == {len(head)}
    return head, lines


def test_table_averages_over_the_seeds_that_both_have():
    head, lines = columns_of(suite.published_table(made_up_results()))
    assert len(lines) == len(PUBLISHED)
    at, difference = head.index("at the end, formulas"), head.index("difference")
    for line in lines:
        own, published = float(line[at]), float(line[at + 1])
        assert (own, published) == (pytest.approx(0.81, abs=5e-4), pytest.approx(0.71, abs=5e-4))
        assert float(line[difference].split()[0]) == pytest.approx(published - own, abs=2e-4)


def test_table_shows_the_test_loss_without_and_with_penalties():
    head, lines = columns_of(suite.published_table(made_up_results()))
    at = head.index("test loss at the end, formulas")
    assert head[at + 1 : at + 3] == ["as published", "as published, penalties included"]
    for line in lines:
        formulas, without, including = map(float, line[at : at + 3])
        assert (formulas, without) == (pytest.approx(0.3, abs=4e-3), pytest.approx(0.4, abs=4e-3))
        assert including - without == pytest.approx(0.05, abs=2e-4)


def test_table_names_what_is_not_measured():
    results = made_up_results()
    _, _, published = suite.pairs()[0]
    del results.records[published]
    _, lines = columns_of(suite.published_table(results))
    assert lines[0][1] == f"no finished member of {[published]}"
    assert "no finished" not in lines[1][1]


def test_figure_draws_the_seeds_that_both_have():
    """The line by the formulas ends at the mean of three seeds."""
    ax = suite.published_figure(made_up_results()).axes[0]
    ends = {line.get_label(): float(line.get_ydata()[-1]) for line in ax.lines}
    assert ends["formulas"] == pytest.approx(0.81, abs=1e-3)
    assert ends["as published"] == pytest.approx(0.71, abs=1e-3)
