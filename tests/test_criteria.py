"""Criteria that look at the model at work: influence, sensitivity, the loss without a layer; against references."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from small_networks import deleted, network
from taulearn import Criterion, prune, wrap
from taulearn.adaptivity.criteria import on_data
from taulearn.adaptivity.estimate import MEASURED
from taulearn.adaptivity.loss_without import LossWithout
from taulearn.nn import Residual, fractional_dnn, resnet
from taulearn.nn.time_steps import time_steps_of
from wrapping.hosts import BY_NAME, Host, every_host, tensor

INIT = [0.5, -0.2, 0.4, 0.1, 0.3]
CAUSAL = [BY_NAME["gpt2"], BY_NAME["llama"]]


def batches(number: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    sizes = [4 + 3 * k for k in range(number)]
    return [(torch.randn(n, 3, generator=generator, dtype=dtype), torch.arange(n) % 2) for n in sizes]


def texts() -> list[dict[str, Tensor]]:
    """Two batches of padded sentences, of different lengths."""
    generator, found = torch.Generator().manual_seed(1), []
    for lengths in ([6, 3], [4, 5, 2]):
        ids = torch.randint(3, 39, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def scores(name: str, model: Any, data: Any, loss: Any = None) -> Tensor:
    return on_data(name, data, loss)(time_steps_of(model).tau, model)


@pytest.mark.parametrize("name", MEASURED)
def test_inputs_of_a_decoder_are_made_of_labels_as_the_model_does_it(name: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    ids, labels = torch.randint(3, 40, (2, 6)), torch.randint(3, 40, (2, 5))
    given = {"decoder_input_ids": nn.functional.pad(labels[:, :-1], (1, 0))}
    model = wrap(T5ForConditionalGeneration(config).eval(), example_inputs={"input_ids": ids, **given})

    def loss(output: Any, target: Tensor) -> Tensor:
        return cross_entropy(output.logits.flatten(0, 1), target.flatten())

    def deleted_with(**options: Any) -> Any:
        data = {"input_ids": ids, "labels": labels, **options.pop("extra", {})}
        return prune(copy.deepcopy(model), budget=2, criterion=name, data=data, **options).deleted

    expected = deleted_with(extra=given)
    assert deleted_with() == expected
    assert [each.layer for each in deleted_with(loss=loss)] == [each.layer for each in expected]


class TestFiguresThatAreNotFinite:
    """A batch without a label or a token that counts says nothing, rather than that its layers are worth nothing."""

    def without_any(self) -> dict[str, Tensor]:
        batch = texts()[0]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": torch.zeros_like(batch["attention_mask"]),
            "labels": torch.full_like(batch["labels"], -100),
        }

    @pytest.mark.parametrize("name", ["influence", "sensitivity"])
    def test_leave_the_mean_of_the_others(self, name: str) -> None:
        model = BY_NAME["gpt2"].wrapped()
        expected = scores(name, model, texts())
        for data in ([self.without_any(), *texts()], [*texts(), self.without_any()]):
            np.testing.assert_allclose(scores(name, model, data), expected, rtol=1e-6)

    @pytest.mark.parametrize("name", ["influence", "sensitivity"])
    def test_alone_are_refused(self, name: str) -> None:
        model = BY_NAME["gpt2"].wrapped()
        with pytest.raises(ValueError, match=r"data must .*finite"):
            prune(model, budget=2, criterion=name, data=[self.without_any()])
        assert time_steps_of(model).num_steps == 4


class TestSensitivity:
    """The mean over batches of |tau dJ_b/dtau|, with autograd's dJ/dtau."""

    def by_autograd(self, model: Any, data: Any, loss: Callable[[Any, Any], Tensor]) -> Tensor:
        values, found = time_steps_of(model).values, []
        for x, z in data:
            (gradient,) = torch.autograd.grad(loss(model(x), z), values)
            found.append((gradient * values).detach().abs())
        return torch.stack(found).mean(0)

    def test_of_a_network(self) -> None:
        model = network(INIT)
        found = scores("sensitivity", model, batches(), cross_entropy)
        np.testing.assert_allclose(found, self.by_autograd(model, batches(), cross_entropy), rtol=1e-6)
        one = scores(
            "sensitivity",
            model,
            [(torch.cat(x), torch.cat(z)) for x, z in [zip(*batches(), strict=True)]],
            cross_entropy,
        )
        assert float(one[4]) < 0.999 * float(found[4]), "the mean of absolute values is not that of one large batch"

    @every_host
    def test_of_a_wrapped_model(self, host: Host) -> None:
        model = host.wrapped(init=[0.5, 0.25, 1.0, 0.3]).double().eval()
        x = host.inputs()
        x = x if x.dtype == torch.long else x.double()
        data = [(x, torch.tensor(0)), (x[:1], torch.tensor(0))]

        def loss(output: Any, _: Tensor) -> Tensor:
            return tensor(output).square().mean()

        expected = self.by_autograd(model, data, loss)
        np.testing.assert_allclose(scores("sensitivity", model, data, loss), expected, rtol=1e-6)

    @pytest.mark.parametrize("host", CAUSAL, ids=str)
    def test_of_branches(self, host: Host) -> None:
        """Attention and MLP each, and the block as their sum before the absolute value."""
        tau = [0.5, 0.8, 0.25, 0.7, 1.0, 0.9, 0.3, 0.6]
        model = host.wrapped(per="branch", init=tau).double().eval()
        data = [(host.inputs(), torch.tensor(0))]

        def loss(output: Any, _: Tensor) -> Tensor:
            return tensor(output).square().mean()

        expected = self.by_autograd(model, data, loss)
        np.testing.assert_allclose(scores("sensitivity", model, data, loss), expected, rtol=1e-6)

    def test_of_a_fractional_network(self) -> None:
        """The derivative in a factor on tau^gamma f, the weights of the memory held."""
        model, expected = network([abs(t) for t in INIT], builder=fractional_dnn), []

        class Scaled(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner, self.factor = inner, torch.ones((), dtype=torch.float64, requires_grad=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.factor * self.inner(x)

        scaled = copy.deepcopy(model)
        scaled.layers = nn.ModuleList(Scaled(layer) for layer in scaled.layers)
        for x, z in batches():
            of = torch.autograd.grad(cross_entropy(scaled(x), z), [layer.factor for layer in scaled.layers])
            expected.append(torch.stack(of).abs())
        found = scores("sensitivity", model, batches(), cross_entropy)
        np.testing.assert_allclose(found, torch.stack(expected).mean(0), rtol=1e-6)

    def test_of_a_model_in_which_nothing_trains(self) -> None:
        model, frozen = network(INIT), network(INIT, constraint="fixed")
        for parameter in frozen.parameters():
            parameter.requires_grad_(False)
        expected = scores("sensitivity", model, batches(), cross_entropy)
        torch.testing.assert_close(scores("sensitivity", frozen, batches(), cross_entropy), expected)
        assert not any(p.requires_grad for p in frozen.parameters())


class TestInfluence:
    """1 - cos of the states before and after, in NumPy."""

    def test_of_a_network(self) -> None:
        model, (data, *_) = network(INIT, dtype=torch.float64), batches()
        states = [data[0].numpy(), *[y.detach().numpy() for y in model.states(data[0])]]
        found = scores("influence", model, [data])
        assert found[0] == 0.0, "the width changes"
        for l in range(1, 5):
            x, y = states[l], states[l + 1]
            cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
            assert float(found[l]) == pytest.approx((1 - cosine).mean(), rel=1e-5)

    @pytest.mark.parametrize("host", [*CAUSAL, BY_NAME["bert"]], ids=str)
    def test_of_tokens_that_count(self, host: Host) -> None:
        model, expected = host.wrapped(init=[0.5, 0.25, 1.0, 0.3]).eval(), []
        for batch in texts():
            with torch.no_grad():
                states = model(**batch, output_hidden_states=True).hidden_states
            kept, of = batch["attention_mask"].bool(), []
            for l in range(3):  # the last state is behind a normalisation in some models
                x, y = states[l][kept].double().numpy(), states[l + 1][kept].double().numpy()
                of.append((1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean())
            expected.append(of)
        np.testing.assert_allclose(scores("influence", model, texts())[:3], np.mean(expected, 0), rtol=1e-4)

    def test_of_a_step_that_hardly_turns_the_state(self) -> None:
        """Without the cancellation of 1 - cos: it goes with the square of the step."""
        found = [
            float(scores("influence", BY_NAME["gpt2"].wrapped(init=[1.0, step, 1.0, 1.0]), texts()[:1])[1])
            for step in (1e-5, 2e-5)
        ]
        assert found[1] == pytest.approx(4 * found[0], rel=0.02)
        assert 0.0 < found[0] < 1e-9

    def test_of_a_shape_without_tokens(self) -> None:
        """One vector a sample; a mask of another shape says nothing."""
        host = BY_NAME["resnet"]
        found = scores("influence", host.wrapped(), [(host.inputs(), torch.tensor(0))])
        assert bool((found > 0).all())


class TestLoss:
    """The greedy choice by brute force, on copies."""

    def mean_loss(self, model: Any, data: Any) -> float:
        """The loss of all samples together, in one batch."""
        x, z = (torch.cat(parts) for parts in zip(*data, strict=True))
        with torch.no_grad():
            return float(cross_entropy(model.eval()(x), z))

    def greedy(self, model: Any, data: Any, left: int) -> list[int]:
        gone: list[int] = []
        model = copy.deepcopy(model)
        while (number := model.time_steps.num_steps) > left:
            found = {}
            for l in range(1, number):
                smaller = copy.deepcopy(model)
                prune(smaller, keep=[i for i in range(number) if i != l])
                found[l] = self.mean_loss(smaller, data)
            least = min(found, key=found.__getitem__)
            gone.append(model.time_steps.origin[least])
            prune(model, keep=[i for i in range(number) if i != least])
        return gone

    @pytest.mark.parametrize("seed", range(3))
    def test_of_a_network(self, seed: int) -> None:
        model, data = network([0.5, 0.9, -0.8, 0.7, 0.9, -0.6]), batches()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.normal_(generator=generator)
        expected = self.greedy(model, data, 2)
        again = copy.deepcopy(model)
        report = prune(model, budget=2, criterion="loss", data=data, loss=cross_entropy)
        assert deleted(report) == expected
        assert report.note == "", "no layers were equal"
        assert deleted(prune(copy.deepcopy(again), budget=2, data=data, loss=cross_entropy)) == expected, "the default"
        assert report.deleted[0].share == pytest.approx(self.share(again, data), abs=1e-6)

    def share(self, model: Any, data: Any) -> float:
        losses = []
        for l in range(1, 6):
            smaller = copy.deepcopy(model)
            prune(smaller, keep=[i for i in range(6) if i != l])
            losses.append(self.mean_loss(smaller, data))
        least = min(self.mean_loss(model, data), *losses)
        worse = np.array(losses) - least
        return float(worse.min() / worse.sum())

    def test_of_a_language_model_is_the_mean_over_tokens(self) -> None:
        model = BY_NAME["gpt2"].wrapped().eval()
        total, count = 0.0, 0
        for batch in texts():
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            total += float(cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum"))
            count += int((labels != -100).sum())
        assert LossWithout(texts())._mean(model) == pytest.approx(total / count, rel=1e-6)

    def test_a_criterion_of_ones_own_that_is_taken_again(self) -> None:
        class Last(Criterion):
            greedy = True

            def scores(self, model: Any) -> Tensor:
                return torch.arange(model.time_steps.num_steps, 0, -1)

        model = network(INIT)
        assert deleted(prune(model, criterion=Last(), budget=3)) == [4, 3]


@pytest.mark.parametrize("name", MEASURED)
def test_by_name_on_text(name: str) -> None:
    """Batches of transformers, whose loss is the model's own; the model is as it was but for the deletion."""
    model = BY_NAME["gpt2"].wrapped(init=[1.0, 0.6, 1.0, 0.8]).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = prune(model, budget=3, criterion=name, data=texts())
    assert len(report.deleted) == 1
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    kept = {key: value for key, value in model.state_dict().items() if ".h." not in key and "time_steps" not in key}
    assert all(torch.equal(value, state[key]) for key, value in kept.items())


@pytest.mark.parametrize("name", MEASURED)
def test_what_data_may_be(name: str) -> None:
    """A loader, a list, an iterator, one batch: the same choice; the loader's draws leave the generator alone."""
    x, z = torch.randn(24, 3, dtype=torch.float64), torch.arange(24) % 2
    loader = DataLoader(TensorDataset(x, z), batch_size=8, shuffle=True)
    listed = [(x[i : i + 8], z[i : i + 8]) for i in (0, 8, 16)]
    found = []
    for data in (loader, listed, iter(listed), (x, z)):
        model = network(INIT)
        random = torch.get_rng_state()
        found.append(deleted(prune(model, budget=3, criterion=name, data=data, loss=cross_entropy)))
        assert torch.equal(torch.get_rng_state(), random)
    assert found[1] == found[2]
    if name != "sensitivity":  # which depends on the size of the batches
        assert found == [found[0]] * 4


def test_a_model_that_changes_when_it_is_called() -> None:
    """Batch normalisation and counters are as they were, also after an error."""
    torch.manual_seed(0)
    host = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()) for _ in range(4)))
    model = wrap(host, "[0123]").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    data = [(x.float(), z) for x, z in batches()]
    for name in MEASURED:
        with pytest.raises(RuntimeError, match="shapes"):
            prune(
                model,
                budget=2,
                criterion=name,
                data=[*data, (torch.ones(2, 5), torch.zeros(2).long())],
                loss=cross_entropy,
            )
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert model.time_steps.num_steps == 4
    assert len(prune(model, budget=2, criterion="loss", data=data, loss=cross_entropy).deleted) == 2


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = network(INIT)
    with pytest.raises(ValueError, match="loss must be finite"):
        prune(model, budget=2, criterion="loss", data=batches(), loss=lambda y, _: y.sum() * math.nan)
    assert model.time_steps.num_steps == 5


def test_regression() -> None:
    model, (x, _) = resnet(3, 4, 1, 4, activation="tanh"), batches()[2]
    data = (x.float(), x.float()[:, :1])
    for name in ("sensitivity", "loss"):
        assert len(prune(copy.deepcopy(model), budget=3, criterion=name, data=data, loss=mse_loss).deleted) == 1


def test_a_scheme_that_changes_the_output_of_a_layer_in_place() -> None:
    class InPlace(Residual):
        def step(self, l: int, f: nn.Module, y: Tensor, carry: Any, skips: Any, coefficients: Any) -> Any:
            increment, past = f(y).mul_(coefficients[l]), skips(y, l, l + 1)
            return (increment if past is None else increment.add_(past)), carry

    model, twin = network(INIT, activation="gelu"), network(INIT, activation="gelu")
    twin.scheme = InPlace()
    found = [scores("sensitivity", each, batches(), cross_entropy) for each in (model, twin)]
    torch.testing.assert_close(*found)


def test_a_host_that_changes_the_output_of_a_block_in_place() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                x *= 2.0
            return x

    torch.manual_seed(0)
    model = wrap(Shifted().double(), "blocks.*", init=[0.5, 0.7, 0.9])
    data, of = batches(1), TestSensitivity()
    found = scores("sensitivity", model, data, cross_entropy)
    np.testing.assert_allclose(found, of.by_autograd(model, data, cross_entropy), rtol=1e-6)
