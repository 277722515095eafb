"""What stands where a branch was deleted."""

import copy
from typing import Any

import torch
from torch import nn

from .branches import Branch


class NoBranch(nn.Module):
    """Stands where a branch was deleted: returns an increment of 0 as the branch would have.

    Args:
        site: The module that is gone, without its step.
        branch: The branch of which it was the site.
    """

    def __init__(self, site: nn.Module, branch: Branch) -> None:
        super().__init__()
        self.site, self.form, self.sizes = branch.site, branch.form, branch.sizes
        # without memory: what save_pretrained writes zeros for
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in site.parameters()
        }
        self.gone = (copy.deepcopy(site, memo),)
        offsets = {end.parameter.removeprefix(f"{branch.site}."): end.offset for end in branch.ends}
        self.offsets = {name: offset for name, offset in offsets.items() if offset}
        for name, value in vars(site).items():  # hosts read some of them
            if not name.startswith("_") and type(value) in (bool, int, float, str):
                vars(self).setdefault(name, value)
        for name in site._parameters:
            self.register_parameter(name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, in the form of the site's output."""
        x = self.form.arriving(args, kwargs)
        assert x is not None
        shape = list(x.shape)
        for dim, size in self.sizes:
            shape[dim] = size
        return self.form.around(x.new_zeros(shape))

    def zeros(self, device: torch.device | str = "cpu") -> nn.Module:
        """The module that was here, without adapters, with parameters for which its output is 0."""
        (gone,) = self.gone
        module = _without_adapters(copy.deepcopy(gone))
        for holder in module.modules():
            for name, p in holder._parameters.items():
                if p is not None:
                    holder._parameters[name] = nn.Parameter(torch.zeros_like(p, device=device), requires_grad=False)
        with torch.no_grad():
            for name, offset in self.offsets.items():
                module.get_parameter(name).fill_(-offset)
        return module


def _without_adapters(module: nn.Module) -> nn.Module:
    """The module with the layers in it that PEFT has put its own around, as ``merge_and_unload`` leaves it."""
    inner = module._modules.get("base_layer")
    if inner is not None:
        return _without_adapters(inner)
    for name, child in module.named_children():
        module._modules[name] = _without_adapters(child)
    return module
