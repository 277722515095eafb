"""Both callbacks beside a loop of ours: steps that a GradScaler skips."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import taulearn
from taulearn import Pruning
from taulearn.integrations.companion import Companion
from taulearn.penalties import L1, L2

SKIPPED = (1, 2, 5)


@pytest.mark.parametrize("options", [{"fused": False, "foreach": False}, {"fused": True}])
@pytest.mark.parametrize("order", ["as Lightning", "as Trainer"])
def test_steps_that_a_scaler_skips_are_none(options: dict[str, Any], order: str) -> None:
    """They are not recorded, and nothing is deleted after them: fused optimisers are called all the same."""
    torch.manual_seed(0)
    model = taulearn.nn.resnet(4, 6, 2, 5, init=[0.5, 0.1, 0.2, 0.3, 0.4])
    optimizer = torch.optim.Adam(taulearn.parameter_groups(model, lr=1e-2), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    companion = Companion([L2(0.1)], Pruning(target_blocks=3, every=2), progress=False)
    companion.begin(model, optimizer, epochs=1, per_epoch=12, averages=list)
    session = companion.session
    inputs, expected, looks = torch.randn(8, 4), [], []
    look = companion._change
    companion._change = lambda *a, **k: (looks.append(session.iteration), look(*a, **k))  # type: ignore[method-assign]
    with ExitStack() as training:
        if order == "as Trainer":
            training.callback(optimizer.register_step_pre_hook(lambda *_: session.before_step()).remove)
        companion.constrained(training)
        for iteration in range(12):
            session.measure()
            optimizer.zero_grad()
            tau = np.full(5, np.nan)
            tau[list(model.time_steps.origin)] = model.time_steps.tau.tolist()
            scaler.scale(nn.functional.cross_entropy(model(inputs), torch.arange(8) % 2)).backward()
            if iteration in SKIPPED:
                model.head.weight.grad.fill_(float("inf"))
            else:
                expected.append(tau)
            scaler.unscale_(optimizer)
            if order == "as Lightning":
                session.before_step()
            scaler.step(optimizer)
            scaler.update()
            companion.after_step(None, epoch=1)
    found = companion.history().iterations["tau"]
    np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=1e-7)
    assert looks == list(range(1, 10))
    assert all(d.iteration % 2 == 0 for d in companion.history().deletions)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("options", [{"target_blocks": 3}, {"target_latency_ms": 1.0, "penalised": "all"}])
def test_the_penalty_of_a_target_is_not_the_users(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="penalties must not contain L1 where pruning has a target"):
        Companion([L1(0.1)], Pruning(**options), progress=False)
    Companion([L1(0.1)], Pruning(target_blocks=3, penalised="none"), progress=False)
    Companion([L2(0.1)], Pruning(**options), progress=False)


def test_an_optimiser_with_a_session_is_refused() -> None:
    model = taulearn.nn.resnet(4, 6, 2, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taulearn.attach(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer must have no session of taulearn.attach"):
        Companion([], None, progress=False).begin(model, optimizer, epochs=1, per_epoch=12, averages=list)
