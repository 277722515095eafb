"""A learned order: its gradient, its bounds, and all that networks do."""

import copy
import json
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference import network_output
from taulearn import (
    Pruning,
    Refinement,
    adjoint,
    attach,
    fit,
    load_model,
    parameter_groups,
    prune,
    refine,
    save_model,
    summary,
    truncate,
)
from taulearn.adaptivity.estimate import as_criterion
from taulearn.adaptivity.indicators import indicators
from taulearn.caputo import l1_weights
from taulearn.caputo.weights import plain_left_weights
from taulearn.export import export_model
from taulearn.nn import Fractional, FractionalLearned, LearnedOrder, TimeVariableNetwork, fractional_dnn

DOUBLE = torch.float64
mse = nn.functional.mse_loss


def network(order: Any = None, layers: int = 5, **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(0)
    order = LearnedOrder(0.4) if order is None else order
    made = fractional_dnn(3, 5, 2, layers, gamma=order, activation="tanh", dtype=DOUBLE, **options)
    with torch.no_grad():
        made.time_steps.values.mul_(torch.linspace(0.4, 1.6, layers, dtype=DOUBLE))
    return made


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, dtype=DOUBLE, generator=generator)
    return x, torch.randn(samples, 2, dtype=DOUBLE, generator=generator)


def per_layer(layers: int = 5, memory_from: int = 1, orders: Any = None) -> TimeVariableNetwork:
    """A network whose layers have orders of their own, from 0.2 to 0.8."""
    model = network(LearnedOrder(0.4, "layer"), layers, memory_from=memory_from)
    take_orders_(model, np.linspace(0.2, 0.8, layers) if orders is None else orders)
    return model


def take_orders_(model: TimeVariableNetwork, orders: Any) -> None:
    with torch.no_grad():
        for g, gamma in zip(model.scheme.orders, orders, strict=True):
            share = (gamma - 0.01) / 0.98
            g.fill_(float(np.log(share / (1 - share))))


def loss_by_numpy(model: TimeVariableNetwork, x: Tensor, z: Tensor, orders: Any = None) -> float:
    """The loss by the printed formulas, with these orders."""
    model = copy.deepcopy(model)
    if orders is not None:
        take_orders_(model, orders)
    return float(np.mean((network_output(model, x) - z.numpy()) ** 2))


@pytest.mark.parametrize("memory_from", [0, 1])
def test_orders_of_layers_are_those_of_the_printed_formula(memory_from: int) -> None:
    model, (x, z) = per_layer(6, memory_from), batch()
    orders = np.array(model.scheme.gamma)
    assert mse(model(x), z).item() == pytest.approx(loss_by_numpy(model, x, z, orders), rel=1e-13)
    slopes = torch.autograd.grad(model.scheme.value().sum(), [*model.scheme.orders])
    found = torch.autograd.grad(mse(model(x), z), [*model.scheme.orders])
    for l in range(6):
        h, e = 1e-4, np.eye(6)[l]
        values = [loss_by_numpy(model, x, z, orders + k * h * e) for k in (-2, -1, 1, 2)]
        expected = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
        assert float(found[l] / slopes[l]) == pytest.approx(expected, rel=1e-8, abs=1e-11)


def test_equal_orders_of_layers_are_one_of_the_network() -> None:
    x, _ = batch()
    torch.testing.assert_close(network(LearnedOrder(0.4, "layer"))(x), network()(x), rtol=1e-13, atol=0.0)


def test_orders_go_and_come_with_their_layers() -> None:
    """With the state of the optimiser; deletion and refinement are those of a network that is built so."""
    model, (x, z) = per_layer(), batch()
    optimizer = torch.optim.Adam(parameter_groups(model, 0.01, weight_decay=0.1))
    mse(model(x), z).backward()
    optimizer.step()
    g, state = [*model.scheme.orders], {p: optimizer.state[p]["exp_avg"].clone() for p in model.scheme.orders}
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(model.time_steps.values), *map(id, g)]
    assert refine(model, [1, 3], optimizer=optimizer).optimizer == "exact"
    orders = [*model.scheme.orders]
    assert [orders[i] is p for i, p in zip((0, 1, 3, 4, 6), g, strict=True)] == [True] * 5
    for half, whole in ((2, 1), (5, 3)):
        assert torch.equal(orders[half], g[whole])
        assert torch.equal(optimizer.state[orders[half]]["exp_avg"], state[g[whole]])
    x_after, loss_after = model(x), loss_by_numpy(model, x, z)
    assert mse(x_after, z).item() == pytest.approx(loss_after, rel=1e-13)

    report = refine(model, [4], by="insert", optimizer=optimizer)
    assert report.parameters_after - report.parameters_before == report.new[0].parameters
    assert model.scheme.gamma[5] == model.scheme.gamma[4]
    assert model.scheme.orders[5] not in optimizer.state
    assert any(p is model.scheme.orders[5] for p in optimizer.param_groups[1]["params"])

    before, kept = [*model.scheme.orders], [0, 2, 5, 7]
    report = prune(model, keep=kept, optimizer=optimizer)
    assert report.optimizer == "exact"
    assert report.parameters_before - report.parameters_after == sum(d.parameters for d in report.deleted)
    assert all(a is before[l] for a, l in zip(model.scheme.orders, kept, strict=True))
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert set(optimizer.state) <= held
    mse(model(x), z).backward()
    optimizer.step()


def test_a_change_that_fails_leaves_the_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    model = per_layer()
    orders, fails = [*model.scheme.orders], pytest.raises(RuntimeError, match="no")
    monkeypatch.setattr("taulearn.adaptivity.transaction.follow", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with fails:
        prune(model, keep=[0, 2], optimizer=torch.optim.Adam(model.parameters()))
    with fails:
        refine(model, [1])
    assert all(a is b for a, b in zip(model.scheme.orders, orders, strict=True))


@pytest.mark.parametrize("orders", [np.linspace(0.2, 0.8, 5), np.linspace(0.8, 0.2, 5)], ids=["rise", "fall"])
def test_shares_are_of_the_powers_of_the_layers(orders: Any) -> None:
    model = per_layer(orders=orders)
    tau, orders = model.time_steps.tau.detach().numpy(), np.array(model.scheme.gamma)
    magnitudes = tau**orders
    assert summary(model).shares == pytest.approx(magnitudes / magnitudes.sum(), rel=1e-12)
    report = prune(copy.deepcopy(model), budget=2)
    positions, expected = list(range(5)), []
    while len(positions) > 2:
        left = magnitudes[positions]
        i = 1 + int(np.argmin(left[1:]))  # the first layer stays
        expected.append((positions.pop(i), left[i] / left.sum()))
    assert [d.layer for d in report.deleted] == [l for l, _ in expected]
    assert [d.share for d in report.deleted] == pytest.approx([share for _, share in expected], rel=1e-12)


def test_shares_follow_what_is_learned() -> None:
    """Faults that were: the rule went on with the order that there was before the training, and in float32."""
    for order in (LearnedOrder(0.4), LearnedOrder(0.4, "layer")):
        model = network(order)
        rule = as_criterion("power", model)
        take_orders_(model, [0.9] * len(model.scheme.orders))
        assert rule.power == pytest.approx(0.9 if order.per == "network" else (0.9,) * 5)


@pytest.mark.parametrize("memory_from", [0, 1])
def test_indicators_of_layers_with_orders_of_their_own(memory_from: int) -> None:
    """Splits and insertions that are carried out change the loss by what the indicators say, to first order."""
    model, (x, z) = per_layer(5, memory_from), batch()
    before = mse(model(x), z).item()
    eta = indicators(model, "dual-weighted", (x, z), mse)
    for l in range(1, 5):
        changed = copy.deepcopy(model)
        refine(changed, [l])
        assert mse(changed(x), z).item() - before == pytest.approx(float(eta[l]), rel=0.2, abs=2e-4), l
    eta = indicators(model, "sensitivity", (x, z), mse)
    for l in range(4):  # the limit is reached slowly for the last layer, whose order is 0.8
        changed, size = copy.deepcopy(model), 1e-12
        changed.time_steps.lower_bound = size
        refine(changed, [l], by="insert")
        change = (mse(changed(x), z).item() - before) / size ** model.scheme.gamma[l]
        assert change == pytest.approx(float(eta[l]), rel=2e-3), l


@pytest.mark.parametrize("changed", [False, True], ids=["as built", "after changes"])
def test_orders_of_layers_are_saved(changed: bool, tmp_path: Path) -> None:
    model, (x, _) = per_layer(), batch()
    if changed:
        refine(model, [1])
        prune(model, keep=[0, 2, 3, 5])
    save_model(model, tmp_path)
    for loaded in (load_model(tmp_path), load_model(tmp_path, host=network(LearnedOrder(0.4, "layer")))):
        assert loaded.scheme.gamma == model.scheme.gamma
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="scheme"):
        load_model(tmp_path, host=network())
    cut = truncate(model, 2)
    assert len(cut.kept) == len(model.scheme.orders) == 2
    assert model(x).isfinite().all()


def test_a_manifest_has_as_many_orders_as_layers(tmp_path: Path) -> None:
    save_model(per_layer(), tmp_path)
    manifest = json.loads((tmp_path / "model.json").read_text())
    assert manifest["scheme"]["options"]["layers"] == 5
    manifest["scheme"]["options"]["layers"] = 10**12
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="one order"):
        load_model(tmp_path)


def test_attach_deletes_orders() -> None:
    model, (x, z) = per_layer(), batch(40)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.01))
    session = attach(model, optimizer, pruning=Pruning(target_blocks=3, every=2, by=0.5), iterations=20)
    for _ in range(20):
        optimizer.zero_grad()
        session.loss(mse(model(x), z)).backward()
        optimizer.step()
    assert model.time_steps.num_steps == len(model.scheme.orders) == 3


def at_order(model: TimeVariableNetwork, gamma: float) -> TimeVariableNetwork:
    """The same network with a fixed order."""
    fixed = copy.deepcopy(model)
    fixed.scheme = Fractional(gamma, model.scheme.memory_from, memory="exact")
    return fixed


@pytest.mark.parametrize("memory_from", [0, 1])
@pytest.mark.parametrize("gamma", [0.05, 0.4, 0.95])
def test_the_network_is_that_of_the_order(gamma: float, memory_from: int) -> None:
    model, (x, _) = network(LearnedOrder(gamma), 9, memory_from=memory_from), batch()
    torch.testing.assert_close(model(x), at_order(model, gamma)(x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.05, 0.4, 0.95])
def test_the_gradient_is_that_of_differences(gamma: float) -> None:
    model, (x, z) = network(LearnedOrder(gamma)), batch()
    slope = torch.autograd.grad(model.scheme.value(), model.scheme.orders[0])[0]
    found = torch.autograd.grad(mse(model(x), z), model.scheme.orders[0])[0] / slope
    with torch.no_grad():
        h = 1e-4
        values = [mse(at_order(model, gamma + k * h)(x), z).item() for k in (-2, -1, 1, 2)]
    expected = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    assert float(found) == pytest.approx(expected, rel=1e-8, abs=1e-11)


def test_the_weights_derivative_is_that_of_the_printed_formula() -> None:
    """a_{l,j} as printed, differentiated in gamma with forty digits."""
    tau, gamma = [0.3, 0.05, 0.7, 0.2], 0.35

    def weight(l: int, j: int) -> Any:
        t = [mpmath.fsum(map(mpmath.mpf, map(str, tau[:k]))) for k in range(len(tau) + 1)]
        first, last = mpmath.mpf(str(tau[j])), mpmath.mpf(str(tau[l]))
        return lambda g: last**g / first * ((t[l + 1] - t[j]) ** (1 - g) - (t[l + 1] - t[j + 1]) ** (1 - g))

    order = torch.tensor(gamma, dtype=DOUBLE, requires_grad=True)
    weights = plain_left_weights(torch.tensor(tau, dtype=DOUBLE), order)
    torch.testing.assert_close(weights.detach(), l1_weights(torch.tensor(tau, dtype=DOUBLE), gamma))
    orders = torch.tensor([0.2, 0.35, 0.6, 0.9], dtype=DOUBLE, requires_grad=True)
    rows = plain_left_weights(torch.tensor(tau, dtype=DOUBLE), orders[:, None])
    with mpmath.workdps(40):
        for l in range(4):
            for j in range(l):
                expected = float(mpmath.diff(weight(l, j), mpmath.mpf(str(gamma))))
                found = float(torch.autograd.grad(weights[l, j], order, retain_graph=True)[0])
                assert found == pytest.approx(expected, rel=1e-12)
                own = float(mpmath.diff(weight(l, j), mpmath.mpf(str(orders[l].item()))))
                of_rows = torch.autograd.grad(rows[l, j], orders, retain_graph=True)[0]
                np.testing.assert_allclose(of_rows, own * np.eye(4)[l], rtol=1e-12)


def test_it_is_learned_beside_the_steps_and_stays_inside() -> None:
    """Data of a network with another order: the order moves towards it; under a huge rate it stays in (0.01, 0.99)."""
    teacher, (x, _) = network(0.8), batch(100)
    with torch.no_grad():
        z = teacher(x)
    model = network(LearnedOrder(0.4))
    groups = parameter_groups(model, lr=0.0, tau_lr=0.1, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [len(list(model.parameters())) - 2, 2]
    assert groups[1]["weight_decay"] == 0.0
    model.time_steps.values.requires_grad_(False)
    fit(model, (x, z), loss=mse, optimizer=torch.optim.Adam(groups), epochs=100, batch_size=100, compile="never")
    assert model.scheme.gamma == pytest.approx(0.8, abs=0.02)
    fit(model, (x, -z), loss=mse, optimizer=torch.optim.SGD(model.scheme.parameters(), lr=1e6), epochs=3, batch_size=50)
    assert 0.01 <= model.scheme.gamma <= 0.99


@pytest.mark.parametrize(
    ("compiled", "dtype"),
    [
        ("never", torch.float32),
        ("never", torch.float64),
        ("always", torch.float32),
        pytest.param("always", torch.float64, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("per", ["network", "layer"])
def test_training_deletes_and_saves(compiled: str, dtype: torch.dtype, per: Any, tmp_path: Path) -> None:
    model = fractional_dnn(3, 5, 2, 5, gamma=LearnedOrder(0.4, per), activation="tanh", dtype=dtype)
    x, z = (part.to(dtype) for part in batch(40))
    assert model.scheme.orders[0].dtype == dtype
    optimizer = torch.optim.Adam(parameter_groups(model, 0.01))
    policy = Pruning(target_blocks=3, every=2, by=3)
    fit(model, (x, z), loss=mse, optimizer=optimizer, epochs=5, batch_size=10, pruning=policy, compile=compiled)
    assert model.time_steps.num_steps == 3
    assert len(model.scheme.orders) == (1 if per == "network" else 3)
    assert np.abs(np.array(model.scheme.gamma) - 0.4).min() > 1e-4
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.scheme, FractionalLearned)
    assert loaded.scheme.gamma == model.scheme.gamma
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("per", ["network", "layer"])
def test_resuming_goes_on_to_the_bit(per: Any, tmp_path: Path) -> None:
    """Also where layers went and came before."""
    (x, z), order = batch(40), LearnedOrder(0.4, per)

    def train(model: nn.Module, epochs: int, run: Path, resume: bool = False) -> None:
        optimizer = torch.optim.Adam(parameter_groups(model, 0.01))
        fit(
            model,
            (x, z),
            loss=mse,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=10,
            run=run,
            resume=resume,
            compile="never",
            seed=0,
            refinement=Refinement(7, every=2, until=1),
            pruning=Pruning(0.125, every=7),
            progress=False,
        )

    whole, halves = network(order), network(order)
    train(whole, 4, tmp_path / "whole")
    train(halves, 2, tmp_path / "halves")
    again = network(order)
    assert 3 < halves.time_steps.num_steps < 7
    assert halves.time_steps.next_number == 7
    train(again, 4, tmp_path / "halves", resume=True)
    assert again.scheme.gamma == whole.scheme.gamma
    assert torch.equal(again(x), whole(x))


def test_refinement_follows() -> None:
    model, (x, z) = network(), batch()
    fixed = at_order(model, model.scheme.gamma)
    eta = [indicators(each, "dual-weighted", (x, z), mse) for each in (model, fixed)]
    torch.testing.assert_close(eta[0], eta[1], rtol=1e-9, atol=1e-13, equal_nan=True)
    assert eta[0][1:].isfinite().all()
    optimizer = torch.optim.Adam(parameter_groups(model, 0.01))
    refine(model, [2, 3], optimizer=optimizer)
    refine(fixed, [2, 3])
    assert model.time_steps.num_steps == 7
    torch.testing.assert_close(model(x), fixed(x), rtol=1e-10, atol=1e-12)
    prune(model, keep=[0, 2, 4], optimizer=optimizer)
    mse(model(x), z).backward()
    optimizer.step()


@pytest.mark.parametrize("made", [network, per_layer])
def test_onnx(made: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'taulearn[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'taulearn[onnx]'")

    model, x = made().float(), batch()[0].float()
    exported = export_model(model, tmp_path / "out", x)
    session = runtime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_it_prints_without_content() -> None:
    assert "gamma=0.4" in repr(network().to("meta"))
    assert "gamma=(0.4, 0.4)" in repr(network(LearnedOrder(0.4, "layer"), 2).to("meta"))


def test_refusals() -> None:
    for value in (0.0, 1.0, 0.005, np.nan, "a", None):
        with pytest.raises(ValueError, match="initial must lie in"):
            LearnedOrder(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'layer'"):
        LearnedOrder(0.5, "layers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden_layers must be"):
        network(LearnedOrder(0.5, "layer"), 0)
    with pytest.raises(ValueError, match="memory must not be 'fast'"):
        network(memory="fast")
    with pytest.raises(ValueError, match="gamma must be a number in"):
        network("0.5")
    with pytest.raises(ValueError, match="network must have the residual or the fractional scheme"):
        adjoint.gradients(network(), *batch(), mse)
