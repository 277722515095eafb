"""Forward passes of the probe and of the trial leave nothing behind."""

import random
from collections import Counter, UserDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taulearn import contribution, fit, prune, summary, wrap
from taulearn._undisturbed import undisturbed
from taulearn.nn import resnet
from wrapping.hosts import Block, transformers


class Changing(nn.Module):
    """A model whose forward pass changes something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.blocks = nn.Linear(4, 4), nn.Sequential(*(Block(4) for _ in range(3)))
        for name, value in (("count", 0.0), ("mean", [0.0] * 4), ("variance", [1.0] * 4)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.plain, self.nested = torch.zeros(3), {"tensors": [torch.zeros(2)], "numbers": [1, {2}]}
        self.space, self.counter, self.last = SimpleNamespace(kind="short"), Counter("a"), deque([1, 2], maxlen=2)
        self.generator, self.act = torch.Generator(), nn.ReLU()
        self.unregistered = [nn.BatchNorm1d(4)]

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        y: Tensor = self.blocks(self.act(self.enter(x)))
        return y

    def change(self, x: Tensor) -> None:
        raise NotImplementedError


class Buffers(Changing):
    def change(self, x: Tensor) -> None:
        self.count += 1
        self.count.data.mul_(3.0)
        self.sparse.mul_(2.0)
        self.count = self.count + 1.0


class Weights(Changing):
    def change(self, x: Tensor) -> None:
        self.enter.weight.div_(2.0)
        self.enter.bias.data[1:] = 5.0
        torch._foreach_mul_(list(self.blocks.parameters()), 1.5)
        torch.add(self.plain, 1.0, out=self.plain)


class OtherMemory(Changing):
    def change(self, x: Tensor) -> None:
        self.enter.weight.data = 2.0 * self.enter.weight.data
        self.enter.weight.mul_(2.0)
        self.enter.weight.requires_grad_(False)


class Statistics(Changing):
    def change(self, x: Tensor) -> None:
        nn.functional.batch_norm(x, self.mean, self.variance, training=True)
        self.unregistered[0](x)


class Attributes(Changing):
    def change(self, x: Tensor) -> None:
        self.space.kind = "long"
        self.counter["a"] += 1
        self.last.append(3)
        self.nested["numbers"][1].add(4)
        self.nested["tensors"][0] += 1
        self.nested["tensors"].append(x)
        self.cache = x
        if isinstance(self.act, nn.ReLU):
            self.act = nn.GELU()
        self.blocks[0].norm.eps *= 2.0


class Modes(Changing):
    def change(self, x: Tensor) -> None:
        self.train()
        self.blocks[1].eval()


class Draws(Changing):
    def change(self, x: Tensor) -> None:
        random.random()
        np.random.rand()  # noqa: NPY002  as hosts do
        torch.rand(1)
        torch.rand(1, generator=self.generator)


class Doing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class ModesOfItsOwn(Changing):
    def change(self, x: Tensor) -> None:
        with Doing():
            self.count += 1
        with torch.inference_mode():
            self.count += 1
        with torch.enable_grad():
            self.mean.add_(torch.func.vmap(lambda row: 2.0 * row)(x).sum(0).detach())


CHANGING = (Buffers, Weights, OtherMemory, Statistics, Attributes, Modes, Draws, ModesOfItsOwn)
changing = pytest.mark.parametrize("make", CHANGING)


def picture(model: Changing) -> list[Any]:
    """All that can change, in values and identities."""
    tensors = [*model.state_dict(keep_vars=True).items(), ("plain", model.plain)]
    tensors += [(f"nested {i}", each) for i, each in enumerate(model.nested["tensors"])]
    tensors += [*model.unregistered[0].state_dict(keep_vars=True).items()]
    modules = [*model.named_modules(), *model.unregistered[0].named_modules()]
    return [
        [
            (name, id(each), each.requires_grad, each.to_dense().tolist())
            for name, each in tensors
            if "time" not in name
        ],
        [(name, id(each), each.training) for name, each in modules if "time" not in name],
        [sorted(vars(each).keys() - {"forward", "_time_step_wrapping"}) for _, each in modules],
        [id(each) for each in (model.nested, model.nested["numbers"], model.space, model.counter, model.last)],
        str((model.nested["numbers"], model.space, model.counter, model.last, model.blocks[0].norm.eps)),
        [model.generator.get_state().tolist(), torch.get_rng_state().tolist()],
        [random.getstate(), np.random.get_state()[2]],  # noqa: NPY002
    ]


@changing
@pytest.mark.parametrize("training", [True, False])
def test_wrap_leaves_models_as_they_are_that_change_when_they_are_called(make: type[Changing], training: bool) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.ones(2, 4)
    model.train(training)
    model.blocks[2].train(not training)
    before = picture(model)
    wrap(model, "blocks.*", example_inputs=x)
    after = picture(model)
    assert len(model.time_steps.tau) == 3
    after[1] = [each for each in after[1] if not each[0].startswith("time_steps")]
    after[2] = after[2][: len(before[2])] if len(after[2]) == len(before[2]) else after[2][:-2] + after[2][-1:]
    assert after == before
    prune(model, keep=[0])


@changing
def test_a_pass_leaves_nothing_behind(make: type[Changing]) -> None:
    model, x = make(), torch.ones(2, 4)
    before = picture(model)
    with undisturbed(model, x):
        model(x)
        with undisturbed(model):
            model(x)
        changed = picture(model)
        model(x)
        x += 1.0
    assert changed != before
    assert picture(model) == before
    assert torch.equal(x, torch.ones(2, 4))


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    class Failing(Weights):
        def change(self, x: Tensor) -> None:
            super().change(x)
            raise RuntimeError("on the way")

    model = Failing()
    before = picture(model)
    with pytest.raises(RuntimeError, match="on the way"):
        wrap(model, example_inputs=torch.ones(2, 4))
    assert picture(model) == before


def test_hooks_can_be_removed_after_wrap() -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(4, 4), Block(4), Block(4))
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    wrap(model, example_inputs=torch.ones(1, 4))
    handle.remove()
    calls.clear()
    model(torch.ones(1, 4))
    assert not calls


def test_lazy_modules_are_made_and_scripted_ones_stay() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), Block(4), Block(4))
    wrap(lazy, example_inputs=torch.ones(1, 3))
    assert lazy[0].weight.shape == (4, 3)
    assert lazy[0].training

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.gate = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.gate * x

    scripted = torch.jit.script(Counting())
    model = nn.Sequential(scripted, Block(4), Block(4))
    wrap(model, example_inputs=torch.ones(1, 4))
    assert scripted.count.item() == 0.0
    assert model.time_steps.num_steps == 2


def test_nothing_is_copied_where_nothing_is_written() -> None:
    with torch.device("meta"):
        large = nn.Linear(1 << 20, 1 << 20)
    with undisturbed(large):
        assert large(torch.ones(1, 1 << 20, device="meta")).shape == (1, 1 << 20)


def test_attention_that_switches_and_weights_that_are_rescaled() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 12}
    ids = torch.randint(5, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    bird = transformers.BigBirdModel(
        transformers.BigBirdConfig(**sizes, num_attention_heads=2, block_size=2, num_random_blocks=1)
    )
    attentions = [layer.attention.self for layer in bird.encoder.layer]
    wrap(bird, example_inputs=ids)
    assert bird.attention_type == bird.encoder.attention_type == "block_sparse"
    assert all(layer.attention.self is each for layer, each in zip(bird.encoder.layer, attentions, strict=True))
    rwkv = transformers.RwkvModel(transformers.RwkvConfig(**sizes, attention_hidden_size=8, rescale_every=1))
    weights = [block.attention.output.weight.detach().clone() for block in rwkv.blocks]
    wrap(rwkv, example_inputs=ids)
    assert not rwkv.layers_are_rescaled
    for block, weight in zip(rwkv.blocks, weights, strict=True):
        assert torch.equal(block.attention.output.weight, weight)


def test_measuring_contributions_leaves_nothing_behind() -> None:
    model, x = Buffers(), torch.ones(2, 4)
    wrap(model, "blocks.*", example_inputs=x)
    before = picture(model)
    prune(model, criterion=contribution(x), threshold=1e-9)
    assert picture(model)[0] == before[0]


@pytest.mark.parametrize("make", [Buffers, OtherMemory, Attributes])
def test_measuring_times_leaves_nothing_behind(make: type[Changing]) -> None:
    model, x = make(), torch.ones(2, 4)
    wrap(model, "blocks.*", example_inputs=x)
    before = picture(model)
    summary(model, x)
    prune(model, budget={"latency_ms": 1e6, "example_inputs": x})
    assert picture(model) == before


def test_inputs_in_a_mapping_of_another_class() -> None:
    """As those that a tokenizer gives."""
    inputs = UserDict(input=torch.zeros(2))
    with undisturbed(nn.Identity(), inputs):
        inputs["input"].add_(1)
    assert inputs["input"].tolist() == [0.0, 0.0]


class Counting(nn.Module):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_fit_checks_its_data_without_a_trace() -> None:
    model = resnet(2, 3, 1, 2)
    model.head = nn.Sequential(model.head, counting := Counting())
    data, optimizer = (torch.zeros(4, 2), torch.zeros(4, 1)), torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, data, loss=nn.functional.mse_loss, optimizer=optimizer, epochs=1, batch_size=2, progress=False)
    assert counting.calls == 2, "one for each batch"
