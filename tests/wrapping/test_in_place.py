"""Steps in place: those of torch, wherever they are taken, and not taken where anyone could tell."""

import copy
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from taulearn import parameter_groups, prune, wrap
from taulearn.wrapping import blocks as blocks_module, compiled
from wrapping.hosts import Host, call, every_host, tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

Function = Callable[[Any, Tensor], Any]


class Own(nn.Module):
    """A block that computes what a function says, with one weight of the state's last dimension."""

    def __init__(self, function: Function, width: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.linspace(-1.0, 1.5, width))
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def keeping(block: Own, y: Tensor, kept: Any) -> Tensor:
    block.kept.append(kept)
    return y


TAKEN: dict[str, Function] = {
    "sum": lambda b, x: x + (x * b.w).sin(),
    "sum, other way round": lambda b, x: (x * b.w).sin() + x,
    "sum with a factor": lambda b, x: torch.add(x, (x * b.w).sin(), alpha=0.7),
    "factor at the state": lambda b, x: torch.add((x * b.w).sin(), x, alpha=-1.3),
    "sum with one number": lambda b, x: x + (x * b.w).sum(),
    "state twice": lambda b, x: x + x * b.w + x,
    "sum in place": lambda b, x: (x * b.w).add_(x),
    "no sum": lambda b, x: (x * b.w).cos() * b.w,
    "sum of others": lambda b, x: (2 * x) + (x * b.w).sin(),
    "norm": lambda b, x: nn.functional.layer_norm(x + x * b.w, x.shape[-1:]),
    "only the weight": lambda b, x: x.detach() * b.w,
}
LEFT: dict[str, Function] = {
    "kept": lambda b, x: keeping(b, y := x + x * b.w, y),
    "kept detached": lambda b, x: keeping(b, y := x + x * b.w, y.detach()),
    "kept in a view": lambda b, x: keeping(b, y := x + x * b.w, y[0]),
    "needed for its gradient": lambda b, x: (x + x * b.w).sigmoid(),
    "needed for another": lambda b, x: keeping(b, y := x + x * b.w, y.square().sum()),
    "hooked": lambda b, x: keeping(b, y := x + x * b.w, y.register_hook(lambda g: 2 * g)),
    "a view": lambda b, x: (x + x * b.w).flatten().view_as(x),
    "other layout": lambda b, x: (x.t().contiguous().t() * b.w).sin(),
}


def model(function: Function, *, init: float = 1.0, compile: str = "always", width: int = 9) -> nn.Module:  # noqa: A002
    return wrap(nn.Sequential(Own(function, width), Own(function, width)), "[01]", init=init, compile=compile)


def states(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def taken(output: Tensor) -> bool:
    assert output.grad_fn is not None
    return output.grad_fn.name() == "StepBackward"


def results(wrapped: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weights and steps."""
    x = x.clone().requires_grad_()
    output = wrapped(2 * x)
    kept = [
        each for block in list(wrapped)[:2] for each in block.kept if isinstance(each, Tensor) and each.requires_grad
    ]
    total = output.sin().sum() + sum(each.square().sum() for each in kept)
    return [output.detach(), *torch.autograd.grad(total, [x, *wrapped.parameters()], allow_unused=True)]


def compare(wrapped: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-12) -> None:
    for found, expected in zip(results(wrapped, x), results(plain, x), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance * (1 + float(expected.abs().max()))
            )


@pytest.mark.parametrize("tau", [1.0, 0.3, -0.7, 1.6])
@pytest.mark.parametrize("name", TAKEN)
def test_results_are_those_of_torch(name: str, tau: float) -> None:
    for size in (1, 2, 5, 12, 1500):
        wrapped, plain = (model(TAKEN[name], init=tau, compile=each).double() for each in ("always", "never"))
        x = states(size, 9)
        assert taken(wrapped(x.requires_grad_()))
        assert not taken(plain(x))
        for _ in range(2):
            compare(wrapped, plain, x.detach())
        assert torch.equal(wrapped(x), plain(x))


@pytest.mark.parametrize("name", TAKEN)
def test_results_in_single_precision(name: str) -> None:
    wrapped, plain = (model(TAKEN[name], init=0.8, compile=each) for each in ("always", "never"))
    x = states(4001, 9, dtype=torch.float32)
    assert taken(wrapped(x.clone().requires_grad_()))
    assert torch.equal(wrapped(x), plain(x))
    compare(wrapped, plain, x, 1e-4)


@pytest.mark.parametrize("name", LEFT)
def test_not_taken_where_anyone_could_tell(name: str) -> None:
    wrapped, plain = (model(LEFT[name], init=0.8, compile=each).double() for each in ("always", "never"))
    x = states(12, 9)
    assert not taken(wrapped(x.requires_grad_()))
    for each in (wrapped, plain):
        each[0].kept.clear()
        each[1].kept.clear()
    compare(wrapped, plain, x.detach())


def test_what_a_hook_of_a_submodule_keeps_stays() -> None:
    inner, seen = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), []
    wrapped = wrap(nn.Sequential(inner), "0", init=0.5, compile="always")
    x = states(3, 9, dtype=torch.float32).requires_grad_()
    assert taken(wrapped(x))
    inner[1].register_forward_hook(lambda *call: seen.append(call[-1]))
    output = wrapped(x)
    assert not taken(output)
    torch.testing.assert_close(output, torch.lerp(x, seen[0], 0.5))


@pytest.mark.parametrize("kind", [tuple, list, lambda entries: dict(zip("ab", entries, strict=True))])
def test_states_in_containers(kind: Callable[[Any], Any]) -> None:
    class Holding(nn.Module):
        def __init__(self, *, twice: bool) -> None:
            super().__init__()
            self.linear, self.twice = nn.Linear(4, 4), twice

        def forward(self, x: Tensor) -> Any:
            y = x + self.linear(x)
            return kind((y, y if self.twice else "rest"))

    x = states(6, 4, dtype=torch.float32).requires_grad_()
    for twice in (False, True):
        block = Holding(twice=twice)
        wrapped = wrap(nn.Sequential(block), "0", init=0.7, compile="always")
        output = wrapped(x)
        state, other = output.values() if isinstance(output, dict) else output
        assert type(output) is type(kind(()) if kind in (tuple, list) else {})
        assert not taken(state)  # others may hold the container
        torch.testing.assert_close(state, torch.lerp(x, x + block.linear(x), 0.7))
        assert other == "rest" if not twice else torch.equal(other, x + block.linear(x))


@pytest.mark.parametrize("name", ["sum", "no sum", "sum with a factor"])
def test_first_and_second_derivatives(name: str) -> None:
    torch.manual_seed(0)
    wrapped = model(TAKEN[name], init=0.6, width=3).double()
    x = states(2, 3).requires_grad_()
    assert taken(wrapped(x))
    assert torch.autograd.gradcheck(wrapped, (x,))
    assert torch.autograd.gradgradcheck(wrapped, (x,))
    # second derivatives by parameters, against torch's own operations
    plain = model(TAKEN[name], init=0.6, width=3, compile="never").double()
    found = []
    for each in (wrapped, plain):
        parameters = list(each.parameters())
        first = torch.autograd.grad(each(x).sin().sum(), parameters, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(norm, [x, *parameters]))  # type: ignore[arg-type]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_is_gone_through_once_unless_it_is_kept() -> None:
    wrapped, x = model(TAKEN["sum"], init=0.6), states(5, 9, dtype=torch.float32)
    total = wrapped(x).sum()
    first = torch.autograd.grad(total, list(wrapped.parameters()), retain_graph=True)
    again = torch.autograd.grad(total, list(wrapped.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, list(wrapped.parameters()))


def test_only_some_gradients() -> None:
    wrapped, plain = (model(TAKEN["sum"], init=0.6, compile=each).double() for each in ("always", "never"))
    x = states(5, 9)
    for pick in (lambda m, _: [m.time_steps.values], lambda m, _: [m[0].w], lambda _, x: [x]):
        found = []
        for each in (wrapped, plain):
            start = x.clone().requires_grad_()
            found += torch.autograd.grad(each(start).sin().sum(), pick(each, start))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("train", ["tau", "all"])
def test_frozen_weights_and_fixed_steps(train: str) -> None:
    x = states(40, 9, dtype=torch.float32)
    for constraint in ("free", "fixed", "dependent"):
        found = []
        for each in ("always", "never"):
            host = nn.Sequential(Own(TAKEN["sum"], 9), Own(TAKEN["sum"], 9))
            wrapped = wrap(host, "[01]", constraint=constraint, train=train, compile=each)
            start = x.clone().requires_grad_()
            found.append(torch.autograd.grad(wrapped(start).sin().sum(), [start, *filter(needs, wrapped.parameters())]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def needs(parameter: Tensor) -> bool:
    return parameter.requires_grad


def test_small_steps_are_torchs() -> None:
    x = states(5, 9, dtype=torch.float32).requires_grad_()
    for tau in (0.0, 0.05, -0.06, float("nan")):
        wrapped = model(TAKEN["sum"])
        with torch.no_grad():
            wrapped.time_steps.values.fill_(tau)
        assert not taken(wrapped(x))


def test_the_same_bits_on_any_number_of_threads() -> None:
    wrapped, threads, found = model(TAKEN["sum"], init=0.9), torch.get_num_threads(), []
    x = states(30_011, 9, dtype=torch.float32)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(wrapped, x)[-1])  # the gradient of the steps; others are torch's sums
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_layouts_of_images() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 6, 3, padding=1)
    for format in (torch.contiguous_format, torch.channels_last):  # noqa: A001
        found = []
        for each in ("always", "never"):
            wrapped = wrap(nn.Sequential(copy.deepcopy(convolution)), "0", init=0.8, compile=each)
            x = states(2, 6, 5, 5, dtype=torch.float32).contiguous(memory_format=format).requires_grad_()
            output = wrapped(x)
            assert taken(output) is (each == "always")
            # the gradient comes in another layout than the state
            total = (output.contiguous() * torch.arange(300.0).view(2, 6, 5, 5)).sum()
            found.append(torch.autograd.grad(total, [x, *wrapped.parameters()]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


class Consumer(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0).sin() if self.active else (2.0 * x).sin()


def test_a_host_that_changes_states_in_place_goes_on() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(9, 9), states(5, 9, dtype=torch.float32)
    wrapped, plain = (
        wrap(nn.Sequential(copy.deepcopy(linear), Consumer()), "0", init=0.8, compile=each)
        for each in ("always", "never")
    )
    for _ in range(3):
        found = []
        for each in (wrapped, plain):
            each.zero_grad()
            each(x).square().sum().backward()
            found.append([p.grad.clone() for p in each.parameters() if p.grad is not None])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert vars(wrapped[0])["forward"].seen.item() == 2


def test_a_host_that_begins_to_change_states_in_place_is_told() -> None:
    host = nn.Sequential(nn.Linear(9, 9), Consumer())
    wrapped, x = wrap(host, "0", compile="always"), states(5, 9, dtype=torch.float32)
    wrapped[1].active = False
    wrapped(x).sum().backward()
    wrapped[1].active = True
    with pytest.raises(RuntimeError, match="compile='never'"):
        wrapped(x).sum().backward()


def test_the_same_bits_in_the_first_pass_and_later() -> None:
    """A resumed run begins with a first pass; it must not differ."""
    wrapped, x = model(TAKEN["sum"], init=0.7), states(1000, 9, dtype=torch.float32)
    first, second = (results(wrapped, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
def test_transforms_and_modes_are_torchs() -> None:
    wrapped, x = model(TAKEN["sum"], init=0.7), states(5, 9, dtype=torch.float32)
    plain = model(TAKEN["sum"], init=0.7, compile="never")
    with torch.no_grad():
        expected = wrapped(x)
    found = torch.func.vmap(wrapped)(x)
    torch.testing.assert_close(found.detach(), expected)
    gradient = torch.func.grad(lambda z: wrapped(z).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda z: plain(z).sum())(x))
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(each(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
            for each in (wrapped, plain)
        ]
    torch.testing.assert_close(*tangents)
    traced = torch.jit.trace(wrapped, (x,))
    torch.testing.assert_close(traced(2 * x), wrapped(2 * x))
    values = {"time_steps.values": torch.tensor([0.5, 2.0], requires_grad=True)}
    found = torch.func.functional_call(wrapped, values, (x,))
    torch.testing.assert_close(found, torch.func.functional_call(plain, values, (x,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(wrapped(x))
    assert taken(wrapped(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    wrapped, plain = (model(TAKEN["sum"], init=0.7, compile=each).double() for each in ("always", "never"))
    found = []
    for each in (wrapped, plain):
        x = states(7, 9).requires_grad_()
        y = x
        for block in list(each)[:2]:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.sin().sum().backward()
        found.append([x.grad, *(p.grad for p in each.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_two_passes_at_once_and_in_threads() -> None:
    wrapped, x = model(TAKEN["sum"], init=0.7).double(), states(300, 9)
    single = results(wrapped, x)[-1]
    both = torch.autograd.grad(wrapped(2 * x).sin().sum() + wrapped(2 * x).sin().sum(), [wrapped.time_steps.values])[0]
    torch.testing.assert_close(both, 2 * single)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(results(wrapped, x)[-1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, single) for each in found)


def test_deletions_keep_what_was_seen() -> None:
    wrapped, x = model(TAKEN["sum"]), states(5, 9, dtype=torch.float32)
    wrapped(x).sum().backward()
    for twin, seen in ((copy.deepcopy(wrapped), 0), (wrapped, 1)):  # copies see for themselves
        prune(twin, keep=[1])
        assert vars(twin[0])["forward"].seen.item() == seen
        assert taken(twin(x))
    step = vars(wrap(nn.Sequential(nn.Linear(2, 2)), "0", compile="always")[0])["forward"]
    assert pickle.loads(pickle.dumps(step)).scalars.least == 0


@every_host
def test_training_every_host_as_torch_does(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LEAST", 0)
    names: list[set[str]] = []
    found: list[list[Tensor]] = []
    for each in ("auto", "never"):
        torch.manual_seed(1)
        wrapped = host.wrapped(compile=each, init=0.9).double().train()
        optimizer = torch.optim.SGD(parameter_groups(wrapped, lr=0.05), momentum=0.9)
        inputs = host.inputs()
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        for _ in range(3):
            optimizer.zero_grad()
            output = tensor(call(wrapped, inputs))
            output.square().mean().backward()
            optimizer.step()
        names.append(nodes(output))
        found.append([p.detach() for p in wrapped.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # the blocks of transformers' ResNet end in a function that needs its own result
    assert ("StepBackward" in names[0]) is (str(host) != "resnet")
    assert "StepBackward" not in names[1]


def nodes(output: Tensor) -> set[str]:
    """Names of all nodes of a graph."""
    found, left = set(), [output.grad_fn]
    seen = set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name())
            left += [each for each, _ in node.next_functions]
    return found


def test_small_states_are_torchs_unless_asked() -> None:
    wrapped = model(TAKEN["sum"], compile="auto", width=64)
    for size, expected in ((compiled.LEAST // 64 - 1, False), (compiled.LEAST // 64, True)):
        assert taken(wrapped(states(size, 64, dtype=torch.float32).requires_grad_())) is expected


def test_bad_value() -> None:
    with pytest.raises(ValueError, match=r"compile must be one of .*'never'.*, got 'yes'"):
        wrap(nn.Sequential(nn.Linear(2, 2)), "0", compile="yes")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets for a test what was compiled."""
    functions = (compiled.load, blocks_module._in_place)
    kept = [each() for each in functions]
    for each in functions:
        each.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for each in functions:
        each.cache_clear()
    assert [each() for each in functions] == kept or kept[0] is not None


def test_without_a_compiler_that_works(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(compiled, "SOURCE", compiled.SOURCE.with_name("blocks.py"))
    wrapped, x = model(TAKEN["sum"]), states(5, 9, dtype=torch.float32).requires_grad_()
    with pytest.warns(UserWarning, match=r"per cent slower, as blocks.py did not compile: .*install a current g\+\+"):
        output = wrapped(x)
    assert not taken(output)
    assert not taken(wrapped(x))  # without another warning


def test_without_any_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taulearn._native.compiler_found", lambda: False)
    wrapped = model(TAKEN["sum"], compile="auto", width=512)
    assert not taken(wrapped(states(100, 512, dtype=torch.float32).requires_grad_()))


def test_blocks_that_gelu_ends() -> None:
    """Its gradient needs its input, not its result."""
    wrapped = model(lambda b, x: gelu(x * b.w), init=0.9).double()
    plain = model(lambda b, x: gelu(x * b.w), init=0.9, compile="never").double()
    x = states(8, 9)
    assert taken(wrapped(x))
    compare(wrapped, plain, x)
