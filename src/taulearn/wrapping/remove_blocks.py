"""Deleting blocks from the modules that hold them: lists change, elsewhere a placeholder stays.

Everything is done by assigning attributes of modules, never by changing an object they share, so that the transaction
of pruning can undo it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from torch import nn

from .block import PassThrough
from .state_argument import Form

LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Changed:
    """A list with other members than before."""

    name: str  # its name in the host
    length: int  # number of its members before
    kept: tuple[int, ...]  # for each member now the position before, its own or that of which it is a copy
    members: tuple[nn.Module, ...]  # those that it has now


def holders(host: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """All places of modules in a host."""
    for name, holder in host.named_modules():
        for key, module in holder._modules.items():
            if module is not None:
                yield name, holder, key, module


def list_of(host: nn.Module, block: nn.Module) -> str | None:
    """Name of the list (ModuleList or Sequential) that holds a block, or None."""
    for name, holder, _, module in holders(host):
        if module is block and isinstance(holder, LISTS):
            return name
    return None


def sure_to_shorten(host: nn.Module, name: str) -> bool:
    """Whether a list is known to be run through in order, without trying it on inputs."""
    holder = host.get_submodule(name)
    owner = host.get_submodule(name.rpartition(".")[0]) if name else None
    return type(holder).forward is nn.Sequential.forward or isinstance(
        owner, nn.TransformerEncoder | nn.TransformerDecoder
    )


def remove(host: nn.Module, blocks: Mapping[nn.Module, Form], shorten: Collection[str]) -> list[Changed]:
    """Take blocks out of a host."""
    stand_ins = {block: PassThrough(form) for block, form in blocks.items()}
    shortened: list[Changed] = []
    without: set[nn.Module] = set()
    for name, holder in list(host.named_modules()):
        present = {key: module for key, module in holder._modules.items() if module is not None}
        if not any(module in blocks for module in present.values()):
            continue
        if name not in shorten:
            _put(holder, stand_ins)
            continue
        before = tuple(present.values())
        kept = tuple(i for i, module in enumerate(before) if module not in blocks)
        shortened.append(Changed(name, len(before), kept, tuple(before[i] for i in kept)))
        without |= set(before) & blocks.keys()
        holder._modules = _renumbered(present, blocks)
        follow_first(host, name, holder, before[0])
    _mend_plain_lists(host, stand_ins, without)
    return shortened


def put_in_place(host: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the places of some."""
    for holder in list(host.modules()):
        if any(module in stand_ins for module in holder._modules.values()):
            _put(holder, stand_ins)
    _mend_plain_lists(host, stand_ins, ())


def _put(holder: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> None:
    holder._modules = {
        key: stand_ins.get(module, module) if module is not None else None for key, module in holder._modules.items()
    }


def _renumbered(present: Mapping[str, nn.Module], blocks: Collection[nn.Module]) -> dict[str, nn.Module | None]:
    """The members that stay; those with a number for a name are numbered anew."""
    result: dict[str, nn.Module | None] = {}
    number = 0
    for key, module in present.items():
        if module in blocks:
            continue
        result[str(number) if key.isdigit() else key] = module
        number += key.isdigit()
    return result


def follow_first(host: nn.Module, name: str, holder: nn.Module, first: nn.Module) -> None:
    """torch's encoder and decoder count their layers, and the encoder reads an attribute of its first one."""
    owner = host.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.TransformerEncoder | nn.TransformerDecoder) and owner.layers is holder:
        owner.num_layers = len(holder._modules)
        if not holder._modules and isinstance(first, nn.TransformerEncoderLayer):
            empty = PassThrough(Form())
            object.__setattr__(empty, "self_attn", SimpleNamespace(batch_first=first.self_attn.batch_first))
            holder._modules = {"0": empty}


def _mend_plain_lists(
    host: nn.Module, stand_ins: Mapping[nn.Module, nn.Module], without: Collection[nn.Module]
) -> None:
    """Python lists and tuples of modules, which some hosts keep beside their containers."""
    for module in host.modules():
        for key, value in list(vars(module).items()):
            if type(value) in (list, tuple) and any(isinstance(v, nn.Module) and v in stand_ins for v in value):
                vars(module)[key] = type(value)(
                    stand_ins.get(v, v) if isinstance(v, nn.Module) else v
                    for v in value
                    if not (isinstance(v, nn.Module) and v in without)
                )
