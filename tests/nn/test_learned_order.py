"""A learned order: its gradient, its bounds, and all that networks do."""

import copy
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taulearn import Pruning, adjoint, fit, load_model, parameter_groups, prune, refine, save_model
from taulearn.adaptivity.indicators import indicators
from taulearn.caputo import l1_weights
from taulearn.caputo.weights import plain_left_weights
from taulearn.export import export_model
from taulearn.nn import Fractional, FractionalLearned, LearnedOrder, TimeVariableNetwork, fractional_dnn
from taulearn.nn.learned_order import gamma_function

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
    slope = torch.autograd.grad(model.scheme.value(), model.scheme.order)[0]
    found = torch.autograd.grad(mse(model(x), z), model.scheme.order)[0] / slope
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
    with mpmath.workdps(40):
        for l in range(4):
            for j in range(l):
                expected = float(mpmath.diff(weight(l, j), mpmath.mpf(str(gamma))))
                found = float(torch.autograd.grad(weights[l, j], order, retain_graph=True)[0])
                assert found == pytest.approx(expected, rel=1e-12)


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
def test_training_deletes_and_saves(compiled: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = fractional_dnn(3, 5, 2, 5, gamma=LearnedOrder(0.4), activation="tanh", dtype=dtype)
    x, z = (part.to(dtype) for part in batch(40))
    assert model.scheme.order.dtype == dtype
    optimizer = torch.optim.Adam(parameter_groups(model, 0.01))
    policy = Pruning(target_blocks=3, every=2, by=3)
    fit(model, (x, z), loss=mse, optimizer=optimizer, epochs=5, batch_size=10, pruning=policy, compile=compiled)
    assert model.time_steps.num_steps == 3
    assert abs(model.scheme.gamma - 0.4) > 1e-4
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded.scheme, FractionalLearned)
    assert loaded.scheme.gamma == model.scheme.gamma
    assert torch.equal(loaded(x), model(x))


def test_resuming_goes_on_to_the_bit(tmp_path: Path) -> None:
    x, z = batch(40)

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
        )

    whole, halves = network(), network()
    train(whole, 4, tmp_path / "whole")
    train(halves, 2, tmp_path / "halves")
    again = network()
    train(again, 4, tmp_path / "halves", resume=True)
    assert torch.equal(again.scheme.order, whole.scheme.order)
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


def test_gamma_function() -> None:
    x = torch.linspace(1.0, 2.0, 41, dtype=DOUBLE, requires_grad=True)
    found = gamma_function(x)
    expected = [float(mpmath.gamma(float(each))) for each in x.detach()]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-14)
    slope = [float(mpmath.gamma(float(each)) * mpmath.digamma(float(each))) for each in x.detach()]
    np.testing.assert_allclose(torch.autograd.grad(found.sum(), x)[0].numpy(), slope, rtol=1e-12, atol=1e-13)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'taulearn[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'taulearn[onnx]'")

    model, x = network().float(), batch()[0].float()
    exported = export_model(model, tmp_path / "out", x)
    session = runtime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_it_prints_without_content() -> None:
    assert "gamma=0.4" in repr(network().to("meta"))


def test_refusals() -> None:
    for value in (0.0, 1.0, 0.005, np.nan, "a", None):
        with pytest.raises(ValueError, match="initial must lie in"):
            LearnedOrder(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory must not be 'fast'"):
        network(memory="fast")
    with pytest.raises(ValueError, match="gamma must be a number in"):
        network("0.5")
    with pytest.raises(ValueError, match="network must have the residual or the fractional scheme"):
        adjoint.gradients(network(), *batch(), mse)
