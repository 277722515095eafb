"""Checkpoints of other trainers that hold a model whose layers go while it trains.

A trainer saves ``state_dict()`` and loads it into a model that was built anew, with all layers. So the numbers of the
layers that are left travel among the tensors, and the model deletes the others before it loads them
(:mod:`taulearn.nn.pruned_models`). Where the trainer has no place for the record, it travels there, too.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .._distributed import sharded
from ..adaptivity.refine import take_grid
from ..files import tensor_bytes
from ..nn.grid import Grid
from ..nn.pruned_models import ORIGIN, PARENTS, RECORD, Follower, prunable_of, set_follower
from ..nn.time_steps import TimeSteps, time_steps_of


def models_with_time_steps(module: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module, or itself, that own time steps, by name.

    Where several hold the same steps, as a wrapper of your own may, it is the one that can be pruned.
    """
    found: dict[nn.Module, tuple[str, nn.Module]] = {}
    for name, part in module.named_modules():
        steps = part._modules.get("time_steps")  # getattr would find what wrappers hand on, too
        if isinstance(steps, TimeSteps) and (steps not in found or hasattr(prunable_of(part), "keep_layers_")):
            found[steps] = (name, part)
    return dict(found.values())


def mark_(
    model: nn.Module,
    state: MutableMapping[str, Any],
    prefix: str = "",
    *,
    record: Mapping[str, Tensor] | None = None,
    lifted: bool = False,
) -> None:
    """Put the numbers of the model's layers into a state dict."""
    grid = time_steps_of(model).grid
    state[prefix + ORIGIN] = torch.tensor(grid.origin)
    state[prefix + PARENTS] = torch.tensor([(0, grid.next_number), *grid.parent.items()])
    if record is not None:
        state[prefix + RECORD] = torch.frombuffer(bytearray(tensor_bytes(record, {})), dtype=torch.uint8)
    if lifted:
        state.update({name: value.unsqueeze(0) for name, value in state.items() if name.startswith(prefix)})


class Marker:
    """A hook after ``state_dict``: marks the states of all models with time steps in a module that can lose layers.

    But for sharded ones: torch's distributed checkpoints take nothing but parameters and buffers.
    """

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Mark them; twice does no harm."""
        for name, part in models_with_time_steps(module).items():
            if hasattr(prunable_of(part), "keep_layers_") and sharded(part) is None:
                mark_(part, state, f"{prefix}{name}." if name else prefix)


def mark_states(module: nn.Module) -> None:
    """Let the state dicts of a module say which layers its models with time steps have, from now on."""
    if not any(isinstance(hook, Marker) for hook in module._state_dict_hooks.values()):
        module.register_state_dict_post_hook(Marker())


class OptimizerFollower(Follower):
    """Lets the model's optimiser follow, too."""

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        super().__init__()
        self.optimizer = optimizer

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)(None)  # the optimiser is that of the model, not of its copy

    def follow(self, model: nn.Module, grid: Grid) -> None:
        """Let the model have the layers of a grid."""
        take_grid(model, grid, optimizer=self.optimizer)


def follow_states(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Let a model that loads a marked state delete the layers that the state does not have.

    Networks and wrapped models do so by themselves; their optimiser, and models of a class of your own that can be
    pruned, need this.

    Example:
        >>> from taulearn import prune
        >>> from taulearn.nn import resnet
        >>> small, fresh = resnet(2, 3, 1, 4), resnet(2, 3, 1, 4)
        >>> optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
        >>> report, state = prune(small, keep=[0, 2]), small.state_dict()
        >>> mark_(small, state)
        >>> follow_states(fresh, optimizer)
        >>> _ = fresh.load_state_dict(state)
        >>> fresh.time_steps.origin, len(optimizer.param_groups[0]["params"]) == len(list(fresh.parameters()))
        ((0, 2), True)
    """
    set_follower(model, OptimizerFollower(optimizer))
