"""Intermediate outputs of any model with time steps: of the networks of this package, and of wrapped models."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..nn.network import TimeVariableNetwork
from ..nn.pruned_models import wrapping_of
from ..nn.time_steps import TimeSteps
from .wrapped_states import intermediate_outputs, record_states


def forward_with_states(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One forward pass with its states."""
    if isinstance(model, TimeVariableNetwork):
        states = model.states(inputs, initial=model.skips.from_input)
        return model.head(states[-1]), states
    check_has_stages(model)
    return record_states(model, inputs)


def stage_outputs(model: nn.Module, inputs: Tensor, states: Sequence[Tensor]) -> dict[int, Tensor]:
    """The intermediate outputs without the final one."""
    if isinstance(model, TimeVariableNetwork):
        return model.intermediate_outputs(inputs, states=states, final=False)
    check_has_stages(model)
    return intermediate_outputs(model, inputs, states=states, final=False)


def stage_numbers(model: nn.Module, depths: Iterable[int]) -> list[int]:
    """The numbers that states had at the start, before anything was pruned.

    Example:
        >>> from taulearn import prune
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> _ = prune(network, keep=[0, 2])
        >>> stage_numbers(network, [1, 2])
        [1, 3]
    """
    steps = model.time_steps
    assert isinstance(steps, TimeSteps)
    return [steps.origin[k - 1] + 1 if k else 0 for k in depths]


def check_has_stages(model: nn.Module, argument: str = "model") -> None:
    """Refuse a model of which it is not known what follows a state."""
    if not isinstance(model, TimeVariableNetwork) and wrapping_of(model) is None:
        if hasattr(model, "_orig_mod"):
            raise TypeError(
                f"{argument} must be a TimeVariableNetwork or a wrapped model, got one behind torch.compile, where no "
                "states are seen: give the model that it was compiled from"
            )
        raise TypeError(
            f"{argument} must be a TimeVariableNetwork or a wrapped model, got {type(model).__name__}: only there it "
            "is known what follows a state; build it with taulearn.nn, or wrap it with taulearn.wrap"
        )


def scalar(value: object) -> Tensor:
    """The value of a loss, without dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(value).__name__}: compute it with torch's functions")
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}: take its mean over the batch")
    return value.reshape(())
