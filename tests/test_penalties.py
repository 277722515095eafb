"""Penalties against NumPy and closed-form gradients, and the proximal step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference import Array, array, linear_layers
from taulearn.nn import SmoothReLU, TimeVariableNetwork, densenet, feedforward, fractional_dnn, resnet
from taulearn.optim import constrain_
from taulearn.penalties import L1, L2, BiasOrdering, ElasticNet, GroupLasso, Penalty, TimeHorizon, WeightElasticNet

TAU = [0.5, -0.25, 0.125, 0.75]
all_builders = pytest.mark.parametrize("builder", [feedforward, resnet, densenet, fractional_dnn])


def network(tau: list[float] | None = None, **options: Any) -> TimeVariableNetwork:
    torch.manual_seed(0)
    options = dict[str, Any](horizon=2.0, dtype=torch.float64) | options
    model = resnet(3, [4, 4, 2, 2], 2, 4, **options)
    if tau is not None:
        with torch.no_grad():
            model.time_steps.values.copy_(torch.tensor(tau, dtype=torch.float64))
    return model


def tau_gradient(penalty: Penalty, model: TimeVariableNetwork) -> Array:
    model.zero_grad()
    penalty(model).backward()
    assert model.time_steps.values.grad is not None
    return array(model.time_steps.values.grad)


T = np.array(TAU)
STEP_PENALTIES = [
    pytest.param(L1(0.3), 0.3 * 1.625, 0.3 * np.sign(T), id="L1"),
    pytest.param(L2(0.3), 0.3 * np.sum(T**2), 0.6 * T, id="L2"),
    pytest.param(ElasticNet(0.3), 0.15 * (np.sum(T**2) + 1.625), 0.3 * T + 0.15 * np.sign(T), id="ElasticNet"),
    pytest.param(TimeHorizon(), 0.5 * (2.0 - 1.125) ** 2, np.full(4, -(2.0 - 1.125)), id="TimeHorizon of the model"),
    pytest.param(TimeHorizon(1.0, weight=3.0), 1.5 * 0.125**2, np.full(4, 3 * 0.125), id="TimeHorizon"),
]


class TestSteps:
    @pytest.mark.parametrize(("penalty", "value", "gradient"), STEP_PENALTIES)
    def test_value_and_gradient(self, penalty: Penalty, value: float, gradient: Array) -> None:
        model = network(TAU)
        assert penalty(model).item() == pytest.approx(value, rel=1e-14)
        np.testing.assert_allclose(tau_gradient(penalty, model), gradient, rtol=1e-14)
        assert all(p.grad is None for name, p in model.named_parameters() if name != "time_steps.values")

    @pytest.mark.parametrize(("penalty", "value", "gradient"), STEP_PENALTIES)
    def test_dependent_steps_count_and_pass_gradients(self, penalty: Penalty, value: float, gradient: Array) -> None:
        model = network(TAU[:3], constraint="dependent", horizon=1.125)
        if isinstance(penalty, TimeHorizon):
            assert penalty.of(model.time_steps.tau, model.time_steps).item() == pytest.approx(
                penalty.weight / 2 * ((penalty.horizon or 1.125) - 1.125) ** 2, abs=1e-14
            )
            return
        assert penalty(model).item() == pytest.approx(value, rel=1e-14)
        np.testing.assert_allclose(tau_gradient(penalty, model), gradient[:3] - gradient[3], rtol=1e-14)

    @pytest.mark.parametrize(("penalty", "value", "gradient"), STEP_PENALTIES)
    def test_fixed_steps(self, penalty: Penalty, value: float, gradient: Array) -> None:
        found = penalty(network(TAU, constraint="fixed"))
        assert found.item() == pytest.approx(value, rel=1e-14)
        assert not found.requires_grad

    @all_builders
    def test_every_network_can_be_penalised(self, builder: Callable[..., TimeVariableNetwork]) -> None:
        assert L1(0.5)(builder(2, 3, 1, 4, dtype=torch.float64)).item() == pytest.approx(0.5)

    @pytest.mark.parametrize("penalty", [L1(1.0), ElasticNet(2.0)], ids=["L1", "ElasticNet"])
    def test_the_subgradient_at_zero_is_zero(self, penalty: Penalty) -> None:
        gradient = tau_gradient(penalty, network([0.0, 0.0, 1.0, -1.0]))
        assert gradient[:2].tolist() == [0.0, 0.0]
        assert gradient[2] == -gradient[3] > 0

    def test_the_subgradient_step_does_not_land_on_zero(self) -> None:
        """It crosses zero, which the docstring says; the proximal step below does land."""
        model = network([0.25, 0.5, 0.5, 0.5])
        optimizer = torch.optim.SGD([model.time_steps.values], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            L1(1.0)(model).backward()
            optimizer.step()
            assert float(model.time_steps.tau.detach()[0]) != 0.0
        assert abs(float(model.time_steps.tau.detach()[0])) < 0.1


class TestProximal:
    def step(self, model: TimeVariableNetwork, lr: float, alpha: float) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        constrain_(model, optimizer, [L1(alpha, proximal=True)])

    def test_it_lands_on_exact_zeros(self) -> None:
        model = network(TAU)
        self.step(model, lr=0.5, alpha=0.5)
        assert model.time_steps.tau.tolist() == [0.25, 0.0, 0.0, 0.5]

    def test_it_is_recorded_but_not_differentiated(self) -> None:
        assert not L1(1.0, proximal=True).differentiated
        assert L1(1.0).differentiated
        assert L1(2.0, proximal=True)(network(TAU)).item() == 3.25

    def test_a_differentiated_penalty_has_no_proximal_step(self) -> None:
        values = torch.tensor(TAU)
        for penalty in (L1(1.0), L2(1.0), ElasticNet(1.0), TimeHorizon(), BiasOrdering(), GroupLasso(1.0)):
            assert penalty.proximal(values, 1.0) is values

    def test_dependent(self) -> None:
        model = network([0.5, -0.25, 0.125], constraint="dependent")
        self.step(model, lr=0.5, alpha=0.5)
        assert model.time_steps.tau.tolist() == [0.25, 0.0, 0.0, 1.75]

    def test_simplex(self) -> None:
        """The shrinkage shifts all entries alike, so that the projection undoes it but for those it took to zero."""
        model = network([0.75, 0.125, 0.0, 1.125], constraint="simplex")
        self.step(model, lr=0.5, alpha=0.5)
        # shrunk to (0.5, 0, 0, 0.875), then 0.625 are to be shared by all
        np.testing.assert_allclose(array(model.time_steps.tau), [0.65625, 0.15625, 0.15625, 1.03125], rtol=1e-14)

    def test_lower_bound(self) -> None:
        model = network(TAU, lower_bound=0.0625, init=0.5)
        self.step(model, lr=0.5, alpha=0.5)
        assert model.time_steps.tau.tolist() == [0.25, 0.0625, 0.0625, 0.5]

    def test_fixed_steps_stay(self) -> None:
        model = network(TAU, constraint="fixed")
        self.step(model, lr=0.5, alpha=0.5)
        assert model.time_steps.tau.tolist() == TAU

    def test_the_learning_rate_is_that_of_tau_now(self) -> None:
        model = network(TAU)
        weights = [p for p in model.parameters() if p is not model.time_steps.values]
        groups = [{"params": weights, "lr": 100.0}, {"params": [model.time_steps.values], "lr": 1.0}]
        optimizer = torch.optim.SGD(groups)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25)
        optimizer.step()
        scheduler.step()
        constrain_(model, optimizer, [L1(0.5, proximal=True)])
        assert model.time_steps.tau.tolist() == [0.375, -0.125, 0.0, 0.625]

    def test_a_learning_rate_in_a_tensor(self) -> None:
        model = network(TAU)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5), foreach=False)
        constrain_(model, optimizer, [L1(0.5, proximal=True)])
        assert model.time_steps.tau.tolist() == [0.25, 0.0, 0.0, 0.5]


def weights_and_biases(model: TimeVariableNetwork) -> list[list[Array]]:
    return [[array(linear.weight), array(linear.bias)] for linear in linear_layers(model)]


class TestWeights:
    def test_elastic_net(self) -> None:
        model = network()
        assert isinstance(model.head, nn.Linear)
        arrays = [w for layer in weights_and_biases(model) for w in layer] + [array(model.head.weight)]
        expected = 0.35 * sum(np.sum(w**2) + np.sum(np.abs(w)) for w in arrays)
        penalty = WeightElasticNet(0.7)(model)
        assert penalty.item() == pytest.approx(expected, rel=1e-14)
        penalty.backward()
        for name, p in model.named_parameters():
            if name == "time_steps.values":
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, 0.7 * p.detach() + 0.35 * p.detach().sign(), rtol=1e-14, atol=1e-16)

    def test_group_lasso(self) -> None:
        model = network()
        norms = [np.sqrt(sum(np.sum(w**2) for w in layer)) for layer in weights_and_biases(model)]
        penalty = GroupLasso(0.7)(model)
        assert penalty.item() == pytest.approx(0.7 * sum(norms), rel=1e-14)
        penalty.backward()
        for layer, norm in zip(model.layers, norms, strict=True):
            for p in layer.parameters():
                torch.testing.assert_close(p.grad, 0.7 * p.detach() / norm, rtol=1e-13, atol=1e-16)

    def test_group_lasso_at_a_layer_that_vanished(self) -> None:
        """The root of a sum of squares gave NaN here."""
        model = network()
        with torch.no_grad():
            for p in model.layers[1].parameters():
                p.zero_()
        GroupLasso(1.0)(model).backward()
        for p in model.layers[1].parameters():
            assert p.grad is not None
            assert torch.equal(p.grad, torch.zeros_like(p))
        for p in model.layers[0].parameters():
            assert p.grad is not None
            assert bool(torch.isfinite(p.grad).all())

    def test_layers_without_parameters_count_nothing(self) -> None:
        model = network()
        model.layers[1] = nn.Tanh()
        assert bool(torch.isfinite(GroupLasso(1.0)(model)))


class TestBiasOrdering:
    def test_value_and_gradient(self) -> None:
        model = network()
        biases = [layer[1] for layer in weights_and_biases(model)]
        expected, gradients = 0.0, []
        for b in biases:
            gradient = np.zeros_like(b)
            for j in range(len(b) - 1):
                excess = max(0.0, b[j] - b[j + 1])
                expected += 2.5 * excess**2
                gradient[j] += 5.0 * excess
                gradient[j + 1] -= 5.0 * excess
            gradients.append(gradient)
        assert expected > 0
        penalty = BiasOrdering(5.0)(model)
        assert penalty.item() == pytest.approx(expected, rel=1e-14)
        penalty.backward()
        for linear, gradient in zip(linear_layers(model), gradients, strict=True):
            assert linear.bias.grad is not None
            np.testing.assert_allclose(array(linear.bias.grad), gradient, rtol=1e-13, atol=1e-16)

    def test_ordered_biases_cost_nothing(self) -> None:
        model = network()
        with torch.no_grad():
            for linear in linear_layers(model):
                linear.bias.copy_(linear.bias.sort().values)
        assert BiasOrdering()(model).item() == 0.0

    def test_the_papers_weight(self) -> None:
        assert BiasOrdering().beta == 10.0


class TestCommon:
    def penalties(self) -> list[Penalty]:
        return [L1(1), L2(1), ElasticNet(1), TimeHorizon(), WeightElasticNet(1), GroupLasso(1), BiasOrdering()]

    def test_names_are_those_of_the_records(self) -> None:
        names = [penalty.name for penalty in self.penalties()]
        assert names == [
            "l1",
            "l2",
            "elastic_net",
            "time_horizon",
            "weight_elastic_net",
            "group_lasso",
            "bias_ordering",
        ]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_scalars_of_the_networks_type(self, dtype: torch.dtype) -> None:
        for penalty in self.penalties():
            value = penalty(network(dtype=dtype), torch.zeros(1, 3), torch.zeros(1), [])
            assert value.dtype == dtype
            assert value.shape == ()

    def test_they_add_up(self) -> None:
        model = network(TAU)
        total = torch.stack([penalty(model) for penalty in self.penalties()]).sum()
        total.backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_they_go_on_after_pruning(self) -> None:
        model = network(TAU)
        model.keep_layers_([0, 2, 3])
        assert L1(1.0)(model).item() == 1.375
        norms = [np.sqrt(sum(np.sum(w**2) for w in layer)) for layer in weights_and_biases(model)]
        assert GroupLasso(1.0)(model).item() == pytest.approx(sum(norms), rel=1e-14)
        assert len(norms) == 3

    def test_they_compile(self) -> None:
        torch._dynamo.reset()
        model = network(TAU, activation=SmoothReLU())
        penalties = self.penalties()

        def total(model: TimeVariableNetwork) -> Tensor:
            return torch.stack([penalty(model) for penalty in penalties]).sum()

        compiled = torch.compile(total, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(model), total(model), rtol=1e-14, atol=1e-14)
