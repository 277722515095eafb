"""Refinement while training: whether layers that come where an indicator is large lower the loss more than elsewhere.

Kreis, Herberg, Koehne, Schiela, Herzog (2023), SensLI, arXiv 2311.15995, insert layers where the loss is most sensitive
to them. Hintermueller, Hinze, Korolev (2026), arXiv 2601.07397, refine where dual weighted residuals are large. What is
judged here are these ideas with learned steps, not the authors' programs: a layer is inserted with step 0, its
sensitivity is dJ/dtau, and a split keeps the layer's parameters.

Narrow networks, of which deeper ones train to a lower loss, so that there is something to gain: 5 layers become 9, one
in each of four rounds in the first half of the training. All that grow have the same depth at every epoch, but where
all layers are split at once, at the mean time of the rounds. Fixed networks train for so many epochs that their
multiply-adds are those of a network that grows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from taulearn.adaptivity.indicators import indicators
from taulearn.adaptivity.refiner import Refinement
from taulearn.app import build
from taulearn.app.config import TrainConfig
from taulearn.app.members import Member
from taulearn.app.results import Results
from taulearn.app.train import Hooks
from taulearn.report.figures import PALETTE

from .antil2022.statistics import log_ratio, measured
from .axes_and_tables import new_axes
from .intervals import Interval
from .suite import Claim, Figures, Suite, Verdict, generalisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA: dict[str, tuple[int, int, int]] = {"peaks": (5, 2, 1), "nested-spheres": (3, 2, 2), "sine": (3, 1, 1)}
"""Width of the network, number of inputs and of outputs."""
SHALLOW, DEEP = 5, 9
FULL_EPOCHS, QUICK_EPOCHS, FULL_SEEDS, QUICK_SEEDS = 48, 16, 16, 2
SAMPLES = 500
"""Samples that an indicator looks at: as many as in a batch."""
RESOLUTION = torch.finfo(torch.float32).eps
"""Losses below are taken for it: float32 does not tell them from 0, which has no logarithm. (Added when a network
reached 0, before any comparison was looked at.)"""
PLACES = {"insert": ("largest", "first", "random", "smallest"), "split": ("largest", "all", "longest", "smallest")}
"""Where layers come. largest, smallest: by the indicator; first: behind the first layer; random: behind any; longest:
the longest step is split, for a grid that is evenly fine; all: every layer is split, in a single round."""


@dataclass(frozen=True)
class Refined(Hooks):
    """Hooks of :func:`taulearn.experiments.train`: what comes in each round, and where, one of PLACES."""

    by: str
    place: str

    @property
    def name(self) -> str:
        """For instance "insert_largest"."""
        return f"{self.by}_{self.place}"

    def refinement(self, config: TrainConfig) -> Refinement:
        """That of the settings, at other places."""
        policy, splits = build.make_refinement(config), build.load_splits(config)
        assert policy is not None
        loss = build.make_loss(config, classes=splits.classes is not None)[1]
        named = "dual-weighted" if self.by == "split" else "sensitivity"

        def largest(model: nn.Module, batch: Any) -> Tensor:
            return indicators(model, named, batch, loss)

        def random(tau: Tensor, _: nn.Module) -> Tensor:
            return torch.rand(len(tau), generator=torch.Generator().manual_seed(100 * config.seed + len(tau)))

        functions: dict[str, Callable[[Any, Any], Tensor]] = {
            "largest": largest,
            "smallest": lambda model, batch: 1.0 / (largest(model, batch).abs() + 1e-300),
            "first": lambda tau, _: 1.0 / torch.arange(1, len(tau) + 1),
            "random": random,
            "longest": lambda tau, _: tau,
            "all": lambda tau, _: torch.ones_like(tau),
        }
        return replace(
            policy,
            by=self.by,
            indicator=functions[self.place],
            data=[tuple(each[:SAMPLES] for each in splits.train)] if self.place in ("largest", "smallest") else None,
            number=DEEP - SHALLOW if self.place == "all" else 1,
        )


def fixed_epochs(data: str, layers: int, epochs: int) -> int:
    """Epochs of a fixed network with the multiply-adds of one that grows, rounded up: against the claim.

    The passes of indicators, about 1 % of the work, are not counted.

    Example:
        >>> fixed_epochs("peaks", SHALLOW, 48), fixed_epochs("peaks", DEEP, 48)
        (77, 42)
    """
    width, inputs, outputs = DATA[data]
    work = {n: width * (inputs + outputs) + (n - 1) * width**2 for n in range(SHALLOW, DEEP + 1)}
    growing = sum(work[n] for n in range(SHALLOW, DEEP)) / (DEEP - SHALLOW)
    return math.ceil(epochs * (growing + work[DEEP]) / 2 / work[layers])


def members(quick: bool = False, seeds: int | None = None) -> list[Member]:
    """All trainings, seed by seed.

    Example:
        >>> len(members())
        480
    """
    epochs, found = QUICK_EPOCHS if quick else FULL_EPOCHS, []
    for seed in range(seeds or (QUICK_SEEDS if quick else FULL_SEEDS)):
        for data, (width, _, _) in DATA.items():
            common: dict[str, Any] = {"data": data, "width": width, "activation": "tanh", "seed": seed}
            common |= {"optimizer": "adam", "lr": 0.01, "scheduler": "cosine", "batch_size": 500}
            common |= {"compile": "never", "trace": "thinned", "checkpoint_every": epochs, "threads": 1}
            for name, layers in (("shallow", SHALLOW), ("deep", DEEP)):
                own: dict[str, Any] = {"hidden_layers": layers, "epochs": fixed_epochs(data, layers, epochs)}
                found.append(Member(f"{data}/{name}", seed, TrainConfig(**common, **own), generalisation))
            grown: dict[str, Any] = common | {"hidden_layers": SHALLOW, "epochs": epochs, "refine": DEEP}
            for by, places in PLACES.items():
                for place in places:
                    until = epochs * 5 // 16 if place == "all" else epochs // 2  # rounds: epochs / 8 times 1, 2, 3, 4
                    config = TrainConfig(**grown, refine_until=until)
                    found.append(Member(f"{data}/{by}/{place}", seed, config, generalisation, Refined(by, place)))
    return found


def ratio(results: Results, a: str, b: str, split: str = "train") -> Interval:
    """The logarithm of the final loss of a setting over that of another one, in pairs of seeds."""
    figure = measured(f"{split}.loss")
    return log_ratio(results, a, b, lambda *member: max(figure(*member), RESOLUTION))


def _as_factor(found: Interval) -> str:
    """The interval of a ratio, from that of its logarithm."""
    mean, low, high = (f"{math.exp(each):.3g}" for each in found[:3])
    return f"{mean} ({low} .. {high}, n = {found.n})"


def lower_than(results: Results, name: str, others: Mapping[str, str]) -> Verdict:
    """Whether a setting ends with a lower training loss than others do, on each data set.

    A part holds where the 95 % interval of the paired log ratio lies below 0, does not hold where it lies above, and is
    open else: losses of the seeds differ by orders of magnitude. There is no margin, as the claims are of order, not of
    size. Of nine parts without any effect one would be told to hold or not to hold with a probability of 37 %; only all
    of them together let the claim hold.
    """
    parts: dict[str, bool | None] = {}
    figures = Figures()
    for data in DATA:
        for words, other in others.items():
            pair = f"{data}/{name}", f"{data}/{other}"
            parts[f"{data}: lower than {words}"] = ratio(results, *pair).less
            for split in ("train", "test"):
                figures[f"{data}: {split} loss, times that of {words}"] = _as_factor(ratio(results, *pair, split))
            done, than = (_work(results, setting)[-1] for setting in pair)
            figures[f"{data}: work, times that of {words}"] = done / than
    return Verdict.of(parts, figures)


def _work(results: Results, setting: str) -> Any:
    """The work after each epoch of the first seed, in parameters, of which each is a multiply-add of a sample."""
    return np.cumsum(results.history(setting, results.seeds(setting)[0]).epochs["parameters"][:-1], dtype=np.float64)


ELSEWHERE = {"behind the first layer": "insert/first", "anywhere": "insert/random", "the least": "insert/smallest"}
FIXED = {"the shallow network": "shallow", "the deep network": "deep"}
UNIFORM = {"all at once": "split/all", "the longest steps": "split/longest", "the smallest residuals": "split/smallest"}
CLAIMS = (
    (
        "Layers inserted where the sensitivity is largest lower the loss more than layers inserted elsewhere.",
        ("insert/largest", ELSEWHERE),
    ),
    ("They lower the loss more than a fixed network does with the same work.", ("insert/largest", FIXED)),
    (
        "Splits where the dual weighted residual is largest lower the loss more than uniform refinement does.",
        ("split/largest", UNIFORM),
    ),
)


def figure_losses(results: Results) -> "Figure":
    """Above: training loss over the work, geometric means over the seeds. Below: final training losses as multiples."""
    from matplotlib.ticker import LogFormatter

    figure, axes = new_axes(2, len(DATA), 3.2)
    shown = {"insert/largest": "insertion", "split/largest": "splits", "shallow": "5 layers", "deep": "9 layers"}
    pairs = [(k, name, other) for k, (_, (name, others)) in enumerate(CLAIMS) for other in others.values()]
    for (above, below), data in zip(axes.T, DATA, strict=True):
        for colour, (name, label) in zip(PALETTE, shown.items(), strict=False):
            setting = f"{data}/{name}"
            losses = [results.history(setting, seed).epochs["train.loss"][1:] for seed in results.seeds(setting)]
            means = np.exp(np.mean(np.log(np.maximum(losses, RESOLUTION)), axis=0))
            above.plot(_work(results, setting), means, color=colour, label=label)
        above.set(yscale="log", xlabel="Work (epochs x parameters)", ylabel="Loss, training", title=data)
        for row, (k, name, other) in enumerate(pairs):
            mean, low, high = np.exp(ratio(results, f"{data}/{name}", f"{data}/{other}")[:3])
            below.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=PALETTE[k], capsize=2)
        below.axvline(1.0, color="0.6", linewidth=0.8)
        words = [other if below is axes[1][0] else "" for *_, other in pairs]
        below.set(xscale="log", xlabel="Final loss, times that of", yticks=range(len(pairs)), yticklabels=words)
        below.xaxis.set(major_formatter="{x:g}", minor_formatter=LogFormatter(minor_thresholds=(1.0, 0.4)))
        below.invert_yaxis()
    axes[0][0].legend(fontsize="small")
    return figure


SUITE = Suite(
    name="adaptive",
    title="Refinement while training: sensitivities (arXiv 2311.15995) and dual weighted residuals (arXiv 2601.07397)",
    members=members,
    claims=tuple(
        Claim(f"R{k}", statement, lambda results, what=what: lower_than(results, *what))  # type: ignore[misc]
        for k, (statement, what) in enumerate(CLAIMS, start=1)
    ),
    figures={"losses": figure_losses},
    kept=("epoch/train.loss", "epoch/layers", "epoch/parameters", "deletion/*", "insertion/*"),
)
