"""Seconds of an epoch with and without pruning, and of smaller networks, measured in turn in one process.

Times taken while a suite trains would tell how busy the machine was. Here the variants take turns, and the fastest
epoch of each turn counts. Where other members train beside it, intervals over the turns are wide: the command with
``--workers 1`` measures alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ...suite import Member

DATA, DEPTHS = "fashion-mnist", (6, 12, 24)
ROUNDS = 5
EPOCHS = 4
SAMPLES = 20_000
NOTHING = 1e-12
"""A threshold below which no share ever lies: all of the rule but the deletion."""


def members(quick: bool) -> list[Member]:
    """One member for each depth.

    Args:
        quick: Fewer rounds.
    """
    return [
        Member(f"time/resnet-{depth}", 0, None, partial(epoch_times, layers=depth, rounds=1 if quick else ROUNDS))
        for depth in DEPTHS
    ]


def epoch_times(_: Path, *, layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of an epoch of the residual network, by what differs.

    Args:
        _: The member's folder; nothing is left there.
        layers: Depth of the network.
        rounds: How often each variant has its turn.

    Returns:
        "never", "each epoch", "each iteration": when layers to delete are looked for, none of which is found;
        "2 layers" and so on: networks of that size, without looking. A figure for each turn.
    """
    from ....adaptivity.policies import Pruning

    rules: dict[str, Any] = {
        "never": None,
        "each epoch": Pruning(NOTHING),
        "each iteration": Pruning(NOTHING, 1),
    }
    variants = {name: (layers, rule) for name, rule in rules.items()}
    variants |= {f"{n} layers": (n, None) for n in (2, 4, 6) if n < layers}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _round in range(rounds):
        for name, (depth, rule) in variants.items():
            times[name].append(_fastest_epoch(depth, rule))
    return times


def _fastest_epoch(layers: int, rule: Any) -> float:
    import torch

    from .... import data
    from ....nn import resnet
    from ....optim import parameter_groups
    from ....penalties import L1
    from ....training import fit

    inputs, targets = data.load(DATA, "train", as_uint8=True)
    torch.manual_seed(0)
    model = resnet(784, 100, 10, layers)
    history = fit(
        model,
        (inputs[:SAMPLES], targets[:SAMPLES]),
        loss=torch.nn.functional.cross_entropy,
        optimizer=torch.optim.SGD(parameter_groups(model, 0.01), lr=0.01),
        penalties=[L1(0.01)],
        pruning=rule,
        epochs=EPOCHS,
        compile="always",
        progress=False,
    )
    return float(history.epochs["seconds"][2:].min())
