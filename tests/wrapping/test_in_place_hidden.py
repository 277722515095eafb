"""Steps in place where something hidden would tell them from torch's: faults that a review found."""

import copy
import io
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from taulearn import wrap
from taulearn.wrapping import blocks as blocks_module
from wrapping.in_place import TAKEN, Own, compare, model, needs_compiler, states, taken

pytestmark = needs_compiler


def pair(function: Any = TAKEN["sum"], init: float = 0.7) -> tuple[nn.Module, nn.Module]:
    """A model with steps in place, and the same with torch's."""
    return model(function, init=init).double(), model(function, init=init, compile="never").double()


class Tupled(nn.Module):
    """Returns a tuple, which others may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.linear(x), None


class Passing(nn.Module):
    """Returns what a module inside returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tupled()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        output: tuple[Tensor, None] = self.inner(x)
        return output


def test_a_hook_that_keeps_a_tuple_keeps_what_was_in_it() -> None:
    block, kept = Passing(), []
    block.inner.register_forward_hook(lambda module, args, output: kept.append(output))
    wrapped, x = wrap(nn.Sequential(block), "0", init=0.5, compile="always"), states(5, 4, dtype=torch.float32)
    wrapped(x)
    torch.testing.assert_close(kept[0][0], x + block.inner.linear(x))


class Foreign(torch.autograd.Function):
    """A sigmoid in NumPy, in memory that it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.result = 1 / (1 + np.exp(-x.detach().numpy()))
        return torch.from_numpy(ctx.result)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(ctx.result * (1 - ctx.result))


def test_memory_that_is_not_torchs() -> None:
    wrapped, plain = pair(lambda b, x: Foreign.apply(x * b.w))
    assert not taken(wrapped(states(5, 9)))
    compare(wrapped, plain, states(5, 9))


def test_steps_that_are_changed_between_the_passes() -> None:
    found = []
    for each in pair():
        x = states(5, 9).requires_grad_()
        output = each(x)
        each.time_steps.values.data.clamp_(max=0.5)
        found.append(torch.autograd.grad(output.sin().sum(), [x, *each.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_node_that_is_known_elsewhere_is_run() -> None:
    def knows_node(block: Own, x: Tensor) -> Tensor:
        y = x + x * block.w
        block.kept.append(y.grad_fn)
        return y

    def knows_edge(block: Own, x: Tensor) -> Tensor:
        y = x + x * block.w
        block.kept.append(get_gradient_edge(y))
        return y

    called = []
    wrapped = model(knows_node, init=0.7)
    output = wrapped(states(5, 9, dtype=torch.float32))
    wrapped[1].kept[-1].register_hook(lambda *gradients: called.append(1))
    output.sum().backward()
    assert called == [1]
    wrapped = model(knows_edge, init=0.7)
    output = wrapped(states(5, 9, dtype=torch.float32))
    (found,) = torch.autograd.grad(output.sum(), [wrapped[1].kept[-1]])
    torch.testing.assert_close(found, torch.full((5, 9), 0.7))


@pytest.mark.parametrize("kind", ["negative view", "tangent", "batch", "jacobian", "fake"])
def test_gradients_of_other_kinds(kind: str) -> None:
    found = []
    for each in pair():
        x = states(2, 9).requires_grad_()
        wanted = [x, *each.parameters()]
        if kind == "negative view":
            found.append(torch.autograd.grad(each(x), wanted, torch._neg_view(torch.ones(2, 9).double())))
        elif kind == "tangent":
            with forward_ad.dual_level():
                g = forward_ad.make_dual(torch.ones(2, 9).double(), states(2, 9))
                duals = torch.autograd.grad(each(x), wanted, g)
                found.append(tuple(part for dual in duals for part in forward_ad.unpack_dual(dual)))
        elif kind == "batch":
            g = torch.eye(18).double().view(18, 2, 9)
            found.append(torch.autograd.grad(each(x), wanted, g, is_grads_batched=True))
        elif kind == "jacobian":
            found.append((torch.autograd.functional.jacobian(each, x, vectorize=True),))
        else:
            output = each(x).sum()
            with FakeTensorMode(allow_non_fake_inputs=True):
                shapes = [g.shape for g in torch.autograd.grad(output, wanted)]
            assert shapes == [w.shape for w in wanted]
            found.append(())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_of_a_host_that_changes_states_in_place() -> None:
    torch.manual_seed(0)
    linear, found = nn.Linear(9, 9).double(), []
    for compile in ("auto", "always", "never"):  # noqa: A001
        host = nn.Sequential(copy.deepcopy(linear), nn.ELU(inplace=True), copy.deepcopy(linear))
        wrapped = wrap(host, ["0", "2"], init=0.8, compile=compile)
        for _ in range(2):
            x = states(5, 9).requires_grad_()
            (first,) = torch.autograd.grad(wrapped(x).sin().sum(), x, create_graph=True)
            second = torch.autograd.grad(first.square().sum(), [x, *wrapped.parameters()])
        found.append(second)
    for others in found[:2]:
        for a, b in zip(others, found[2], strict=True):
            torch.testing.assert_close(a, b)


def test_a_step_that_failed_can_be_repeated() -> None:
    class Later(nn.Module):
        active = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2.0) if self.active else 2.0 * x

    wrapped, x = wrap(nn.Sequential(nn.Linear(9, 9), Later()), "0", compile="always"), states(5, 9, dtype=torch.float32)
    wrapped(x).sum().backward()
    wrapped[1].active = True
    with pytest.raises(RuntimeError, match=r"^the output of a wrapped block was changed in place .*repeat this step"):
        wrapped(x).sum().backward()
    wrapped(x).sum().backward()


def test_compiled_autograd_says_what_to_do() -> None:
    wrapped = model(TAKEN["sum"])
    output = wrapped(states(5, 9, dtype=torch.float32)).sum()
    enabled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
    with enabled, pytest.raises(RuntimeError, match="compile='never'"):
        output.backward()


class Forbids(TorchFunctionMode):
    """A mode that does not let anyone look at addresses."""

    seen = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__self__", None) is Tensor._cdata:  # type: ignore[attr-defined]
            raise NotImplementedError
        self.seen += function is torch.lerp
        return function(*args, **(kwargs or {}))


def test_modes_of_functions_see_torchs_operations() -> None:
    wrapped, x = model(TAKEN["sum"]), states(5, 9, dtype=torch.float32).requires_grad_()
    assert taken(wrapped(x))
    with Forbids() as mode:
        assert not taken(wrapped(x))
    assert mode.seen == 2


def test_deep_graphs_are_released() -> None:
    script = """
        import torch
        from torch import nn
        from taulearn import wrap

        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(1))

            def forward(self, x):
                return x + x * self.w

        model = wrap(nn.Sequential(Sum()), "0", compile="always")
        for backward in (False, True):
            y = torch.zeros(2, requires_grad=True)
            for _ in range(100_000):
                y = model(y)
            assert y.grad_fn.name() == "StepBackward"
            if backward:
                y.sum().backward()
            del y
        print("released")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "released\n", done.stderr


def test_a_model_that_is_loaded_to_another_device() -> None:
    wrapped, x = model(TAKEN["sum"]), states(5, 9, dtype=torch.float32)
    wrapped[0].function = wrapped[1].function = None  # lambdas cannot be pickled
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False).to_empty(device="cpu")
    loaded.load_state_dict(wrapped.state_dict())
    loaded[0].function = loaded[1].function = TAKEN["sum"]
    assert taken(loaded(x.requires_grad_()))
    loaded(x).sum().backward()


def test_first_use_where_another_device_is_the_default() -> None:
    blocks_module._in_place.cache_clear()
    wrapped, x = model(TAKEN["sum"]), states(5, 9, dtype=torch.float32).requires_grad_()
    with torch.device("meta"):
        assert not taken(wrapped(x))
    assert taken(wrapped(x))


def test_first_use_in_a_debugger() -> None:
    script = """
        import sys
        import torch
        from torch import nn
        from taulearn import wrap

        class Keeping(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(1))

            def forward(self, x):
                y = x + x * self.w
                self.first = self.second = y
                return y

        def trace(frame, event, argument):
            frame.f_locals
            return trace

        model, x = wrap(nn.Sequential(Keeping()), "0", init=0.5, compile="always"), torch.ones(3, requires_grad=True)
        sys.settrace(trace)
        model(x)
        sys.settrace(None)
        output = model(x)
        assert model[0].first is not output
        print(model[0].first.tolist())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[2.0, 2.0, 2.0]\n", done.stderr


def test_steps_without_gradient_save_nothing() -> None:
    def function(block: Own, x: Tensor) -> Tensor:
        return x + block.w

    wrapped = model(function)
    h = wrapped(states(5, 9, dtype=torch.float32).requires_grad_())
    assert taken(h)
    values = {"time_steps.values": torch.tensor([0.5, 2.0])}
    x = states(5, 9, dtype=torch.float32).requires_grad_()
    h = torch.func.functional_call(wrapped, values, (x,))
    h.mul_(2.0)
    h.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5, 9), 2.0))


def test_nothing_is_kept_alive() -> None:
    wrapped, x = model(TAKEN["sum"]), states(5, 9, dtype=torch.float32)
    nodes = []
    for backward in (True, False):
        output = wrapped(x)
        nodes.append(weakref.ref(output))
        if backward:
            output.sum().backward()
        del output
    assert all(node() is None for node in nodes)
