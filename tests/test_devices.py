"""Devices are never mixed: a model on a second device computes what it does on the CPU, and stays there.

Always on a second device without a card (``second_device``), and on CUDA where there is a card.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taulearn
from second_device import ELSEWHERE, SecondDevice
from taulearn import penalties, prune, refine, unwrap, wrap
from taulearn.nn import LearnedOrder, densenet, feedforward, fractional_dnn, resnet, resnet_v2

SCHEMES = {
    "feedforward": feedforward,
    "dense": densenet,
    **{name: partial(resnet, scheme=name) for name in ("residual", "midpoint", "heun", "rk4", "momentum", "verlet")},
    "fractional": fractional_dnn,
    "fractional, fast memory": partial(fractional_dnn, memory="fast"),
    "fractional, learned order": partial(fractional_dnn, gamma=LearnedOrder(0.6, "layer")),
}
long = partial(pytest.param, marks=pytest.mark.long)
HERE = torch.device("cpu")
PENALTIES = {
    "l1": penalties.L1(0.1),
    "l2": penalties.L2(0.1),
    "elastic net": penalties.ElasticNet(0.1),
    "horizon": penalties.TimeHorizon(2.0),
    "group lasso": penalties.GroupLasso(0.1),
    "weights": penalties.WeightElasticNet(0.1),
    "ordering": penalties.BiasOrdering(),
    "stage cost": penalties.StageCost(0.1, cross_entropy),
}
CUDA = pytest.param(torch.device("cuda", 0), marks=pytest.mark.cuda)


@pytest.fixture(params=[ELSEWHERE, *([CUDA] if torch.cuda.is_available() else [])], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    torch.manual_seed(0)
    with SecondDevice() if request.param == ELSEWHERE else nullcontext():
        yield request.param


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class After(nn.Module):
    """A block that normalises its sum, which has no branches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.body(x))


def host(block: Callable[[], nn.Module] = Residual) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *(block() for _ in range(4)), nn.Linear(4, 2))


def network(scheme: str = "residual", steps: tuple[float, ...] = (0.4, 0.1, 0.3, 0.2), **options: Any) -> Any:
    return SCHEMES[scheme](3, 4, 2, len(steps), init=steps, horizon=sum(steps), activation="tanh", **options)


def samples(device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    return x.to(device), (torch.arange(6) % 2).to(device)


def assert_on(device: torch.device, model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, each in tensors if each.device != device] == []


def assert_equal(one: Tensor, other: Tensor) -> None:
    """The same to the bit, or, on a card, to its rounding."""
    bits = {} if one.is_cuda else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(one.cpu(), other, **bits)


def assert_same(there: nn.Module, here: nn.Module, device: torch.device) -> None:
    """The same output and gradients, and everything where the model is."""
    outputs = []
    for model, place in ((there, device), (here, HERE)):
        model.zero_grad()
        x, z = samples(place)
        outputs.append(model(x))
        cross_entropy(outputs[-1], z).backward()
        assert outputs[-1].device == place
        assert_on(place, model)
    assert_equal(*outputs)
    for (name, one), other in zip(there.named_parameters(), here.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None
        assert_equal(one.grad, other.grad)


def test_the_second_device_refuses_a_mixture() -> None:
    with SecondDevice():
        there, here = torch.ones(2, device=ELSEWHERE), torch.ones(2)
        mixtures = (
            torch.add,
            torch.mul,
            lambda a, b: torch.cat([a, b]),
            lambda a, b: a.add_(b),
            lambda a, b: b.add_(a),
        )
        for mix in mixtures:
            with pytest.raises(RuntimeError, match="two devices"):
                mix(there, here)
        with pytest.raises(RuntimeError, match="two devices"):
            network().to(ELSEWHERE)(samples(HERE)[0])
        assert (there + torch.tensor(2.0)).device == ELSEWHERE
        assert (there[torch.tensor([0])] + here.to(ELSEWHERE)[:1]).tolist() == [2.0]
        assert there.cpu().device == here.copy_(there).device == HERE


@pytest.mark.parametrize("constraint", ["free", "simplex", long("fixed"), long("dependent")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, constraint: str, device: torch.device) -> None:
    here = network(scheme, (0.125,) * 8, constraint=constraint)  # from eight layers the fractional memory has blocks
    there = copy.deepcopy(here).to(device)
    assert_same(there, here, device)
    there.time_steps.project_()
    assert_on(device, there)
    assert_on(device, network(scheme, constraint=constraint, device=device))


def test_a_convolutional_network(device: torch.device) -> None:
    here = resnet_v2((1, 2), 2, 1, (4, 8))
    there, x = copy.deepcopy(here).to(device), torch.randn(2, 1, 8, 8)
    assert_equal(there(x.to(device)), here(x))
    assert_on(device, there)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name: str, device: torch.device) -> None:
    here = network()
    there, values = copy.deepcopy(here).to(device), []
    for model, place in ((there, device), (here, HERE)):
        value = PENALTIES[name](model, *samples(place))
        value.backward()
        assert value.device == place
        values.append(value.detach())
    assert_equal(*values)


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_distillation(hidden: float, device: torch.device) -> None:
    model, teacher, x = network().to(device), network().to(device), samples(device)[0]
    value = penalties.Distillation(teacher, 0.5, 2.0, hidden)(model, x, outputs=model(x))
    value.backward()
    assert value.device == device


def test_proximal_step(device: torch.device) -> None:
    values = torch.tensor([0.5, -0.01], device=device)
    assert penalties.L1(0.1, proximal=True).proximal(values, 1.0).tolist() == pytest.approx([0.4, 0.0])


# by which layers go
WAYS: dict[str, dict[str, Any]] = {
    "by hand": {"keep": [0, 2]},
    "share": {"threshold": 0.25},
    **{name: {"budget": 2, "criterion": name} for name in ("sensitivity", "contribution", "influence", "loss")},
}


def change(model: Any, name: str, device: torch.device) -> None:
    """Delete or refine layers of a model that was trained for a step, with its optimiser, and train on."""
    optimizer = torch.optim.AdamW(taulearn.parameter_groups(model, lr=0.01))
    x, z = samples(device)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), z).backward()
        optimizer.step()
        model.time_steps.project_()

    step()
    data = {} if name in ("by hand", "share") else {"data": [(x, z)], "loss": cross_entropy}
    if name in WAYS:
        prune(model, **WAYS[name], **data, optimizer=optimizer)
    else:
        refine(model, by=name, number=1, **data, optimizer=optimizer)
    step()


@pytest.mark.parametrize("name", [*WAYS, "split", "insert"])
@pytest.mark.parametrize("scheme", ["residual", "fractional", long("heun")])
def test_prune_and_refine(scheme: str, name: str, device: torch.device) -> None:
    here = network(scheme)
    there = copy.deepcopy(here).to(device)
    change(there, name, device)
    change(here, name, HERE)
    assert there.time_steps.origin == here.time_steps.origin
    assert len(there.time_steps.origin) != 4
    assert_same(there, here, device)


@pytest.mark.parametrize(
    ("block", "units", "name"),
    [
        *((block, "steps", name) for block in (Residual, After) for name in (None, *WAYS, "split", "insert")),
        *((Residual, "displacement", name) for name in (None, "share")),
    ],
)
def test_wrap(block: type[nn.Module], units: str, name: str | None, device: torch.device) -> None:
    here = host(block)
    there = copy.deepcopy(here).to(device)
    for model, place in ((there, device), (here, HERE)):
        wrapped = wrap(model, example_inputs=samples(place)[0], units=units)
        if name is not None:
            change(wrapped, name, place)
    assert_same(there, here, device)
    unwrap(there, discard_steps=True)
    assert_on(device, there)


@pytest.mark.parametrize("compiled", ["never", *(["always"] if torch.cuda.is_available() else [])])
def test_fit(compiled: str, device: torch.device) -> None:
    here = network()
    there = copy.deepcopy(here).to(device)
    for model, place in ((there, device), (here, HERE)):
        taulearn.fit(
            model,
            samples(place),
            loss=cross_entropy,
            optimizer=torch.optim.SGD(taulearn.parameter_groups(model, lr=0.1)),
            epochs=2,
            batch_size=3,
            penalties=[penalties.L2(0.01), penalties.StageCost(0.1, cross_entropy)],
            pruning=taulearn.Pruning(target_blocks=2),
            compile=compiled if place.type == "cuda" else "never",
            progress=False,
        )
    assert_same(there, here, device)
