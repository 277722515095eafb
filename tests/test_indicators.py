"""Indicators for refinement, against networks that are really refined, by hand; and the marking."""

import copy
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_map

from small_networks import assert_same_bits
from taulearn import Criterion, TimeSteps, refine, wrap
from taulearn._batches import loss_on
from taulearn.adaptivity import mark_to_refine
from taulearn.adaptivity.indicators import indicators, not_refined
from taulearn.nn import Residual, TimeVariableNetwork, densenet, feedforward, resnet, resnet_v2
from taulearn.nn.constraints import Constraint
from taulearn.nn.pruned_models import prunable_of
from taulearn.nn.schemes import Fractional, Scheme
from taulearn.nn.skips import IdentitySkips
from wrapping.hosts import BY_NAME, Block

DOUBLE = torch.float64
FORMS = ["whole", "branches"]
TAU = [0.3, 0.2, -0.1, 0.25, 0.15]


def batch(n: int = 7, inputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(n, inputs, generator=generator, dtype=DOUBLE),
        torch.randn(n, 2, generator=generator, dtype=DOUBLE),
    )


class Momentum(Scheme):
    """v' = v + tau (f(y) - v), y' = P y + tau v': a scheme of one's own that carries v."""

    name = "momentum"
    deletes_exactly = True

    def init(self, y_0: Tensor) -> Any:
        return torch.zeros_like(y_0)

    def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Any, coefficients: Any) -> tuple[Tensor, Any]:
        tau, value, past = coefficients[l], f(y), skips(y, l, l + 1)
        if past is None:
            return tau * value, torch.zeros_like(value)
        v = carry + tau * (value - carry)
        return past + tau * v, v


def built(scheme: Scheme, tau: list[float] = TAU, *, stem: bool = False) -> TimeVariableNetwork:
    """A small network in double precision, with smooth layers."""
    torch.manual_seed(1)
    n = len(tau)
    layers = [nn.Sequential(nn.Linear(3 if l == 0 and not stem else 4, 4, dtype=DOUBLE), nn.Tanh()) for l in range(n)]
    steps = TimeSteps(n, init=tau, dtype=DOUBLE)
    return TimeVariableNetwork(
        layers, nn.Linear(4, 2, dtype=DOUBLE), scheme, steps, stem=nn.Linear(3, 4, dtype=DOUBLE) if stem else None
    )


def longer(network: TimeVariableNetwork, l: int, new: nn.Module, steps: tuple[Tensor, ...]) -> Any:
    """The network whose layer l is two, with these steps."""
    tau = network.time_steps.tau.detach()
    tau = torch.cat([tau[:l], torch.stack(steps), tau[l + 1 :]])
    layers = [*network.layers[: l + 1], new, *network.layers[l + 1 :]]
    skips = IdentitySkips(len(layers), from_input=network.skips.from_input)

    def states(x: Tensor) -> Tensor:
        y = network.scheme.states(network.stem(x), layers, skips, tau)[-1]
        return network.head(y)

    return states


def split_change(network: TimeVariableNetwork, l: int, theta: float, data: tuple[Tensor, Tensor]) -> float:
    """What the loss changes by where layer l is really split."""
    x, y = data
    tau = network.time_steps.tau.detach()
    with torch.no_grad():
        finer = longer(network, l, network.layers[l], (theta * tau[l], (1 - theta) * tau[l]))
        return float(mse_loss(finer(x), y) - mse_loss(network(x), y))


SCHEMES = {"residual": Residual, "momentum": Momentum}


@pytest.mark.parametrize("name", SCHEMES)
def test_sensitivity_is_the_derivative_in_the_step_of_a_layer_that_is_inserted(name: str) -> None:
    network, (x, y) = built(SCHEMES[name]()), batch()
    found = indicators(network, "sensitivity", (x, y), mse_loss)
    for l in range(5):
        new = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        layer = network.layers[max(l, 1)]
        value = mse_loss(longer(network, l, layer, (network.time_steps.tau[l].detach(), new))(x), y)
        assert abs(float(torch.autograd.grad(value, new)[0] - found[l])) < 1e-10
    assert found.abs().min() > 1e-6


def test_sensitivity_of_the_residual_scheme_in_numpy() -> None:
    """The adjoint states of MATH.md section 7, letter by letter."""
    network, (x, y) = built(Residual()), batch()
    W = [layer[0].weight.detach().numpy() for layer in network.layers]
    b = [layer[0].bias.detach().numpy() for layer in network.layers]
    tau, head = np.array(TAU), network.head.weight.detach().numpy()

    def f(l: int, y: Any) -> Any:
        return np.tanh(y @ W[l].T + b[l])

    states = [x.numpy()]
    for l in range(5):
        states.append((states[l] if l else 0) + tau[l] * f(l, states[l]))
    output = states[5] @ head.T + network.head.bias.detach().numpy()
    phi = {5: 2.0 * (output - y.numpy()) / output.size @ head}
    for l in range(4, 0, -1):
        phi[l] = phi[l + 1] + tau[l] * (phi[l + 1] * (1 - f(l, states[l]) ** 2)) @ W[l]
    expected = [(phi[l + 1] * f(max(l, 1), states[l + 1])).sum() for l in range(5)]
    np.testing.assert_allclose(indicators(network, "sensitivity", (x, y), mse_loss).numpy(), expected, atol=1e-12)
    deltas = [0.6 * tau[l] * (f(l, states[l] + 0.4 * tau[l] * f(l, states[l])) - f(l, states[l])) for l in range(1, 5)]
    expected = [(phi[l + 2] * delta).sum() for l, delta in enumerate(deltas)]
    found = indicators(network, "dual-weighted", (x, y), mse_loss, theta=0.4)
    np.testing.assert_allclose(found[1:].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("theta", [0.5, 0.3])
def test_dual_weighted_tends_to_the_change_by_a_split(name: str, theta: float) -> None:
    errors = []
    for tau in (0.4, 0.2, 0.1, 0.05):
        network, data = built(SCHEMES[name](), [tau] * 5, stem=True), batch()
        found = indicators(network, "dual-weighted", data, mse_loss, theta=theta)
        quotients = [split_change(network, l, theta, data) / float(found[l]) for l in range(5)]
        errors.append(max(abs(quotient - 1.0) for quotient in quotients))
    assert all(later < 0.75 * before for before, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.02


MEMORIES = [(False, 1), (False, 0), (True, 0), (True, 1)]


@pytest.mark.parametrize(("stem", "memory_from"), MEMORIES)
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_fractional_splits_with_all_that_later_steps_remember(gamma: float, stem: bool, memory_from: int) -> None:
    """A split changes J by O(tau^gamma), which the indicator has to first order."""
    errors = []
    for tau in (0.1, 0.01, 0.001):
        network = built(Fractional(gamma, memory_from), [tau, 2 * tau, tau, tau / 2, tau] + [tau] * 4, stem=stem)
        data, without = batch(), not_refined(network, "dual-weighted")
        found = indicators(network, "dual-weighted", data, mse_loss, theta=0.4)
        assert found.isnan().nonzero().flatten().tolist() == sorted(without)
        changes = {l: split_change(network, l, 0.4, data) for l in range(9) if l not in without}
        scale = max(map(abs, changes.values()))
        errors.append(max(abs(change - float(found[l])) for l, change in changes.items()) / scale)
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 0.05


@pytest.mark.parametrize(("stem", "memory_from"), MEMORIES)
def test_fractional_sensitivity_is_the_derivative_in_the_power_of_the_step(stem: bool, memory_from: int) -> None:
    gamma = 0.5
    network, (x, y) = built(Fractional(gamma, memory_from), [0.3, 0.2, 0.1, 0.25, 0.15], stem=stem), batch()
    found = indicators(network, "sensitivity", (x, y), mse_loss)
    with torch.no_grad():
        before = mse_loss(network(x), y)
        for l in range(5):
            quotients = []
            for step in (1e-8, 1e-10):
                new = network.layers[l if stem else max(l, 1)]
                pair = (network.time_steps.tau[l], torch.tensor(step, dtype=DOUBLE))
                change = float(mse_loss(longer(network, l, new, pair)(x), y) - before)
                quotients.append(change / step**gamma)
            limit = (10 * quotients[1] - quotients[0]) / 9  # the error is O(step^gamma)
            assert abs(limit - float(found[l])) < 2e-6


def test_a_function_makes_the_layer_that_would_be_inserted() -> None:
    network, (x, y) = built(Residual()), batch()
    torch.manual_seed(5)
    made = nn.Sequential(nn.Linear(4, 4, dtype=DOUBLE), nn.Tanh())
    found = indicators(network, "sensitivity", (x, y), mse_loss, layer=lambda parent: made)
    for l in range(5):
        new = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        value = mse_loss(longer(network, l, made, (network.time_steps.tau[l].detach(), new))(x), y)
        assert abs(float(torch.autograd.grad(value, new)[0] - found[l])) < 1e-10
    with pytest.raises(ValueError, match="layer must make a layer that keeps"):
        indicators(network, "sensitivity", (x, y), mse_loss, layer=lambda parent: nn.Linear(4, 1, dtype=DOUBLE))


def parts_of(data: Any, *cuts: int) -> list[Any]:
    """A batch in parts that end at these samples."""
    slices = [slice(i, j) for i, j in itertools.pairwise((0, *cuts))]
    return [tree_map(operator.itemgetter(each), data) for each in slices]


@pytest.mark.parametrize("model", ["residual", "fractional", "whole", "branches"])
@pytest.mark.parametrize("name", ["dual-weighted", "sensitivity"])
def test_the_mean_over_batches_counts_what_they_count(name: str, model: str) -> None:
    if model in FORMS:
        network, data = toy(model)
    else:
        network, data = built(Residual() if model == "residual" else Fractional(0.5), [0.1] * 9), batch(6)
    whole = indicators(network, name, data, mse_loss)
    assert_close(whole, indicators(network, name, parts_of(data, 2, 6), mse_loss))
    data = data[0], torch.tensor([0, -100, -100, -100, 0, 1])
    whole = indicators(network, name, data, cross_entropy)
    assert_close(whole, indicators(network, name, parts_of(data, 1, 3, 6), cross_entropy))


def assert_close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-13, equal_nan=True)


def test_what_changes_the_width_is_not_split() -> None:
    network = resnet_v2(2, 3, in_channels=1, widths=(4, 8)).double().eval()
    data = torch.rand(3, 1, 8, 8, dtype=DOUBLE), torch.tensor([0, 1, 2])
    split, inserted = (indicators(network, name, data, cross_entropy) for name in ("dual-weighted", "sensitivity"))
    assert split.isnan().nonzero().flatten().tolist() == [2] == sorted(not_refined(network, "dual-weighted"))
    assert bool(inserted.isfinite().all())
    narrow = resnet(3, [5, 4, 6], 2, 3).double()
    assert indicators(narrow, "dual-weighted", batch(), mse_loss).isnan().all()
    assert sorted(not_refined(narrow, "sensitivity")) == [0, 1, 2]
    found = indicators(
        narrow, "sensitivity", batch(), mse_loss, layer=lambda f: nn.Linear(*[f.linear.out_features] * 2).double()
    )
    assert bool(found.isfinite().all())


# wrapped models


class Masked(nn.Module):
    """Two branches that use a mask, which is given by keyword; the state is the first entry of a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.end = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, *, mask: Tensor) -> tuple[Tensor, str]:
        x = x + self.dropout(self.end(self.norm(x) * mask[..., None]))
        return x + self.down(torch.tanh(self.up(x))), "more"


class Toy(nn.Module):
    """A toy transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Masked(4) for _ in range(4))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask=attention_mask)[0]
        return self.head(x).mean(1)


def toy(form: str, tau: float = 0.7) -> tuple[Toy, Any]:
    torch.manual_seed(0)
    data = (
        {
            "x": torch.randn(6, 5, 3, dtype=DOUBLE),
            "attention_mask": (torch.rand(6, 5) > 0.3).double(),
        },
        torch.randn(6, 2, dtype=DOUBLE),
    )
    init = [tau, 0.8 * tau, tau, 0.5 * tau]
    return wrap(Toy().double(), example_inputs=data[0], form=form, init=init), data


def stepped(block: Any, x: Tensor, mask: Tensor, tau: Tensor, form: str) -> Tensor:
    """A block of :class:`Toy` with a step, by its formula."""
    if form == "whole":
        first = x + block.end.forward(block.norm(x) * mask[..., None])
        return x + tau * (first + block.down(torch.tanh(block.up(first))) - x)
    x = x + tau * linear(block.end, block.norm(x) * mask[..., None])
    return x + tau * linear(block.down, torch.tanh(block.up(x)))


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Its formula, without the step that its forward has in form "branches"."""
    assert isinstance(module, nn.Linear)
    return nn.functional.linear(x, module.weight, module.bias)


def loss_with(model: Toy, data: Any, plan: list[tuple[Any, Any]], form: str) -> Tensor:
    """The loss where these blocks run with these steps."""
    inputs, y = data
    x = linear(model.stem, inputs["x"])
    for block, tau in plan:
        x = stepped(block, x, inputs["attention_mask"], tau, form)
    return mse_loss(linear(model.head, x).mean(1), y)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_a_wrapped_model_inserted_by_hand(form: str) -> None:
    model, data = toy(form)
    assert prunable_of(model).form == form
    found = indicators(model, "sensitivity", data, mse_loss)
    torch.manual_seed(8)
    other = Masked(4).double()
    by_function = indicators(model, "sensitivity", data, mse_loss, layer=lambda parent: copy.deepcopy(other))
    by_copy = indicators(model, "sensitivity", data, mse_loss, layer=copy.deepcopy)
    torch.testing.assert_close(by_copy, found, rtol=0, atol=1e-12)
    own = list(zip(model.blocks, model.time_steps.tau.detach(), strict=True))
    for l in range(4):
        for block, figures in ((model.blocks[l], found), (other, by_function)):
            new = torch.zeros((), dtype=DOUBLE, requires_grad=True)
            value = loss_with(model, data, [*own[: l + 1], (block, new), *own[l + 1 :]], form)
            assert abs(float(torch.autograd.grad(value, new)[0] - figures[l])) < 1e-10


@pytest.mark.parametrize("constraint", ["free", "dependent"])
def test_the_indicators_of_a_model_of_which_only_new_blocks_train(constraint: str) -> None:
    data, found = toy("whole")[1], []
    for train in (None, "new"):
        model = wrap(toy_plain(), example_inputs=data[0], form="whole", constraint=constraint, init=0.25)
        refine(model, [1], by="insert", train=train)
        found.append(indicators(model, "dual-weighted", data, mse_loss))
    assert torch.equal(*found)


def toy_plain() -> Toy:
    torch.manual_seed(0)
    return Toy().double()


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_a_wrapped_model_split_by_hand(form: str) -> None:
    errors = []
    for tau in (0.4, 0.2, 0.1, 0.05):
        model, data = toy(form, tau)
        found = indicators(model, "dual-weighted", data, mse_loss)
        own = list(zip(model.blocks, model.time_steps.tau.detach(), strict=True))
        whole, changes = loss_with(model, data, own, form).detach(), []
        for l, (block, step) in enumerate(own):
            halves = [(block, step / 2)] * 2
            changes.append(loss_with(model, data, [*own[:l], *halves, *own[l + 1 :]], form).detach() - whole)
        errors.append(float((torch.stack(changes) - found).abs().max() / found.abs().max()))
    assert all(later < before for before, later in itertools.pairwise(errors)), errors
    assert errors[-1] < min(0.01, 0.2 * errors[0])


def texts() -> list[dict[str, Tensor]]:
    generator, found = torch.Generator().manual_seed(1), []
    for lengths in ([6, 3], [4, 5, 2]):
        ids = torch.randint(3, 39, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


class Given(Constraint):
    name = "given"
    steps: Tensor

    def tau(self, values: Tensor) -> Tensor:
        return self.steps


def in_double(output: Any, labels: Tensor) -> Tensor:
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_with_their_caches_and_their_own_loss(name: str, form: str) -> None:
    model = BY_NAME[name].wrapped(form=form, init=0.5).double().eval()
    assert model.config.use_cache
    (text,) = texts()[:1]
    found = indicators(model, "sensitivity", text, in_double)
    split = indicators(model, "dual-weighted", text, in_double)
    own = indicators(model, "sensitivity", text)  # which is computed in single precision
    torch.testing.assert_close(own, found, rtol=1e-4, atol=1e-6)
    assert model.config.use_cache
    # one block taken twice in a row
    wrapping, l, tau = prunable_of(model), 1, model.time_steps.tau.detach()
    block, form_of = wrapping.layers[l], wrapping.present[l].form
    forward, rule = block.forward, Given()
    text["use_cache"], model.time_steps.rule = False, rule

    def loss_of(first: Tensor, second: Tensor) -> Tensor:
        def twice(*args: Any, **kwargs: Any) -> Any:
            rule.steps = torch.stack([tau[0], first, *tau[2:]])
            state = form_of.leaving(forward(*args, **kwargs))
            assert state is not None
            rule.steps = torch.stack([tau[0], second, *tau[2:]])
            others, named = form_of.handing(state, args, kwargs)
            return forward(*others, **named)

        rule.steps, vars(block)["forward"] = tau, twice
        return loss_on(model, text, in_double)[0]

    new, half = torch.zeros((), dtype=DOUBLE, requires_grad=True), torch.tensor(0.5, dtype=DOUBLE)
    assert abs(float(torch.autograd.grad(loss_of(half, new), new)[0] - found[l])) < 1e-9
    change = loss_of(half / 2, half / 2) - loss_of(half, 0 * half)
    assert 0.5 < float(change.detach() / split[l]) < 2.0


@pytest.mark.parametrize("form", FORMS)
def test_the_encoder_of_torch_with_its_fast_path(form: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu", norm_first=form == "branches")
    generator = torch.Generator().manual_seed(4)
    data = torch.randn(2, 5, 8, generator=generator, dtype=DOUBLE), torch.ones(2, 5, 8, dtype=DOUBLE)
    torch.backends.mha.set_fastpath_enabled(form == "whole")  # in which branches are not found
    try:
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
        model = wrap(encoder, example_inputs=data[0], form=form, init=0.5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert bool(indicators(model, "dual-weighted", data, mse_loss).isfinite().all())
    assert torch.backends.mha.get_fastpath_enabled()


# nothing is left behind


def noisy() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(Block(6), nn.BatchNorm1d(6)) for _ in range(3)]
    return wrap(nn.Sequential(nn.Linear(3, 6), *blocks, nn.Linear(6, 2)).double(), example_inputs=batch()[0])


MODELS: dict[str, Callable[[], Any]] = {
    "residual": lambda: built(Residual()),
    "fractional": lambda: built(Fractional(0.5), [0.1] * 9),
    "stages": lambda: resnet_v2(2, 2, in_channels=1, widths=(4, 8)).double(),
    "wrapped": noisy,
    "branches": lambda: toy("branches")[0],
}


@pytest.mark.parametrize("indicator", ["dual-weighted", "sensitivity"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name: str, indicator: str) -> None:
    model = MODELS[name]()
    x, y = toy("branches")[1] if name == "branches" else batch()
    if name == "stages":
        x = torch.rand(7, 1, 8, 8, dtype=DOUBLE)
    model.train()
    model.get_submodule("stem" if name == "branches" else "head" if hasattr(model, "head") else "0").eval()
    (loss_on(model, (x, y), mse_loss)[0]).backward()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags = [(module.training, len(module._forward_hooks), set(vars(module))) for module in model.modules()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    rule, frozen = model.time_steps.rule, [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()

    def failing(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("in the middle")

    indicators(model, indicator, (x, y), mse_loss)
    with pytest.raises(RuntimeError, match="in the middle"):
        indicators(model, indicator, (x, y), failing)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(values, dict(model.state_dict()))
    assert_same_bits(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert flags == [(module.training, len(module._forward_hooks), set(vars(module))) for module in model.modules()]
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    assert model.time_steps.rule is rule
    assert frozen == [p.requires_grad for p in model.parameters()]


def test_a_frozen_model_in_training_mode_has_the_same_indicators() -> None:
    model, data = noisy(), batch()
    expected = indicators(model, "sensitivity", data, mse_loss)
    again = indicators(model.requires_grad_(False).train(), "sensitivity", data, mse_loss)
    assert torch.equal(expected, again)
    assert expected.abs().min() > 0


@pytest.mark.parametrize("name", ["residual", "fractional", "whole", "branches"])
@pytest.mark.parametrize("indicator", ["dual-weighted", "sensitivity"])
def test_a_batch_costs_less_than_three_of_its_passes(indicator: str, name: str) -> None:
    """Calls of a layer, and of its backward pass: three and three would be the limit."""
    model: Any
    if name in FORMS:
        model, data = toy(name)
        counted = model.blocks[1].up
    else:
        model, data = built(Residual() if name == "residual" else Fractional(0.5), [0.1] * 9), batch()
        counted = model.layers[2][0]
    calls = {"forward": 0, "backward": 0}

    def count(_: Any, __: Any, output: Tensor) -> None:
        calls["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: calls.update(backward=calls["backward"] + 1))

    counted.register_forward_hook(count)
    indicators(model, indicator, data, mse_loss)
    assert calls["forward"] <= 3
    assert calls["backward"] <= 2


# functions of one's own, and refusals


def test_a_block_that_is_not_called_has_no_indicator() -> None:
    model, data = toy("whole")
    vars(model)["forward"] = lambda x, attention_mask: without_the_last(model, x, attention_mask)
    with pytest.raises(ValueError, match="every layer is called"):
        indicators(model, "sensitivity", data, mse_loss)


def without_the_last(model: Toy, x: Tensor, mask: Tensor) -> Tensor:
    """The model without its last block."""
    x = model.stem(x)
    for block in model.blocks[:3]:
        x = block(x, mask=mask)[0]
    return model.head(x).mean(1)


def test_a_compiled_network_is_looked_at_uncompiled() -> None:
    network, data = built(Residual()), batch()
    found = indicators(torch.compile(network, backend="eager"), "sensitivity", data, mse_loss)  # type: ignore[arg-type]
    assert torch.equal(found, indicators(network, "sensitivity", data, mse_loss))


def test_functions_of_ones_own() -> None:
    network, data = built(Residual()), batch()
    assert indicators(network, lambda tau, model: tau.square()).tolist() == pytest.approx([t**2 for t in TAU])

    class Numbers(Criterion):
        def scores(self, model: nn.Module) -> Tensor:
            return torch.arange(5.0)

    assert indicators(network, Numbers()).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]

    def figures(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
        return part[0].mean() * torch.ones(5, dtype=DOUBLE)

    x, y = data
    found = indicators(network, figures, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert found.tolist() == pytest.approx([float(x.mean())] * 5)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"data": None}, "data must be given"),
        ({"indicator": "dual"}, "indicator must be"),
        ({"indicator": 3}, "indicator must be"),
        ({"indicator": lambda tau, model: tau[:2], "data": None}, "5 figures"),
        ({"theta": 1.0}, r"theta must lie in \(0, 1\)"),
        ({"loss": None}, "loss must be given"),
        ({"loss": lambda output, target: output.sum() * math.inf}, "loss must be finite"),
        ({"data": []}, "at least one batch"),
        ({"model": nn.Linear(3, 2)}, "model must have time steps"),
        ({"model": feedforward(3, 4, 2, 3).double()}, "feedforward"),
        ({"model": densenet(3, 4, 2, 3).double()}, "dense"),
        ({"model": lambda: wrap(Toy().double(), example_inputs=toy("whole")[1][0], per="branch")}, "per='block'"),
    ],
)
def test_refusals(change: dict[str, Any], part: str) -> None:
    given = {"model": built(Residual()), "indicator": "sensitivity", "data": batch(), "loss": mse_loss} | change
    if not isinstance(given["model"], nn.Module):
        given["model"] = given["model"]()
    with pytest.raises((ValueError, TypeError), match=part):
        indicators(**given)


# marking

NAN = math.nan


def test_the_largest_are_marked() -> None:
    assert mark_to_refine.largest([0.1, -0.5, NAN, 0.3, 0.5], 2) == [1, 4]
    assert mark_to_refine.largest(torch.tensor([0.5, 0.5, 0.5]), 2) == [0, 1]
    with pytest.raises(ValueError, match=r"at most 1.*got 2; layer 0 cannot: it changes the width"):
        mark_to_refine.largest([NAN, 0.1], 2, {0: "it changes the width"})
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="number must be"):
            mark_to_refine.largest([0.1, 0.2], wrong)  # type: ignore[arg-type]


def test_the_bulk_is_the_smallest_set_with_its_share() -> None:
    """Against all subsets."""
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.5, 0.8, 1.0):
        eta = torch.randn(7, generator=generator, dtype=DOUBLE)
        sizes = eta.abs().tolist()
        eta[3] = NAN
        rest = [0, 1, 2, 4, 5, 6]
        total = math.fsum(sizes[l] for l in rest)
        subsets = [s for n in range(7) for s in itertools.combinations(rest, n)]
        enough = [s for s in subsets if math.fsum(sizes[l] for l in s) >= share * total]
        best = min(enough, key=lambda s: (len(s), -sum(sizes[l] for l in s)))
        assert mark_to_refine.bulk(eta, share) == list(best)
    assert mark_to_refine.bulk([0.0, 0.0], 0.5) == []
    for eta, share in (([NAN, NAN], 0.5), ([0.1], 0.0), ([0.1], 1.5), ([math.inf, 0.1], 0.5)):
        with pytest.raises(ValueError, match=r"must be|must lie"):
            mark_to_refine.bulk(eta, share)
