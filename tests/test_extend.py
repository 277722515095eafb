"""docs/how-to/extend.md runs as it stands; a scheme or constraint of one's own goes through all that networks do."""

import copy
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import taulearn
from taulearn import TimeSteps, fit, load_model, penalties, prune, save_model
from taulearn.diagnostics import depth_profile, gradient_propagation
from taulearn.nn import Constraint, Fractional, Residual, Scheme, TimeVariableNetwork

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "extend.md"
DOUBLE = torch.float64
CE = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """The names that the code of the page defines, as a module, which the compiler looks for."""
    module = sys.modules["extend"] = types.ModuleType("extend")
    for cell in re.findall(r"```\{code-cell\}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(cell, vars(module))
    yield vars(module)
    del sys.modules["extend"]


class Logarithms(Constraint):
    """Positive steps, by their logarithms; the last one cannot be deleted, so that it need not be stored twice."""

    name = "logarithms"

    def values(self, steps: Tensor) -> Tensor:
        return steps.log()

    def tau(self, values: Tensor) -> Tensor:
        return values.exp()

    def projected(self, values: Tensor) -> Tensor:
        return values

    def fixed(self, number: int) -> dict[int, str]:
        return {1: "it is held"} if number > 1 else {}


class Accumulating(Scheme):
    """A carry of several tensors, one of them a dictionary's: y + tau f(y) minus the mean of all earlier increments."""

    name = "accumulating"

    def prepare(self, tau: Tensor) -> Any:
        return tau.unbind(), tau.cumsum(0)

    def init(self, y_0: Tensor) -> Any:
        return {"sum": torch.zeros_like(y_0), "first": (y_0, None)}

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Any, coefficients: Any) -> tuple[Tensor, Any]:
        tau, time = coefficients
        total = carry["sum"] + tau[l] * f(y)
        return y + tau[l] * f(y) - 0.1 * total / time[l], {"sum": total, "first": carry["first"]}


def network(scheme: Scheme, steps: TimeSteps, *, seed: int = 0, sharp: float = 1.0) -> TimeVariableNetwork:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(steps.num_steps)]
    model = TimeVariableNetwork(layers, nn.Linear(5, 3), scheme, steps, stem=nn.Linear(4, 5)).to(DOUBLE)
    with torch.no_grad():
        model.head.weight.mul_(sharp)
    return model


def batch(number: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 4, dtype=DOUBLE, generator=generator), torch.arange(number) % 3


SCHEMES: dict[str, Callable[[dict[str, Any]], Scheme]] = {
    "Midpoint": lambda page: page["Midpoint"](),
    "SecondOrder": lambda page: page["SecondOrder"](),
    "Accumulating": lambda page: Accumulating(),
}
CONSTRAINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "at-most": lambda page: page["AtMost"](),
    "logarithms": lambda page: Logarithms(),
}


def train(model: TimeVariableNetwork, **options: Any) -> Any:
    optimizer = torch.optim.SGD(taulearn.parameter_groups(model, lr=0.1))
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 10, "progress": False, "compile": "never"} | options
    return fit(model, batch(), loss=CE, optimizer=optimizer, **settings)


@pytest.mark.parametrize("constraint", ["free", *CONSTRAINTS])
@pytest.mark.parametrize("name", SCHEMES)
def test_fit_prune_predict_save_load(page: dict[str, Any], name: str, constraint: str, tmp_path: Path) -> None:
    def make(seed: int = 0) -> TimeVariableNetwork:
        rule = CONSTRAINTS[constraint](page) if constraint in CONSTRAINTS else constraint
        return network(SCHEMES[name](page), TimeSteps(4, horizon=2.0, constraint=rule, dtype=DOUBLE), seed=seed)

    model, (x, z) = make(), batch()
    history = train(model, penalties=[penalties.L1(0.01)], validation=(x, z))
    assert history.iterations["loss"][-1] < history.iterations["loss"][0]
    assert model.time_steps.constraint == constraint
    if model.scheme.deletes_exactly:
        with torch.no_grad():
            before = model(x)
        report = prune(model, keep=[0, 1, 3])
        assert model.time_steps.origin == (0, 1, 3)
        assert report
        assert not torch.equal(model(x), before)
    outputs, _ = model.predict(x, 1.0)
    torch.testing.assert_close(outputs, model(x).detach(), rtol=1e-12, atol=1e-12)
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="host must be given"):
        load_model(tmp_path)
    loaded = load_model(tmp_path, host=make(seed=1))
    assert loaded.time_steps.origin == model.time_steps.origin
    assert loaded.time_steps.constraint == constraint
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", SCHEMES)
def test_early_exit_drops_samples_from_state_and_carry_alike(page: dict[str, Any], name: str) -> None:
    model, (x, _) = network(SCHEMES[name](page), TimeSteps(6, init=0.7, dtype=DOUBLE), sharp=6.0), batch()
    check_early_exit(model, x)


@pytest.mark.parametrize("memory", ["exact", "fast"])
@pytest.mark.parametrize("memory_from", [0, 1])
@pytest.mark.parametrize("layers", [3, 12, 40])
def test_early_exit_drops_samples_from_fractional_memory(memory: str, memory_from: int, layers: int) -> None:
    scheme = Fractional(0.6, memory_from, memory=memory)
    model = network(scheme, TimeSteps(layers, init=3.0 / layers, dtype=DOUBLE), sharp=15.0)
    check_early_exit(model, batch()[0])


def check_early_exit(model: TimeVariableNetwork, x: Tensor) -> None:
    """Samples that leave at several depths do not change the others; each is as alone, and as in the full pass."""
    number = len(model.layers)
    outputs, depths = model.predict(x, 0.9)
    gone = depths.unique().tolist()
    assert len(gone) >= 3
    assert number in gone
    with torch.no_grad():
        full = model.intermediate_outputs(x)
    alone = [model.predict(x[i : i + 1], 0.9) for i in range(len(x))]
    assert depths.tolist() == [int(each.depths) for each in alone]
    torch.testing.assert_close(outputs, torch.cat([each.outputs for each in alone]), rtol=1e-12, atol=1e-12)
    expected = torch.stack([full[int(k)][i] for i, k in enumerate(depths)])
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_two_evaluations_of_a_layer_in_diagnostics(page: dict[str, Any]) -> None:
    model, (x, z) = network(page["Midpoint"](), TimeSteps(4, dtype=DOUBLE)), batch()
    with torch.no_grad():
        states = model.states(x, initial=True)
        sizes = [(b - a).square().sum(1).mean().sqrt() for a, b in pairwise(states)]
    torch.testing.assert_close(depth_profile(model, x, z, CE).contribution, torch.stack(sizes), rtol=1e-9, atol=0.0)
    found = gradient_propagation(model, x[:2])
    assert found.structural_growth.tolist() == [1.0] * 4
    assert taulearn.summary(model).scheme == "midpoint"


@pytest.mark.parametrize("name", SCHEMES)
def test_the_compiler_sees_one_graph(page: dict[str, Any], name: str) -> None:
    """Of states, gradients and projection, as the fused step of fit compiles them."""
    model = network(SCHEMES[name](page), TimeSteps(3, horizon=1.5, constraint=page["AtMost"](), dtype=DOUBLE))
    x, _ = batch()

    def projected_gradient(values: Tensor) -> Tensor:
        def loss(tau: Tensor) -> Tensor:
            return functional_call(model, {"time_steps.values": tau}, (x,)).square().mean()

        return model.time_steps.projected(values - grad(loss)(values))

    torch._dynamo.reset()
    values = model.time_steps.values.detach()
    found = torch.compile(projected_gradient, fullgraph=True, backend="aot_eager")(values)
    torch.testing.assert_close(found, projected_gradient(values), rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, values)


def test_a_constraint_holds_in_training(page: dict[str, Any]) -> None:
    model = network(Residual(), TimeSteps(4, horizon=1.0, constraint=page["AtMost"](), dtype=DOUBLE))
    history = train(model, epochs=10)
    tau = history.iterations["tau"]
    assert (tau >= 0).all()
    assert (tau.sum(1) <= 1.0 + 1e-6).all()
    with pytest.raises(ValueError, match="init must be >= 0 with a sum of at most 1"):
        TimeSteps(2, constraint=page["AtMost"](), init=0.75)


def test_a_constraint_is_copied_into_its_steps(page: dict[str, Any]) -> None:
    rule = page["AtMost"]()
    first, second = (TimeSteps(2, horizon=T, constraint=rule) for T in (1.0, 5.0))
    assert (first.horizon, second.horizon) == (1.0, 5.0)
    twin = copy.deepcopy(second)
    twin.horizon = 7.0
    assert second.horizon == 5.0


def test_layers_that_a_constraint_holds_stay() -> None:
    model = network(Residual(), TimeSteps(4, constraint=Logarithms(), dtype=DOUBLE))
    assert model.fixed_layers() == {1: "it is held"}
    with pytest.raises(ValueError, match=r"indices must .*got \[0, 2\]"):
        model.time_steps.keep_([0, 2])
    with pytest.raises(ValueError, match="keep must contain layer 1"):
        prune(model, keep=[0, 2])
    with pytest.raises(ValueError, match="model must not have the constraint 'logarithms', with which layer 1 cannot"):
        taulearn.truncate(model, 1)


def test_a_constraint_in_a_wrapped_model(page: dict[str, Any], tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        host = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        return taulearn.wrap(host, constraint=page["AtMost"](), example_inputs=torch.ones(2, 4))

    model, x = make(), torch.randn(5, 4)
    assert model.time_steps.constraint == "at-most"
    prune(model, keep=[0, 2])
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path, host=make())(x), model(x))


def test_a_constraint_in_a_builder(page: dict[str, Any], tmp_path: Path) -> None:
    def make() -> TimeVariableNetwork:
        return taulearn.nn.resnet(4, 5, 3, 4, constraint=page["AtMost"]())

    model, x = make(), torch.ones(2, 4)
    prune(model, keep=[0, 2])
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match="host must be given"):
        load_model(tmp_path)
    assert torch.equal(load_model(tmp_path, host=make())(x), model(x))


def test_names_of_the_package_stay_its_own() -> None:
    class Mine(Constraint):
        name = "free"

    with pytest.raises(ValueError, match=r"constraint must .*got Mine with 'free'"):
        TimeSteps(2, constraint=Mine())


def test_a_scheme_without_a_step_says_so() -> None:
    class Nothing(Scheme):
        name = "nothing"

    with pytest.raises(NotImplementedError, match="Nothing must define step"):
        network(Nothing(), TimeSteps(2, dtype=DOUBLE))(batch()[0])


class TestStatesAlone:
    """A scheme as it was documented until now."""

    def make(self) -> TimeVariableNetwork:
        with pytest.warns(DeprecationWarning, match=r"Old.states is deprecated: define step"):

            class Old(Residual):
                name = "old"

                def states(self, x: Tensor, layers: Any, skips: Any, tau: Tensor) -> list[Tensor]:
                    states, y = [], x
                    for l, (layer, step) in enumerate(zip(layers, tau.unbind(), strict=True)):
                        y = skips(y, l, l + 1) + step * layer(y + 0.5 * step * layer(y))
                        states.append(y)
                    return states

        return network(Old(), TimeSteps(6, init=0.7, dtype=DOUBLE), sharp=6.0)

    def test_everything_works_and_predict_runs_it_whole(self, page: dict[str, Any]) -> None:
        model, (x, _) = self.make(), batch()
        check_early_exit(model, x)
        new = copy.deepcopy(model)
        new.scheme = page["Midpoint"]()
        torch.testing.assert_close(model(x), new(x), rtol=1e-12, atol=1e-12)
        assert model.predict(x, 0.9).depths.tolist() == new.predict(x, 0.9).depths.tolist()
        train(model)
        prune(model, keep=[0, 2, 5])

    def test_a_step_in_a_subclass_ends_it(self) -> None:
        old = type(self.make().scheme)
        with warnings.catch_warnings():
            warnings.simplefilter("error")

            class New(old):  # type: ignore[misc, valid-type]
                def step(self, *args: Any) -> Any:
                    return Residual.step(self, *args)

        assert not New.runs_whole
