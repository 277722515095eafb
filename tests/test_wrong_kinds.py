"""Arguments of the Python API that are of the wrong kind: named in a sentence, not in an error of Python's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from taulearn import Pruning, TimeSteps, prune
from taulearn.nn import fractional_dnn, resnet
from taulearn.optim import register_projection
from taulearn.penalties import L1, ElasticNet, TimeHorizon
from taulearn.training import evaluate

NONSENSE: Any = "a"


def network() -> Any:
    return resnet(2, 3, 1, 4)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "pruning threshold": (lambda: Pruning(NONSENSE), ValueError, r"threshold must lie in \(0, 1\), got 'a'"),
    "prune threshold": (lambda: prune(network(), NONSENSE), ValueError, r"threshold must lie in \(0, 1\), got 'a'"),
    "every": (lambda: Pruning(0.1, every=NONSENSE), ValueError, "every must be 'epoch' or a number .*got 'a'"),
    "keep": (lambda: prune(network(), keep=NONSENSE), TypeError, "keep must be a list of layer numbers.*got 'a'"),
    "criterion": (lambda: prune(network(), criterion=NONSENSE), ValueError, "criterion must be one of"),
    "criterion that is no function": (
        lambda: prune(network(), criterion=3),  # type: ignore[arg-type]
        TypeError,
        "criterion must be a name or a function .* got 3",
    ),
    "budget": (lambda: prune(network(), budget=NONSENSE), ValueError, "budget must be an integer >= 1, got 'a'"),
    "optimizer of prune": (
        lambda: prune(network(), optimizer=NONSENSE),
        TypeError,
        "optimizer must be an optimiser of the model's parameters, got 'a'",
    ),
    "averaged of prune": (
        lambda: prune(network(), averaged=network()),
        TypeError,
        "averaged must be torch's AveragedModel of the model, got a TimeVariableNetwork",
    ),
    "averaged of another model": (
        lambda: prune(network(), averaged=AveragedModel(torch.nn.Linear(2, 2))),
        ValueError,
        "averaged must average this model",
    ),
    "gamma": (lambda: fractional_dnn(2, 3, 1, 4, gamma=NONSENSE), ValueError, r"gamma must lie in \(0, 1\), got 'a'"),
    "no gamma": (
        lambda: fractional_dnn(2, 3, 1, 4, gamma=None),  # type: ignore[arg-type]
        ValueError,
        r"gamma must lie in \(0, 1\), got None",
    ),
    "tolerance": (
        lambda: fractional_dnn(2, 3, 1, 4, tolerance=NONSENSE),
        ValueError,
        r"tolerance must lie in \(0, 1\), got 'a'",
    ),
    "horizon": (lambda: TimeSteps(3, horizon=NONSENSE), ValueError, "horizon must be a positive finite number"),
    "bound": (lambda: TimeSteps(3, lower_bound=NONSENSE), ValueError, "lower_bound must be None or a finite number"),
    "init": (lambda: TimeSteps(3, init=NONSENSE), ValueError, "init must be a number or 3 numbers, got 'a'"),
    "alpha": (lambda: L1(NONSENSE), ValueError, "alpha must be a finite number >= 0, got 'a'"),
    "weight": (lambda: ElasticNet(None), ValueError, "weight must be a finite number >= 0"),  # type: ignore[arg-type]
    "penalty's horizon": (lambda: TimeHorizon(NONSENSE), ValueError, "horizon must be positive, got 'a'"),
    "optimizer of a projection": (
        lambda: register_projection(NONSENSE, network()),
        TypeError,
        "optimizer must be an optimiser of the model's parameters, got 'a'",
    ),
    "loss": (
        lambda: evaluate(network(), (torch.zeros(3, 2), torch.zeros(3, 1)), loss=NONSENSE),
        TypeError,
        "loss must be a function of",
    ),
    "data": (lambda: evaluate(network(), NONSENSE), TypeError, "data must be a pair of tensors .* got str"),
}


@pytest.mark.parametrize("case", CASES)
def test_argument_of_the_wrong_kind(case: str) -> None:
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_a_single_penalty_of_a_projection_needs_no_list() -> None:
    model = resnet(2, 3, 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    register_projection(optimizer, model, L1(0.25, proximal=True))
    model(torch.zeros(1, 2)).sum().backward()
    model.time_steps.values.grad.zero_()
    optimizer.step()
    assert model.time_steps.tau.tolist() == [0.0] * 4
