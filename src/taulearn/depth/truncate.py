"""Cutting a network after some of its layers, so that it computes its intermediate output and nothing else.

The layers from the cut on go with all their variables, also those whose skips are no identities: these skips are a part
of the head from then on. The cut network is the one with tau_l = 0 for all l >= k (residual and fractional schemes).

References:
    Püttschneider, Heilig, Fischer, Faulwasser (2025), Towards an optimal control perspective of ResNet training.
"""

import copy

from torch import nn

from .._errors import positive_integer
from ..adaptivity.coarsen import PruneReport, deleted_layers, number_of_variables, prune
from ..adaptivity.estimate import shares
from ..adaptivity.transaction import Snapshot
from ..nn.network import TimeVariableNetwork
from ..nn.pruned_models import refuse_inference_mode, retire, wrapping_of
from ..nn.time_steps import TimeSteps


def truncate(model: nn.Module, depth: int) -> PruneReport:
    """Cut a model after its first ``depth`` layers, in place.

    Args:
        model: A TimeVariableNetwork of any scheme, or a wrapped model.
        depth: Number of layers to keep, at least 1; all: nothing is done.

    Returns:
        What was deleted. An optimiser made before still holds what is gone: make a new one to train on.

    Raises:
        TypeError: If it is neither.
        ValueError: If there are not so many layers, the steps are bound to add up to the horizon with constraint
            "dependent", or the blocks of a wrapped model cannot be deleted.

    Example:
        >>> import torch
        >>> from taulearn.nn import resnet
        >>> network, x = resnet(2, 3, 1, 4), torch.ones(5, 2)
        >>> expected = network.intermediate_outputs(x)[2]
        >>> print(truncate(network, 2))
        deleted layers 3, 2 (shares 0.25, 0.25): 4 -> 2 layers, 52 -> 26 parameters
        >>> torch.allclose(network(x), expected)
        True
    """
    depth = positive_integer("depth", depth, "a network needs at least one layer")
    steps = getattr(model, "time_steps", None)
    number = 0 if steps is None else steps.num_steps
    if steps is not None and depth > number:
        raise ValueError(f"depth must be at most {number}, the number of layers, got {depth}")
    if wrapping_of(model) is not None:
        return prune(model, keep=range(depth))
    if not isinstance(model, TimeVariableNetwork):
        behind = " behind torch.compile: give the model that it was compiled from"
        hint = behind if hasattr(model, "_orig_mod") else ": build it with taulearn.nn, or wrap it with taulearn.wrap"
        raise TypeError(f"model must be a TimeVariableNetwork or a wrapped model, got {type(model).__name__}{hint}")
    refuse_inference_mode("cut")
    check_cuts("model", model.time_steps, depth)
    before = Snapshot([model])
    try:
        share = shares(model.time_steps, model.scheme.step_power).tolist()
        deleted = deleted_layers(model, ((l, share[l]) for l in reversed(range(depth, number))))
        parameters = number_of_variables(model)
        note = model.time_steps.rule.deletion_note if depth < number else ""
        if depth < number:
            cut(model, depth)
        left = number_of_variables(model)
        return PruneReport(deleted, tuple(range(depth)), number, depth, parameters, left, "none", note)
    except BaseException:
        before.restore()
        raise


def check_cuts(argument: str, steps: TimeSteps, depth: int) -> None:
    """Refuse a constraint that holds a layer from the cut on."""
    for layer, reason in steps.rule.fixed(steps.num_steps).items():
        if layer >= depth:
            raise ValueError(
                f"{argument} must not have the constraint {steps.constraint!r}, with which layer "
                f"{steps.origin[layer]} cannot be cut off ({reason}): train with 'free', or delete layers by their "
                "shares with taulearn.prune"
            )


def cut(network: TimeVariableNetwork, depth: int) -> None:
    """Let a network end after its first ``depth`` layers; the skips past the others come before the head."""
    number, skips = len(network.layers), copy.deepcopy(network.skips)
    maps = [skips.past(l) for l in range(depth, number) if not skips.unchanged(l)]
    if maps:
        ends = list(network.head) if type(network.head) is nn.Sequential else [network.head]
        network.head = nn.Sequential(*maps, *ends)
    kept = range(depth)
    retire(network.time_steps.values)
    network.time_steps.keep_(kept)
    network.skips.keep_(kept)
    network.scheme.follow_(kept)
    network.layers = nn.ModuleList(network.layers[l] for l in kept)
