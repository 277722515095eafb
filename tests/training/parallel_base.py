"""Shared by the processes of the parallel tests: the network, one training, and what it leaves for the tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taulearn
from taulearn import Pruning, parameter_groups
from taulearn.files import write_tensors
from taulearn.penalties import L1
from taulearn.training import History
from training.support import digits, network, run_fit

RANK = int(os.environ.get("RANK", "0"))
STEPS = [0.5, 0.03, 0.3, 0.1, 0.2, 0.17, 0.3, 0.25]


def model_and_optimizer(kind: str = "sgd", **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = network(8, dtype=torch.float64, init=STEPS, horizon=sum(STEPS), **options)
    groups = parameter_groups(model, lr=0.05, tau_lr=0.02, weight_decay=1e-4)
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adam": lambda: torch.optim.Adam(groups, lr=2e-3),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
        "steepest_descent": lambda: taulearn.optim.SteepestDescent(model.parameters()),
    }
    return model, kinds[kind]()


def leave(folder: Path, model: nn.Module, history: History, optimizer: torch.optim.Optimizer | None = None) -> None:
    """The results for the tests: the record, all tensors of the model, and of the optimiser's state."""
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    if optimizer is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        tensors |= {
            f"state/{names[id(p)]}/{key}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
    write_tensors(folder / f"{RANK}.safetensors", tensors | history.tensors(), {"origin": str(model.time_steps.origin)})


def train(folder: Path, kind: str = "sgd", **options: Any) -> None:
    """100 iterations, during which layers go."""
    model, optimizer = model_and_optimizer(kind)
    defaults: dict[str, Any] = {
        "epochs": 10,
        "batch_size": 42,
        "penalties": [L1(0.2, proximal=True)],
        "pruning": Pruning(0.02, every=7),
        "validation": digits(60, torch.float64),
    }
    history = run_fit(model, digits(420, torch.float64), optimizer, **defaults | options)
    leave(folder, model, history, optimizer)
