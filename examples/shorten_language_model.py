"""A language model of characters with 12 blocks, trained here, then shortened in many ways with the same healing.

    python examples/shorten_language_model.py train --text shakespeare.txt --weights lm
    python examples/shorten_language_model.py run --text shakespeare.txt --weights lm --out cells --keep 6
    python examples/shorten_language_model.py time --text shakespeare.txt --weights lm --out cells --keep 6 8
    python examples/shorten_language_model.py report --cells cells --out page

The text is any; its last tenth is held out. ``train`` takes 20 minutes of two cores for a width of 128 (a decoder as
Llama's: pre-norm, rotary positions, gated linear units). The ways are in _shortening.py; an epoch is as many windows
of 128 characters, from random places, as the text has. ``--quick`` takes some seconds: four blocks, trained and
shortened on this file's text.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from _shortening import Batch, Case, Page, Study, parser, report, run
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 32


def read(path: Path) -> tuple[Tensor, int]:
    """The text as numbers of its characters, and how many different ones there are."""
    text = path.read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def random_windows(codes: Tensor, context: int, generator: torch.Generator, size: int = BATCH) -> Batch:
    """(size, context) windows from random places; the model shifts the labels itself."""
    starts = torch.randint(len(codes) - context, (size,), generator=generator)
    windows = torch.stack([codes[start : start + context] for start in starts.tolist()])
    return {"input_ids": windows, "labels": windows}


@torch.no_grad()
def nats_per_character(model: nn.Module, codes: Tensor, context: int) -> float:
    """The mean loss over windows side by side, in evaluation mode and the precision of the training."""
    model.eval()
    windows = codes[: len(codes) // context * context].view(-1, context)
    total = 0.0
    for part in windows.split(64):
        with torch.autocast("cpu", torch.bfloat16):
            total += len(part) * model(input_ids=part, labels=part).loss.item()
    return total / len(windows)


def make(characters: int, layers: int, width: int, context: int) -> LlamaForCausalLM:
    heads = max(1, width // 32)
    config = LlamaConfig(
        vocab_size=characters,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(given: argparse.Namespace) -> None:
    """The trained model: AdamW, warm-up, then the learning rate falls to a tenth as a cosine."""
    codes, characters = read(given.text)
    torch.manual_seed(0)
    model = make(characters, given.layers, given.width, given.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    warm = given.steps // 20

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / (given.steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator, began = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(given.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**random_windows(codes[: 9 * len(codes) // 10], given.context, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{step + 1} steps, {time.perf_counter() - began:.0f} s, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(given.weights)


def make_case(given: argparse.Namespace) -> Case:
    if given.quick:
        given.text, given.weights = Path(__file__), given.out / "trained"
        given.layers, given.width, given.context, given.steps = 4, 32, 32, 120
        if not given.weights.exists():
            train(given)
    codes, characters = read(given.text)
    first, second = 9 * len(codes) // 10, 19 * len(codes) // 20
    parts = {"train": codes[:first], "dev": codes[first:second], "test": codes[second:]}
    config = LlamaConfig.from_pretrained(given.weights)
    batches = 20 if given.quick else first // (BATCH * given.context)

    def epoch(generator: torch.Generator) -> list[Batch]:
        return [random_windows(parts["train"], given.context, generator) for _ in range(batches)]

    def calibration(seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 + seed)
        return [random_windows(parts["train"], given.context, generator) for _ in range(2 if given.quick else 4)]

    return Case(
        task="text",
        measure="nats per character",
        higher=False,
        layers=config.num_hidden_layers,
        blocks="model.layers.*",
        trained=lambda: LlamaForCausalLM.from_pretrained(given.weights),
        random=lambda layers: make(characters, layers, config.hidden_size, given.context),
        load=LlamaForCausalLM.from_pretrained,
        epoch=epoch,
        calibration=calibration,
        evaluate=lambda model: {
            part: nats_per_character(model, parts[part], given.context) for part in ("dev", "test")
        },
        sample=lambda size: random_windows(parts["dev"], given.context, torch.Generator().manual_seed(0), size),
        lr=1e-3 if given.quick else 3e-4,
        random_lrs=(1e-3, 2e-3, 4e-3),
        batches=batches,
        survivors="free",
    )


REMARKS = """Made by `python examples/shorten_language_model.py`, from `cells.jsonl` and `times` alone (`report --cells
docs/results/shorten-language-model --out docs/results/shorten-language-model`). A decoder with 12 blocks that was
trained on the text by the same example (`train`), shortened, then trained on with AdamW at 3e-4 after a warm-up of a
tenth; an epoch is 245 steps of 32 windows of 128 characters. The criteria see 128 windows, drawn by the seed. Faded
ways are done at 0.2 epochs; at 0 epochs their blocks went at once. Nats per character on the last twentieth of the
text; perplexity is their exponential."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["train", "run", "time", "report"])
    options.add_argument("--text", type=Path, help="a text file")
    options.add_argument("--weights", type=Path, help="folder of the trained model, which train writes")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--context", type=int, default=128)
    options.add_argument("--steps", type=int, default=2500, help="of train")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "report":
        print(
            report(given, Page("A language model, shortened", REMARKS, "nats per character", False, {"text": (6, 8)}))
        )
        return
    if given.what == "train":
        train(given)
        return
    given.keep = given.keep or [2 if given.quick else 6]
    study = Study(make_case(given), given.out, given.save)
    if given.what == "time":
        print(study.times([study.case.layers, *given.keep]))
    else:
        run(study, given)


if __name__ == "__main__":
    main()
