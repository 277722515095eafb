"""Refinement while training: whether layers that come where an indicator is large lower the loss more than elsewhere.

Kreis, Herberg, Koehne, Schiela, Herzog (2023), SensLI, arXiv 2311.15995, insert layers where the loss is most sensitive
to them. Hintermueller, Hinze, Korolev (2026), arXiv 2601.07397, refine where dual weighted residuals are large. What is
judged here are these ideas with learned steps, not the authors' programs: a layer is inserted with step 0, its
sensitivity is dJ/dtau, and a split keeps the layer's parameters.

Narrow networks, of which deeper ones train to a lower loss, so that there is something to gain: 5 layers become 9, one
in each of four rounds in the first half of the training. All networks of a comparison that grow have the same depth at
every epoch, but for those of "all", whose layers come at once at the mean time of the rounds. Fixed networks train for
so many epochs that their multiply-adds are those of a network that grows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from taulearn.adaptivity.indicators import indicators
from taulearn.adaptivity.policies import Pruning
from taulearn.adaptivity.refiner import Refinement
from taulearn.app import build
from taulearn.app.config import TrainConfig
from taulearn.app.members import Member
from taulearn.app.results import Results
from taulearn.nn.network import TimeVariableNetwork
from taulearn.report.figures import PALETTE

from .herberg2023.figures import new_axes
from .herberg2023.statistics import Figures, describe
from .intervals import Interval, interval_of
from .suite import Claim, Suite, Verdict, generalisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA: dict[str, tuple[int, int, int]] = {"peaks": (5, 2, 1), "nested-spheres": (3, 2, 2), "sine": (3, 1, 1)}
"""Width of the network, number of inputs and of outputs."""
SHALLOW, DEEP = 5, 9
FULL_EPOCHS, QUICK_EPOCHS, FULL_SEEDS, QUICK_SEEDS = 48, 16, 16, 2
SAMPLES = 500
"""Samples that an indicator looks at: as many as in a batch."""
PLACES = {"insert": ("largest", "first", "random", "smallest"), "split": ("largest", "all", "longest", "smallest")}


@dataclass(frozen=True)
class Refined:
    """Hooks of :func:`taulearn.experiments.train`: what comes in each round, and where, one of PLACES.

    largest, smallest: by the indicator; first: behind the first layer; random: anywhere; longest: the longest step is
    split; all: every layer is split in a single round.
    """

    by: str
    place: str

    @property
    def name(self) -> str:
        """For instance "insert_largest"."""
        return f"{self.by}_{self.place}"

    def check(self, config: TrainConfig) -> None:
        """Refuse settings without refinement."""
        if config.refine is None:
            raise ValueError(f"refine must be given with {self.name}, got None: so many layers are reached")

    def adapt_(self, network: TimeVariableNetwork, config: TrainConfig) -> None:
        """Leave the network as it is."""

    def pruning(self, config: TrainConfig) -> Pruning | None:
        """That of the settings."""
        return build.make_pruning(config)

    def refinement(self, config: TrainConfig) -> Refinement | None:
        """That of the settings, with other places."""
        policy, splits = build.make_refinement(config), build.load_splits(config)
        assert policy is not None
        loss = build.make_loss(config, classes=splits.classes is not None)[1]
        named = "dual-weighted" if self.by == "split" else "sensitivity"

        def largest(model: nn.Module, batch: Any) -> Tensor:
            return indicators(model, named, batch, loss)

        def random(tau: Tensor, _: nn.Module) -> Tensor:
            return torch.rand(len(tau), generator=torch.Generator().manual_seed(100 * config.seed + len(tau)))

        seen = {"largest": largest, "smallest": lambda model, batch: 1.0 / (largest(model, batch).abs() + 1e-300)}
        blind = {
            "first": lambda tau, _: 1.0 / torch.arange(1, len(tau) + 1),
            "random": random,
            "longest": lambda tau, _: tau,
            "all": lambda tau, _: torch.ones_like(tau),
        }
        return replace(
            policy,
            by=self.by,
            indicator=(seen | blind)[self.place],
            data=[tuple(each[:SAMPLES] for each in splits.train)] if self.place in seen else None,
            number=config.refine - config.hidden_layers if self.place == "all" and config.refine else 1,
        )

    def restore_(self, network: TimeVariableNetwork) -> None:
        """Leave the network as it is."""


def work(data: str, layers: int) -> int:
    """Multiply-adds of a forward pass of one sample; a backward pass takes twice as many.

    Example:
        >>> work("peaks", 5), work("peaks", 9)
        (115, 215)
    """
    width, inputs, outputs = DATA[data]
    return width * (inputs + outputs) + (layers - 1) * width**2


def epochs_for_equal_work(data: str, layers: int, epochs: int) -> int:
    """Epochs of a fixed network with the work of one that grows, rounded up: against the claim.

    An indicator's passes, about 1 % of the work, are not counted.

    Example:
        >>> epochs_for_equal_work("peaks", SHALLOW, 48), epochs_for_equal_work("peaks", DEEP, 48)
        (77, 42)
    """
    rounds = DEEP - SHALLOW
    grown = sum(work(data, SHALLOW + k) for k in range(rounds)) / (2 * rounds) + work(data, DEEP) / 2
    return math.ceil(epochs * grown / work(data, layers))


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
                own: dict[str, Any] = {"hidden_layers": layers, "epochs": epochs_for_equal_work(data, layers, epochs)}
                found.append(Member(f"{data}/{name}", seed, TrainConfig(**common, **own), generalisation))
            grown: dict[str, Any] = common | {"hidden_layers": SHALLOW, "epochs": epochs, "refine": DEEP}
            for by, places in PLACES.items():
                for place in places:
                    until = epochs * 5 // 16 if place == "all" else epochs // 2  # rounds: epochs / 8 times 1, 2, 3, 4
                    config = TrainConfig(**grown, refine_until=until)
                    found.append(Member(f"{data}/{by}/{place}", seed, config, generalisation, Refined(by, place)))
    return found


def log_ratio(results: Results, a: str, b: str, split: str = "train") -> Interval:
    """log10 of the final loss of a setting over that of another one, whose seeds differ by orders of magnitude."""
    losses = [[results.measurements(name, seed)[f"{split}.loss"] for seed in results.seeds(a, b)] for name in (a, b)]
    return interval_of(np.log10(losses[0]) - np.log10(losses[1]))


def as_factor(found: Interval) -> str:
    """The interval of a ratio, from that of its logarithm.

    Example:
        >>> as_factor(Interval(-1.0, -2.0, 0.0, 12))
        '0.1 (0.01 .. 1, n = 12)'
    """
    mean, low, high = (f"{10.0**each:.3g}" for each in found[:3])
    return f"{mean} ({low} .. {high}, n = {found.n})"


def lower_than(results: Results, name: str, others: Mapping[str, str]) -> Verdict:
    """Whether a setting ends with a lower training loss than others do, on each data set.

    A part holds where the 95 % interval of the paired log ratio lies below 0, does not hold where it lies above, and is
    open else. There is no margin: the claims are of order, not of size. Of nine parts without any effect one would be
    told to hold or not to hold with a probability of 37 %; only all of them together let the claim hold.
    """
    parts: dict[str, bool | None] = {}
    figures = Figures()
    for data in DATA:
        own = f"{data}/{name}"
        for words, other in others.items():
            found = log_ratio(results, own, f"{data}/{other}")
            parts[f"{data}: lower than {words}"] = found.less
            figures[f"{data}: training loss, times that of {words}"] = as_factor(found)
            figures[f"{data}: test loss, times that of {words}"] = as_factor(
                log_ratio(results, own, f"{data}/{other}", "test")
            )
        seeds = results.seeds(own, *(f"{data}/{other}" for other in others.values()))
        figures[f"{data}: training loss"] = describe(results.measurements(own, seed)["train.loss"] for seed in seeds)
        for words, other in others.items():
            spent = [_work_done(results, each, seeds[0])[-1] for each in (own, f"{data}/{other}")]
            figures[f"{data}: work, times that of {words}"] = spent[0] / spent[1]
    return Verdict.of(parts, figures)


def _work_done(results: Results, name: str, seed: int) -> Any:
    """The work after each epoch, in epochs times parameters, of which each stands for a multiply-add of a sample."""
    return np.cumsum(results.history(name, seed).epochs["parameters"][:-1].astype(np.float64))


ELSEWHERE = {"behind the first layer": "insert/first", "anywhere": "insert/random", "the least": "insert/smallest"}
FIXED = {"the shallow network": "shallow", "the deep network": "deep"}
UNIFORM = {"all at once": "split/all", "the longest steps": "split/longest", "the smallest residuals": "split/smallest"}


def figure_losses(results: Results) -> "Figure":
    """Above: training loss over the work, geometric means over the seeds. Below: final training losses as multiples."""
    figure, axes = new_axes(2, len(DATA), 3.2)
    shown = {"insert/largest": "insertion", "split/largest": "splits", "shallow": "5 layers", "deep": "9 layers"}
    pairs = [("insert/largest", other) for other in [*ELSEWHERE.values(), *FIXED.values()]]
    pairs += [("split/largest", other) for other in UNIFORM.values()]
    for (above, below), data in zip(axes.T, DATA, strict=True):
        for colour, (name, label) in zip(PALETTE, shown.items(), strict=False):
            setting = f"{data}/{name}"
            losses = [results.history(setting, seed).epochs["train.loss"][1:] for seed in results.seeds(setting)]
            done = _work_done(results, setting, results.seeds(setting)[0])
            above.plot(done, 10 ** np.mean(np.log10(losses), axis=0), color=colour, label=label)
        above.set(yscale="log", xlabel="Work (parameters x epochs)", ylabel="Loss, training", title=data)
        for row, (name, other) in enumerate(pairs):
            low, mean, high = 10.0 ** np.take(log_ratio(results, f"{data}/{name}", f"{data}/{other}"), [1, 0, 2])
            below.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=PALETTE[row // 5], capsize=2)
        below.axvline(1.0, color="0.6", linewidth=0.8)
        below.set(xscale="log", xlabel="Final loss, times that of", yticks=range(len(pairs)))
        below.set_yticklabels([other for _, other in pairs] if below is axes[1][0] else [])
        below.invert_yaxis()
    axes[0][0].legend(fontsize="small")
    return figure


SUITE = Suite(
    name="adaptive",
    title="Refinement while training: sensitivities (arXiv 2311.15995) and dual weighted residuals (arXiv 2601.07397)",
    members=members,
    claims=(
        Claim(
            "R1",
            "Layers inserted where the sensitivity is largest lower the loss more than layers inserted elsewhere.",
            lambda results: lower_than(results, "insert/largest", ELSEWHERE),
        ),
        Claim(
            "R2",
            "Layers inserted there lower the loss more than a fixed network does with the same work.",
            lambda results: lower_than(results, "insert/largest", FIXED),
        ),
        Claim(
            "R3",
            "Splits where the dual weighted residual is largest lower the loss more than uniform refinement does.",
            lambda results: lower_than(results, "split/largest", UNIFORM),
        ),
    ),
    figures={"losses": figure_losses},
)
