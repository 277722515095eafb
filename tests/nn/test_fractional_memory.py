"""Networks with blocked memory, exact and fast, against NumPy and against the plain contraction."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from contract import CONSTRAINTS, gradients, pruning_error, scramble_
from reference import array, network_output
from taulearn import load_model, prune, save_model
from taulearn.caputo import ExponentialKernel
from taulearn.nn import Fractional, IdentitySkips, TimeSteps, TimeVariableNetwork, fractional_dnn, schemes

DOUBLE = torch.float64
modes = pytest.mark.parametrize("memory", ["exact", "fast"])
all_constraints = pytest.mark.parametrize("constraint", CONSTRAINTS)
TOLERANCE = {"exact": 1e-12, "fast": 1e-6}


def network(
    memory: str, layers: int = 12, *, seed: int = 0, tolerance: float = 1e-8, **options: Any
) -> TimeVariableNetwork:
    torch.manual_seed(seed)
    settings = {"activation": "tanh", "horizon": 2.0, "dtype": DOUBLE, "gamma": 0.4} | options
    model = fractional_dnn(3, 4, 2, layers, memory=memory, tolerance=tolerance, **settings)
    scramble_(model.time_steps)
    return model


def batch(samples: int = 3) -> Tensor:
    return torch.randn(samples, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(7))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = torch.linalg.vector_norm(found[name] - value)
        assert difference <= tolerance * torch.linalg.vector_norm(value), name


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a function with the plain contraction in place of blocks."""

    def run(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(schemes, "_BLOCKED_FROM", 10**9)
            return function(*args)

    return run


@modes
class TestBothModes:
    @all_constraints
    @pytest.mark.parametrize("memory_from", [0, 1])
    @pytest.mark.parametrize("layers", [8, 33, pytest.param(70, marks=pytest.mark.long)])
    def test_outputs_and_gradients(
        self, memory: str, constraint: str, memory_from: int, layers: int, plain: Any
    ) -> None:
        model, x = network(memory, layers, constraint=constraint, memory_from=memory_from), batch()
        expected = torch.from_numpy(network_output(model, x))
        tolerance = TOLERANCE[memory]
        torch.testing.assert_close(model(x).detach(), expected, rtol=tolerance, atol=tolerance)
        assert (model.scheme.kernel_error is None) == (memory == "exact")
        assert_near(gradients(model, x), plain(gradients, model, x), tolerance)

    @pytest.mark.parametrize("memory_from", [0, 1])
    def test_a_state_that_is_carried_from_the_input(self, memory: str, memory_from: int, plain: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(4, 4, dtype=DOUBLE), nn.Tanh()) for _ in range(12)]
        stem, head = nn.Linear(3, 4, dtype=DOUBLE), nn.Linear(4, 2, dtype=DOUBLE)
        scheme = Fractional(0.6, memory_from, memory=memory, tolerance=1e-8)
        model = TimeVariableNetwork(layers, head, scheme, TimeSteps(12, dtype=DOUBLE), stem=stem)
        assert model.skips.from_input
        x, tolerance = batch(), TOLERANCE[memory]
        torch.testing.assert_close(model(x), plain(model, x), rtol=tolerance, atol=tolerance)
        assert_near(gradients(model, x), plain(gradients, model, x), tolerance)

    def test_a_loss_of_all_states(self, memory: str, plain: Any) -> None:
        model, x = network(memory), batch()

        def of_states() -> dict[str, Tensor]:
            names, values = zip(*model.named_parameters(), strict=True)
            total = sum((y * y).sum() * k for k, y in enumerate(model.states(x)))
            return dict(zip(names, torch.autograd.grad(total, values, materialize_grads=True), strict=True))

        assert_near(of_states(), plain(of_states), TOLERANCE[memory])

    @all_constraints
    def test_pruning_in_the_middle(self, memory: str, constraint: str, plain: Any) -> None:
        """The steps shrink, grow and change in number; a forward pass before and after."""
        model, x = network(memory, 40, constraint=constraint), batch()
        model(x)
        optimizer = torch.optim.SGD([*model.parameters()], lr=0.0)
        prune(model, keep=[0, *range(9, 40)], optimizer=optimizer)
        tolerance = TOLERANCE[memory]
        torch.testing.assert_close(
            model(x).detach(), torch.from_numpy(network_output(model, x)), rtol=tolerance, atol=tolerance
        )
        assert_near(gradients(model, x), plain(gradients, model, x), tolerance)

    @pytest.mark.parametrize("gamma", [0.3, pytest.param(0.5, marks=pytest.mark.long), 0.8])
    def test_error_of_pruning_falls_with_the_power_gamma_of_the_step(self, memory: str, gamma: float) -> None:
        model, x = network(memory, gamma=gamma, tolerance=1e-9), batch()
        steps = [1e-7, 1e-8, 1e-9]
        errors = [pruning_error(model, [5], step, x) for step in steps]
        assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(gamma, abs=0.02)

    @all_constraints
    def test_training(self, memory: str, constraint: str) -> None:
        """Some steps of SGD with projection, under which the steps move, go the same way as with the plain memory."""
        losses = []
        for kind in (memory, "plain"):
            model, x = network("exact" if kind == "plain" else kind, constraint=constraint), batch()
            if kind == "plain":
                model.scheme.states = Plain(model.scheme.gamma, model.scheme.memory_from).states
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(10):
                optimizer.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                optimizer.step()
                model.time_steps.project_()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE[memory])

    def test_a_deep_copy_is_independent(self, memory: str) -> None:
        model, x = network(memory), batch()
        expected = gradients(model, x)
        twin = copy.deepcopy(model)
        assert twin.scheme.memory == memory
        assert_near(gradients(twin, x), expected, 0.0)

    def test_inference(self, memory: str) -> None:
        model, x = network(memory), batch()
        expected = model(x).detach()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(model(x), expected)

    def test_the_state_dict_is_that_of_any_mode(self, memory: str) -> None:
        model, other = network(memory), network("auto", seed=1)
        before = model.state_dict().keys()
        model(batch())
        assert model.state_dict().keys() == before == other.state_dict().keys()
        other.load_state_dict(model.state_dict(), strict=True)

    def test_saved_and_loaded(self, memory: str, tmp_path: Path) -> None:
        model, x = network(memory, tolerance=1e-5), batch()
        save_model(model, tmp_path)
        loaded: Any = load_model(tmp_path)
        assert repr(loaded.scheme) == repr(model.scheme)
        assert torch.equal(loaded(x), model(x))

    def test_float32(self, memory: str) -> None:
        model, x = network(memory, 60), batch()
        expected, tau = model(x).detach(), gradients(model, x)["time_steps.values"]
        model.float()
        torch.testing.assert_close(model(x.float()).double().detach(), expected, rtol=1e-5, atol=1e-5)
        found = gradients(model, x.float())["time_steps.values"].double()
        assert torch.linalg.vector_norm(found - tau) < 1e-4 * torch.linalg.vector_norm(tau)

    def test_images_as_states(self, memory: str, plain: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, dtype=DOUBLE), nn.Tanh()) for _ in range(9)]
        scheme = Fractional(0.5, 0, memory=memory, tolerance=1e-8)
        model = TimeVariableNetwork(layers, nn.Flatten(), scheme, TimeSteps(9, dtype=DOUBLE), stem=nn.Identity())
        x = torch.randn(2, 2, 5, 5, dtype=DOUBLE).to(memory_format=torch.channels_last)
        assert_near(gradients(model, x), plain(gradients, model, x), TOLERANCE[memory])

    def test_an_empty_batch(self, memory: str) -> None:
        model = network(memory)
        output = model(torch.zeros(0, 3, dtype=DOUBLE))
        output.sum().backward()
        assert output.shape == (0, 2)

    def test_steps_that_are_no_longer_positive_spread_nan(self, memory: str) -> None:
        """As in the plain contraction: the loop that trains has the say."""
        model = network(memory)
        with torch.no_grad():
            model.time_steps.values[3] = -1.0
        assert bool(torch.isnan(model(batch())).all())


class Plain(Fractional):
    """The scheme as networks with other skips, and transforms, use it."""

    def _recall(self, *_: Any) -> None:
        return None


@modes
class TestTransforms:
    """They see the plain contraction, which is exact."""

    def test_compile(self, memory: str) -> None:
        model, x = network(memory, 9), batch()
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=TOLERANCE[memory], atol=TOLERANCE[memory])
        expected = gradients(model, x)
        compiled(x).square().sum().div(2).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_near(found, expected, TOLERANCE[memory])

    def test_vmap_over_networks_and_functional_gradient(self, memory: str) -> None:
        models, x = [network(memory, seed=seed) for seed in range(3)], batch()
        parameters, buffers = stack_module_state(models)
        base = copy.deepcopy(models[0])

        def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return functional_call(base, (p, b), (x,)).square().sum() / 2

        found = vmap(grad(loss))(parameters, buffers)
        for i, model in enumerate(models):
            assert_near({name: g[i] for name, g in found.items()}, gradients(model, x), TOLERANCE[memory])

    def test_second_derivatives_go_by_torch_func(self, memory: str) -> None:
        model, x = network(memory), batch()
        tau = model.time_steps.values
        (first,) = torch.autograd.grad(model(x).sum(), tau, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
        hessian = torch.func.hessian(lambda t: functional_call(model, {"time_steps.values": t}, (x,)).sum())
        assert bool(torch.isfinite(hessian(tau.detach())).all())

    def test_cotangents_in_a_batch(self, memory: str) -> None:
        model = network(memory)
        with pytest.raises(RuntimeError, match=r"^is_grads_batched must be False .*: .* take torch.func.vjp"):
            torch.autograd.grad(
                model(batch()).sum(0), model.time_steps.values, torch.eye(2, dtype=DOUBLE), is_grads_batched=True
            )


class TestFallback:
    @modes
    def test_skips_that_are_not_identities(self, memory: str, plain: Any) -> None:
        torch.manual_seed(0)
        model = fractional_dnn(3, [4] * 5 + [2] * 5, 2, 10, memory=memory, dtype=DOUBLE, activation="tanh")
        x = batch()
        assert torch.equal(model(x), plain(model, x))
        assert model.scheme.kernel_error is None

    @modes
    def test_states_that_change_their_type(self, memory: str, plain: Any) -> None:
        """From float32 to float64 in the sixth layer: blocks before, the plain contraction from there on."""

        class Widen(nn.Module):
            def forward(self, y: Tensor) -> Tensor:
                return torch.tanh(y.double())

        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]
        layers += [Widen() for _ in range(6)]
        steps = TimeSteps(12)
        skips = IdentitySkips(12, from_input=False)
        scheme = Fractional(0.5, memory=memory, tolerance=1e-7)
        model = TimeVariableNetwork(layers, nn.Identity(), scheme, steps, skips)
        x = torch.randn(3, 4)
        assert [y.dtype for y in model.states(x)] == [torch.float32] * 6 + [DOUBLE] * 6
        torch.testing.assert_close(model(x), plain(model, x), rtol=1e-5, atol=1e-5)
        assert_near(gradients(model, x), plain(gradients, model, x), 1e-4)

    @modes
    def test_a_state_of_another_type_on_the_way(self, memory: str, plain: Any) -> None:
        """The layers after it have the type of the first ones again, but the blocks lack that state."""

        class Cast(nn.Module):
            def __init__(self, dtype: torch.dtype) -> None:
                super().__init__()
                self.dtype = dtype

            def forward(self, y: Tensor) -> Tensor:
                return torch.cos(y).to(self.dtype)

        layers = [Cast(DOUBLE if l == 6 else torch.float32) for l in range(12)]
        skips, scheme = IdentitySkips(12, from_input=False), Fractional(0.5, memory=memory, tolerance=1e-7)
        model = TimeVariableNetwork(layers, nn.Identity(), scheme, TimeSteps(12), skips)
        x = torch.randn(3, 4)
        torch.testing.assert_close(model(x), plain(model, x), rtol=1e-5, atol=1e-5)

    def test_few_layers(self) -> None:
        model = network("fast", 7)
        model(batch())
        assert model.scheme.kernel_error is None


class TestOptions:
    def test_auto_decides_by_the_number_of_layers(self) -> None:
        model = network("auto", schemes._FAST_FROM)
        with torch.no_grad():
            model(batch())
            assert 0 < model.scheme.kernel_error <= 1e-8
            prune(model, keep=range(schemes._FAST_FROM - 1))
            model(batch())
            assert model.scheme.kernel_error is None

    def test_the_error_is_that_of_the_last_forward_pass(self) -> None:
        model, x = network("fast", tolerance=1e-4), batch()
        model(x)
        before = model.scheme.kernel_error
        with torch.no_grad():
            model.time_steps.values[5] = 1e-4  # far out of the range so far
        expected = network_output(model, x)
        np.testing.assert_allclose(array(model(x)), expected, rtol=1e-3)
        assert 0 < model.scheme.kernel_error <= 1e-4
        assert model.scheme.kernel_error != before

    def test_accuracy_promised_by_the_default(self) -> None:
        model, x = network("exact", 300, horizon=1.0), batch(10)
        output, tau = model(x).detach(), gradients(model, x)["time_steps.values"]
        model.scheme.memory, model.scheme.tolerance = "fast", Fractional().tolerance
        assert torch.linalg.vector_norm(model(x).detach() - output) < 1e-5 * torch.linalg.vector_norm(output)
        difference = gradients(model, x)["time_steps.values"] - tau
        assert torch.linalg.vector_norm(difference) < 1e-4 * torch.linalg.vector_norm(tau)

    def test_tolerance_that_cannot_be_met(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(ExponentialKernel.__init__.__kwdefaults__, "max_nodes", 8)
        with pytest.raises(ValueError, match=r"tolerance must be .*1e-17"):
            network("fast", tolerance=1e-17)(batch())

    def test_print(self) -> None:
        assert repr(Fractional(memory="fast", tolerance=1e-4)) == (
            "Fractional(gamma=0.5, memory_from=1, memory='fast', tolerance=0.0001)"
        )
