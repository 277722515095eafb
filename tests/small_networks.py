"""Small networks for the tests of pruning, trained on one batch; comparison to the bit, also with what was before."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taulearn.adaptivity.coarsen import PruneReport
from taulearn.nn import TimeSteps, TimeVariableNetwork, resnet

DOUBLE = torch.float64
KEEP = (0, 2, 4)


def network(
    init: list[float] | None = None, *, builder: Callable[..., TimeVariableNetwork] = resnet, **options: Any
) -> TimeVariableNetwork:
    torch.manual_seed(0)
    depth = 5 if init is None else len(init)
    horizon = options.pop("horizon", 1.0 if init is None else sum(init))
    options = {"dtype": DOUBLE, "activation": "tanh", "init": init, "horizon": horizon} | options
    return builder(3, 4, 2, depth, **options)


def batch(n: int = 6) -> Tensor:
    return torch.randn(n, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))


def deleted(report: PruneReport) -> list[int]:
    return [d.layer for d in report.deleted]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def loss_of(model: nn.Module) -> Tensor:
    return (model(batch()) - 1.0).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, iterations: int = 3) -> None:
    for _ in range(iterations):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def assert_same_bits(first: Any, second: Any) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
        assert first.dtype == second.dtype
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    else:
        assert first == second


class Picture:
    """Model, optimiser and averaged model at one moment, to the bit and to the identity of the parameters."""

    def __init__(self, *things: nn.Module | torch.optim.Optimizer) -> None:
        self.things = things
        self.values = copy.deepcopy([thing.state_dict() for thing in things])
        self.identities = self.identify()

    def identify(self) -> list[Any]:
        found: list[Any] = []
        for thing in self.things:
            if isinstance(thing, nn.Module):
                found.append([(name, id(p), id(p.grad)) for name, p in thing.named_parameters()])
                found.append([(name, id(module)) for name, module in thing.named_modules()])
                found.append([m.origin for m in thing.modules() if isinstance(m, TimeSteps)])
                found.append(repr(thing))
            else:
                found.append([[id(p) for p in group["params"]] for group in thing.param_groups])
                found.append([id(group["params"]) for group in thing.param_groups])
                found.append({id(p): {k: id(v) for k, v in s.items()} for p, s in thing.state.items()})
        return found

    def assert_unchanged(self) -> None:
        assert_same_bits([thing.state_dict() for thing in self.things], self.values)
        assert self.identify() == self.identities
