"""Refinement of networks: insertions change nothing, splits are the same equation on a finer grid."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel

from small_networks import DOUBLE, assert_same_bits, batch, count, loss_of, network, train
from taulearn import TimeSteps, prune, refine
from taulearn.adaptivity.indicators import indicators
from taulearn.nn import ComposedSkips, Fractional, Residual, TimeVariableNetwork, fractional_dnn, resnet, resnet_v2

INIT = [0.3, 0.1, 0.2, 0.15, 0.25]


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def stages() -> TimeVariableNetwork:
    torch.manual_seed(0)
    model = resnet_v2((2, 2), 4, widths=(4, 6), init=[0.3, 0.4, 0.5, 0.6], activation="tanh", dtype=DOUBLE)
    model.train()
    model(images(16))  # running statistics of their own
    return model


def widths(skips: str = "pad") -> TimeVariableNetwork:
    torch.manual_seed(0)
    return resnet(3, [4, 4, 6, 6], 2, 4, init=[0.3, 0.2, 0.4, 0.1], activation="tanh", skips=skips, dtype=DOUBLE)


def by_hand() -> TimeVariableNetwork:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()) for _ in range(3)]
    steps = TimeSteps(3, init=[0.3, 0.2, 0.4], dtype=DOUBLE)
    skips = ComposedSkips([None, nn.Linear(3, 3, bias=False), None], from_input=True)
    return TimeVariableNetwork(layers, nn.Linear(3, 2), Residual(), steps, skips).to(DOUBLE)


MODELS: dict[str, tuple[Callable[[], TimeVariableNetwork], Callable[[], Tensor]]] = {
    "resnet": (lambda: network(INIT), batch),
    "simplex": (lambda: network(INIT, constraint="simplex"), batch),
    "padded": (widths, batch),
    "learned skips": (lambda: widths("learned"), batch),
    "stages": (stages, images),
    "by hand": (by_hand, batch),
}
models = pytest.mark.parametrize("name", MODELS)


@models
@pytest.mark.parametrize("training", [True, False])
def test_an_insertion_leaves_outputs_to_the_bit(name: str, training: bool) -> None:
    make, inputs = MODELS[name]
    model, x = make().train(training), inputs()
    before, parameters, number = copy.deepcopy(model)(x), count(model), model.time_steps.num_steps
    report = refine(model, range(number), by="insert")
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert (report.layers_before, report.layers_after) == (number, 2 * number) == (number, len(model.layers))
    assert (report.parameters_before, report.parameters_after) == (parameters, count(model))
    assert report.parameters_after - parameters == sum(each.parameters for each in report.new)
    assert [each.layer for each in report.new] == list(range(number, 2 * number))
    assert model.time_steps.tau.tolist().count(0.0) == number
    owned = [id(p) for p in model.parameters()]
    assert len(owned) == len(set(owned)) == len(list(model.named_parameters(remove_duplicate=False)))
    model(x).square().mean().backward()
    assert model.time_steps.values.grad is not None
    assert bool((model.time_steps.values.grad != 0).all())


def test_a_copy_of_the_next_layer_comes_where_the_width_changes() -> None:
    model = widths()
    report = refine(model, [0, 1, 2], by="insert")
    # layers 0 and 2 change the width: behind them comes a copy of the next, in front of it
    assert [each.parent for each in report.new] == [1, 1, 3]
    assert model.time_steps.origin == (0, 4, 1, 5, 2, 6, 3)
    assert model.time_steps.parent == {4: 1, 5: 1, 6: 3}
    parents = {4: 2, 5: 2, 6: 6}  # where they are now
    for number, at in parents.items():
        copied = model.layers[model.time_steps.origin.index(number)]
        assert_same_bits(copied.state_dict(), model.layers[at].state_dict())


def test_the_buffers_of_batch_normalisation_are_copied() -> None:
    model = stages()
    refine(model, [1])
    assert_same_bits(model.layers[1].state_dict(), model.layers[2].state_dict())
    running = model.layers[2].state_dict()["norm_1.running_mean"]
    assert running.abs().max() > 0
    model(images())
    assert not torch.equal(running, model.layers[1].state_dict()["norm_1.running_mean"])


@models
def test_the_derivative_for_an_inserted_step(name: str) -> None:
    """dJ/dtau_new = <psi, f_new(y)>, psi the derivative of J with respect to the state behind which it stands."""
    make, inputs = MODELS[name]
    model, x = make().eval(), inputs()
    number = model.time_steps.num_steps
    states = model.states(x)
    psi = torch.autograd.grad(model.head(states[-1]).square().mean(), states)
    behind = [l for l in range(number) if model.copied_behind(l) == l]
    expected = [float((psi[l] * model.layers[l](states[l])).sum().detach()) for l in behind]
    refine(model, behind, by="insert")
    model(x).square().mean().backward()
    grad = model.time_steps.values.grad
    assert grad is not None
    found = [float(grad[model.time_steps.origin.index(number + k)]) for k in range(len(behind))]
    assert expected == pytest.approx(found, rel=1e-10, abs=1e-14)
    assert max(map(abs, expected)) > 1e-3


@pytest.mark.parametrize("theta", [0.5, 0.3])
@pytest.mark.parametrize("constraint", ["free", "fixed", "dependent", "simplex"])
def test_the_change_by_a_split_is_of_second_order(theta: float, constraint: str) -> None:
    changes = []
    for tau in (0.04, 0.02, 0.01):
        model = network([tau] * 4, constraint=constraint)
        before, states = model(batch()).detach(), model.states(batch())
        y, f = states[1].detach(), model.layers[2]
        refine(model, [2], theta=theta)
        assert float(model.time_steps.tau.detach().sum()) == pytest.approx(4 * tau, abs=1e-15)
        after = model.states(batch())
        # theta (1 - theta) tau^2 f'(y) f(y)
        slope = torch.func.jvp(f, (y,), (f(y).detach(),))[1]
        expected = theta * (1 - theta) * tau**2 * slope
        torch.testing.assert_close(after[3] - states[2], expected, rtol=0.1, atol=1e-3 * tau**2)
        changes.append(float((model(batch()) - before).detach().norm()))
    for coarse, fine in pairwise(changes):
        assert 3.7 < coarse / fine < 4.3


@pytest.mark.parametrize("memory_from", [0, 1])
def test_a_fractional_network(memory_from: int) -> None:
    def make() -> TimeVariableNetwork:
        return network(INIT, builder=fractional_dnn, gamma=0.6, memory_from=memory_from, lower_bound=1e-12)

    model, before = make(), make()(batch()).detach()
    report = refine(model, [1, 4], by="insert")
    assert model.time_steps.tau.tolist().count(1e-12) == 2
    factor = float(model.scheme.factor(torch.tensor(1e-12, dtype=DOUBLE)))
    assert f"{factor:.2g}" in str(report)
    assert 0 < float((model(batch()) - before).detach().abs().max()) < 100 * factor
    # halves of a step of the same equation: the solution changes little, and less on finer grids
    changes = []
    for depth in (8, 32):
        coarse = network([1.0 / depth] * depth, builder=fractional_dnn, gamma=0.6, memory_from=memory_from)
        with torch.no_grad():
            for layer in coarse.layers[2:]:
                layer.load_state_dict(coarse.layers[1].state_dict())
        was = coarse(batch()).detach()
        assert "memory" in str(refine(coarse, range(1, depth)))
        changes.append(float((coarse(batch()) - was).detach().norm() / was.norm()))
    assert changes[1] < 0.5 * changes[0] < 0.05


def test_the_first_layer_of_a_memory_from_one_is_not_split() -> None:
    steps = TimeSteps(3, lower_bound=1e-4, dtype=DOUBLE)
    layers = [nn.Linear(3, 3) for _ in range(3)]
    for memory_from in (0, 1):
        model = TimeVariableNetwork(layers, nn.Linear(3, 1), Fractional(0.5, memory_from), steps, stem=nn.Identity())
        assert (0 in model.not_split()) == (memory_from == 1)


@pytest.mark.parametrize("by", ["split", "insert"])
@pytest.mark.parametrize("constraint", ["free", "simplex"])
def test_insert_then_prune_gives_all_back(by: str, constraint: str) -> None:
    model = network(INIT, constraint=constraint)
    optimizer, averaged = torch.optim.Adam(model.named_parameters(), lr=0.01, amsgrad=True), AveragedModel(model)
    train(model, optimizer)
    averaged.update_parameters(model)
    model.time_steps.project_()
    before = copy.deepcopy([each.state_dict() for each in (model, optimizer, averaged)])
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    refine(model, [1, 4], by="insert", optimizer=optimizer, averaged=averaged)
    refine(model, [0], by="insert", optimizer=optimizer, averaged=averaged)
    prune(
        model, keep=[l for l, n in enumerate(model.time_steps.origin) if n < 5], optimizer=optimizer, averaged=averaged
    )
    if constraint == "simplex":  # a deletion projects: to rounding
        torch.testing.assert_close(model.time_steps.tau.detach(), before[0]["time_steps.values"], rtol=0, atol=1e-15)
        for each in (model, averaged.module):
            each.time_steps.values.data = before[0 if each is model else 2][
                "time_steps.values" if each is model else "module.time_steps.values"
            ]
    assert_same_bits([each.state_dict() for each in (model, optimizer, averaged)], before)
    assert model.time_steps.origin == averaged.module.time_steps.origin == (0, 1, 2, 3, 4)
    assert model.time_steps.next_number == 8
    now = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert [len(each) for each in now] == [len(each) for each in held]
    train(model, optimizer)


def test_a_layer_of_ones_own() -> None:
    model, seen = widths(), []

    def make(neighbour: nn.Module) -> nn.Module:
        seen.append(neighbour)
        width = neighbour.linear.out_features
        return nn.Sequential(nn.Linear(width, width, dtype=DOUBLE), nn.Tanh())

    optimizer, averaged = torch.optim.Adam(model.parameters(), lr=0.01), AveragedModel(model)
    before, neighbours = model(batch()), [model.layers[1].state_dict(), model.layers[3].state_dict()]
    report = refine(model, [0, 3], by="insert", layer=make, optimizer=optimizer, averaged=averaged)
    assert_same_bits([dict(each.state_dict()) for each in seen], [dict(each) for each in neighbours])
    assert not {id(p) for each in seen for p in each.parameters()} & {id(p) for p in model.parameters()}
    assert [each.parent for each in report.new] == [1, 3]
    assert torch.equal(model(batch()), before)
    assert torch.equal(averaged(batch()), before)
    assert_same_bits(model.state_dict(), averaged.module.state_dict())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    train(model, optimizer)


def test_a_function_that_changes_its_neighbour() -> None:
    def mute(neighbour: nn.Module) -> nn.Module:
        with torch.no_grad():
            for p in neighbour.parameters():
                p.zero_()
        return neighbour

    for make in (widths, lambda: network(INIT)):
        model, one, same = make(), batch(), lambda neighbour: neighbour
        data = one, torch.ones(len(one), 2, dtype=DOUBLE)
        by_copy = indicators(model, "sensitivity", data, mse_loss)
        torch.testing.assert_close(indicators(model, "sensitivity", data, mse_loss, layer=same), by_copy)
        before, output = copy.deepcopy(model.state_dict()), model(one)
        assert not indicators(model, "sensitivity", data, mse_loss, layer=mute).any()
        assert_same_bits(model.state_dict(), before)
        refine(model, number=3, by="insert", layer=mute, data=data, loss=mse_loss)
        assert torch.equal(model(one), output)


def test_only_what_is_new_trains() -> None:
    model = network(INIT)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    report = refine(model, [1], by="insert", optimizer=optimizer, train="new")
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert report.new[0].layer == model.time_steps.origin[2]
    assert changed == {"layers.2.linear.weight", "layers.2.linear.bias", "time_steps.values"}
    moved = model.time_steps.tau.detach() != before["time_steps.values"]
    assert moved.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("drop", [True, False])
def test_what_no_longer_trains_stays_whatever_gradients_are_left(drop: bool) -> None:
    model = network(INIT)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    refine(model, [1], by="insert", optimizer=optimizer, train="new")
    before = model.layers[0].linear.weight.detach().clone()
    for _ in range(2):
        if drop:
            optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        optimizer.step()
    assert torch.equal(model.layers[0].linear.weight, before)


def test_a_model_in_evaluation_mode_stays_in_it() -> None:
    model = widths("learned").eval()
    refine(model, [1], by="insert", layer=lambda _: nn.Sequential(nn.Linear(4, 4, dtype=DOUBLE), nn.Dropout()))
    refine(model, [1])
    prune(model, keep=[l for l in range(len(model.layers)) if l != 2])
    assert not any(module.training for module in model.modules())


def test_an_indicator_of_ones_own() -> None:
    model = network(INIT)
    report = refine(model, number=2, indicator=lambda tau, m: torch.tensor([9.0, -3.0, 1.0, 2.0, -1.0]))
    # the first layer changes the width, and cannot be split
    assert [(each.parent, each.indicator) for each in report.new] == [(1, -3.0), (3, 2.0)]
    report = refine(network(INIT), bulk=0.7, indicator=lambda tau, m: torch.tensor([0.0, -3.0, 1.0, 2.0, -1.0]))
    assert [each.parent for each in report.new] == [1, 3]


def test_twice_and_pruned_it_still_trains() -> None:
    model = network(INIT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer)
    refine(model, [1, 3], optimizer=optimizer)
    refine(model, [2], by="insert", optimizer=optimizer)
    train(model, optimizer)
    prune(model, keep=[0, 2, 3, 5], optimizer=optimizer)
    assert model.time_steps.origin == (0, 5, 7, 3)
    before = loss_of(model).item()
    train(model, optimizer)
    assert loss_of(model).item() != before


def test_a_compiled_model() -> None:
    model = network(INIT)
    compiled: Any = torch.compile(model, backend="eager")
    before = compiled(batch())
    refine(compiled, [1], by="insert")
    assert torch.equal(compiled(batch()), before)


BATCHES = [(batch(6), torch.zeros(6, 2, dtype=DOUBLE)), (batch(4), torch.ones(4, 2, dtype=DOUBLE))]


@pytest.mark.parametrize("by", ["split", "insert"])
def test_indicators_by_name(by: str) -> None:
    from taulearn.adaptivity.indicators import indicators

    options: dict[str, Any] = {"data": BATCHES, "loss": nn.functional.mse_loss}
    eta = indicators(network(INIT), "dual-weighted" if by == "split" else "sensitivity", **options)
    order = sorted((l for l in range(5) if not eta[l].isnan()), key=lambda l: -abs(float(eta[l])))
    model = network(INIT)
    report = refine(model, number=2, by=by, **options)
    assert [number for number in model.time_steps.origin if number >= 5] == [each.layer for each in report.new]
    assert sorted(each.indicator for each in report.new) == sorted(float(eta[l]) for l in order[:2])
    whole = refine(network(INIT), bulk=1.0, by=by, **options)
    assert len(whole.new) == len(order)


def test_the_change_of_the_loss_is_what_the_indicator_says() -> None:
    """The quotient tends to 1 as the steps halve."""

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(sum(len(x) * nn.functional.mse_loss(model(x), z) for x, z in BATCHES)) / 10

    quotients = []
    for tau in (0.4, 0.2, 0.1, 0.05):
        model = network([tau] * 4)
        before = loss(model)
        report = refine(model, number=1, data=BATCHES, loss=nn.functional.mse_loss)
        quotients.append((loss(model) - before) / report.new[0].indicator)
    errors = [abs(q - 1) for q in quotients]
    assert errors[-1] < 0.02
    assert all(fine < 0.7 * coarse for coarse, fine in pairwise(errors))
