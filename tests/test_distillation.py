"""Distillation against NumPy, closed gradients and plain loops; what it counts, and what it leaves alone."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference import Array, array
from taulearn import attach, prune, wrap
from taulearn.nn import resnet
from taulearn.penalties import Distillation
from taulearn.training.batches import make_batches
from training.support import assert_same_history, assert_same_weights, digits, network, run_fit, sgd

DOUBLE = torch.float64


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(z: Array, teachers: Array, temperature: float) -> Array:
    p, q = softmax(teachers / temperature), softmax(z / temperature)
    return (p * np.log(p / q)).sum(-1)


class Answers(nn.Module):
    """A model whose logits are its parameter; its steps do nothing."""

    def __init__(self, logits: Tensor, *, steps: bool = True) -> None:
        super().__init__()
        self.z = nn.Parameter(logits)
        self.calls: list[Any] = []
        if steps:
            self.time_steps = resnet(2, 2, 2, 2).time_steps

    def forward(self, x: Any = None, **others: Any) -> Any:
        self.calls.append(others or x)
        return {"logits": self.z} if others else self.z


class AnswersCausalLM(Answers):
    """Its logits at a token are for the next one."""


def pair(*shape: int, of: type[Answers] = Answers) -> tuple[Answers, Answers]:
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(*shape, dtype=DOUBLE, generator=random) for _ in range(2)]
    return of(logits[0]), Answers(logits[1], steps=False)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient_of_classes(temperature: float) -> None:
    model, teacher = pair(4, 3)
    penalty, x = Distillation(teacher, 0.7, temperature), torch.zeros(4, 2)
    value = penalty(model, x, outputs=model(x))
    z, t = array(model.z), array(teacher.z)
    assert value.item() == pytest.approx(0.7 * temperature**2 * divergence(z, t, temperature).mean(), rel=1e-12)
    value.backward()
    gradient = 0.7 * temperature * (softmax(z / temperature) - softmax(t / temperature)) / 4
    np.testing.assert_allclose(array(model.z.grad), gradient, rtol=1e-10, atol=1e-14)
    assert teacher.z.grad is None


LABELS = torch.tensor([[1, -100, 0, 2], [-100, 2, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
COUNTS: dict[str, tuple[type[Answers], Any, Any, Any]] = {
    "labels": (Answers, {"attention_mask": MASK}, LABELS, LABELS != -100),
    "labels of the next token": (
        AnswersCausalLM,
        {"attention_mask": MASK},
        LABELS,
        torch.tensor([[False, True, True, False], [True, False, False, False]]),
    ),
    "mask": (Answers, {"attention_mask": MASK}, None, MASK == 1),
    "mask beside labels of samples": (Answers, {"attention_mask": MASK}, torch.tensor([0, 1]), MASK == 1),
    "all": (Answers, {"ids": MASK}, None, torch.ones(2, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize(("of", "inputs", "labels", "counts"), COUNTS.values(), ids=COUNTS)
def test_tokens_that_count(of: type[Answers], inputs: Any, labels: Any, counts: Tensor) -> None:
    model, teacher = pair(2, 4, 3, of=of)
    value = Distillation(teacher, 2.0)(model, inputs, labels, outputs=model(**inputs))
    each = divergence(array(model.z), array(teacher.z), 1.0)
    assert value.item() == pytest.approx(2.0 * each[counts.numpy()].mean(), rel=1e-12)
    assert teacher.calls == [inputs]


def test_labels_among_the_inputs_are_targets() -> None:
    model, teacher = pair(2, 3, 5)
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    penalty = Distillation(teacher, 1.0)
    expected = penalty(model, inputs, labels, outputs=model.z)
    assert torch.equal(penalty(model, {**inputs, "labels": labels}, outputs=model.z), expected)
    assert not torch.equal(penalty(model, inputs, outputs=model.z), expected)
    assert all("labels" not in given for given in teacher.calls)


def test_no_token_counts() -> None:
    model, teacher = pair(2, 4, 3)
    value = Distillation(teacher, 2.0)(model, {"ids": MASK}, torch.full((2, 4), -100), outputs=model.z)
    value.backward()
    assert value.item() == 0.0
    assert model.z.grad is not None
    assert not model.z.grad.any()


def test_hidden_states_are_matched_by_number() -> None:
    torch.manual_seed(0)
    model = resnet(3, 4, 2, 4, dtype=DOUBLE)
    teacher, x = resnet(3, 4, 2, 4, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    prune(model, keep=[0, 2, 3])
    value = Distillation(teacher, 0.0, hidden=0.3)(model, x, outputs=model(x))
    y, t = ([array(each) for each in m.states(x)] for m in (model, teacher))
    expected = 0.3 * np.mean([((y[k] - t[l]) ** 2).mean() for k, l in enumerate((0, 2, 3))])
    assert value.item() == pytest.approx(expected, rel=1e-12)


class Encoder(nn.Module):
    """Blocks on (batch, tokens, width), with logits for each sample; padding is seen by nobody but the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        weights = attention_mask[..., None].to(x.dtype)
        return {"logits": self.head((weights * x).sum(1) / weights.sum(1))}


def encoder(seed: int) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(seed)
    inputs = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": MASK}
    return wrap(Encoder().double(), example_inputs=inputs, blocks="blocks.*"), inputs


def test_hidden_states_of_padding_do_not_count() -> None:
    (model, inputs), (teacher, _) = encoder(0), encoder(1)
    penalty = Distillation(teacher, 0.5, hidden=0.3)
    value = penalty(model, inputs, torch.tensor([0, 1]), outputs=model(**inputs))
    other = inputs | {"input_ids": torch.where(MASK == 1, inputs["input_ids"], 8)}
    assert penalty(model, other, torch.tensor([0, 1]), outputs=model(**other)).item() == pytest.approx(
        value.item(), rel=1e-12
    )


def test_the_teacher_is_in_evaluation_mode_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = resnet(3, 4, 2, 2)
    teacher = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    teacher[1].eval()
    before, x = copy.deepcopy(teacher.state_dict()), torch.randn(5, 3)
    penalty = Distillation(teacher, 1.0)
    values = [penalty(model, x, outputs=model(x)).item() for _ in range(2)]
    assert values[0] == values[1]
    assert [each.training for each in teacher] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_half_precision_is_compared_in_single() -> None:
    model, teacher = pair(4, 3)
    halves = [each.z.detach().to(torch.bfloat16) for each in (model, teacher)]
    value = Distillation(Answers(halves[1], steps=False), 1.0)(model, torch.zeros(4, 2), outputs=halves[0])
    expected = divergence(array(halves[0].double()), array(halves[1].double()), 1.0).mean()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)


class Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.network(x)


def test_fit_is_the_plain_loop_and_calls_the_teacher_once_a_batch() -> None:
    train, teacher = digits(dtype=DOUBLE), Counted(network(7, seed=1, dtype=DOUBLE))
    model, plain = network(dtype=DOUBLE), network(dtype=DOUBLE)
    history = run_fit(model, train, sgd(model), epochs=1, penalties=Distillation(teacher, 0.5, 2.0))
    assert teacher.calls == 5 + 1  # batches, and the look at the data before
    assert "network.time_steps.values" not in model.state_dict()
    optimizer, values = sgd(plain), []
    batches: Any = make_batches(train, 40, 0, torch.device("cpu"))
    for x, z in batches.epoch(0):
        optimizer.zero_grad()
        y = plain(x)
        with torch.no_grad():
            t = teacher.network(x)
        term = 0.5 * 4.0 * F.kl_div((y / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")
        (F.cross_entropy(y, z) + term).backward()
        values.append(term.item())
        optimizer.step()
    np.testing.assert_allclose(history.iterations["penalty.distillation"], values, rtol=1e-9)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-12)


def test_parts_add_up_and_a_resumed_run_is_the_same_bit_by_bit(tmp_path: Any) -> None:
    train, teacher = digits(), network(7, seed=1)
    before = copy.deepcopy(teacher.state_dict())

    def run(accumulate: int = 1, epochs: int = 3, model: Any = None, **options: Any) -> tuple[Any, Any]:
        model = network() if model is None else model
        penalty = Distillation(teacher, 0.5, 2.0, hidden=0.1)
        options |= {"penalties": penalty, "accumulate": accumulate, "epochs": epochs}
        return model, run_fit(model, train, torch.optim.Adam(model.parameters(), lr=1e-3), **options)

    model, history = run()
    parts, of_parts = run(accumulate=3)
    np.testing.assert_allclose(
        of_parts.iterations["penalty.distillation"], history.iterations["penalty.distillation"], rtol=1e-5
    )
    torch.testing.assert_close(parts.state_dict(), model.state_dict(), rtol=0, atol=1e-5)
    run(epochs=2, run=tmp_path / "run")
    resumed, whole = run(run=tmp_path / "run", resume=True)
    assert_same_weights(resumed, model)
    assert_same_history(whole, history)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_attach_records_it_and_gives_its_gradient() -> None:
    (model, inputs), (teacher, _) = encoder(0), encoder(1)
    optimizer, labels = sgd(model), torch.tensor([0, 1])
    session = attach(model, optimizer, penalties=Distillation(teacher, 0.5, 2.0))
    outputs = model(**inputs)
    loss = F.cross_entropy(outputs["logits"], labels)
    total = session.loss(loss, outputs=outputs, inputs={**inputs, "labels": labels})
    expected = 2.0 * divergence(array(outputs["logits"]), array(teacher(**inputs)["logits"]), 2.0).mean()
    assert (total - loss).item() == pytest.approx(expected, rel=1e-10)
    total.backward()
    optimizer.step()
    session.detach()
    assert session.history.iterations["penalty.distillation"].tolist() == pytest.approx([expected], rel=1e-6)
    assert session.history.iterations["loss"].tolist() == pytest.approx([loss.item()], rel=1e-6)


def test_a_compiled_fit_runs_it_eagerly(tmp_path: Any) -> None:
    train, teacher, model = digits(80), network(7, seed=1), network()
    run_fit(
        model, train, sgd(model), epochs=1, compile="always", penalties=Distillation(teacher, 0.5), run=tmp_path / "r"
    )
    assert "a teacher answers" in (tmp_path / "r" / "run.toml").read_text()


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (lambda model: model, "itself"),
        (lambda model: nn.Sequential(nn.Flatten(), nn.Linear(64, 12), model.head), "shares"),
        (lambda model: resnet(64, 12, 11, 5), "11"),
        (lambda model: nn.Sequential(nn.Linear(8, 10)), r"\(2, 1, 8, 10\)"),
    ],
    ids=["the model", "shared parameters", "other classes", "other shape"],
)
def test_fit_refuses_a_teacher_before_anything_changes(
    teacher: Callable[[Any], nn.Module], says: str, tmp_path: Any
) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"^teacher must .*{says}"):
        run_fit(model, digits(), sgd(model), penalties=Distillation(teacher(model), 0.5), run=tmp_path / "run")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "run").exists()
