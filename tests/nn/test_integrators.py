"""Midpoint, Heun, Runge-Kutta 4, Momentum and Verlet: orders, adjoints, invariants, and all that networks do."""

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from problems import coupled_springs
from taulearn import Pruning, adjoint, fit, load_model, prune, refine, save_model
from taulearn._milliseconds import layer_milliseconds
from taulearn.adaptivity.criteria import Contribution, Influence, Sensitivity, on_data
from taulearn.adaptivity.indicators import indicators
from taulearn.diagnostics import depth_profile, gradient_propagation
from taulearn.export import export_model
from taulearn.nn import (
    Antisymmetric,
    Dense,
    Fractional,
    FractionalLearned,
    FullyConnected,
    Heun,
    Midpoint,
    Momentum,
    Residual,
    RungeKutta4,
    Scheme,
    Symmetric,
    TimeSteps,
    TimeVariableNetwork,
    Verlet,
    resnet,
    resnet_v2,
    reversible,
)
from taulearn.training.fast.fused import steps_per_call
from taulearn.training.objective import Objective
from test_adjoint import assert_autograd, draw_batch

DOUBLE = torch.float64
ALL = [Midpoint(), Heun(), RungeKutta4(), Momentum(0.8), Verlet()]
all_schemes = pytest.mark.parametrize("scheme", ALL, ids=repr)
slow = [pytest.param(scheme, marks=pytest.mark.long) for scheme in ALL[:-1]]
verlet_alone = pytest.mark.parametrize("scheme", [*slow, ALL[-1]], ids=repr)  # the others take the same way
mse = nn.functional.mse_loss


def network(scheme: Scheme, layers: int = 4, *, horizon: float = 1.5, **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(1)
    made = resnet(3, 5, 2, layers, scheme=scheme, activation="tanh", horizon=horizon, dtype=DOUBLE, **options)
    with torch.no_grad():
        made.time_steps.values.mul_(torch.linspace(0.5, 1.5, len(made.time_steps.values), dtype=DOUBLE))
    return made


class Matrix(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, y: Tensor) -> Tensor:
        return y @ self.matrix.T


def graded(number: int) -> list[float]:
    """Steps that grow by the factor 4 from the first to the last, whose sum is 1."""
    ends = [(k / number + (k / number) ** 2 * 1.5) / 2.5 for k in range(number + 1)]
    return list(np.diff(ends))


@pytest.mark.parametrize("grid", ["equal", "graded"])
@pytest.mark.parametrize(
    ("scheme", "order"),
    [(Residual(), 1), (Midpoint(), 2), (Heun(), 2), (RungeKutta4(), 4), (Momentum(0.6), 1), (Verlet(), 2)],
    ids=repr,
)
def test_order_of_convergence(scheme: Scheme, order: int, grid: str) -> None:
    problem = coupled_springs()
    exact = {
        "momentum": lambda: problem.second_order(1.0, friction=1 / 0.6, pull=1 / 0.6),
        "verlet": lambda: problem.second_order(1.0),
    }.get(scheme.name, lambda: problem.first_order(1.0))()
    errors, numbers = [], [16, 32, 64, 128]
    for number in numbers:
        steps = TimeSteps(number, init=1 / number if grid == "equal" else graded(number), dtype=DOUBLE)
        layers = [Matrix(problem.matrix) for _ in range(number)]
        model = TimeVariableNetwork(layers, nn.Identity(), scheme, steps, stem=nn.Identity())
        errors.append(float((model(problem.y0[None])[0] - exact).norm().detach()))
    slope = -np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1)


def energies(tau_K: float, sigma: str) -> list[float]:
    """|v|^2 / 2 + sum of sigma's antiderivative of K x + b over 1,000 steps of x'' = -K^T sigma(K x + b)."""
    torch.manual_seed(0)
    layer = Symmetric(6, sigma, dtype=DOUBLE)
    K, b = layer.linear.weight, layer.linear.bias
    potential = (lambda z: z.cosh().log().sum()) if sigma == "tanh" else (lambda z: z.square().sum() / 2)
    found = []
    with torch.no_grad():
        tau = tau_K / torch.linalg.matrix_norm(K, 2)
        y = torch.randn(1, 6, dtype=DOUBLE)
        v = torch.zeros_like(y)
        for _ in range(1000):
            y, v = Verlet().advance(layer, y, v, tau)
            found.append(float(v.square().sum() / 2 + potential(y @ K.T + b)))
    return found


@pytest.mark.parametrize(("sigma", "tau_K"), [("tanh", 0.5), ("Identity", 1.8)])
def test_the_energy_of_verlet_stays_bounded(sigma: str, tau_K: float) -> None:
    """tau norm(K) sqrt(sup sigma') < 2 is enough where sigma is linear; else smaller steps keep it."""
    found = energies(tau_K, sigma)
    assert max(found[500:]) <= 1.02 * max(found[:500]) <= 2.0 * found[0]


def test_beyond_the_limit_the_energy_grows() -> None:
    found = energies(2.05, "Identity")
    assert found[200] > 1e3 * found[0]


@all_schemes
class TestAdjoint:
    @pytest.mark.parametrize("constraint", ["free", "fixed", "dependent", "simplex"])
    def test_is_autograd(self, scheme: Scheme, constraint: str) -> None:
        assert_autograd(network(scheme, constraint=constraint), *draw_batch(3, 2))

    @pytest.mark.parametrize("activation", ["relu", "gelu", "softplus"])
    def test_activations(self, scheme: Scheme, activation: str) -> None:
        torch.manual_seed(0)
        model = resnet(3, 4, 2, 3, scheme=scheme, activation=activation, dtype=DOUBLE)
        assert_autograd(model, *draw_batch(3, 2))

    def test_after_a_deletion_and_from_the_input(self, scheme: Scheme) -> None:
        model = network(scheme)
        prune(model, keep=[0, 2, 3])
        assert_autograd(model, *draw_batch(3, 2))
        layers = [FullyConnected(3, 3, "tanh", dtype=DOUBLE) for _ in range(3)]
        steps = TimeSteps(3, init=[0.3, 0.5, 0.2], dtype=DOUBLE)
        head = nn.Linear(3, 2, dtype=DOUBLE)
        assert_autograd(TimeVariableNetwork(layers, head, scheme, steps, stem=nn.Identity()), *draw_batch(3, 2))

    def test_the_other_method_is_refused(self, scheme: Scheme) -> None:
        for call in (adjoint.deviation, lambda *given: adjoint.gradients(*given, method="optimize-then-discretize")):
            with pytest.raises(ValueError, match="residual"):
                call(network(scheme), *draw_batch(3, 2), mse)


@all_schemes
class TestGrid:
    """The time grid gets coarser and finer; a carried velocity goes past what is not there."""

    def test_a_layer_with_step_0_goes_to_the_bit(self, scheme: Scheme) -> None:
        model, (x, _) = network(scheme), draw_batch(3, 2)
        with torch.no_grad():
            model.time_steps.values[1:3] = 0.0
        before = model(x)
        prune(model, threshold=1e-9)
        assert model.time_steps.origin == (0, 3)
        assert torch.equal(model(x), before)

    def test_an_insertion_changes_nothing_and_its_sensitivity_is_the_derivative(self, scheme: Scheme) -> None:
        model, (x, z) = network(scheme), draw_batch(3, 2)
        before = model(x)
        eta = indicators(model, "sensitivity", (x, z), mse)
        refine(model, [0, 1, 3], by="insert")
        assert torch.equal(model(x), before)
        gradient = torch.autograd.grad(mse(model(x), z), model.time_steps.values)[0]
        new = [l for l, number in enumerate(model.time_steps.origin) if number >= 4]
        torch.testing.assert_close(gradient[new], eta[[0, 1, 3]], rtol=1e-10, atol=1e-14)

    def test_a_split_is_what_its_indicator_says(self, scheme: Scheme) -> None:
        def quotient(horizon: float) -> float:
            model, (x, z) = network(scheme, horizon=horizon), draw_batch(3, 2)
            eta = indicators(model, "dual-weighted", (x, z), mse)
            with torch.no_grad():
                before = mse(model(x), z)
                refine(model, [2])
                return float((mse(model(x), z) - before) / eta[2])

        assert abs(quotient(0.2) - 1.0) < 0.02


@verlet_alone
class TestCompiledAndExported:
    def test_compiled_training_is_the_plain_one(self, scheme: Scheme) -> None:
        x, z = draw_batch(3, 2, 40)
        found = []
        for mode in ("never", "always"):
            model = network(scheme)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            fit(model, (x, z), loss=mse, optimizer=optimizer, epochs=2, batch_size=10, compile=mode, seed=0)
            found.append(model(x))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)

    def test_onnx(self, scheme: Scheme, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript", reason="pip install 'taulearn[onnx]'")
        runtime = pytest.importorskip("onnxruntime", reason="pip install 'taulearn[onnx]'")

        model, x = network(scheme).float(), draw_batch(3, 2)[0].float()
        exported = export_model(model, tmp_path / "out", x)
        session = runtime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@all_schemes
class TestUse:
    def test_training_deletes_and_saves(self, scheme: Scheme, tmp_path: Path) -> None:
        model, (x, z) = network(scheme).float(), draw_batch(3, 2, 40)
        x, z = x.float(), z.float()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        policy = Pruning(target_blocks=3, every=2, by=4)
        history = fit(
            model, (x, z), loss=mse, optimizer=optimizer, epochs=6, batch_size=10, pruning=policy, compile="never"
        )
        assert model.time_steps.num_steps == 3
        assert history.iterations["loss"][-4:].mean() < history.iterations["loss"][:4].mean()
        save_model(model, tmp_path)
        loaded = load_model(tmp_path)
        assert repr(loaded.scheme) == repr(scheme)
        assert torch.equal(loaded(x), model(x))

    def test_early_exit_drops_samples_from_state_and_velocity(self, scheme: Scheme) -> None:
        model, (x, _) = network(scheme, 5), draw_batch(3, 2, 30)
        with torch.no_grad():
            model.head.weight.mul_(40.0)
        together = model.predict(x, 0.9)
        assert len(together.depths.unique()) >= 2
        alone = [model.predict(x[i : i + 1], 0.9) for i in range(len(x))]
        assert together.depths.tolist() == [int(each.depths) for each in alone]
        torch.testing.assert_close(together.outputs, torch.cat([each.outputs for each in alone]))

    def test_intermediate_outputs_have_later_steps_of_0(self, scheme: Scheme) -> None:
        model, (x, _) = network(scheme), draw_batch(3, 2)
        outputs = model.intermediate_outputs(x)
        with torch.no_grad():
            model.time_steps.values[2:] = 0.0
        torch.testing.assert_close(outputs[2], model(x), rtol=1e-12, atol=1e-14)

    def test_gradient_propagation(self, scheme: Scheme) -> None:
        model, (x, _) = network(scheme), draw_batch(3, 2)
        found = gradient_propagation(model, x[:2])
        y = model.states(x[:1])
        jacobian = torch.stack([torch.autograd.grad(each, y[2], retain_graph=True)[0][0] for each in y[3][0]])
        assert float(found.largest[2, 0]) == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-9)


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_momentum_with_epsilon_tau_is_the_residual_scheme(tau: float) -> None:
    models = [network(scheme, init=tau) for scheme in (Residual(), Momentum(tau))]
    for model in models:
        with torch.no_grad():
            model.time_steps.values.fill_(tau)
    x, _ = draw_batch(3, 2)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-12, atol=1e-12)


class TestRefusals:
    @pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan, "1", None])
    def test_inertia(self, epsilon: Any) -> None:
        with pytest.raises(ValueError, match="epsilon must be positive"):
            Momentum(epsilon)

    def test_names(self) -> None:
        with pytest.raises(ValueError, match=r"scheme must be one of .*did you mean 'midpoint'"):
            resnet(2, 3, 1, 3, scheme="midpiont")
        for given in (Fractional(), "fractional"):
            with pytest.raises(ValueError, match="scheme must not be 'fractional'"):
                resnet(2, 3, 1, 3, scheme=given)
        for given in (Heun, ["heun"], None):
            with pytest.raises(TypeError, match="scheme must be a name or a scheme"):
                resnet(2, 3, 1, 3, scheme=given)  # type: ignore[arg-type]

    @all_schemes
    def test_a_layer_that_changes_the_width(self, scheme: Scheme) -> None:
        model = resnet(2, [3, 4, 4], 1, 3, scheme=scheme)
        with pytest.raises(ValueError, match=r"skips must be identities .* past layer 1"):
            model(torch.ones(2, 2))


@pytest.mark.parametrize("scheme", [*ALL, Momentum(memory="reversible")], ids=repr)
@pytest.mark.parametrize("width", [1, 3])
def test_a_layer_that_changes_the_shape(scheme: Scheme, width: int) -> None:
    """Width 1 would be broadcast."""
    layers = [nn.Linear(4, 4), nn.Linear(4, width), nn.Linear(4, 4)]
    model = TimeVariableNetwork(layers, nn.Linear(4, 2), scheme, TimeSteps(3), stem=nn.Identity())
    with pytest.raises(ValueError, match=rf"keep the shape .* got \(5, {width}\) from Linear for \(5, 4\)"):
        model(torch.ones(5, 4))


@pytest.mark.parametrize("scheme", [Residual(), Dense(), Fractional(), FractionalLearned()], ids=repr)
@pytest.mark.parametrize("width", [1, 3])
def test_a_value_that_would_be_broadcast(scheme: Scheme, width: int) -> None:
    """Fault that was: a layer 4 -> 1 was added to all four."""
    layers = [nn.Linear(4, 4), nn.Linear(4, width), nn.Linear(4, 4)]
    model = TimeVariableNetwork(layers, nn.Linear(4, 2), scheme, TimeSteps(3), stem=nn.Identity())
    with pytest.raises(ValueError, match=rf"layers must .* \(5, 4\), .* got \(5, {width}\) from layer 1"):
        model(torch.ones(5, 4))


def steps_by_autograd(model: Any, x: Tensor, z: Tensor) -> Tensor:
    values = model.time_steps.values
    return (values * torch.autograd.grad(mse(model(x), z), values)[0]).detach().abs()


@all_schemes
class TestCriteria:
    """Faults that were: the contribution was that of the last stage, or of the layer's value without the velocity."""

    def test_contribution_is_the_whole_increment(self, scheme: Scheme) -> None:
        model, (x, z) = network(scheme), draw_batch(3, 2)

        def added(x: Tensor) -> list[Tensor]:
            states = [y.detach() for y in model.states(x)]
            return [states[0], *(after - before for before, after in itertools.pairwise(states))]

        expected = [
            torch.stack([s.norm(dim=1).mean() for s in pair]).mean()
            for pair in zip(added(x), added(3 * x), strict=True)
        ]
        found = on_data("contribution", [(x, z), (3 * x, z)], None)(model.time_steps.tau, model)
        torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=0.0)
        rule = Contribution(model)
        with rule.measuring():  # parts of a batch: the last one
            model(3 * x)
            model(x)
        expected = [step.norm(dim=1).mean() for step in added(x)]
        torch.testing.assert_close(rule.values.double(), torch.stack(expected), rtol=1e-5, atol=0.0)
        expected = [step.square().sum(1).mean().sqrt() for step in added(x)]
        found = torch.as_tensor(depth_profile(model, x, z, mse).contribution)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=0.0)

    def test_a_layer_that_answers_0_moves_the_state_all_the_same(self, scheme: Scheme) -> None:
        """Where there is a velocity; pruning by what the model does without the layer shows it, too."""
        model, batch = network(scheme, 6, horizon=6.0), draw_batch(3, 2)
        with torch.no_grad():
            model.layers[3].linear.weight.zero_()
            model.layers[3].linear.bias.zero_()
        moves = getattr(scheme, "second_order", False)
        for name in ("sensitivity", "contribution", "influence"):
            found = on_data(name, batch, mse)(model.time_steps.tau, model)
            assert (float(found[3]) > 0.0) == moves
            assert bool((found[[1, 2, 4, 5]] > 0.0).all())

    def test_the_sensitivity_of_parts_adds_up(self, scheme: Scheme) -> None:
        """Also where another pass without gradients comes between, and in the frozen half of a network."""
        model, (x, z) = network(scheme), draw_batch(3, 2, 8)
        expected, rule = steps_by_autograd(model, x, z), Sensitivity(model)
        model.layers[:2].requires_grad_(False)
        with rule.measuring():
            for half in (slice(0, 4), slice(4, 8)):
                (mse(model(x[half]), z[half]) / 2).backward()
                with torch.no_grad():
                    model(9 * x)
        torch.testing.assert_close(rule.values.double(), expected, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("kind", [Contribution, Influence, Sensitivity])
    def test_a_copy_made_meanwhile_is_a_plain_model(self, scheme: Scheme, kind: Any, copied: Any) -> None:
        model, (x, z) = network(scheme), draw_batch(3, 2)
        rule = kind(model)
        with rule.measuring():
            twin = copied(model)
            mse(model(x), z).backward()
            with torch.no_grad():
                twin.time_steps.values.mul_(2.0)
            mse(copied(twin)(9 * x), z).backward()
        assert {"states", "last"}.isdisjoint(vars(model.scheme))
        again, plain = kind(model), network(scheme)
        again.look((x, z), mse)
        assert torch.equal(rule.values, again.values)
        with torch.no_grad():
            plain.time_steps.values.mul_(2.0)
        assert torch.equal(twin(x), plain(x))
        rules = [kind(each) for each in (twin, plain)]
        for each in rules:
            each.look((x, z), mse)
        assert torch.equal(rules[0].values, rules[1].values)


@pytest.mark.parametrize("kind", [Contribution, Influence, Sensitivity])
@pytest.mark.parametrize("scheme", [Momentum, Verlet])
def test_criteria_with_reversible_memory(scheme: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures; the sensitivity stores no states for them."""
    (x, z), passes, segment = draw_batch(3, 2), [], reversible.last_state
    monkeypatch.setattr(reversible, "last_state", lambda *args: passes.append(1) or segment(*args))
    rules = [kind(network(scheme(memory=memory))) for memory in ("stored", "reversible")]
    for rule in rules:
        rule.look((x, z), mse)
    torch.testing.assert_close(rules[1].values, rules[0].values)
    assert len(passes) == (kind is Sensitivity)


@pytest.mark.parametrize("scheme", [Midpoint(), Heun(), RungeKutta4()], ids=repr)
class TestStages:
    """A fault that was: a layer of several stages counted as one evaluation."""

    def test_stages_are_counted(self, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
        model, stages = network(scheme), len(scheme.stage_weights)
        fused = [steps_per_call(Objective(each, mse, []), 1000) for each in (model, network(Residual()))]
        assert fused[0] == fused[1] // stages
        monkeypatch.setattr("taulearn._milliseconds.clock", lambda _: itertools.count().__next__)
        assert layer_milliseconds(model, list(model.layers), torch.ones(2, 3).double())[0] == (1.0, *[stages] * 3)


def test_a_scheme_is_copied_with_its_network() -> None:
    model = network(Momentum(0.4))
    twin = copy.deepcopy(model)
    twin.scheme.epsilon = 2.0
    assert model.scheme.epsilon == 0.4


class TestLayers:
    def test_antisymmetric(self) -> None:
        """K - K^T - g I, whose eigenvalues have the real part -g; against NumPy."""
        torch.manual_seed(0)
        layer, y = Antisymmetric(4, "tanh", shift=0.3, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
        K, b = layer.linear.weight.detach().numpy(), layer.linear.bias.detach().numpy()
        matrix = K - K.T - 0.3 * np.eye(4)
        np.testing.assert_allclose(layer(y).detach().numpy(), np.tanh(y.numpy() @ matrix.T + b), rtol=1e-13)
        np.testing.assert_allclose(np.linalg.eigvals(matrix).real, -0.3, atol=1e-13)

    def test_symmetric(self) -> None:
        """-K^T sigma(K y + b), whose Jacobian is symmetric and negative semidefinite."""
        torch.manual_seed(0)
        layer, y = Symmetric(4, "tanh", dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
        K, b = layer.linear.weight.detach().numpy(), layer.linear.bias.detach().numpy()
        np.testing.assert_allclose(layer(y).detach().numpy(), -np.tanh(y.numpy() @ K.T + b) @ K, rtol=1e-13)
        jacobian = torch.func.jacrev(layer)(y[0])
        torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-12, atol=1e-14)
        assert float(torch.linalg.eigvalsh(jacobian.detach()).max()) <= 1e-12

    @pytest.mark.parametrize("make", [Antisymmetric, Symmetric])
    def test_convolutions_are_the_matrices_that_they_stand_for(self, make: Any) -> None:
        torch.manual_seed(0)
        layer = make(2, "tanh", kernel_size=3, dtype=DOUBLE)
        with torch.no_grad():
            layer.convolution.bias.zero_()
        jacobian = torch.func.jacrev(layer)(torch.zeros(1, 2, 4, 4, dtype=DOUBLE)).view(32, 32)  # tanh'(0) = 1
        assert float(jacobian.detach().abs().max()) > 0.01
        if make is Symmetric:
            torch.testing.assert_close(jacobian, jacobian.T, rtol=0.0, atol=1e-14)
            assert float(torch.linalg.eigvalsh(jacobian.detach()).max()) <= 1e-12
        else:
            torch.testing.assert_close(jacobian, -jacobian.T, rtol=0.0, atol=1e-14)

    @pytest.mark.parametrize("make", [Antisymmetric, Symmetric])
    def test_in_a_network_that_is_saved(self, make: Any, tmp_path: Path) -> None:
        def build() -> TimeVariableNetwork:
            torch.manual_seed(0)
            layers = [make(3, "tanh", dtype=DOUBLE) for _ in range(4)]
            head = nn.Linear(3, 2, dtype=DOUBLE)
            return TimeVariableNetwork(layers, head, Verlet(), TimeSteps(4, dtype=DOUBLE), stem=nn.Identity())

        model, (x, _) = build(), draw_batch(3, 2)
        prune(model, keep=[0, 2])
        save_model(model, tmp_path)
        loaded = load_model(tmp_path, host=build())
        assert torch.equal(loaded(x), model(x))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="shift must be"):
            Antisymmetric(3, shift=-1.0)
        with pytest.raises(ValueError, match="kernel_size must be odd"):
            Antisymmetric(3, kernel_size=2)


@pytest.mark.parametrize("scheme", ["heun", "verlet"])
def test_images(scheme: str) -> None:
    model, x = resnet_v2(3, 4, 1, 6, scheme=scheme), torch.randn(2, 1, 8, 8)
    assert model(x).shape == (2, 4)
    stages = resnet_v2((1, 1), 4, 1, (4, 8), scheme=scheme)
    with pytest.raises(ValueError, match="past layer 1"):
        stages(x)
