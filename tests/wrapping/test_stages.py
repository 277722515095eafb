"""Intermediate outputs of wrapped models: those of the model with tau = 0 from a block on, without computing blocks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from taulearn import Pruning, fit, prune, wrap
from taulearn.depth.wrapped_states import intermediate_outputs, record_states, skipping
from taulearn.penalties import L1, StageCost
from wrapping.hosts import Block, Host, evaluated, every_host, tensor


def zeroed(model: Any, k: int) -> Any:
    """A twin whose steps are zero from the k-th on."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.time_steps.values[k:] = 0.0
    return twin


def calls(model: Any) -> list[int]:
    """Counts the calls of the blocks' own forwards."""
    counts = [0] * model.time_steps.num_steps
    for l, block in enumerate(model._time_step_wrapping.layers):
        inner = next(module for module in block.modules() if next(module.parameters(recurse=False), None) is not None)

        def count(*_: object, l: int = l) -> None:
            counts[l] += 1

        inner.register_forward_hook(count)
    return counts


@every_host
def test_are_those_with_zero_steps(host: Host) -> None:
    model, inputs = host.wrapped().eval(), host.inputs()
    with torch.no_grad():
        model.time_steps.values.uniform_(0.4, 1.3)
        expected = [evaluated(zeroed(model, k), inputs) for k in range(model.time_steps.num_steps + 1)]
        found = intermediate_outputs(model, inputs)
        output, states = record_states(model, inputs)
        again = intermediate_outputs(model, inputs, states=states)
    assert list(found) == list(range(len(expected)))
    for k, value in enumerate(expected):
        torch.testing.assert_close(tensor(found[k]), value, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(tensor(again[k]), value, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(tensor(output), expected[-1], rtol=0.0, atol=0.0)


@every_host
def test_each_block_is_computed_once(host: Host) -> None:
    model, inputs = host.wrapped().eval(), host.inputs()
    counts = calls(model)
    with torch.no_grad():
        intermediate_outputs(model, inputs)
        assert max(counts) == 1
        states = record_states(model, inputs)[1]
        before = list(counts)
        intermediate_outputs(model, inputs, states=states)
    assert counts == before


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(3) for _ in range(2)]
    return nn.Sequential(nn.Linear(2, 3), *blocks, nn.Tanh(), Block(3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batches_seen(model: nn.Sequential, x: Tensor) -> list[int]:
    """Sizes of the batches that reach what follows the blocks, once the trial is over."""
    sizes: list[int] = []
    with model[5].register_forward_hook(lambda *arguments: sizes.append(len(arguments[2]))):
        intermediate_outputs(model, x)
        sizes.clear()
        intermediate_outputs(model, x)
    return sizes


def test_all_at_once_where_the_host_allows_it() -> None:
    model, x = wrap(sequential(), ["1", "2", "4"]), torch.randn(5, 2)
    assert batches_seen(model, x) == [5, 15]


class SequenceFirst(nn.Module):
    """A host whose samples are in the second dimension, of which there are as many as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_host_that_would_mix_samples_is_asked_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 5, 4)
    model = wrap(SequenceFirst(), example_inputs=x).eval()
    found = intermediate_outputs(model, x)
    for k in range(4):
        torch.testing.assert_close(found[k], zeroed(model, k)(x), rtol=0.0, atol=1e-5)


class Centred(nn.Module):
    """A host that mixes samples behind its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(3) for _ in range(3)))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x)
        return self.head(y - y.mean(0))


def test_equal_states_do_not_hide_that_a_host_mixes_them() -> None:
    """With steps of zero all states are the same, and one pass gives by chance what single passes give."""
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    model = wrap(Centred(), example_inputs=x).eval()
    with torch.no_grad():
        model.time_steps.values.zero_()
        intermediate_outputs(model, x)
        model.time_steps.values.fill_(1.0)
        found = intermediate_outputs(model, x)
        for k in range(4):
            torch.testing.assert_close(found[k], zeroed(model, k)(x), rtol=0.0, atol=1e-5)


def test_a_single_depth_does_not_hide_it_either() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    host = Centred()
    host.blocks = nn.Sequential(Block(3))
    model = wrap(host, ["blocks.0"], example_inputs=x).eval()
    with torch.no_grad():
        intermediate_outputs(model, x)
        found = intermediate_outputs(model, x, states=record_states(model, x)[1])
        for k in range(2):
            torch.testing.assert_close(found[k], zeroed(model, k)(x), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", ["tuple", "list", "keywords", "empty"])
def test_other_inputs_after_a_tensor(kind: str) -> None:
    model, x = wrap(sequential(), ["1", "2", "4"]).eval(), torch.randn(5, 2)
    with torch.no_grad():
        expected = intermediate_outputs(model, x)
        inputs = {"tuple": (x,), "list": [x], "keywords": {"input": x}, "empty": x[:0]}[kind]
        found = intermediate_outputs(model, inputs)
    for k in range(4):
        torch.testing.assert_close(found[k], expected[k][:0] if kind == "empty" else expected[k])


@pytest.mark.parametrize("kind", ["tuple", "empty", "nan", "inf"])
def test_a_first_batch_from_which_nothing_can_be_told(kind: str) -> None:
    """It is answered one by one, and the next one shows what the host allows."""
    model, x = wrap(sequential(), ["1", "2", "4"]).eval(), torch.randn(5, 2)
    bad = x.clone()
    bad[0, 0] = {"nan": float("nan")}.get(kind, float("inf"))
    with torch.no_grad():
        for _ in range(2):
            found = intermediate_outputs(model, {"tuple": (x,), "empty": x[:0]}.get(kind, bad))
            assert list(found) == [0, 1, 2, 3]
        cost = StageCost(1.0, cross_entropy)(model, bad, torch.zeros(5, dtype=torch.long))
        assert kind == "inf" or bool(torch.isnan(cost)) or kind in ("tuple", "empty")
        assert batches_seen(model, x) == [5, 15]


class Normalised(nn.Module):
    """Batch normalisation after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(3) for _ in range(3)))
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


def test_normalisation_in_training() -> None:
    """Each state by its own statistics, and only the final one enters the running ones."""
    torch.manual_seed(0)
    host, x = Normalised(), torch.randn(6, 3)
    for module in host.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = wrap(host, example_inputs=x).train()
    running = model.norm.running_mean.clone()
    expected = []
    for k in range(4):
        twin = zeroed(model, k)
        expected.append(twin(x))
    found = intermediate_outputs(model, x)
    for k in range(4):
        torch.testing.assert_close(found[k], expected[k], rtol=0.0, atol=1e-6)
    states = record_states(model, x)[1]
    torch.testing.assert_close(model.norm.running_mean, running + 0.19 * (states[-1].mean(0) - running))


def test_after_a_deletion() -> None:
    model, x = wrap(sequential(), ["1", "2", "4"], example_inputs=torch.randn(5, 2)).eval(), torch.randn(5, 2)
    with torch.no_grad():
        intermediate_outputs(model, x)
        prune(model, keep=[0, 2])
        found = intermediate_outputs(model, x)
        for k in range(3):
            torch.testing.assert_close(found[k], zeroed(model, k)(x))


@every_host
def test_skipped_blocks_are_not_computed(host: Host) -> None:
    model, inputs = host.wrapped().eval(), host.inputs()
    expected = evaluated(zeroed(model, 1), inputs)
    counts = calls(model)
    with skipping(model, 1):
        torch.testing.assert_close(evaluated(model, inputs), expected, rtol=0.0, atol=1e-6)
    assert counts == [1] + [0] * (len(counts) - 1)


@pytest.mark.parametrize("compile", ["never", "always"])
def test_training_with_a_stage_cost(compile: str) -> None:  # noqa: A002
    model, x = wrap(sequential(), ["1", "2", "4"], init=0.5, example_inputs=torch.randn(5, 2)), torch.randn(40, 2)
    z = (x[:, 0] > 0).long()
    penalties = [StageCost(0.5, cross_entropy), L1(0.3, proximal=True)]
    history = fit(
        model,
        (x, z),
        loss=cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        epochs=20,
        batch_size=8,
        penalties=penalties,
        pruning=Pruning(0.05),
        progress=False,
        compile=compile,
    )
    losses = history.iterations["stage_loss"]
    assert losses.shape == (100, 4)
    assert history.deletions
    gone = history.deletions[0]
    assert not bool(torch.isfinite(torch.from_numpy(losses[gone.iteration :, gone.layer + 1])).any())
    assert losses[-1][[0]] == pytest.approx(losses[-1, 0])
    assert losses[-1, 0] < 0.8 * losses[0, 0]


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"model must .*got Linear"):
        intermediate_outputs(nn.Linear(2, 2), torch.ones(1, 2))
    model, x = wrap(sequential(), ["1", "2", "4"]), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"states must .*got 3 tensors"):
        intermediate_outputs(model, x, states=record_states(model, x)[1][1:])
    with pytest.raises(ValueError, match="model must call its blocks one after the other in the order of their steps"):
        record_states(wrap(Backwards(), "blocks.*"), torch.randn(5, 3))
