"""Branches that are deleted one by one, which ``wrap(per="branch")`` allows."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._distributed import refuse_distributed
from .branches import Branch
from .folding import take_off
from .remove_blocks import put_in_place
from .wrapped_model import is_configured

if TYPE_CHECKING:
    from .find_branches import Trial
    from .wrapped_model import Layer


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

    def zeros(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """The module that was here, without adapters, with parameters for which its output is 0."""
        (gone,) = self.gone
        module = _without_adapters(copy.deepcopy(gone))
        for holder in module.modules():
            for name, p in holder._parameters.items():
                if p is not None:
                    kind = dtype if p.is_floating_point() else None
                    zeros = torch.zeros_like(p, device=device, dtype=kind)
                    holder._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        with torch.no_grad():
            for name, offset in self.offsets.items():
                module.get_parameter(name).fill_(-offset)
        return module


def lost_branches(block: nn.Module) -> bool:
    """Whether branches of a block were deleted before."""
    return any(isinstance(module, NoBranch) for module in block.modules())


def _without_adapters(module: nn.Module) -> nn.Module:
    """The module with the layers in it that PEFT has put its own around, as ``merge_and_unload`` leaves it."""
    inner = module._modules.get("base_layer")
    if inner is not None:
        return _without_adapters(inner)
    for name, child in module.named_children():
        module._modules[name] = _without_adapters(child)
    return module


def tried_without(trial: "Trial", branch: Branch) -> Branch:
    """The branch, with why it cannot be deleted alone."""
    form = branch.form
    if form.argument is None or form.kind not in (None, tuple, list):
        why = f"{branch.site!r} has no argument of its output's dimensions, or returns more than tensors"
        return replace(branch, not_deleted=why)
    holder, key = trial.block.get_submodule(branch.site.rpartition(".")[0]), branch.site.rpartition(".")[2]
    site = trial.modules[branch.site]
    try:
        expected = trial.run(scales={branch.site: (form, 0.0)})
        holder._modules[key] = NoBranch(site, branch)
        found, before = dict(trial.run().others), dict(expected.others)
        same = found.keys() == before.keys() and all(torch.equal(found[key], before[key]) for key in found)
        why = "" if same else "the block gives another output without it than with a step of 0"
    # whatever the block raises without its branch, it cannot do without it
    except Exception as error:  # noqa: BLE001
        why = f"the block fails without it ({type(error).__name__})"
    finally:
        holder._modules[key] = site
    return replace(branch, not_deleted=why)


def why_kept(host: nn.Module, name: str, branch: Branch) -> str:
    """Why a branch of a block cannot be deleted alone, or nothing."""
    why: str | None = branch.not_deleted
    if not why and is_configured(host):
        from .configurations import why_not_without

        why = why_not_without(host, name, branch.site)
    return f"it cannot be deleted alone: {why}" if why else ""


def take_branches_out(host: nn.Module, lost: "Iterable[Layer]") -> None:
    """Put modules that return zeros in the places of branches, whose blocks stay."""
    stand_ins: dict[nn.Module, nn.Module] = {}
    for layer in lost:
        refuse_distributed("model", host, "branch")
        ((place, site),) = layer.sites.items()
        take_off(site)
        stand_ins[site] = NoBranch(site, layer.at_start.branches[place])
        watch = vars(layer.block)["forward"]
        if sites := {k: v for k, v in watch.sites.items() if k != place}:
            vars(layer.block)["forward"] = replace(watch, sites=sites)
        else:
            take_off(layer.block)
    put_in_place(host, stand_ins)
