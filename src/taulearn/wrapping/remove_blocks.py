"""Deleting blocks from the modules that hold them: lists change, elsewhere a placeholder stays; and inserting them.

Everything is done by assigning attributes of modules, never by changing an object they share, so that the transaction
of pruning can undo it.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """Take blocks out of a host: out of lists that get shorter; elsewhere placeholders come into their places."""
    in_lists = {module for name, _, _, module in holders(host) if name in shorten and module in blocks}
    changed = change_lists(host, shorten, dict.fromkeys(in_lists, ()))
    put_in_place(host, {block: PassThrough(form) for block, form in blocks.items()})
    return changed


def change_lists(
    host: nn.Module, names: Collection[str], instead: Mapping[nn.Module, Sequence[nn.Module]]
) -> list[Changed]:
    """Let some members of lists give way to others, or to none; members with a number for a name are numbered anew."""
    changed: list[Changed] = []
    for name, holder in list(host.named_modules()):
        present = {key: module for key, module in holder._modules.items() if module is not None}
        if name not in names or not any(module in instead for module in present.values()):
            continue
        places = [(i, key, new) for i, (key, old) in enumerate(present.items()) for new in instead.get(old, (old,))]
        kept, _, members = zip(*places, strict=True) if places else ((), (), ())
        changed.append(Changed(name, len(present), kept, members))
        holder._modules = {}
        numbers = itertools.count()
        for _, key, module in places:
            key = str(next(numbers)) if key.isdigit() else key
            holder._modules[f"{key}_{len(present)}" if key in holder._modules else key] = module
        _follow_first(host, name, holder, next(iter(present.values())))
    _mend_plain_lists(host, instead)
    return changed


def put_in_place(host: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the places of some."""
    for holder in list(host.modules()):
        if any(module in stand_ins for module in holder._modules.values()):
            others = (
                (key, None if part is None else stand_ins.get(part, part)) for key, part in holder._modules.items()
            )
            holder._modules = dict(others)
    _mend_plain_lists(host, {module: (other,) for module, other in stand_ins.items()})


def _follow_first(host: nn.Module, name: str, holder: nn.Module, first: nn.Module) -> None:
    """torch's encoder and decoder count their layers, and the encoder reads an attribute of its first one."""
    owner = host.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.TransformerEncoder | nn.TransformerDecoder) and owner.layers is holder:
        owner.num_layers = len(holder._modules)
        if not holder._modules and isinstance(first, nn.TransformerEncoderLayer):
            empty = PassThrough(Form())
            object.__setattr__(empty, "self_attn", SimpleNamespace(batch_first=first.self_attn.batch_first))
            holder._modules = {"0": empty}


def _mend_plain_lists(host: nn.Module, instead: Mapping[nn.Module, Sequence[nn.Module]]) -> None:
    """Python lists and tuples of modules, which some hosts keep beside their containers."""
    for module in host.modules():
        for key, value in list(vars(module).items()):
            if type(value) in (list, tuple) and any(isinstance(v, nn.Module) and v in instead for v in value):
                others = (instead.get(v, (v,)) if isinstance(v, nn.Module) else (v,) for v in value)
                vars(module)[key] = type(value)(itertools.chain.from_iterable(others))
