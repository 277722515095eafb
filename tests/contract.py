"""The contract of every model with learned time steps, whatever built it.

A test module subclasses :class:`TimeVariableContract` and gives it a ``case`` fixture, one :class:`Case` per model.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cosine_similarity, mse_loss

from taulearn import prune
from taulearn.adaptivity.coarsen import check_prunable
from taulearn.adaptivity.criteria import on_data
from taulearn.depth.states import forward_with_states
from taulearn.nn import TimeSteps
from taulearn.nn.pruned_models import prunable_of, wrapping_of

CONSTRAINTS = ("free", "fixed", "dependent", "simplex")
DEVICES = ("cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []))
all_constraints = pytest.mark.parametrize("constraint", CONSTRAINTS)


@dataclass(frozen=True)
class Case:
    """One model under the contract.

    Attributes:
        name: Its name in the test's id.
        build: From a constraint, a fresh float64 model with smooth layers, drawn weights and four or more steps.
        inputs: A float64 batch of two or more samples.
        reference: The model's output by another implementation, where there is one.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[], Tensor]
    reference: Callable[[Any, Tensor], NDArray[np.float64]] | None = None

    def __str__(self) -> str:
        return self.name

    def model(self, constraint: str = "free", *, seed: int = 0) -> Any:
        """A model whose steps differ from each other."""
        torch.manual_seed(seed)
        model = self.build(constraint)
        scramble_(model.time_steps)
        return model


@torch.no_grad()
def scramble_(steps: Any) -> None:
    """Draw steps in the upper half of (0, T/N), which all constraints allow but the simplex, which is projected on."""
    assert isinstance(steps, TimeSteps)
    steps.values.uniform_(0.5, 1.0).mul_(steps.horizon / steps.num_steps)
    steps.project_()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of half the squared output with respect to all parameters, by plain autograd."""
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(model(x).square().sum() / 2, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, values, strict=True))


def pruning_error(model: Any, layers: list[int], step: float, x: Tensor) -> float:
    """The largest change of the output when layers with this step are deleted; ``model`` itself stays as it is."""
    model = copy.deepcopy(model)
    steps = model.time_steps
    with torch.no_grad():
        steps.values[layers] = step
        if steps.constraint == "simplex":
            others = [i for i in range(steps.num_steps) if i not in layers]
            steps.values[others] *= (steps.horizon - step * len(layers)) / steps.values[others].sum()
    before, number = model(x), steps.num_steps
    kept = [i for i in range(number) if i not in layers]
    report = prune(model, keep=kept)
    assert sorted(d.layer for d in report.deleted) == layers
    assert steps.num_steps == number - len(layers) == len(steps.tau)
    return float((model(x) - before).detach().abs().max())


class TimeVariableContract:
    """The tests; ``case`` is given by the subclass."""

    @all_constraints
    def test_forward_is_the_reference(self, case: Case, constraint: str) -> None:
        if case.reference is None:
            pytest.skip("no other implementation")
        model, x = case.model(constraint), case.inputs()
        expected = torch.from_numpy(case.reference(model, x))
        torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)

    @all_constraints
    def test_gradcheck_of_all_parameters(self, case: Case, constraint: str) -> None:
        model, x = case.model(constraint), case.inputs()[:2]
        names, values = zip(*model.named_parameters(), strict=True)
        assert ("time_steps.values" in names) == (constraint != "fixed")

        def output(*parameters: Tensor) -> Tensor:
            return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

        assert torch.autograd.gradcheck(output, tuple(v.detach().requires_grad_() for v in values))

    @all_constraints
    def test_state_dict_round_trip(self, case: Case, constraint: str) -> None:
        model, other, x = case.model(constraint, seed=1), case.model(constraint, seed=2), case.inputs()
        assert not torch.equal(model(x), other(x))
        assert "time_steps.values" in model.state_dict()
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(model(x), other(x))

    def test_fixed_steps_do_not_train(self, case: Case) -> None:
        model = case.model("fixed")
        before = model.time_steps.tau.clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        model(case.inputs()).square().sum().backward()
        optimizer.step()
        model.time_steps.project_()
        assert torch.equal(model.time_steps.tau, before)
        assert all(p is not model.time_steps.values for p in model.parameters())

    @all_constraints
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_types_and_devices(self, case: Case, constraint: str, dtype: torch.dtype, device: str) -> None:
        model, x = case.model(constraint), case.inputs()
        expected = model(x).detach()
        model.to(dtype=dtype, device=device)
        output = model(x.to(dtype=dtype, device=device))
        assert output.dtype == model.time_steps.tau.dtype == dtype
        assert output.device.type == model.time_steps.tau.device.type == device
        tolerance = 1e-4 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(output.detach().cpu().double(), expected, rtol=tolerance, atol=tolerance)

    @all_constraints
    def test_a_deep_copy_is_independent(self, case: Case, constraint: str) -> None:
        model, x = case.model(constraint), case.inputs()
        expected, twin = model(x), copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        assert twin.time_steps.origin == model.time_steps.origin
        with torch.no_grad():
            for value in twin.state_dict().values():
                if value.is_floating_point():
                    value.mul_(0.5)
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)

    def test_compiled_is_eager(self, case: Case) -> None:
        model, x = case.model(), case.inputs()
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
        expected = gradients(model, x)
        compiled(x).square().sum().div(2).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12)

    @all_constraints
    def test_vmap_over_networks_is_the_loop(self, case: Case, constraint: str) -> None:
        models, x = [case.model(constraint, seed=seed) for seed in range(3)], case.inputs()
        parameters, buffers = stack_module_state(models)
        base = copy.deepcopy(models[0])

        def output(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return functional_call(base, (p, b), (x,))

        stacked = vmap(output)(parameters, buffers)
        torch.testing.assert_close(stacked, torch.stack([model(x) for model in models]), rtol=1e-12, atol=1e-12)

    @all_constraints
    def test_functional_gradient_is_autograd(self, case: Case, constraint: str) -> None:
        model, x = case.model(constraint), case.inputs()
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(p: dict[str, Tensor]) -> Tensor:
            return functional_call(model, p, (x,)).square().sum() / 2

        found, expected = grad(loss)(parameters), gradients(model, x)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)

    @all_constraints
    def test_steps_get_gradients(self, case: Case, constraint: str) -> None:
        model, x = case.model(constraint), case.inputs()
        tau = model.time_steps.tau
        assert tau.shape == (model.time_steps.num_steps,)
        assert tau.requires_grad == (constraint != "fixed")
        if constraint != "fixed":
            assert bool((gradients(model, x)["time_steps.values"] != 0).all())

    def test_the_sensitivity_is_the_derivative_in_the_steps(self, case: Case) -> None:
        """Also where they do not train. The fractional schemes' is the one in tau^gamma f, the weights held."""
        model, x = case.model(), case.inputs()
        if prunable_of(model).scheme.step_power != 1.0:
            pytest.skip("tau^gamma takes the place of tau")
        z, values = torch.zeros_like(model(x).detach()), model.time_steps.values
        expected = (values * torch.autograd.grad(mse_loss(model(x), z), values)[0]).detach().abs()
        for frozen in (False, True):
            values.requires_grad_(not frozen)
            found = on_data("sensitivity", (x, z), mse_loss)(model.time_steps.tau, model)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)

    def test_the_influence_is_that_of_the_states(self, case: Case) -> None:
        model, x = case.model(), case.inputs()
        wrapped = wrapping_of(model) is not None
        states = forward_with_states(model, x)[1] if wrapped else model.states(x, initial=True)
        states = [y.detach().flatten(0, 1) if y.ndim == 3 else y.detach().flatten(1) for y in states]
        found = on_data("influence", (x, x))(model.time_steps.tau, model).double()
        for l, (y, after) in enumerate(pairwise(states)):
            expected = (1.0 - cosine_similarity(y, after)).mean() if y.shape == after.shape else y.new_zeros(())
            torch.testing.assert_close(found[l], expected, rtol=1e-5, atol=0.0)

    @all_constraints
    def test_pruning_a_vanishing_step(self, case: Case, constraint: str) -> None:
        """Residual: a zero step changes nothing. Fractional: the error is proportional to tau^gamma. Else: refused."""
        model, x = case.model(constraint), case.inputs()
        if not prunable_of(model).scheme.deletes_exactly:
            with pytest.raises(ValueError, match="in which tau = 0 is not the identity: no layer can be deleted"):
                prune(model)
            return
        number, fixed = model.time_steps.num_steps, prunable_of(model).fixed_layers()
        free = [i for i in range(number) if i not in fixed][: number - 1]
        assert free
        if prunable_of(model).scheme.step_power == 1.0:
            error = pruning_error(model, free, 0.0, x)
            # a simplex is projected upon again, which rounds
            assert error <= (1e-13 if constraint == "simplex" else 0.0)
        else:
            steps = [1e-6, 1e-8, 1e-10]
            errors = [pruning_error(model, free[:1], step, x) for step in steps]
            slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
            power = prunable_of(model).scheme.step_power
            assert slope == pytest.approx(power[free[0]] if isinstance(power, tuple) else power, abs=0.02)

    @all_constraints
    def test_pruning_keeps_the_contract(self, case: Case, constraint: str) -> None:
        model, x = case.model(constraint), case.inputs()
        if not prunable_of(model).scheme.deletes_exactly:
            with pytest.raises(ValueError, match="tau = 0 is not the identity"):
                check_prunable(model)
            return
        gone = next(i for i in range(model.time_steps.num_steps) if i not in prunable_of(model).fixed_layers())
        keep = [i for i in range(model.time_steps.num_steps) if i != gone]
        prune(model, keep=keep)
        assert model.time_steps.origin == tuple(keep)
        assert f"origin={tuple(keep)}" in repr(model)
        assert all(bool(torch.isfinite(g).all()) for g in gradients(model, x).values())
        twin = copy.deepcopy(model)
        twin.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(twin(x), model(x))
        if case.reference is not None:
            expected = torch.from_numpy(case.reference(model, x))
            torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)
