"""Deletions broken off anywhere: all is as before and the exception arrives, or all is done and the report arrives."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import taulearn
from small_networks import DOUBLE, Picture, batch, loss_of, network, train
from taulearn import PruneReport, contribution, prune, wrap
from taulearn.depth.truncate import truncate
from taulearn.nn import resnet

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PACKAGE = str(Path(taulearn.__file__).parent)


class Failure(Exception):
    pass


class At:
    """Raises at the event of a number, a line or a call, in files that begin with ``within``; lists the events before.

    Args:
        number: From 0; None: it does not raise.
        error: What it raises.
        within: How the names of the files begin.
    """

    def __init__(self, number: int | None, error: type[BaseException], within: str) -> None:
        self.number, self.error, self.within = number, error, within
        self.events: list[tuple[str, int, str]] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.within):
            return None
        if event in ("call", "line"):
            self.events.append((frame.f_code.co_filename, frame.f_lineno, event))
            if len(self.events) - 1 == self.number:
                raise self.error
        return self


Setting = tuple[Callable[[], PruneReport], list[Any]]


def built(constraint: str = "free") -> Setting:
    model = network(constraint=constraint)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    averaged = AveragedModel(model)
    train(model, optimizer)
    return lambda: prune(model, keep=[0, 2, 4], optimizer=optimizer, averaged=averaged), [model, optimizer, averaged]


def wrapped() -> Setting:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3)]
    model = wrap(nn.Sequential(nn.Sequential(*blocks), nn.Linear(3, 2)).double(), "0.*", example_inputs=batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    averaged = AveragedModel(model)
    train(model, optimizer)
    return lambda: prune(model, keep=[0, 2], optimizer=optimizer, averaged=averaged), [model, optimizer, averaged]


def several() -> Setting:
    model = network([0.3, 0.001, 0.3])
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)
    for _ in range(2):
        loss_of(model).backward()
        muon.step()
        adamw.step()
    return lambda: prune(model, keep=[0, 2], optimizer=[muon, adamw]), [model, muon, adamw]


def nested() -> Setting:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    vars(optimizer)["inner"] = inner = torch.optim.Adam(optimizer.param_groups)
    train(model, inner)
    return lambda: prune(model, keep=[0, 2, 4], optimizer=optimizer), [model, optimizer, inner]


def measured() -> Setting:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    return lambda: prune(model, criterion=contribution(batch()), budget=3, optimizer=optimizer), [model, optimizer]


def timed() -> Setting:
    model = network()
    budget = {"latency_ms": 3.0, "example_inputs": batch(1)}
    return lambda: prune(model, criterion=lambda tau, _: tau, budget=budget), [model]


@pytest.fixture(autouse=True)
def a_millisecond_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ``timed`` deletes the same layers each time."""

    def milliseconds(model: Any, inputs: Any) -> float:
        model(inputs)
        return float(model.time_steps.num_steps)

    monkeypatch.setattr("taulearn._milliseconds.milliseconds", milliseconds)


def without_optimizer() -> Setting:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer)
    return lambda: prune(model, keep=[0, 2, 4]), [model, optimizer]


def truncated() -> Setting:
    model = resnet(3, [4, 4, 5, 5], 2, 4, dtype=DOUBLE)
    return lambda: truncate(model, 2), [model]


SETTINGS = [built, lambda: built("dependent"), wrapped, several, nested, measured, timed, without_optimizer, truncated]
NAMES = ["built", "dependent", "wrapped", "several", "nested", "measured", "timed", "without optimizer", "truncated"]


def traces(setting: Callable[[], Setting], within: str, *, share: int = 1, part: int = 0) -> list[str]:
    """Break a deletion off at the first and at the last passage of each line; returns where that left a trace.

    As all is as before after each, the same objects serve for all.

    Args:
        setting: Makes them.
        within: How the names of the files begin.
        share: Of how many lines to take one.
        part: Which.
    """
    found, listed = list[str](), At(None, Failure, within)
    assert _run(setting()[0], listed)
    passages = {event: i for i, event in reversed(list(enumerate(listed.events)))}
    last = {event: i for i, event in enumerate(listed.events)}
    numbers = sorted({*passages.values(), *last.values()})[part::share]
    assert len(numbers) > 5
    act, things = setting()
    picture, modes = Picture(*things), _modes(things)
    for i, number in enumerate(numbers):
        at = At(number, (Failure, KeyboardInterrupt)[i % 2], within)
        if _run(act, at) is None:
            try:
                picture.assert_unchanged()
                assert _modes(things) == modes
                assert torch.is_grad_enabled()
                continue
            except AssertionError:
                found.append(str(at.events[-1]))
                torch.set_grad_enabled(True)
        act, things = setting()  # done all the same, as a generator that is closed tells nobody
        picture, modes = Picture(*things), _modes(things)
    assert _run(act, At(None, Failure, within))
    return found


def _run(act: Callable[[], PruneReport], at: At) -> PruneReport | None:
    """The report, or None where the exception arrived."""
    previous = sys.gettrace()
    sys.settrace(at)
    try:
        return act()
    except (Failure, KeyboardInterrupt):
        return None
    finally:
        sys.settrace(previous)


def _modes(things: list[Any]) -> list[Any]:
    """Whether modules train, their hooks, and marks on parameters."""
    modules = [module for thing in things if isinstance(thing, nn.Module) for module in thing.modules()]
    parameters = [dict(vars(p)) for module in modules for p in module.parameters()]
    return [parameters, *((m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules)]


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_broken_off_in_lines_of_ours(setting: Callable[[], Setting]) -> None:
    """One in so many; another one in each setting."""
    assert traces(setting, PACKAGE, share=2 * len(SETTINGS), part=SETTINGS.index(setting)) == []


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("within", [PACKAGE, ""], ids=["of ours", "of all that is called"])
def test_broken_off_in_every_line(setting: Callable[[], Setting], within: str) -> None:
    assert traces(setting, within) == []
