"""Noise in place of constant parameters, for passes that show what a host does with its modules.

Gates and heads that are zero at the start, and normalisations that scale by one, would hide it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def noise_for(host: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Values in place of constant parameters: of their size and sign, but such that none is small or like another."""
    generator = torch.Generator().manual_seed(0)
    noise: dict[nn.Parameter, Tensor] = {}
    for parameter in host.parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or not _constant(parameter):
            continue
        value, shape = float(parameter.flatten()[0]), parameter.shape
        drawn = torch.rand(shape, generator=generator)
        if abs(value) > 0.1:
            drawn = value * (0.5 + drawn)
        elif parameter.ndim < 2:
            drawn = 0.1 + 0.4 * drawn
        else:
            drawn = (2.0 * drawn - 1.0) * (3.0 * shape[0] / parameter.numel()) ** 0.5
        noise[parameter] = drawn.to(parameter)
    return noise


def put_noise(host: nn.Module, noise: Mapping[nn.Parameter, Tensor]) -> None:
    """Let a host have noise in place of parameters, until its modules' dictionaries are put back."""
    # copies, as the host may write into them
    others = {p: nn.Parameter(each.clone(), requires_grad=p.requires_grad) for p, each in noise.items()}
    for module in host.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in others:
                module._parameters[name] = others[parameter]


def _constant(values: Tensor) -> bool:
    if values.is_meta or values.numel() == 0:
        return False
    flat = values.flatten()
    return bool((flat[:8] == flat[0]).all()) and bool((flat == flat[0]).all()) and bool(torch.isfinite(flat[0]))
