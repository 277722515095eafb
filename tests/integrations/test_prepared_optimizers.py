"""Optimisers, schedulers and models that accelerate, Lightning or Fabric prepared, where an optimiser is asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from small_networks import DOUBLE, KEEP, assert_same_bits, loss_of, network
from taulearn import Pruning, fit, prune
from taulearn.adaptivity.optimizer_state import bare
from taulearn.optim import constrain_, group_of, parameter_groups, register_projection
from taulearn.penalties import L1


class Duck:
    """A wrapper that is no optimiser of torch, and hands everything on to one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def by_accelerate(optimizer: torch.optim.Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def by_accelerate_twice(optimizer: torch.optim.Optimizer) -> Any:
    pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    return AcceleratedOptimizer(by_accelerate(optimizer))


def by_lightning(optimizer: torch.optim.Optimizer) -> Any:
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    return LightningOptimizer(optimizer)


def by_fabric(optimizer: torch.optim.Optimizer) -> Any:
    pytest.importorskip("lightning")
    from lightning.fabric.strategies import SingleDeviceStrategy
    from lightning.fabric.wrappers import _FabricOptimizer

    return _FabricOptimizer(optimizer, SingleDeviceStrategy(device=torch.device("cpu")))


prepared = pytest.mark.parametrize(
    "prepare", [by_accelerate, by_accelerate_twice, by_lightning, by_fabric, Duck], ids=lambda f: f.__name__
)
Prepare = Callable[[torch.optim.Optimizer], Any]


def make(model: nn.Module, kind: str = "Adam") -> torch.optim.Optimizer:
    groups = parameter_groups(model, 0.05)
    return torch.optim.Adam(groups) if kind == "Adam" else torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@prepared
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_a_loop_by_hand(prepare: Prepare, kind: str) -> None:
    """Projection, proximal step and deletion as with the optimiser itself, bit by bit."""
    models = []
    for wrapped in (True, False):
        model = network(constraint="simplex")
        plain = make(model, kind)
        optimizer = prepare(plain) if wrapped else plain
        handle = register_projection(optimizer, model, L1(0.1, proximal=True))
        for keep in ([0, 1, 2, 4], [0, 1, 3], None):
            for _ in range(2):
                plain.zero_grad()
                loss_of(model).backward()
                plain.step() if prepare is by_lightning else optimizer.step()
            if keep is not None:
                assert prune(model, keep=keep, optimizer=[optimizer]).optimizer == "exact"
        assert float(model.time_steps.tau.detach().sum()) == pytest.approx(1.0, abs=1e-12)
        handle.remove()
        models.append(model)
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


@prepared
def test_fit(prepare: Prepare) -> None:
    """Also where the user's projection is registered already, and a scheduler hangs on the one or on the other."""
    torch.manual_seed(1)
    data = torch.randn(24, 3, dtype=DOUBLE), torch.randn(24, 2, dtype=DOUBLE)
    models = []
    for wrapped, on_wrapper in ((True, False), (True, True), (False, False)):
        model = network([0.3, 0.001, 0.2, 0.3])
        plain = make(model)
        optimizer = prepare(plain) if wrapped else plain
        register_projection(optimizer, model)
        hung_on = optimizer if on_wrapper and prepare is not Duck else plain
        scheduler: Any = torch.optim.lr_scheduler.StepLR(hung_on, 1, gamma=0.5)
        if wrapped and prepare is by_accelerate:
            from accelerate.scheduler import AcceleratedScheduler

            scheduler = AcceleratedScheduler(scheduler, optimizer)
        fit(
            model,
            data,
            loss=nn.functional.mse_loss,
            optimizer=optimizer,
            scheduler=scheduler,
            epochs=2,
            batch_size=8,
            pruning=Pruning(0.02),
            penalties=L1(0.01, proximal=True),
            compile="never",
            progress=False,
        )
        assert model.time_steps.num_steps == 3
        assert plain.param_groups[0]["lr"] == 0.0125
        models.append(model)
    for model in models[:2]:
        assert_same_bits(model.state_dict(), models[-1].state_dict())


@prepared
def test_what_is_looked_at_is_the_optimiser_inside(prepare: Prepare) -> None:
    model = network()
    plain = make(model)
    optimizer = prepare(plain)
    assert bare(optimizer) is plain
    assert group_of(optimizer, model.time_steps.values) is plain.param_groups[1]
    constrain_(model, optimizer, [L1(100.0, proximal=True)])
    assert model.time_steps.tau.tolist() == [0.0] * 5
    stranger = prepare(make(network()))
    for call in (lambda: register_projection(stranger, model), lambda: prune(model, keep=KEEP, optimizer=stranger)):
        with pytest.raises(ValueError, match="none of them"):
            call()


def test_a_wrapper_with_state_of_its_own_is_not_taken_apart() -> None:
    """Its step is more than that of what it wraps."""
    model = network()
    plain = make(model)
    wrapper = torch.optim.SGD(plain.param_groups, lr=0.1)
    vars(wrapper)["optimizer"] = plain
    assert bare(wrapper) is wrapper


def test_everything_that_accelerate_prepares_trains_as_without() -> None:
    accelerate = pytest.importorskip("accelerate")
    data = torch.utils.data.TensorDataset(torch.randn(24, 3, dtype=DOUBLE), torch.randn(24, 2, dtype=DOUBLE))
    models = []
    for wrapped in (True, False):
        model: Any = network()
        parts: Any = model, make(model), torch.utils.data.DataLoader(data, batch_size=8)
        if wrapped:
            parts = accelerate.Accelerator(cpu=True).prepare(*parts)
        given, optimizer, loader = parts
        fit(
            given,
            loader,
            loss=nn.functional.mse_loss,
            optimizer=optimizer,
            epochs=1,
            compile="never",
            progress=False,
        )
        models.append(model)
    assert_same_bits(models[0].state_dict(), models[1].state_dict())


def test_an_overflow_in_an_optimiser_of_accelerate() -> None:
    """Its scaler skips the step, in which the proximal step must not act."""
    pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    by_accelerate(make(network()))  # accelerate's own state
    for fused in (True, False):
        model, scaler = network(dtype=torch.float32), torch.amp.GradScaler("cpu")
        optimizer = AcceleratedOptimizer(torch.optim.AdamW(parameter_groups(model, 0.1), fused=fused), scaler=scaler)
        register_projection(optimizer, model, L1(0.5, proximal=True))
        before = model.time_steps.tau.detach().clone()
        for p in model.parameters():
            p.grad = torch.full_like(p, float("inf"))
        scaler.scale(torch.zeros(()))
        optimizer.step()
        assert torch.equal(model.time_steps.tau.detach(), before)
