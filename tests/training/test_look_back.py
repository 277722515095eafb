"""Fused steps that ran past the deletion of a layer are undone, as if the layers had been looked at all along.

Nothing is compiled here: the functions that would be are run as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import taulearn
from taulearn import Pruning, parameter_groups
from taulearn.penalties import L1, StageCost
from taulearn.training import History, Interrupted, StopTraining
from taulearn.training.fast.fused import FusedSGD
from training.support import LOSS, assert_same_history, assert_same_weights, digits, network, run_fit
from training.test_fused import assert_close

OPTIONS = {"dtype": torch.float64, "hidden_layers": 4, "init": [0.35, 0.06, 0.44, 0.15]}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn.training.fast.fused.compile_once", lambda function, **_: function)


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of fused steps that was watched, whether it was undone."""
    found: list[bool] = []

    def undo(self: FusedSGD) -> Any:
        put_back, call = original(self), len(found)
        found.append(False)

        def noted() -> None:
            found[call] = True
            put_back()

        return noted

    original = FusedSGD.undo
    monkeypatch.setattr(FusedSGD, "undo", undo)
    return found


def trained(
    compile: str,  # noqa: A002
    every: int,
    *,
    momentum: float = 0.9,
    dropout: float = 0.0,
    penalties: tuple[Any, ...] = (),
    network_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, History]:
    model = network(**{**OPTIONS, "dropout": dropout, **(network_options or {})})
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, tau_lr=0.02), lr=0.05, momentum=momentum)
    torch.manual_seed(5)
    history = run_fit(
        model,
        digits(200, torch.float64),
        optimizer,
        batch_size=10,
        compile=compile,
        penalties=[L1(0.25, proximal=True), *penalties],
        **{"pruning": Pruning(0.05, every=every), **options},
    )
    return model, history


@pytest.mark.parametrize("every", [1, 4, 9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0, "dropout": 0.3},
        {"penalties": (StageCost(0.1, LOSS),)},
        {"network_options": {"constraint": "dependent", "lower_bound": 0.001}},
        {"network_options": {"constraint": "simplex"}},
    ],
    ids=["momentum", "dropout", "stage cost", "dependent", "simplex"],
)
def test_deletions_are_those_of_single_steps(every: int, options: dict[str, Any], undone: list[bool]) -> None:
    single = trained("never", every, **options)
    assert undone == []
    fused = trained("always", every, **options)
    assert_close(fused, single, 1e-12)
    assert single[1].deletions
    assert undone
    assert not all(undone)


def test_steps_are_undone_in_these_tests(undone: list[bool]) -> None:
    _, history = trained("always", 1)
    assert [(d.iteration, d.layer) for d in history.deletions] == [(3, 1), (22, 3)]
    assert [i for i, each in enumerate(undone) if each] == [0, 1, 4, 5]  # until they end where a layer goes


@pytest.mark.parametrize("at", range(1, 30, 4))
def test_a_run_goes_on_with_the_same_bits_wherever_it_stopped(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undone: list[bool]
) -> None:
    def run(name: str, **options: Any) -> tuple[Any, History]:
        return trained("always", 1, dropout=0.3, run=tmp_path / name, **options)

    @contextmanager
    def stopping() -> Iterator[Callable[[], bool]]:
        asked = iter(range(1000))
        yield lambda: next(asked) >= at

    model, history = run("whole")
    assert any(undone)
    with monkeypatch.context() as patch:
        patch.setattr("taulearn.training.loop.deferred", stopping)
        with pytest.raises(Interrupted):
            run("stopped")
    resumed, record = run("stopped", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(record, history)


def test_a_model_that_a_callback_pruned_without_the_optimizer_is_noticed() -> None:
    def callback(end: Any) -> None:
        if end.epoch == 2:
            raise StopTraining
        taulearn.prune(end.model, keep=[0, 2])

    with pytest.raises(ValueError, match="optimizer must hold the model's time steps"):
        trained("always", 1, pruning=Pruning(1e-4, every=1), callbacks=[callback])


def test_the_steps_alone_decide_what_is_asked_of_them() -> None:
    from taulearn.adaptivity.controller import Pruner

    model = network(**OPTIONS)
    pruner = Pruner(Pruning(0.05, every=1), model, torch.optim.SGD(model.parameters(), lr=0.1), 1, 1)

    def idle(*tau: float) -> bool:
        return pruner.idle(torch.tensor([[0.3, 0.3, 0.3, 0.1], tau], dtype=torch.float64))

    assert idle(0.3, 0.3, 0.3, 0.1)
    assert pruner.least == pytest.approx(0.1)
    assert not idle(0.3, 0.3, 0.3, 0.04)
    assert idle(0.01, 0.3, -0.3, 0.1)  # layer 0 has no identity skip and stays
    assert not idle(0.3, 0.3, 0.3, float("nan"))
    assert not idle(float("inf"), 0.3, 0.3, 0.1)
    assert not idle(0.0, 0.0, 0.0, 0.0)
