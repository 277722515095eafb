"""The README keeps its word: its code and commands run as they stand, its tables are those of the records."""

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taulearn
from taulearn.app.command_line import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RIVALS = (ROOT / "docs" / "results" / "pruned-while-training.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_block_for_a_network_runs_and_prunes():
    _, network = blocks("python")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(network, names)
    history = names["history"]
    assert history.epochs["validation.accuracy"][-1] > 0.9
    assert history.deletions


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_block_for_a_transformer_leaves_a_plain_one(family, tmp_path, monkeypatch):
    """With what the text below it says of the names; the steps of BERT do not fold."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shape = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=6, **shape)
    name = "LlamaForCausalLM" if family == "Llama" else "BertForSequenceClassification"
    model = getattr(transformers, name)(config)
    sentences = [
        {"input_ids": tokens, "labels": tokens if family == "Llama" else tokens[0] % 2}
        for tokens in torch.randint(64, (64, 16))
    ]
    batches = torch.utils.data.DataLoader(sentences, batch_size=8)
    names = {"model": model, "teacher": copy.deepcopy(model), "batches": batches, "batch": next(iter(batches))}
    exec(blocks("python")[0], names | {"torch": torch, "taulearn": taulearn})
    again = getattr(transformers, name).from_pretrained("shorter")
    assert again.config.num_hidden_layers == 4
    inputs = {"input_ids": sentences[0]["input_ids"][None]}
    torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_commands_run(tmp_path, monkeypatch):
    """The first in a process of its own, as a user runs it; torch is not imported again for the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert lines
    for number, line in enumerate(lines):
        program, *arguments = shlex.split(line)
        assert program == "taulearn"
        if number == 0:
            subprocess.run([sys.executable, "-m", "taulearn", *arguments], capture_output=True, check=True)
        else:
            assert main(arguments) == 0, line
    assert (tmp_path / "runs" / "first" / "report.html").exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["prune-a-resnet", "prune-a-transformer", "cifar10"])
def test_tables_are_those_of_the_records(name):
    table = (ROOT / "docs" / "results" / name / "table.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert "\n".join(rows) in RIVALS
    record = json.loads((ROOT / "docs" / "results" / name / "record.json").read_text(encoding="utf-8"))
    for row, figures in zip(rows[2:], record["table"], strict=True):
        assert f"| {100 * figures['accuracy']:.2f}" in row
        assert f"| {figures['seeds']} |" in row
        members = [
            each for each in record["members"] if (each["way"], each["target"]) == (figures["way"], figures["target"])
        ]
        assert sum(each["accuracy"] for each in members) / len(members) == pytest.approx(figures["accuracy"])


@pytest.mark.parametrize("name", ["shorten-minilm", "shorten-language-model"])
def test_rows_are_those_of_the_page(name):
    """Where a row's figures stand in this order in the page's first table, which a test holds to the records."""
    page = (ROOT / "docs" / "results" / name / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    first = {row[0]: row for row in reversed(cells)}
    table = README.split(f"(docs/results/{name}/README.md)")[1].split("\n**")[0]
    head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    columns = [cell.strip().replace("1/4 epoch", "0.25 epochs") for cell in head.strip("|").split("|")]
    columns = ["1 epochs" if column == "1 epoch" else column for column in columns]
    at = [first["way"].index(column) for column in columns]
    assert len(rows) > 5
    for row in rows:
        found = [cell.strip() for cell in row.strip("|").split("|")]
        assert found == [first[found[0]][place] for place in at]


def test_sweep_figures_are_those_of_the_records():
    """The table of the fully connected network."""
    import csv

    with (ROOT / "docs" / "results" / "fashion-mnist-pruning" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = re.findall(r"^\| (pruned|l1|free)[^|]*(\|.*)$", RIVALS, flags=re.MULTILINE)
    assert len(found) == 3
    for label, row in found:
        of = [each for each in rows if each["label"] == label]
        mean = sum(float(each["test.accuracy"]) for each in of) / len(of)
        assert f"| {100 * mean:.2f}" in row
        assert f"| {len(of)} |" in row


HUGGING_FACE = "transformers' own saving, Trainer"
WRAPPED = {
    "a Sequential of your blocks": "sequential",
    "torch `TransformerEncoder`": "encoder",
    "transformers ViT": "vit",
    "transformers BERT": "bert",
    "transformers GPT-2, Llama": "gpt2 llama",
    "transformers ResNet": "resnet",
}
DELETED = "tests/wrapping/test_prune.py::test_deleting_blocks_with_zero_steps_changes_nothing[[1, 2]-{}]"
FOUND = "tests/wrapping/test_wrap.py::test_at_init_outputs_and_gradients_are_those_of_the_host_to_the_bit[{}]"
COMPILED = "tests/wrapping/test_compile.py::test_compiled_is_eager_before_and_after_a_deletion[{}]"
EXPORTED = "tests/export/test_export.py::test_file_computes_what_the_model_computes[onnx-{}]"
SAVED = "tests/wrapping/test_transformers.py::test_pruned_and_annealed_it_is_saved_for_plain_loading[{}]"
GENERATION = (
    "tests/wrapping/test_transformers.py::test_generation_with_and_without_the_cache_gives_the_same_tokens[0.6-[3]-{}]"
)
NETWORKS = "tests/nn/test_contract.py::TestFullyConnected::"
PARALLEL = "tests/training/test_parallel.py::"
EXPORT_NAMES = {"sequential": "convolutional", "resnet": "resnet of transformers"}


def evidence() -> dict[tuple[str, str], list[str]]:
    """The tests behind each cell of the support matrix, by row and column."""
    found: dict[tuple[str, str], list[str]] = {}
    for row, hosts in WRAPPED.items():
        names = hosts.split()
        found[row, "time steps"] = [FOUND.format(name) for name in names]
        found[row, "prune"] = [DELETED.format(name) for name in names]
        found[row, "compile"] = [COMPILED.format(name) for name in names]
        found[row, "ONNX"] = [EXPORTED.format(EXPORT_NAMES.get(name, name)) for name in names]
        if row.startswith("transformers"):
            found[row, HUGGING_FACE] = [SAVED.format(name) for name in names]
    found["transformers ViT", HUGGING_FACE].append(
        "tests/integrations/test_huggingface.py::test_layers_go_and_the_optimizer_follows"
    )
    found["transformers GPT-2, Llama", HUGGING_FACE] += [GENERATION.format(name) for name in ("gpt2", "llama")]
    found["a Sequential of your blocks", "data parallel"] = [
        PARALLEL + "test_running_statistics_are_those_of_the_first_process"
    ]
    for row, kinds in {
        "`nn.resnet`": "residual",
        "`nn.fractional_dnn`": "fractional",
        "`nn.densenet`, `nn.feedforward`": "dense feedforward",
    }.items():
        for kind in kinds.split():
            case = f"[{kind}, equal-free]"
            found.setdefault((row, "time steps"), []).append(NETWORKS + "test_steps_get_gradients" + case)
            found.setdefault((row, "prune"), []).append(NETWORKS + "test_pruning_keeps_the_contract" + case)
            found.setdefault((row, "compile"), []).append(NETWORKS + f"test_compiled_is_eager[{kind}, ")
            found.setdefault((row, "ONNX"), []).append(EXPORTED.format(kind))
    found["`nn.densenet`, `nn.feedforward`", "prune"] = [
        f"tests/test_pruning.py::TestRefusals::test_schemes_in_which_zero_is_not_the_identity[{name}]"
        for name in ("densenet", "feedforward")
    ]
    found["`nn.resnet`", "data parallel"] = [PARALLEL + "test_two_processes_do_what_one_does[train]"]
    convolutional = "`nn.resnet_v2` (convolutional)"
    for column, test in {
        "time steps": "TestContract::test_steps_get_gradients",
        "prune": "TestShrinking::test_blocks_within_a_stage_are_deleted_exactly",
        "compile": "TestContract::test_compiled_is_eager",
    }.items():
        found[convolutional, column] = ["tests/nn/test_convolutional.py::" + test]
    found[convolutional, "ONNX"] = [EXPORTED.format("resnet_v2")]
    return found


def matrix():
    """Cells of the support matrix by row and column."""
    lines = README.split("## What works with what")[1].split("##")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *body = rows
    return {(row[0], column): cell for row in body for column, cell in zip(head[1:], row[1:], strict=True) if cell}


def test_each_cell_of_the_support_matrix_has_its_tests(collected):
    wanted = evidence()
    assert matrix().keys() == wanted.keys()
    files = {test.partition("::")[0] for test in collected}
    for cell, tests in wanted.items():
        for test in tests:
            if test.partition("::")[0] not in files:
                pytest.skip(f"{test} is not among the files of this call: run all of tests/")
            assert any(each.startswith(test) for each in collected), f"{cell}: {test}"
