"""Compilation that fails after training has begun is recorded, and a resumed run does not try again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from taulearn.training import Run
from training.support import Crash, assert_same_weights, crash_after, digits, network, run_fit


def fit_into(folder: Path, how: str, **options: Any) -> nn.Module:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run_fit(model, digits(), optimizer, compile=how, run=folder, **options)
    return model


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets every compilation fail when what it made is called, and counts the calls."""
    calls: list[int] = []

    def fail(*_: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no such instruction: vaddpd\nand much more")

    monkeypatch.setattr("taulearn.training.fast.compiler._compiler_found", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    return calls


def test_a_run_that_is_uncompiled_does_not_say_that_it_is_fused(attempts: list[int], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training goes on uncompiled"):
        model = fit_into(tmp_path / "run", "always")
    step = Run.open(tmp_path / "run").decisions["step"]
    assert step == "eager: compilation failed (no such instruction: vaddpd)"
    assert len(attempts) in (1, 2)  # without products.cpp a second time
    assert_same_weights(model, fit_into(tmp_path / "eager", "never"))


def test_a_resumed_run_does_not_try_again(attempts: list[int], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training goes on uncompiled"), pytest.raises(Crash):
        fit_into(tmp_path / "run", "always", callbacks=[crash_after(2)])
    attempts.clear()
    model = fit_into(tmp_path / "run", "always", resume=True)
    assert not attempts
    assert_same_weights(model, fit_into(tmp_path / "eager", "never"))
