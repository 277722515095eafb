"""Steps in place in use: hosts that change states, transforms, checkpoints, deletions, all hosts, no compiler."""

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from taulearn import fit, parameter_groups, prune, wrap
from taulearn.training.run import Run
from taulearn.wrapping import blocks as blocks_module, compiled
from wrapping.hosts import Host, call, every_host, tensor
from wrapping.in_place import TAKEN, model, needs_compiler, nodes, results, states, taken

pytestmark = needs_compiler


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


def test_small_states_are_torchs_unless_asked() -> None:
    wrapped = model(TAKEN["sum"], compile="auto", width=64)
    for size, expected in ((compiled.LEAST // 64 - 1, False), (compiled.LEAST // 64, True)):
        assert taken(wrapped(states(size, 64, dtype=torch.float32).requires_grad_())) is expected


@pytest.mark.parametrize(
    ("way", "expected"),
    [("never", "torch's operations"), ("auto", "in place on a CPU, states of 8192 elements and more")],
)
def test_runs_record_how_steps_are_taken(way: str, expected: str, tmp_path: Path) -> None:
    wrapped, x = model(TAKEN["sum"], compile=way), states(40, 9, dtype=torch.float32)
    optimizer = torch.optim.SGD(parameter_groups(wrapped, lr=0.01))
    loss = torch.nn.functional.mse_loss
    fit(wrapped, (x, x), loss=loss, optimizer=optimizer, epochs=1, batch_size=20, run=tmp_path / "run")
    assert Run.open(tmp_path / "run").decisions["wrapped steps"] == expected


def test_bad_value() -> None:
    with pytest.raises(ValueError, match=r"compile must be one of .*'never'.*, got 'yes'"):
        wrap(nn.Sequential(nn.Linear(2, 2)), "0", compile="yes")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets for a test what was compiled."""
    functions = (compiled.load, blocks_module._in_place)
    for each in functions:
        each.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for each in functions:
        each.cache_clear()


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
