"""One module on several states: the outputs of single calls, and no trace in running statistics."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn.nn import apply_to_each
from taulearn.nn.convolutional import PointwiseSkip, PooledHead
from taulearn.nn.module_on_states import mixing, running_statistics_held

DOUBLE = torch.float64


class Own(nn.Module):
    """A module with a normalisation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(3, dtype=DOUBLE), nn.Linear(3, 2, dtype=DOUBLE)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(self.norm(y).mean((2, 3)))


def headed(norm: nn.Module) -> PooledHead:
    head = PooledHead(3, 4, "tanh", dtype=DOUBLE)
    head.norm = norm  # type: ignore[assignment]
    return head


MODULES = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 2, dtype=DOUBLE)),
    "own": Own,
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 3, 1, dtype=DOUBLE), nn.ReLU(), Own()),
    "instance norm": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True, dtype=DOUBLE),
    "pooled head": lambda: PooledHead(3, 4, "tanh", dtype=DOUBLE),
    "pointwise skip": lambda: PointwiseSkip(3, 5, 2, dtype=DOUBLE),
    "head with group norm": lambda: headed(nn.GroupNorm(3, 3, dtype=DOUBLE)),
    "head with instance norm": lambda: headed(nn.InstanceNorm2d(3, track_running_stats=True, dtype=DOUBLE)),
    "head without normalisation": lambda: headed(nn.Identity()),
    "head without scale": lambda: headed(nn.BatchNorm2d(3, affine=False, dtype=DOUBLE)),
    "head without running statistics": lambda: headed(nn.BatchNorm2d(3, track_running_stats=False, dtype=DOUBLE)),
    "without running statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False, dtype=DOUBLE),
    "tail": lambda: nn.Sequential(PointwiseSkip(3, 5, 2, dtype=DOUBLE), PooledHead(5, 4, dtype=DOUBLE)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def states(number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [k + torch.randn(5, 3, 4, 4, dtype=DOUBLE, generator=generator) for k in range(number)]


@every_module
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_is_the_single_calls(name: str, training: bool, number: int) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().train(training)
    before, twin = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    found = apply_to_each(module, states(number))
    for y, output in zip(states(number), found, strict=True):
        torch.testing.assert_close(output, twin(y), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@every_module
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    twin = copy.deepcopy(module)
    sum(y.square().sum() for y in apply_to_each(module, states())).backward()
    sum(twin(y).square().sum() for y in states()).backward()
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_one_call_where_samples_are_not_mixed() -> None:
    module, sizes = MODULES["linear"](), []
    module[1].register_forward_hook(lambda _module, _arguments, output: sizes.append(len(output)))
    apply_to_each(module, states())
    assert sizes == [15]


@pytest.mark.parametrize("name", ["linear", "pooled head", "pointwise skip", "tail"])
def test_empty_batches(name: str) -> None:
    module = MODULES[name]().eval()
    found = apply_to_each(module, [y[:0] for y in states()])
    assert [y.shape for y in found] == [module(states()[0][:0]).shape] * 3


def test_an_empty_batch_has_no_statistics() -> None:
    with pytest.raises(ValueError, match=r"inputs must .*got .*\(0, 3, 4, 4\)"):
        apply_to_each(MODULES["pooled head"](), [y[:0] for y in states()])


def test_nothing_and_identities() -> None:
    assert apply_to_each(Own(), []) == []
    assert apply_to_each(nn.Identity(), states(2))[1].shape == (5, 3, 4, 4)


def test_statistics_are_kept_again_afterwards() -> None:
    module = Own()
    assert mixing(module) == [module.norm]
    with pytest.raises(ZeroDivisionError), running_statistics_held(module):
        raise ZeroDivisionError
    module(states()[1])
    assert bool(module.norm.running_mean.any())
    assert module.norm.num_batches_tracked == 1


def test_a_frozen_normalisation_stays_so() -> None:
    """Not in training mode, it mixes nothing and keeps nothing."""
    module: Any = Own().train()
    module.norm.eval()
    before = copy.deepcopy(module.state_dict())
    apply_to_each(module, states())
    assert mixing(module) == []
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
