"""Which argument and which entry of the output are a block's state, and what the host gets back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taulearn import load_model, prune, save_model, wrap
from taulearn.depth.wrapped_states import record_states
from taulearn.wrapping import wrapping_of


class Mixing(nn.Module):
    """A residual block that looks at a context of its state's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def increment(self, x: Tensor, context: Tensor) -> Tensor:
        y: Tensor = self.inner(torch.cat([x, context], -1)).tanh()
        return y


class ContextFirst(Mixing):
    def forward(self, context: Tensor, state: Tensor) -> Tensor:
        return state + self.increment(state, context)


class ContextFirstOut(Mixing):
    def forward(self, context: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return context, state + self.increment(state, context)


class ContextMade(Mixing):
    def forward(self, context: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(context), state + self.increment(state, context)


class TimeFirst(Mixing):
    def forward(self, t: Tensor, q: Tensor) -> Tensor:
        return q + t * self.increment(q, q)


class AnyArguments(Mixing):
    def forward(self, *args: Tensor) -> Tensor:
        context, state = args
        return state + self.increment(state, context)


class ByName(Mixing):
    def forward(self, *, memory: Tensor, value: Tensor) -> dict[str, Tensor]:
        return {"memory": memory, "value": value + self.increment(value, memory)}


def first(block: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return block(c, x), c


def second(block: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    c, x = block(c, x)
    return x, c


def masked(block: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return block(c, x) * 1.0, c  # so that it is another tensor


def timed(block: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return block(torch.tensor(0.5), x), c


def named(block: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return block(memory=c, value=x)["value"], c


class Host(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], run: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.blocks, self.run = nn.ModuleList(block() for _ in range(3)), run

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            x, context = self.run(block, x, context)
        return x


KINDS = {
    "context first": (ContextFirst, first),
    "context first, masked": (ContextFirst, masked),
    "context first, in the output too": (ContextFirstOut, second),
    "context made anew": (ContextMade, second),
    "time first": (TimeFirst, timed),
    "arguments without names": (AnyArguments, first),
    "by name": (ByName, named),
}


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4), torch.randn(5, 4)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Host(*KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_what_the_block_before_left(kind: str, tmp_path: Path) -> None:
    x, c = inputs()
    bare = make(kind)
    model = wrap(make(kind), example_inputs=(x, c))
    assert torch.equal(model(x, c), bare(x, c))
    with torch.no_grad():
        model.time_steps.values.zero_()
        assert torch.equal(model(x, c), x)
        model.time_steps.values.copy_(torch.tensor([0.5, 1.0, 0.0]))
        state, context = x, c
        for block, tau in zip(bare.blocks, (0.5, 1.0), strict=False):  # type: ignore[arg-type]
            after, context = bare.run(block, state, context)  # type: ignore[operator]
            state = torch.lerp(state, after, tau)
        torch.testing.assert_close(model(x, c), state)
    wrapping = wrapping_of(model)
    assert wrapping is not None
    if 2 not in wrapping.fixed_layers():
        prune(model, keep=[0, 1])
        torch.testing.assert_close(model(x, c), state)
    save_model(model, tmp_path)
    torch.testing.assert_close(load_model(tmp_path, make(kind))(x, c), state)


def test_without_example_inputs_the_name_decides_or_the_block_says_what_it_needs() -> None:
    x, c = inputs()

    class Customary(Mixing):
        def forward(self, context: Tensor, hidden: Tensor) -> Tensor:
            return hidden + self.increment(hidden, context)

    class Unknown(Mixing):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return b + self.increment(b, a)

    model = wrap(Host(Customary, first), "blocks.*", init=0.0)
    assert torch.equal(model(x, c), x)
    with pytest.raises(ValueError, match="example_inputs"):
        wrap(Host(Unknown, first), "blocks.*")(x, c)


def test_right_hand_sides_of_differential_equations_are_refused() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            y: Tensor = t * self.inner(x).tanh()
            return y

    def euler(block: Any, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return x + 0.1 * block(torch.tensor(0.3), x), c

    with pytest.raises(ValueError, match="adds its output to its input"):
        wrap(Host(Slope, euler), example_inputs=inputs())


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("enter", "leave", "shape"),
    [
        (lambda x: x.transpose(1, 2), lambda y: y.contiguous(), (2, 6, 4)),
        (lambda x: x, channels_last, (2, 3, 4, 5)),
        (channels_last, lambda y: y.contiguous(), (2, 3, 4, 5)),
        (lambda x: x.permute(2, 0, 1), lambda y: y.permute(1, 2, 0).contiguous().permute(2, 0, 1), (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_states_keep_the_memory_layout_of_the_block(enter: Any, leave: Any, shape: tuple[int, ...], tau: float) -> None:
    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = leave(self.scale * torch.sin(x))
            return y

    x = enter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    bare = Layout()
    wrapped = wrap(nn.Sequential(Layout()), "0", init=tau)
    expected, found = bare(x), wrapped(x)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, torch.lerp(x, expected, tau))
    assert torch.equal(found, expected) == (tau == 1.0)
    found.sum().backward()
    assert wrapped.time_steps.values.grad is not None


def test_a_checkpoint_of_the_host_loads_whatever_holds_the_wrapped_model() -> None:
    def holder() -> Any:
        return nn.ModuleDict({"net": make("context first"), "head": nn.Linear(4, 1)})

    bare, other = holder(), holder()
    wrap(other["net"], example_inputs=inputs(), init=0.5)
    values = other["net"].time_steps.values
    with torch.no_grad():
        bare["net"].blocks[0].inner.weight.zero_()
    assert other.load_state_dict(bare.state_dict()).missing_keys == []
    assert other["net"].time_steps.values is values
    assert values.tolist() == [0.5, 0.5, 0.5]
    assert not other["net"].blocks[0].inner.weight.any()
    incomplete = {name: value for name, value in bare.state_dict().items() if not name.endswith("bias")}
    with pytest.raises(RuntimeError, match="bias"):
        other.load_state_dict(incomplete)


def test_units_stay_where_the_host_s_checkpoint_has_none() -> None:
    model = wrap(make("context first"), example_inputs=inputs(), units="displacement")
    model.train()(*inputs())
    squares = model.time_steps.units.squares.clone()
    model.load_state_dict(make("context first").state_dict())
    assert torch.equal(model.time_steps.units.squares, squares)
    assert bool(squares.any())


def test_hosts_that_run_through_their_children() -> None:
    class Children(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = Slice(), Slice(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x

    class Registry(Children):
        def forward(self, x: Tensor) -> Tensor:
            for child in self._modules.values():
                assert child is not None
                x = child(x)
            return x

    for host in (Children(), Registry()):
        x = torch.randn(3, 4)
        expected = host(x)
        model = wrap(host, example_inputs=x)
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            model.time_steps.values[0] = 0.0
            expected = model(x)
        prune(model)
        torch.testing.assert_close(model(x), expected)


class Slice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x).tanh()
        return y


class Conditioned(nn.Module):
    """A residual block whose state is neither first nor has a customary name."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(4, 4), nn.Linear(4, 4), both

    def forward(self, cond: Tensor, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z = z + self.b(torch.tanh(self.a(z) + cond))
        return (cond, z) if self.both else z


@pytest.mark.parametrize("both", [False, True])
def test_states_of_a_loaded_model_are_those_of_the_saved_one(both: bool, tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        return Host(lambda: Conditioned(both=both), second if both else first).double()

    x, c = (each.double() for each in inputs())
    save_model(wrap(made(), example_inputs=(x, c), form="branches", init=[0.5, 1.0, 0.25]), tmp_path / "0")
    for n in range(2):  # the second time it is the loaded one that is saved
        loaded = load_model(tmp_path / str(n), made())
        output, states = record_states(loaded, (x, c))
        state = x
        for block, tau, found in zip(made().blocks, (0.5, 1.0, 0.25), states[1:], strict=True):
            state = state + tau * block.b(torch.tanh(block.a(state) + c))
            torch.testing.assert_close(found, state)
        torch.testing.assert_close(output, state)
        save_model(loaded, tmp_path / str(n + 1))
