"""The transaction of pruning: layers go from models and optimiser together, or everything stays as it was."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .nn.following import REPLACED as REPLACED
from .nn.schemes import Scheme
from .nn.time_steps import TimeSteps


class Prunable(Protocol):
    """What pruning asks of a model."""

    time_steps: TimeSteps
    scheme: Scheme

    def fixed_layers(self) -> dict[int, str]:
        """Positions that must stay, with the reason."""

    def keep_layers_(self, indices: Sequence[int]) -> None:
        """Delete all other layers."""


WRAPPING = "_time_step_wrapping"
"""The attribute in which a wrapped model keeps what pruning asks of it."""


def prunable_of(model: nn.Module) -> Any:
    """What pruning asks, of a model itself or of its wrapping; out of torch.compile's wrapper.

    Args:
        model: Any module.

    Returns:
        The model's wrapping, or the model, which need not be :class:`Prunable`.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> prunable_of(network) is network
        True
    """
    inner = getattr(model, "_orig_mod", model)
    return vars(inner).get(WRAPPING, inner)


def check_holds(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse what is no optimiser, and one that does not hold the model's parameters as they are now.

    Args:
        optimizer: What the caller gave.
        model: The model.

    Raises:
        TypeError: If it is a name, a class, or something else.
        ValueError: If it holds none of the model's parameters, or time steps from before a deletion of which it was not
            told.

    Example:
        >>> check_holds(torch.optim.SGD, nn.Linear(1, 1))
        Traceback (most recent call last):
        ...
        TypeError: optimizer must be an optimiser of the model's parameters, got the class SGD: write ...
    """
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else repr(optimizer)
        name = optimizer.__name__ if isinstance(optimizer, type) else "torch.optim.SGD"
        raise TypeError(
            f"optimizer must be an optimiser of the model's parameters, got {given}: "
            f"write {name}(model.parameters(), lr=0.01)"
        )
    own = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(id(p) not in own for p in held)
    if strangers == len(held):
        raise ValueError(
            "optimizer must hold the model's parameters, got one that holds none of them: make it from this model, "
            "and hand it to every call of prune"
        )
    if any(getattr(p, REPLACED, False) for p in held):
        raise ValueError(
            "optimizer must hold the model's time steps, got one that holds those from before layers were "
            "deleted without it, so that tau would not train: make a new one from this model, and hand it to every "
            "call of prune"
        )


def check_holds_steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimiser that leaves time steps that train as they are, as one made before ``wrap`` does.

    Args:
        optimizer: An optimiser that holds parameters of the model.
        model: The model.

    Raises:
        ValueError: If it does not hold the time steps.

    Example:
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> check_holds_steps(torch.optim.SGD(network.layers.parameters()), network)
        Traceback (most recent call last):
        ...
        ValueError: optimizer must hold the model's time steps, got one that does not, ...
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    values = getattr(getattr(model, "time_steps", None), "values", None)
    if isinstance(values, nn.Parameter) and values.requires_grad and id(values) not in held:
        raise ValueError(
            "optimizer must hold the model's time steps, got one that does not, so that tau would not train: make it "
            "after wrap, from taulearn.parameter_groups(model, lr); or freeze them, "
            "model.time_steps.values.requires_grad_(False)"
        )


def check_averaged(averaged: AveragedModel, model: nn.Module) -> None:
    """Refuse what is no average of this model.

    Args:
        averaged: What the caller gave.
        model: The model.

    Raises:
        TypeError: If it is no AveragedModel.
        ValueError: If it averages a model with other parameters.

    Example:
        >>> check_averaged(AveragedModel(nn.Linear(1, 1)), nn.Linear(1, 1))
    """
    if not isinstance(averaged, AveragedModel):
        given = f"the class {averaged.__name__}" if isinstance(averaged, type) else f"a {type(averaged).__name__}"
        raise TypeError(
            f"averaged must be torch's AveragedModel of the model, got {given}: "
            "write torch.optim.swa_utils.AveragedModel(model)"
        )
    shapes, theirs = ([tuple(p.shape) for p in each.parameters()] for each in (model, averaged.module))
    if shapes != theirs:
        raise ValueError(
            "averaged must average this model, got one whose parameters have other shapes: make it from this model, "
            "and hand it to every call of prune"
        )


@contextmanager
def all_or_nothing(models: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Put modules and optimiser back when the body fails; it changes no tensor, so that references suffice."""
    modules = [
        (module, {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in vars(module).items()})
        for model in models
        for module in model.modules()
    ]
    groups = [] if optimizer is None else [(group, {**group}, [*group["params"]]) for group in optimizer.param_groups]
    states = {} if optimizer is None else {p: dict(state) for p, state in optimizer.state.items()}
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for group, options, parameters in groups:
            group.clear()
            group.update(options)
            group["params"][:] = parameters
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(states)
        raise


def delete(models: Sequence[nn.Module], kept: Sequence[int], optimizer: torch.optim.Optimizer | None) -> str:
    """Delete the layers and mend the optimiser; returns what became of its state."""
    model = models[0]
    steps = prunable_of(model).time_steps
    old = steps.values
    names_before: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    own = list(kept[:-1] if steps.constraint == "dependent" else kept)
    for each in models:
        prunable_of(each).keep_layers_(kept)
    new = steps.values
    index = torch.tensor(own, dtype=torch.long, device=old.device)
    if old.grad is not None:
        new.grad = old.grad[index]
    if optimizer is None:
        setattr(old, REPLACED, True)
        return "none"

    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    removed = names_before.keys() - names.keys() - {old}
    per_parameter = not isinstance(optimizer, torch.optim.LBFGS)
    state = optimizer.state.pop(old, None)
    for group in optimizer.param_groups:
        if "param_names" in group:  # of an optimiser made from named parameters: layers have new numbers
            group["param_names"] = [
                names[new if p is old else p] if name == names_before.get(p) else name
                for p, name in zip(group["params"], group["param_names"], strict=True)
                if p not in removed
            ]
        group["params"][:] = [new if p is old else p for p in group["params"] if p not in removed]
    for p in removed:
        optimizer.state.pop(p, None)
    if not per_parameter:
        optimizer.state.clear()
        cast(Any, optimizer)._numel_cache = None
        return "reset"
    if state is not None:
        optimizer.state[new] = {
            key: value[index] if isinstance(value, Tensor) and value.shape == old.shape and value.ndim else value
            for key, value in state.items()
        }
    return "exact"
