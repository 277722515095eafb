"""The compiled steps compute what the plain step computes, up to rounding, and say so when they cannot compile."""

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from taulearn import Pruning, fit, parameter_groups
from taulearn.nn import Residual, TimeSteps, TimeVariableNetwork
from taulearn.penalties import L1, TimeHorizon
from taulearn.training import History, Run
from taulearn.training.fast.compiler import COMPILE_PAYS_FROM, compile_once
from training.support import (
    Crash,
    StubbornTanh,
    assert_same_history,
    assert_same_weights,
    crash_after,
    digits,
    network,
    run_fit,
)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
BATCH = 20
DATA = 200
EPOCHS = 5
Factory = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def short_unroll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps per compiled call, which compile sooner."""
    monkeypatch.setattr("taulearn.training.step.UNROLL", 2)


def sgd(**options: Any) -> Factory:
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.05, **options)


def train(
    factory: Factory,
    compile: str,  # noqa: A002
    *,
    options: Callable[[torch.optim.Optimizer], dict[str, Any]] = lambda optimizer: {},
    **network_options: Any,
) -> tuple[Any, History]:
    model = network(**{"dtype": torch.float64, "init": [0.3, 0.05, 0.2, 0.1, 0.35]} | network_options)
    optimizer = factory(model)
    torch.manual_seed(5)
    train = digits(DATA, model.time_steps.values.dtype)
    defaults = {"epochs": EPOCHS, "batch_size": BATCH, "compile": compile}
    return model, run_fit(model, train, optimizer, **defaults | options(optimizer))


def assert_close(left: tuple[Any, History], right: tuple[Any, History], tolerance: float = 1e-10) -> None:
    """Weights and record agree up to rounding; deletions agree."""
    ours, theirs = left[0].state_dict(), right[0].state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=tolerance)
    for columns, others in ((left[1].iterations, right[1].iterations), (left[1].epochs, right[1].epochs)):
        assert columns.keys() == others.keys()
        for name in columns.keys() - {"seconds"}:
            np.testing.assert_allclose(columns[name], others[name], rtol=0.0, atol=tolerance, err_msg=name)
    assert [(d.iteration, d.layer) for d in left[1].deletions] == [(d.iteration, d.layer) for d in right[1].deletions]


@needs_compiler
@pytest.mark.parametrize(("every", "iterations"), [(9, [9]), (1, [4])])  # in the midst of two fused steps
def test_fused_sgd_with_everything_follows_a_deletion(tmp_path: Path, every: int, iterations: list[int]) -> None:
    def factory(model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, lr=0.05, tau_lr=0.02, weight_decay=1e-3)
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "penalties": [L1(0.6, proximal=True), TimeHorizon(weight=0.3)],
            "pruning": Pruning(0.05, every=every),
            "scheduler": lr_scheduler.StepLR(optimizer, 2, 0.5),
            "epochs": 5,
        }

    network_options = {"hidden_layers": 3, "init": [0.3, 0.06, 0.4]}
    eager = train(factory, "never", options=options, **network_options)
    assert [d.iteration for d in eager[1].deletions] == iterations
    run = tmp_path / "run"

    def with_run(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return options(optimizer) | {"run": run}

    compiled = train(factory, "always", options=with_run, **network_options)
    assert_close(compiled, eager)
    decisions = Run.open(run).decisions
    assert decisions["step"] == "compiled, 2 SGD steps fused"
    assert decisions["compile"] == decisions[f"compile after iteration {iterations[0]}"] == "always (as asked)"


VARIANTS: dict[str, tuple[Factory, Callable[[torch.optim.Optimizer], dict[str, Any]], dict[str, Any]]] = {
    "plain": (sgd(), lambda optimizer: {"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.9)}, {}),
    "dampening": (sgd(momentum=0.8, dampening=0.3, weight_decay=1e-3), lambda optimizer: {}, {}),
    "maximize": (
        sgd(momentum=0.5, weight_decay=1e-2, maximize=True),
        lambda optimizer: {"loss": lambda output, target: -nn.functional.cross_entropy(output, target)},
        {},
    ),
    "one cycle": (
        sgd(momentum=0.9),
        lambda optimizer: {"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)},
        {},
    ),
    "simplex": (sgd(momentum=0.9), lambda optimizer: {}, {"constraint": "simplex"}),
    "dependent": (
        sgd(momentum=0.9),
        lambda optimizer: {"pruning": Pruning(0.08)},
        {"constraint": "dependent", "lower_bound": 0.04},
    ),
    "fixed": (sgd(momentum=0.9), lambda optimizer: {}, {"constraint": "fixed"}),
    "uneven batches": (sgd(momentum=0.9), lambda optimizer: {"batch_size": 30}, {}),
}


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_sgd(variant: str) -> None:
    factory, options, network_options = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = train(factory, "always", options=options, **network_options)
    assert_close(compiled, train(factory, "never", options=options, **network_options))


@needs_compiler
def test_adam_with_a_compiled_objective(tmp_path: Path) -> None:
    def factory(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=3e-3)

    def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"penalties": [L1(0.1)], "clip_norm": 1.0}

    run = tmp_path / "run"
    small: dict[str, Any] = {"hidden_layers": 2, "init": [0.3, 0.2]}
    compiled = train(factory, "always", options=lambda optimizer: options(optimizer) | {"run": run}, **small)
    assert_close(compiled, train(factory, "never", options=options, **small), 1e-9)
    assert "compiled objective (the optimiser is not plain torch.optim.SGD)" in Run.open(run).decisions["step"]


@pytest.mark.long
@needs_compiler
def test_dropout_draws_the_same_numbers_compiled() -> None:
    assert_close(train(sgd(), "always", dropout=0.2), train(sgd(), "never", dropout=0.2))


@pytest.mark.long
@needs_compiler
def test_a_compiled_run_resumes_bit_by_bit(tmp_path: Path) -> None:
    def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"penalties": [L1(0.6, proximal=True)], "pruning": Pruning(0.05, every=7), "run": tmp_path / "whole"}

    factory = sgd(momentum=0.9)
    model, history = train(factory, "always", options=options)
    assert history.deletions
    for epoch in (1, 3):
        changed = {"run": tmp_path / str(epoch)}
        with pytest.raises(Crash):
            train(
                factory,
                "always",
                options=lambda optimizer, changed=changed, epoch=epoch: (
                    options(optimizer) | changed | {"callbacks": [crash_after(epoch)]}
                ),
            )
        resumed, record = train(
            factory,
            "always",
            options=lambda optimizer, changed=changed: options(optimizer) | changed | {"resume": True},
        )
        assert_same_weights(resumed, model)
        assert_same_history(record, history)


def test_auto_decides_from_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.training.fast.compiler._compiler_found", lambda: True)
    train(sgd(), "auto", options=lambda optimizer: {"run": tmp_path / "run"})
    decisions = Run.open(tmp_path / "run").decisions
    assert decisions["compile"] == f"eager: 50 iterations ahead, compiling pays from {COMPILE_PAYS_FROM}"
    assert decisions["step"] == "eager"


@needs_compiler
def test_auto_compiles_a_long_run_and_no_longer_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("taulearn.training.fast.compiler.COMPILE_PAYS_FROM", 45)

    def compile_nothing(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        compiled.append(function)
        return function

    monkeypatch.setattr("taulearn.training.fast.fused.compile_once", compile_nothing)

    def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"penalties": [L1(0.6, proximal=True)], "pruning": Pruning(0.05, every=9)}

    run = tmp_path / "run"
    result = train(sgd(), "auto", options=lambda optimizer: options(optimizer) | {"run": run})
    decisions = Run.open(run).decisions
    assert len(compiled) == 1
    assert decisions["compile"] == "compiled: 50 iterations ahead, compiling pays from 45"
    deleted = result[1].deletions[0].iteration
    assert decisions[f"compile after iteration {deleted}"].startswith(f"eager: {50 - deleted} iterations ahead")
    assert_close(result, train(sgd(), "never", options=options))


def test_without_a_compiler_training_is_eager_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    eager = train(sgd(), "never")
    with pytest.warns(UserWarning, match=r"training runs eager: no C\+\+ compiler was found") as caught:
        result = train(sgd(), "always", options=lambda optimizer: {"run": tmp_path / "run"})
    assert len(caught) == 1
    assert_same_weights(result[0], eager[0])
    assert Run.open(tmp_path / "run").decisions["compile"].startswith("eager: no C++ compiler was found")


@needs_compiler
@pytest.mark.parametrize("factory", [sgd(momentum=0.9), lambda model: torch.optim.Adam(model.parameters())])
def test_what_does_not_compile_is_trained_eagerly_with_a_warning(factory: Factory) -> None:
    with pytest.warns(UserWarning, match="training goes on uncompiled, because compilation failed: ."):
        compiled = train(factory, "always", activation=StubbornTanh())
    assert_close(compiled, train(factory, "never", activation=StubbornTanh()))


@pytest.mark.long
@needs_compiler
def test_a_penalty_that_a_callback_changes_is_followed() -> None:
    def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        penalty = L1(0.0)

        def callback(end: Any) -> None:
            penalty.alpha = 0.2 * end.epoch

        return {"penalties": [penalty], "callbacks": [callback]}

    assert_close(train(sgd(), "always", options=options), train(sgd(), "never", options=options))


class Idle(nn.Module):
    """An activation with a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.long
@needs_compiler
def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    factory = sgd(weight_decay=0.1)
    assert_close(train(factory, "always", activation=Idle()), train(factory, "never", activation=Idle()))


@pytest.mark.long
@needs_compiler
def test_hooks_of_the_optimizer_are_called() -> None:
    def factory(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer.register_step_post_hook(lambda *_: model.head.weight.data.mul_(0.9))
        return optimizer

    assert_close(train(factory, "always"), train(factory, "never"))


@pytest.mark.long
@needs_compiler
def test_accumulated_batches_compile_too() -> None:
    def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"accumulate": 3}

    assert_close(train(sgd(), "always", options=options), train(sgd(), "never", options=options))


@pytest.mark.long
@needs_compiler
def test_any_number_of_functions_compile() -> None:
    """torch counts recompilations per code object, and gives up after eight."""

    def function(x: Tensor) -> Tensor:
        return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(1, 12):
            x = torch.ones(size)
            assert torch.equal(compile_once(function)(x), 2 * x)


@needs_compiler
def test_what_a_callback_freezes_or_changes_is_followed() -> None:
    """Nothing is checked before a fused call, so that a changed model must be noticed between two epochs."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LeakyReLU(0.1))

    def weights(mode: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layers = [copy.deepcopy(module), copy.deepcopy(module)]
        layers[1][0] = torch.nn.Linear(4, 4)
        network = TimeVariableNetwork(layers, torch.nn.Linear(4, 1), Residual(), TimeSteps(2)).double()

        def change(end: Any) -> None:
            network.layers[0][1].negative_slope = 0.5
            network.layers[1][0].weight.requires_grad_(end.epoch != 1)

        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(12, 2)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        fit(
            network,
            (x, x[:, :1]),
            loss=torch.nn.functional.mse_loss,
            optimizer=optimizer,
            epochs=3,
            batch_size=2,
            compile=mode,
            callbacks=[change],
            progress=False,
        )
        return network.state_dict()

    compiled, eager = weights("always"), weights("never")
    for name, value in eager.items():
        assert torch.allclose(compiled[name], value, atol=1e-12), name
