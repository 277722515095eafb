"""Deletions tried when a model is wrapped: what prune accepts later gives what tau = 0 gives."""

import copy
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taulearn import prune, wrap
from taulearn.wrapping import wrapping_of
from taulearn.wrapping.observation import tensors_in
from wrapping.hosts import Block, transformers

Make = Callable[[], nn.Module]


def inputs() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


def kept(model: nn.Module) -> dict[int, str]:
    wrapping = wrapping_of(model)
    assert wrapping is not None
    return wrapping.fixed_layers()


def shortened(model: nn.Module) -> set[str]:
    wrapping = wrapping_of(model)
    assert wrapping is not None
    return set(wrapping.shorten)


def wrapped(make: Make, x: Any = None) -> Any:
    torch.manual_seed(0)
    return wrap(make().eval(), example_inputs=inputs() if x is None else x)


@torch.no_grad()
def assert_deletions_are_steps_of_zero(model: Any, x: Any = None, *, change: Any = lambda _: None) -> None:
    """Combinations that prune accepts, on weights as they may be after training."""
    x = inputs() if x is None else x
    number = model.time_steps.num_steps
    free = [l for l in range(number) if l not in kept(model)]
    change(model)
    sets = [gone for k in range(1, min(len(free), number - 1) + 1) for gone in combinations(free, k)]
    for gone in random.Random(0).sample(sets, min(len(sets), 12)):
        zero, pruned = copy.deepcopy(model), copy.deepcopy(model)
        zero.time_steps.values[list(gone)] = 0.0
        prune(pruned, keep=[l for l in range(number) if l not in gone])
        expected, found = (dict(tensors_in(each(x))) for each in (zero, pruned))
        assert expected.keys() == found.keys(), gone
        for place, tensor in expected.items():
            torch.testing.assert_close(found[place], tensor, rtol=1e-5, atol=1e-5)


class Pyramid(nn.Module):
    """Takes features after fixed numbers of blocks, and answers with them in some object."""

    def __init__(self, answer: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.blocks, self.answer = nn.ModuleList(Block(4) for _ in range(4)), answer

    def forward(self, x: Tensor) -> Any:
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (0, 2):
                features.append(x)
        return self.answer(features)


@dataclass
class Record:
    features: list[Tensor]
    name: str = "record"


class Slotted:
    __slots__ = ("features",)

    def __init__(self, features: list[Tensor]) -> None:
        self.features = {"deep": {"er": tuple(features)}}


class Circular:
    def __init__(self, features: list[Tensor]) -> None:
        self.itself, self.all = self, {"features": features, "again": self}


Named = namedtuple("Named", ["first", "second"])

ANSWERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "dict of lists": lambda f: {"features": f},
    "list of dicts": lambda f: [{"a": f[0]}, {"a": f[1]}],
    "dataclass": Record,
    "namespace": lambda f: SimpleNamespace(inner=SimpleNamespace(features=f)),
    "named tuple": lambda f: (Named(*f),),
    "slots": Slotted,
    "circular": Circular,
    "distribution": lambda f: {"all": torch.distributions.Normal(f[0], f[1].exp())},
    "array": lambda f: {"features": [each.detach().numpy() for each in f]},
    "model output": lambda f: transformers.modeling_outputs.BaseModelOutput(hidden_states=tuple(f)),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_features_at_fixed_places_in_nested_outputs(answer: Callable[[list[Tensor]], Any]) -> None:
    model = wrapped(lambda: Pyramid(answer))
    assert shortened(model) == set()
    assert_deletions_are_steps_of_zero(model)


@pytest.mark.parametrize(
    "answer", [lambda f: iter(f), lambda f: str(len(f)), lambda f: None], ids=["iter", "str", "none"]
)
def test_outputs_without_a_tensor_tell_nothing(answer: Callable[[list[Tensor]], Any]) -> None:
    model = wrapped(lambda: Pyramid(answer))
    assert list(kept(model)) == [0, 1, 2, 3]
    assert "cannot be told" in kept(model)[1]
    with pytest.raises(ValueError, match="cannot be told"):
        prune(model, keep=[0, 1, 2])


class Blind(nn.Module):
    """Hides its blocks behind a gate that is no parameter."""

    def __init__(self, gate: float, shift: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))
        self.gate, self.shift = gate, shift

    def forward(self, x: Tensor) -> Tensor:
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            early = x if i == 0 else early
        return self.gate * (x + early) + self.shift


@pytest.mark.parametrize(("gate", "shift"), [(0.0, 0.0), (0.0, 2.0), (1.0, torch.nan)])
def test_outputs_that_are_constant_or_not_finite_tell_nothing(gate: float, shift: float) -> None:
    assert "cannot be told" in kept(wrapped(lambda: Blind(gate, shift)))[2]


class ZeroAtFirst(nn.Module):
    """The second block's state goes a long way round, and nothing of it is seen at first."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(4))
        self.kind = head
        self.head = nn.Linear(8, 2) if head == "module" else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.weight = nn.Parameter(torch.zeros(2, 8))
        self.gate = nn.Parameter(torch.full((), 1e-6 if head == "small gate" else 0.0))
        self.scales = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = x * self.scales[i] if self.kind == "scales" else x
            early = x if i == 1 else early
        if self.kind == "scales":
            return x
        if self.kind.endswith("gate"):
            return x + self.gate * early
        both = torch.cat([x, early], -1)
        return nn.functional.linear(both, self.weight) if self.head is None else self.head(both)


class Hidden(nn.Module):
    """Its second output is 0 whatever comes, but a module is called for it."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(4) for _ in range(4)), self.Head()

    def forward(self, x: Tensor) -> Any:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0:
                more = self.head(x)
        return x, more


def test_what_modules_are_called_with_counts() -> None:
    model = wrapped(Hidden)
    assert (shortened(model), kept(model)) == (set(), {})
    assert_deletions_are_steps_of_zero(model, change=lambda m: m.head.weight.fill_(1.0))


def randomised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "blocks" not in name and "time_steps" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("head", ["module", "function", "gate", "small gate", "scales"])
def test_heads_and_gates_that_hide_all_at_first_do_not_blind(head: str) -> None:
    model = wrapped(lambda: ZeroAtFirst(head))
    assert shortened(model) == set()
    assert kept(model) == {}
    assert_deletions_are_steps_of_zero(model, change=randomised)


def test_constant_parameters_are_not_touched() -> None:
    torch.manual_seed(0)
    model = ZeroAtFirst("function")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    wrap(model, example_inputs=inputs())
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter is before[name][0]
            assert torch.equal(parameter, before[name][1])


class Two(Block):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, torch.sin(y)


class SecondOutput(nn.Module):
    """A block in the middle returns something more, which is used later."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.a, self.b, self.c, self.d = Block(4), Two(4), Block(4), Block(4)
        self.blocks = nn.ModuleList([Two(4) for _ in range(4)]) if by == "list" else None
        self.shared: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks is not None:
            later = None
            for i, block in enumerate(self.blocks):
                x, more = block(x)
                later = more if i == 1 else later
            return x if later is None else x + later
        x, more = self.b(self.a(x))
        x = self.d(self.c(x))
        return x if more is None else x + more


def test_a_block_in_the_middle_whose_second_output_is_used_later_stays() -> None:
    model = wrapped(lambda: SecondOutput("attributes"))
    assert list(kept(model)) == [1]
    assert "other outputs" in kept(model)[1]
    assert_deletions_are_steps_of_zero(model)
    model = wrapped(lambda: SecondOutput("list"))
    assert list(kept(model)) == [1]
    assert_deletions_are_steps_of_zero(model)


class Writes(Block):
    """Leaves something in an object, for a later block."""

    def forward(self, x: Tensor, box: dict[str, Tensor]) -> Tensor:
        y = super().forward(x) + box.pop("x", 0.0)
        box["x"] = 0.1 * y
        return y


class Boxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Writes(4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        box: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, box)
        return x


def test_what_a_block_hands_on_in_an_object_counts() -> None:
    assert list(kept(wrapped(Boxed))) == [0, 1, 2]


class Groups(nn.Module):
    """Computes places from counts, as ALBERT does with its groups."""

    def __init__(self, by: str, number: int = 6) -> None:
        super().__init__()
        self.by, self.number = by, number
        self.blocks = nn.ModuleList(Block(4) for _ in range(number))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(number))
        self.weights = nn.Parameter(torch.ones(number))

    def forward(self, x: Tensor) -> Tensor:
        length = len(self.blocks)
        if self.by == "stretched":
            for i in range(length):
                x = self.blocks[int(i * self.number / (1.5 * (self.number - 1) if length < 5 else self.number))](x)
        elif self.by == "turns":
            for block, norm in zip(self.blocks, self.norms, strict=False):
                x = norm(block(x))
        elif self.by == "weights":
            for i, block in enumerate(self.blocks):
                x = self.weights[i] * block(x)
        elif self.by == "numbers":
            for i in range(self.number):
                x = self.blocks[i](x)
        else:
            per = max(1, length // 3)
            for i in range(3):
                for j in range(per):
                    x = self.blocks[i * per + j](x)
        return x


@pytest.mark.parametrize("by", ["stretched", "turns", "weights", "numbers", "thirds"])
def test_hosts_that_compute_places_from_counts(by: str) -> None:
    model = wrapped(lambda: Groups(by))
    assert shortened(model) == set()
    assert kept(model) == {}
    assert_deletions_are_steps_of_zero(model, change=randomised)


def test_groups_of_albert() -> None:
    config = transformers.AlbertConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=6,
        num_hidden_groups=6,
        embedding_size=4,
    )
    ids = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    model = wrapped(lambda: transformers.AlbertModel(config), ids)
    assert kept(model) == {}
    assert_deletions_are_steps_of_zero(model, ids)


class Emptied(nn.Module):
    """Does not run where one of its stages is empty, and its blocks leave no place empty."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.first, self.second = (nn.ModuleList(Block(4) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.first, self.second):
            for block in stage:
                x = block(x)
                width = block.norm.normalized_shape if self.by == "attributes" else x.shape[1:]
            x = x / float(width[0])
            del width
        return x


def test_a_stage_that_must_not_be_empty() -> None:
    model = wrapped(lambda: Emptied("attributes"))
    assert shortened(model) == {"first", "second"}
    assert list(kept(model)) == [1, 3]
    assert "where others are deleted" in kept(model)[1]
    assert_deletions_are_steps_of_zero(model)
    model = wrapped(lambda: Emptied("places"))
    assert (shortened(model), kept(model)) == (set(), {})
    assert_deletions_are_steps_of_zero(model)


class Alive(nn.Module):
    """Needs two blocks, wherever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(Block(4) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.left) + len(self.right) < 2:
            raise RuntimeError("one is too few")
        for block in (*self.left, *self.right):
            x = block(x)
        return x


def test_deletions_in_several_lists_at_once() -> None:
    model = wrapped(Alive)
    assert len(kept(model)) == 2
    assert_deletions_are_steps_of_zero(model)


class Shared(nn.Module):
    """One module between all blocks, which is called less often when a block is gone."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Block(4) for _ in range(3)), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(x)
        for block in self.blocks:
            x = self.between(block(x))
        return x


@pytest.mark.parametrize(("between", "shorter"), [(nn.Dropout(0.1), True), (nn.ReLU(), True), (nn.Tanh(), False)])
def test_a_module_between_blocks(between: nn.Module, shorter: bool) -> None:
    model = wrapped(lambda: Shared(between))
    assert shortened(model) == ({"blocks"} if shorter else set())
    assert_deletions_are_steps_of_zero(model)


class Memory(nn.Module):
    """Returns what it takes again with the next call, an entry for each block, as caches are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> dict[str, Any]:
        new = []
        for block in self.blocks:
            x = block(x)
            new.append(x)
        return {"y": x, "cache": new}


def test_a_memory_is_no_result() -> None:
    model = wrapped(Memory)
    assert shortened(model) == {"blocks"}
    assert kept(model) == {}
    prune(model, keep=[0, 2])
    assert len(model(inputs())["cache"]) == 2


class Noisy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn(x.shape)


def test_blocks_that_draw_random_numbers_can_be_deleted() -> None:
    model = wrapped(lambda: nn.Sequential(nn.Linear(4, 4), *(Noisy(4) for _ in range(3)), nn.Linear(4, 2)))
    assert shortened(model) == {""}
    assert kept(model) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_blind(dtype: torch.dtype) -> None:
    model = wrapped(lambda: Pyramid(lambda f: f[0]).to(dtype), inputs().to(dtype))
    assert (shortened(model), kept(model)) == (set(), {})


def test_masks_of_large_numbers_do_not_blind() -> None:
    mask = torch.tensor([0.0, 0.0, 0.0, torch.finfo(torch.float32).min])
    model = wrapped(lambda: Pyramid(lambda f: f[0] + mask))
    assert (shortened(model), kept(model)) == (set(), {})


class Counted(nn.Module):
    """Is another one as soon as it has one module more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(4), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) / len(self._modules)


class Getter(nn.ModuleDict):
    """Returns what each of its modules gives."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = {}
        for name, module in self.items():
            x = seen[name] = module(x)
        return seen


@pytest.mark.parametrize("make", [Counted, lambda: Getter({"a": Block(4), "b": Block(4)})], ids=["counted", "getter"])
def test_hosts_that_steps_of_one_would_change_are_refused(make: Make) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"time steps of 1 .*Sequential\(model\)"):
        wrap(model, example_inputs=inputs())
    assert "time_steps" not in dict(model.named_children())
    outer = wrapped(lambda: nn.Sequential(make()))
    bare, found = (dict(tensors_in(each(inputs()))) for each in (outer[0], outer))
    assert bare.keys() == found.keys()


def test_places_of_tensors() -> None:
    value = {"a": [torch.zeros(1), (torch.ones(1), "text", 3)], "array": np.ones(2), "set": {1}, "model": Block(4)}
    assert [place for place, _ in tensors_in(value)] == ["['a'][0]", "['a'][1][0]", "['array']"]
    assert [place for place, _ in tensors_in(SimpleNamespace(x=value), {"a"})] == [".x['array']"]
