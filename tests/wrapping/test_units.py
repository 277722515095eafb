"""Steps in units of displacement."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taulearn import load_model, prune, save_model, unwrap, wrap
from taulearn._calls import call
from taulearn.wrapping import anneal_to_one, fold_units, wrapping_of
from taulearn.wrapping.displacement import DisplacementUnits
from taulearn.wrapping.folding import plain_steps
from wrapping.hosts import BY_NAME, Block, Host, evaluated, every_host, tensor

PRETRAINED = [BY_NAME["vit"], BY_NAME["gpt2"]]


def trained(host: Host, steps: int = 4) -> Any:
    """A wrapped model whose blocks have grown, with units that have followed."""
    model = host.wrapped(units="displacement")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (tensor(call(model, host.inputs())) - 3.0).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        model.time_steps.values.mul_(torch.linspace(0.5, 1.5, len(host.blocks)))
    return model


@every_host
@pytest.mark.parametrize("training", [True, False])
def test_at_the_start_nothing_changes_to_the_bit(host: Host, training: bool) -> None:
    """Output and gradients of weights in the first pass are those of the bare model."""
    outputs, gradients = [], []
    for model in (host.make(), host.wrapped(units="displacement")):
        model.train(training)
        torch.manual_seed(5)
        output = tensor(call(model, host.inputs()))
        output.square().sum().backward()
        outputs.append(output)
        gradients.append(dict(model.named_parameters()))
    assert torch.equal(*outputs)
    assert plain_steps(wrapping_of(model)).tolist() == [1.0] * len(host.blocks)


class Scaled(nn.Module):
    """x + c g(x) with a scale to turn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x).tanh()


def test_scaling_the_weights_does_not_stand_in_for_a_step() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Scaled(), Scaled()), torch.randn(64, 4)
    wrap(model, example_inputs=x, units="displacement")
    before = model(x)
    with torch.no_grad():
        model[0].scale.mul_(5.0)
        for _ in range(600):
            model(x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain_steps(wrapping_of(model)), torch.tensor([0.2, 1.0]), rtol=1e-4, atol=0)
    assert model.time_steps.tau.tolist() == [1.0, 1.0]


def test_the_gradient_is_that_of_the_batch_s_own_root_mean_square() -> None:
    torch.manual_seed(0)
    d = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    units = DisplacementUnits(1, dtype=torch.float64)
    for _ in range(3):
        units.factor(0, torch.randn(50, 3, dtype=torch.float64))
    weights, gain = torch.randn(50, 3, dtype=torch.float64), units.gains()[0]
    (found,) = torch.autograd.grad((units.factor(0, d) * d * weights).sum(), d)
    rms = d.detach().square().mean().sqrt()
    (expected,) = torch.autograd.grad((gain * rms * d / d.square().mean().sqrt() * weights).sum(), d)
    torch.testing.assert_close(found, expected)
    assert float((found * d.detach()).sum()) == pytest.approx(0.0, abs=1e-10)


def test_the_running_mean_follows_training_only() -> None:
    units = DisplacementUnits(2, dtype=torch.float64)
    squares = [4.0, 9.0, 1.0]
    now = None
    for square in squares:
        expected = 1.0 if now is None else (squares[0] / now) ** 0.5
        assert float(units.factor(1, torch.full((5,), square**0.5, dtype=torch.float64))) == pytest.approx(expected)
        now = square if now is None else 0.98 * now + 0.02 * square
    before = units.squares[1].clone()
    units.eval()
    assert float(units.factor(1, torch.ones(3, dtype=torch.float64))) == pytest.approx((4.0 / now) ** 0.5)  # type: ignore[operator]
    assert torch.equal(units.squares[1], before)
    assert units.gains().tolist() == pytest.approx([1.0, (4.0 / now) ** 0.5])  # type: ignore[operator]
    assert before.tolist()[0] == 0.0


def test_a_block_that_starts_as_the_identity_may_grow() -> None:
    """By hand: r_0 = r is a tenth of the state's 2, then r follows increments other than 0."""
    units, x = DisplacementUnits(1, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64)
    square = 0.04
    for size in (0.0, 0.0, 0.5, 0.0, 0.1):
        assert float(units.factor(0, torch.full_like(x, size), x)) == pytest.approx((0.04 / square) ** 0.5)
        square = 0.98 * square + 0.02 * size**2 if size else square
    assert units.squares.flatten().tolist() == pytest.approx([0.04, square])
    for size in (0.3, 0.01):
        others = DisplacementUnits(1, dtype=torch.float64)
        others.factor(0, torch.full_like(x, size), x)
        assert others.squares.flatten().tolist() == pytest.approx([size**2, size**2])


def test_a_wrapped_block_that_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    block, x = Scaled(), torch.randn(64, 4)
    with torch.no_grad():
        block.scale.zero_()
    model = wrap(nn.Sequential(block), "0", units="displacement")
    assert torch.equal(model(x), x)
    torch.testing.assert_close(model.time_steps.units.squares[0, 0], 0.01 * x.square().mean())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_takes_the_same_steps(reentrant: bool) -> None:
    found: list[list[Tensor]] = []
    for recomputing in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(Scaled(), Scaled()), torch.randn(16, 4)
        wrap(model, example_inputs=x, units="displacement")
        for _ in range(3):
            with torch.no_grad():
                model[0].scale.mul_(4.0)
            model.zero_grad()
            y = x.clone().requires_grad_()
            for block in list(model)[:2]:
                y = checkpoint(block, y, use_reentrant=reentrant) if recomputing else block(y)
            y.square().sum().backward()
        found.append([model.time_steps.units.squares, *(p.grad for p in model.parameters())])  # type: ignore[list-item]
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)


def test_an_increment_of_zero_is_no_trouble() -> None:
    model, x = nn.Sequential(Scaled(), Scaled()), torch.randn(8, 4)
    with torch.no_grad():
        model[0].scale.zero_()
    wrap(model, example_inputs=x, units="displacement")
    for _ in range(2):
        model(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@every_host
def test_saved_models_have_plain_steps(host: Host, tmp_path: Path) -> None:
    model = trained(host)
    prune(model, keep=[0, 1, 3])
    assert (plain_steps(wrapping_of(model)) != model.time_steps.tau).any()
    save_model(model, tmp_path)
    assert wrapping_of(model).units is not None  # type: ignore[union-attr]
    for fresh in (host.make(), host.wrapped(), host.wrapped(units="displacement")):
        loaded = load_model(tmp_path, host=fresh)
        assert [name for name in loaded.state_dict() if "units" in name] == []
        assert wrapping_of(loaded).units is None  # type: ignore[union-attr]
        torch.testing.assert_close(evaluated(loaded, host.inputs()), evaluated(model, host.inputs()))


@every_host
def test_folding_and_unwrapping(host: Host) -> None:
    model = trained(host)
    expected = evaluated(model, host.inputs())
    with pytest.raises(ValueError, match="the time steps must all be 1"):
        unwrap(model)
    fold_units(model)
    torch.testing.assert_close(evaluated(model, host.inputs()), expected)
    assert list(model.time_steps.state_dict()) == ["values"]
    fold_units(model)
    anneal_to_one(model, 1.0)
    assert type(unwrap(model)) is type(host.make())


def test_averaged_weights_are_folded_and_annealed_alike() -> None:
    model = trained(BY_NAME["encoder"])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    expected = evaluated(averaged.module, BY_NAME["encoder"].inputs())
    fold_units(model, averaged=averaged)
    torch.testing.assert_close(evaluated(averaged.module, BY_NAME["encoder"].inputs()), expected)
    averaged.update_parameters(model)
    anneal_to_one(model, 1.0, averaged=averaged)
    assert bool((averaged.module.time_steps.tau == 1.0).all())


def test_annealing_makes_plain_steps() -> None:
    model = trained(BY_NAME["encoder"])
    anneal_to_one(model, 1.0)
    plain = unwrap(copy.deepcopy(model))
    torch.testing.assert_close(
        evaluated(plain, BY_NAME["encoder"].inputs()), evaluated(model, BY_NAME["encoder"].inputs())
    )


@pytest.mark.parametrize("host", PRETRAINED, ids=str)
def test_save_pretrained_asks_for_plain_ones(host: Host, tmp_path: Path) -> None:
    model = trained(host)
    with torch.no_grad():
        model.time_steps.values.fill_(1.0)
    with pytest.raises(ValueError, match="the time steps must all be 1 for save_pretrained"):
        model.save_pretrained(tmp_path)
    anneal_to_one(model, 1.0)
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(fresh, host.inputs()), evaluated(model, host.inputs()))


@every_host
def test_a_deletion_keeps_the_others_units(host: Host) -> None:
    model = trained(host)
    with torch.no_grad():
        model.time_steps.values[1] = 0.0
    before, gains = evaluated(model, host.inputs()), wrapping_of(model).units.gains()  # type: ignore[union-attr]
    prune(model)
    torch.testing.assert_close(evaluated(model, host.inputs()), before, rtol=0, atol=1e-6)
    units = wrapping_of(model).units  # type: ignore[union-attr]
    assert torch.equal(units.gains(), gains[[0, 2, 3]])
    assert model.time_steps.units is units


def test_a_refused_load_leaves_the_units(tmp_path: Path) -> None:
    save_model(wrap(nn.Sequential(Block(4), Block(4)), "[01]"), tmp_path)
    host = wrap(nn.Sequential(Block(5), Block(5)), "[01]", units="displacement")
    with pytest.raises(ValueError, match="host must be of the model"):
        load_model(tmp_path, host=host)
    assert wrapping_of(host).units is host.time_steps.units  # type: ignore[union-attr]
    assert host(torch.ones(1, 5)).shape == (1, 5)


def test_compiled_is_eager() -> None:
    torch.compiler.reset()
    host = BY_NAME["sequential"]
    outputs = []
    for backend in (None, "aot_eager"):
        model = host.wrapped(units="displacement")
        model.eval().time_steps.train()
        called: Any = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(3):
            with torch.no_grad():
                model[1].inner[0].weight.mul_(1.5)
            output = called(host.inputs())
        output.square().sum().backward()
        outputs.append([output.detach(), model.time_steps.units.squares, model[1].inner[0].weight.grad])
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected)


def test_compiled_inference_leaves_a_tensor_that_trains() -> None:
    torch.compiler.reset()
    host = BY_NAME["sequential"]
    model = host.wrapped(units="displacement").train()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.inference_mode():
        compiled(host.inputs())
    assert not model.time_steps.units.squares.is_inference()
    for called in (model, compiled):
        called(host.inputs()).sum().backward()
    assert bool((model.time_steps.units.squares > 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("earlier", [0, 3])
def test_a_batch_that_is_not_finite_leaves_no_trace(bad: float, earlier: int) -> None:
    found, increments = [], torch.linspace(1.0, 2.0, 6)
    for spoilt in (False, True):
        units = DisplacementUnits(2)
        for k, increment in enumerate(increments):
            if spoilt and k == earlier:
                units.factor(1, torch.tensor([1.0, bad]))
            units.factor(1, increment.expand(4))
        found.append(units.squares)
    assert torch.equal(*found)
    assert float(units.gains()[1]) < 1.0
