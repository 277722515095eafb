"""Steps under GradScaler: where the gradients overflow, an optimiser skips its step, and nothing of ours acts in it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from small_networks import assert_same_bits
from taulearn import prune
from taulearn.nn import TimeVariableNetwork, fractional_dnn, resnet
from taulearn.optim import parameter_groups, register_projection
from taulearn.penalties import L1

Make = Callable[[Any], torch.optim.Optimizer]


class OldStyle(torch.optim.SGD):
    """It gets the scaler in its step and skips by itself, as optimisers did before torch left found_inf on them."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
        found = grad_scaler._check_inf_per_device(self)
        if all(t.item() == 0 for t in found.values()):
            for p in (p for group in self.param_groups for p in group["params"]):
                p.grad.div_(grad_scaler.get_scale())
            super().step()


FUSED: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, fused=True),
    "given the scaler": lambda p: OldStyle(p, lr=0.1),
}
PLAIN: dict[str, Make] = {
    "plain AdamW": torch.optim.AdamW,
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain Adadelta": torch.optim.Adadelta,
}
makes = pytest.mark.parametrize("make", (FUSED | PLAIN).values(), ids=(FUSED | PLAIN).keys())
old_style = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")


def network(constraint: str = "free") -> TimeVariableNetwork:
    torch.manual_seed(0)
    return resnet(3, 4, 2, 4, constraint=constraint)


def backward(model: torch.nn.Module, scaler: torch.amp.GradScaler, *, overflow: bool) -> None:
    model.zero_grad()
    scaler.scale(model(torch.ones(5, 3)).square().mean()).backward()
    if overflow:
        next(p for p in model.parameters() if p.ndim == 2).grad.fill_(float("inf"))  # type: ignore[union-attr]


@old_style
@makes
@pytest.mark.parametrize("unscaled", [False, True])
class TestSkipped:
    def test_no_proximal_step(self, make: Make, unscaled: bool) -> None:
        model, scaler = network(), torch.amp.GradScaler("cpu")
        optimizer = make(parameter_groups(model, lr=0.1))
        register_projection(optimizer, model, [L1(0.5, proximal=True)])
        before = copy.deepcopy(model.state_dict())
        backward(model, scaler, overflow=True)
        if unscaled and not isinstance(optimizer, OldStyle):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**15
        assert_same_bits(model.state_dict(), before)

    @pytest.mark.parametrize("builder", [resnet, fractional_dnn])
    def test_no_projection(self, make: Make, unscaled: bool, builder: Any) -> None:
        torch.manual_seed(0)
        model, scaler = builder(3, 4, 2, 4, constraint="simplex", lower_bound=0.05), torch.amp.GradScaler("cpu")
        optimizer = make(parameter_groups(model, lr=0.1))
        handle = register_projection(optimizer, model)
        for overflow in (False, True, False):  # torch's fused SGD needs a step that is taken first
            if overflow:
                with torch.no_grad():
                    model.time_steps.values.copy_(torch.tensor([0.5, 0.4, 0.3, -0.1]))
            before = copy.deepcopy(model.state_dict())
            for p in model.parameters():
                p.grad = torch.full_like(p, float("inf") if overflow else 1.0)
            scaler.scale(torch.zeros(()))
            if unscaled and not isinstance(optimizer, OldStyle):
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                assert_same_bits(model.state_dict(), before)
        assert float(model.time_steps.tau.detach().sum()) == pytest.approx(1.0, abs=1e-5)
        assert float(model.time_steps.tau.detach().min()) >= 0.05
        handle.remove()


@pytest.mark.parametrize("make", [make for name, make in (FUSED | PLAIN).items() if name != "given the scaler"])
def test_steps_that_are_taken_are_those_without_a_scaler(make: Make) -> None:
    """Overflows in between leave no trace but for the scale, a power of 2; a deletion in between changes nothing."""
    models = []
    for scaled in (True, False):
        model, scaler = network(), torch.amp.GradScaler("cpu", enabled=scaled)
        optimizer = make(parameter_groups(model, lr=0.02))
        register_projection(optimizer, model, [L1(0.1, proximal=True)])
        for iteration in range(6):
            overflow = iteration in (1, 4)
            if overflow and not scaled:
                continue
            backward(model, scaler, overflow=overflow)
            scaler.step(optimizer)
            scaler.update()
            if iteration == 2:
                prune(model, keep=[0, 1, 3], optimizer=optimizer)
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name
    assert not torch.equal(models[0].time_steps.tau.detach(), torch.full((3,), 0.25))


def test_the_flag_is_read_where_it_lies() -> None:
    """No .item(): a flag on the device masks the step there."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    register_projection(optimizer, model, [L1(0.5, proximal=True)])
    for flag, moved in ((torch.tensor(1.0), False), (torch.tensor([2.0]), False), (torch.tensor(0.0), True)):
        before = model.time_steps.tau.detach().clone()
        vars(optimizer)["found_inf"] = flag
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (), {})
        assert torch.equal(model.time_steps.tau.detach(), before) != moved
