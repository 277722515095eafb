"""Wrapped and pruned models under torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import prune, summary, wrap
from taulearn._calls import call
from wrapping.hosts import BY_NAME, HOSTS, Block, Host, tensor

LONG = ("encoder", "vit", "bert", "gpt2", "llama", "resnet")  # test_contract.py compiles an encoder and a ViT


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "host", [pytest.param(host, id=str(host), marks=[pytest.mark.long] * (str(host) in LONG)) for host in HOSTS]
)
def test_compiled_is_eager_before_and_after_a_deletion(host: Host) -> None:
    model = host.wrapped(init=0.7).eval()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        gradients = []
        for each in (compiled, model):
            model.zero_grad()
            output = tensor(call(each, host.inputs()))
            output.square().sum().backward()
            gradients.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        prune(model, keep=[0, 1])


def test_inductor() -> None:
    model = wrap(nn.Sequential(*(Block(4) for _ in range(3))), example_inputs=torch.ones(1, 4), init=0.5).eval()
    x = torch.randn(5, 4)
    prune(model, keep=[0, 1])
    compiled: Any = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


class Chain(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    "way",
    ["whole", pytest.param("in place", marks=pytest.mark.long), pytest.param("per block", marks=pytest.mark.long)],
)
def test_repeated_deletions_stay_compiled(way: str) -> None:
    """torch gives up on a function after 8 versions of it, with fullgraph by an error."""
    number = 10
    model = wrap(Chain(number), example_inputs=torch.ones(1, 4), init=0.5).eval()
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    options: dict[str, Any] = {"backend": backend, "fullgraph": True}
    called: Any = model
    if way == "whole":
        called = torch.compile(model, **options)
    elif way == "in place":
        model.compile(**options)
    else:
        for block in model.blocks:
            block.compile(**options)
    x = torch.randn(2, 4)
    for left in range(number, 1, -1):
        runs.clear()
        assert called(x).shape == (2, 4)
        assert len(runs) == (left if way == "per block" else 1)
        prune(called, keep=range(1, left))
        assert model.time_steps.num_steps == left - 1


def test_a_compiled_model_is_summed_up_and_pruned() -> None:
    host = BY_NAME["vit"]
    model = host.wrapped()
    compiled: Any = torch.compile(model, backend="eager")
    assert prune(compiled, keep=[0, 2]).layers_after == 2
    assert summary(compiled).layers == (0, 2)
