"""Batches that are dictionaries, and models that compute their loss: the loop that anyone would write, bit by bit."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import taulearn
from taulearn import Pruning
from taulearn.penalties import L1, Distillation
from taulearn.training import evaluate
from training.support import Crash, assert_same_history, assert_same_weights, crash_after, run_fit

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="pip install 'taulearn[huggingface]'")

WORDS = 23


class Sentences(Dataset[dict[str, Tensor]]):
    """Sentences of different lengths, with a label each or, for language models, one a token."""

    def __init__(self, number: int = 22, *, language: bool = False, prompt: int = 0) -> None:
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 12, (number,), generator=random).tolist()
        self.sentences = [torch.randint(1, WORDS, (length,), generator=random) for length in lengths]
        self.labels = torch.randint(3, (number,), generator=random)
        self.language, self.prompt = language, prompt

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = self.sentences[i]
        labels = ids.clone() if self.language else self.labels[i]
        if self.language:
            labels[: self.prompt] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def padded(items: list[dict[str, Tensor]], length: int = 0) -> dict[str, Tensor]:
    """As long as the longest, or longer: padding is 0, and -100 among labels."""
    length = max(length, *(len(each["input_ids"]) for each in items))
    batch = {}
    for name in items[0]:
        fill = -100 if name == "labels" else 0
        values = [each[name] for each in items]
        if values[0].ndim:
            values = [F.pad(each, (0, length - len(each)), value=fill) for each in values]
        batch[name] = torch.stack(values)
    return batch


def loader(data: Any, size: int = 5, **options: Any) -> Any:
    return DataLoader(data, batch_size=size, collate_fn=padded, **options)


def bert(kind: str = "BertForSequenceClassification", *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=WORDS, max_position_embeddings=32, **sizes, **{"num_labels": 3} | options
    )
    return wrapped(getattr(transformers, kind)(config))


def gpt2(*, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=8, n_layer=3, n_head=2, **ids)
    return wrapped(transformers.GPT2LMHeadModel(config))


def wrapped(model: Any) -> Any:
    return taulearn.wrap(model, example_inputs={"input_ids": torch.ones(2, 4, dtype=torch.long)})


CASES: dict[str, tuple[Any, Any]] = {
    "classes": (bert, Sentences()),
    "language model": (gpt2, Sentences(language=True)),
    "answers of a language model": (gpt2, Sentences(language=True, prompt=2)),
    "masked language model": (lambda: bert("BertForMaskedLM"), Sentences(language=True, prompt=1)),
    "tags": (lambda: bert("BertForTokenClassification", num_labels=WORDS), Sentences(language=True)),
}
all_cases = pytest.mark.parametrize(("make", "data"), CASES.values(), ids=CASES)


def without_dropout(model: Any) -> Any:
    """In double precision, too: parts of a batch differ in rounding alone."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.double()


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(taulearn.parameter_groups(model, lr=3e-3, weight_decay=0.01))


def plain(model: Any, batches: Any, epochs: int, **options: Any) -> tuple[Any, list[float]]:
    optimizer, losses = adam(model), []
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    return model, losses


@all_cases
def test_fit_is_the_plain_loop_bit_by_bit(make: Any, data: Any) -> None:
    torch.manual_seed(3)
    theirs, losses = plain(make(), loader(data, shuffle=True, generator=torch.Generator().manual_seed(5)), 2)
    ours = make()
    batches = loader(data, shuffle=True, generator=torch.Generator().manual_seed(5))
    history = run_fit(ours, batches, adam(ours), loss=None, epochs=2)
    assert history.iterations["loss"].tolist() == losses
    assert_same_weights(ours, theirs)


def count(data: Any, i: int) -> int:
    """How many labels of a sample count in the loss of its model."""
    labels = data[i]["labels"]
    return int((labels != -100).sum()) if labels.ndim else 1


@all_cases
def test_parts_of_a_batch_add_up_to_it(make: Any, data: Any) -> None:
    """Sentences of other lengths have other numbers of tokens that count."""
    results = []
    for accumulate in (1, 3):
        model = without_dropout(make())
        options = {"accumulate": accumulate, "penalties": L1(0.01), "loss": None, "epochs": 1}
        results.append((run_fit(model, loader(data, 8), torch.optim.SGD(model.parameters(), 0.1), **options), model))
    (whole, model), (parts, other) = results
    np.testing.assert_allclose(parts.iterations["loss"], whole.iterations["loss"], rtol=1e-6)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=1e-8)


@all_cases
def test_evaluation_is_that_of_one_big_batch(make: Any, data: Any) -> None:
    model = make().eval()
    figures = evaluate(model, loader(data))
    whole = padded([data[i] for i in range(len(data))])
    with torch.no_grad():
        output = model(**whole)
    assert figures["loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    kind = type(model).__name__
    if kind == "BertForSequenceClassification":
        right = (output.logits.argmax(1) == whole["labels"]).float().mean().item()
        assert figures.keys() == {"loss", "accuracy"}
        assert figures["accuracy"] == pytest.approx(right, rel=1e-6)
    elif kind == "BertForTokenClassification":
        assert figures.keys() == {"loss"}
    else:
        assert figures.keys() == {"loss", "perplexity"}
        assert figures["perplexity"] == pytest.approx(math.exp(output.loss.item()), rel=1e-6)


def test_metrics_by_name() -> None:
    model, data = gpt2().eval(), Sentences(language=True, prompt=1)
    figures = evaluate(model, loader(data), metrics=["accuracy", "perplexity"])
    whole = padded([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = model(**{name: each for name, each in whole.items() if name != "labels"}).logits
    z = whole["labels"][:, 1:]
    right = ((logits[:, :-1].argmax(-1) == z) & (z != -100)).sum() / (z != -100).sum()
    assert figures["accuracy"] == pytest.approx(right.item(), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]), rel=1e-6)
    history = run_fit(
        model, loader(data), adam(model), loss=None, epochs=1, validation=loader(data), metrics=["perplexity"]
    )
    assert [name for name in history.epochs if name.startswith("validation")] == [
        "validation.loss",
        "validation.perplexity",
    ]
    own = evaluate(model, loader(data), metrics={"size": lambda output, labels: output.logits.abs().mean()})
    assert own.keys() == {"loss", "size"}


def shifted(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_that_is_given_is_that_of_the_model() -> None:
    """It gets the outputs of a call without labels, and the batch's labels."""
    data, results = Sentences(language=True, prompt=1), []
    for loss in (None, shifted):
        torch.manual_seed(0)
        model = gpt2()
        run = run_fit(model, loader(data, 8), adam(model), loss=loss, epochs=2, accumulate=2, validation=loader(data))
        results.append((model, run))
    (model, ours), (other, theirs) = results
    np.testing.assert_allclose(theirs.iterations["loss"], ours.iterations["loss"], rtol=1e-6)
    np.testing.assert_allclose(theirs.epochs["validation.perplexity"], ours.epochs["validation.perplexity"], rtol=1e-5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=1e-6)


class Fixed(Dataset[dict[str, Tensor]]):
    """Sentences of one length, which torch stacks by itself."""

    def __init__(self, number: int = 20) -> None:
        self.inputs, self.labels = torch.arange(number * 4).view(number, 4) % WORDS, torch.arange(number) % 3

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[i], "labels": self.labels[i]}


def test_a_dataset_of_dictionaries_is_stacked() -> None:
    model = bert()
    history = run_fit(model, Fixed(), adam(model), loss=None, batch_size=6, epochs=2, validation=Fixed(7))
    assert history.num_iterations == 8
    assert {"validation.loss", "validation.accuracy"} <= history.epochs.keys()


def test_pairs_with_several_inputs() -> None:
    """Dictionaries or tuples of inputs beside targets: the same steps."""
    data, results = Fixed(), []
    pairs: list[Any] = [({"input_ids": x}, z) for x, z in zip(data.inputs, data.labels, strict=True)]
    pairs_of_tuples = [((x, torch.ones_like(x)), z) for x, z in zip(data.inputs, data.labels, strict=True)]
    for items, loss in (
        (data, None),
        (pairs, None),
        (pairs, lambda output, labels: F.cross_entropy(output.logits, labels)),
        (pairs_of_tuples, lambda output, labels: F.cross_entropy(output.logits, labels)),
    ):
        torch.manual_seed(0)
        model = bert()
        run_fit(model, DataLoader(items, batch_size=6), adam(model), loss=loss, epochs=1, accumulate=2)
        results.append(model)
    for other in results[1:]:
        assert_same_weights(other, results[0])


def test_pruning_and_a_resumed_run_are_the_same_bit_by_bit(tmp_path: Path) -> None:
    def run(folder: str, *, resume: bool = False, **options: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model, batches = gpt2(), loader(Sentences(language=True), shuffle=True, generator=torch.Generator())
        options |= {"pruning": Pruning(target_blocks=2), "run": tmp_path / folder, "resume": resume}
        return model, run_fit(model, batches, adam(model), loss=None, epochs=4, **options)

    model, history = run("whole")
    with pytest.raises(Crash):
        run("crashed", callbacks=[crash_after(2)])
    resumed, whole = run("crashed", resume=True)
    assert model.config.n_layer == 2
    assert_same_weights(resumed, model)
    assert_same_history(whole, history)


def test_compiling_is_left_out_and_said(tmp_path: Path) -> None:
    model = bert()
    run_fit(model, loader(Sentences(6)), adam(model), loss=None, epochs=1, compile="always", run=tmp_path / "run")
    assert "eager (batches are dictionaries)" in (tmp_path / "run" / "run.toml").read_text()


def test_distillation_counts_the_tokens_of_each_part() -> None:
    teacher, data, results = gpt2(seed=1), Sentences(language=True, prompt=1), []
    for accumulate in (1, 3):
        model = without_dropout(gpt2())
        options = {"accumulate": accumulate, "penalties": Distillation(copy.deepcopy(teacher).double(), 0.5, 2.0, 0.1)}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        results.append((run_fit(model, loader(data, 8), optimizer, loss=None, epochs=1, **options), model))
    (whole, model), (parts, other) = results
    name = "penalty.distillation"
    np.testing.assert_allclose(parts.iterations[name], whole.iterations[name], rtol=1e-6)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=1e-8)


class Prompts(Sentences):
    """Some sentences are prompts alone: none of their labels counts."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        return item | {"labels": torch.full_like(item["labels"], -100)} if i % 4 == 3 else item


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_without_labels_that_count_are_named(parts: int) -> None:
    """The loss of a batch of which no label counts is 0/0."""
    data = Prompts(12, language=True)
    model, options = gpt2(), {"loss": None, "epochs": 1, "accumulate": parts}
    given = DataLoader(data, batch_size=parts, sampler=[0, 1, 3, 7, 2, 4], collate_fn=padded)
    with pytest.raises(ArithmeticError, match=r"data may be the cause: all labels of sample 3 are -100") as caught:
        run_fit(model, given, adam(model), **options)
    assert "learning rate" not in str(caught.value)
    model, batches = gpt2(), DataLoader([padded([data[i]]) for i in (0, 3)], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ArithmeticError, match="all labels of batch 1 are -100"):
        run_fit(model, batches, adam(model), **options | {"accumulate": 1})


def test_batches_without_labels_that_count_weigh_nothing_in_means() -> None:
    data, model = Prompts(12, language=True), gpt2().eval()
    some = [i for i in range(12) if i % 4 != 3]
    figures = evaluate(model, DataLoader(data, batch_size=1, collate_fn=padded))
    expected = evaluate(model, DataLoader(data, batch_size=9, sampler=some, collate_fn=padded))
    assert figures == pytest.approx(expected, rel=1e-6)
    none = padded([data[3], data[7]])
    assert all(math.isnan(figure) for figure in evaluate(model, DataLoader([none], batch_size=None)).values())  # type: ignore[arg-type]
    outputs = model(**none)
    assert Distillation(gpt2(seed=1), 1.0)(model, none, outputs=outputs).item() == 0.0
    with pytest.raises(ValueError, match="labels that count"):
        taulearn.prune(model, budget=1, criterion="loss", data=none)


def test_distillation_of_an_encoder_with_a_decoder() -> None:
    """The teacher wants the decoder's inputs, which are made of the labels."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, pad_token_id=0, **sizes)
    model, teacher = (transformers.T5ForConditionalGeneration(config) for _ in range(2))
    inputs, labels = {"input_ids": torch.randint(1, WORDS, (2, 6))}, torch.randint(1, WORDS, (2, 4))
    labels[1, 2:] = -100
    answers = [each.eval()(**inputs, labels=labels).logits for each in (model, teacher)]
    value = Distillation(teacher, 1.0)(model, inputs, labels, outputs=answers[0])
    p, q = (each[labels != -100].log_softmax(-1) for each in reversed(answers))
    torch.testing.assert_close(value, F.kl_div(q, p, log_target=True, reduction="batchmean"), rtol=1e-5, atol=1e-7)


def test_answers_to_questions_have_two_labels_of_another_name() -> None:
    items = [{"input_ids": torch.arange(6) + i, "start_positions": torch.tensor(i % 6)} for i in range(14)]
    items = [each | {"end_positions": (each["start_positions"] + 2) % 6} for each in items]
    batches: Any = DataLoader(items, batch_size=7)  # type: ignore[arg-type]
    results = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        model = without_dropout(bert("BertForQuestionAnswering", num_labels=2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        results.append(
            run_fit(model, batches, optimizer, loss=None, epochs=2, accumulate=accumulate).iterations["loss"]
        )
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    whole = torch.utils.data.default_collate(items)
    assert evaluate(model, batches)["loss"] == pytest.approx(model.eval()(**whole).loss.item(), rel=1e-5)


class Answering(nn.Module):
    """A model of one's own that returns a dictionary with a loss, if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = taulearn.nn.resnet(4, 5, 3, 3)
        self.time_steps = self.network.time_steps

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.network(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def rows(**others: Any) -> Any:
    return [{"x": torch.randn(4), "labels": torch.tensor(i % 3), **others} for i in range(6)]


@pytest.mark.parametrize(
    ("items", "loss", "error", "says"),
    [
        (rows(y=torch.ones(1)), None, TypeError, "'y'.*takes labels, x"),
        ([{"x": each["x"]} for each in rows()], None, ValueError, "^loss must be given with this train"),
        ([(each["x"], each["labels"]) for each in rows()], None, ValueError, "^loss must be given with this train"),
        (rows(text="a b"), None, TypeError, "list for 'text'"),
        ([each | {"labels": torch.tensor(3)} for each in rows()], None, ValueError, r"0 \.\. 2, got 3"),
        ([each | {"x": torch.ones(3)} for each in rows()], None, ValueError, r"'x': \(2, 3\)"),
        (rows(), "cross_entropy", TypeError, "loss must be a function"),
    ],
    ids=["strange key", "no labels", "pairs", "no tensor", "label out of range", "wrong shape", "no function"],
)
def test_bad_batches(items: Any, loss: Any, error: type[Exception], says: str) -> None:
    model = Answering()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        run_fit(model, DataLoader(items, batch_size=3), adam(model), loss=loss)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_bert_would_take_any_keyword_and_passes_over_those_it_does_not_know() -> None:
    data, model = Fixed(), bert()
    items = [{"input_ids": x, "token_type_id": x, "labels": z} for x, z in zip(data.inputs, data.labels, strict=True)]
    with pytest.raises(TypeError, match="'token_type_id'"):
        run_fit(model, DataLoader(items), adam(model), loss=None)  # type: ignore[arg-type]


def test_other_keys_in_a_later_batch() -> None:
    model, items = Answering(), rows()

    def collate(some: list[Any]) -> Any:
        return torch.utils.data.default_collate(some) | ({"z": torch.ones(3)} if some[0] is items[3] else {})

    with pytest.raises(ValueError, match=r"train must yield .*'z'\].* after \['labels', 'x'\]"):
        run_fit(model, DataLoader(items, batch_size=3, collate_fn=collate), adam(model), loss=None)


def test_metrics_that_do_not_fit() -> None:
    model = Answering()
    batches = DataLoader(rows(), batch_size=3)
    with pytest.raises(ValueError, match=r"'perplexity'.*got 'perplexy'"):
        run_fit(model, batches, adam(model), loss=None, metrics=["perplexy"])
    with pytest.raises(ValueError, match=r"metrics must be functions .*got .*'accuracy'"):
        evaluate(model, batches, loss=lambda output, labels: output["logits"].square().mean(), metrics=["accuracy"])
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    with pytest.raises(ValueError, match=r"loss must .*'labels'"):
        evaluate(model, DataLoader(unlabelled, batch_size=None))  # type: ignore[arg-type]
    figures = evaluate(model, batches, metrics=["accuracy", "perplexity"])
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]), rel=1e-6)


def test_an_empty_loader() -> None:
    model = Answering()
    with pytest.raises(ValueError, match="train must hold at least one batch"):
        run_fit(model, DataLoader(rows()[:2], batch_size=3, drop_last=True), adam(model), loss=None)


def test_statistics_are_calibrated_on_a_dictionary() -> None:
    class Normalised(Answering):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(self.norm(x), labels)

    model, batch = Normalised(), torch.utils.data.default_collate(rows())
    assert taulearn.calibration.recalibrate_(model, batch) == 1
    torch.testing.assert_close(model.norm.running_mean, batch["x"].mean(0))
