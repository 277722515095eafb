"""Configurations and layer numbers of Hugging Face transformers, which follow when blocks go or come.

A configuration says how many layers there are (``num_hidden_layers`` and its relatives, ``depths`` of stages). It also
speaks of single layers, in four ways: by one entry per layer (``layer_types``), by one entry per state between layers
(``stage_names``), by the numbers of layers or states (``mlp_only_layers``, ``out_indices``, the keys of
``per_layer_config``), and by how many come first (``first_k_dense_replace``). Modules hold copies of all that, and the
number of their own layer, under which the cache keeps their keys. All must fit each other after a deletion: entries of
layers that are gone go, and the numbers of those behind them get smaller. A copy of a layer has what its layer has.

Which entry means which is told by its name, its size and its values. Whether that was right, and whether an entry is
missing here, is tried by those who rely on it: by ``wrap``, which compares outputs, and by
:mod:`taulearn.wrapping.save_pretrained`, which loads what it wrote.

This module does not import transformers: its classes are known by their names.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .remove_blocks import LISTS, Changed
from .single_branches import NoBranch

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_hidden_groups")
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
_COUNTS_OF_ONE_SIDE = ("decoder_num_hidden_layers", "decoder_num_layers")
_FIRST = ("first_k_dense_replace", "num_dense_layers")
_OWN_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")
_NUMBERS = ("index", "indexes", "indices", "idx", "idxs", "ids")
_KIND = re.compile(r"has_(\w+)_layers")  # whether some layer is of a kind, "sliding_attention" say
_CONFIGS = ("PreTrainedConfig", "PretrainedConfig")


def is_of_transformers(value: object, *names: str) -> bool:
    """Whether the value is of a class of transformers with one of these names."""
    return any(cls.__module__.startswith("transformers.") and cls.__name__ in names for cls in type(value).__mro__)


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return is_of_transformers(module, "PreTrainedModel")


def refused_modules(host: nn.Module) -> dict[str, str]:
    """Modules of transformers' models that must not become blocks on their own account, with the reason."""
    reasons = {}
    for name, _ in host.named_modules():
        above = name.rpartition(".")[0]
        configs = _configs_around(host, above)
        if name and configs and not _counted_by(host, configs[0], above):
            reasons[name] = "it is not in a list of layers that the configuration of transformers counts"
    return reasons


def counts(host: nn.Module, name: str) -> bool:
    """Whether a configuration of transformers counts the members of a list."""
    configs = _configs_around(host, name.rpartition(".")[0])
    return bool(configs and _counted_by(host, configs[0], name))


def follow_lists(host: nn.Module, changed: Sequence[Changed]) -> None:
    """Let configurations, their copies in modules, and layer numbers follow.

    A configuration is replaced by a changed copy wherever the host refers to it: other models may have been built from
    the same object.
    """
    for each in changed:
        configs = _configs_around(host, each.name)
        if not configs:
            continue
        for new, (old, member) in enumerate(zip(each.kept, each.members, strict=True)):
            _renumber(member, old - new)
        memo: dict[int, Any] = {}
        for module in host.modules():
            for key, value in list(vars(module).items()):
                if is_of_transformers(value, *_CONFIGS):
                    vars(module)[key] = copy.deepcopy(value, memo)
        cut = _Cut(each.name, each.length, each.kept)
        around = _around(host, each.name)
        inside = [module for member in each.members for module in member.modules()]
        for config in configs:
            _mend_modules([*around, *inside], cut, _edit(memo[id(config)], cut))
        _mend_counts(around[1:2], cut)
        for module in around:
            _mend_generation(module, cut)


def number_caches(host: nn.Module, sites: Collection[str]) -> None:
    """Let what is left of branches have consecutive numbers among those of its kind, under which a cache keeps it."""
    for name, holder in host.named_modules():
        for site in sites if isinstance(holder, LISTS) else ():
            for module, number in _places(host, name, site).items():
                for part in module.modules():
                    for key in _numbers_of(part):
                        vars(part)[key] = number


def _places(host: nn.Module, name: str, site: str) -> dict[nn.Module, int]:
    """What the blocks of a list have left of a branch, with the numbers under which a cache keeps it."""
    members = [*host.get_submodule(name)._modules.values()]
    kinds, places = _kinds(host, name, len(members)), dict[nn.Module, int]()
    free = {kind: iter([i for i, each in enumerate(kinds) if each == kind]) for kind in kinds}
    for block, kind in zip(members, kinds, strict=True):
        module = None if block is None else _inside(block, site)
        if not isinstance(module, NoBranch):
            number = next(free[kind])
            places |= {} if module is None else {module: number}
    return places


@contextmanager
def numbers_kept(host: nn.Module) -> Iterator[None]:
    """Modules have their own numbers again afterwards."""
    own = [(part, key, vars(part)[key]) for part in host.modules() for key in _numbers_of(part)]
    try:
        yield
    finally:
        for part, key, number in own:
            vars(part)[key] = number


def why_not_without(host: nn.Module, name: str, site: str) -> str:
    """Why caches do not allow that a branch is deleted and its block stays, or nothing."""
    above = name.rpartition(".")[0]
    module, holder = host.get_submodule(f"{name}.{site}"), host.get_submodule(above)
    numbers = [vars(part)[each] for part in module.modules() for each in _numbers_of(part)]
    if not numbers:
        return ""
    if not isinstance(holder, LISTS) or set(numbers) != {_places(host, above, site)[module]}:
        return f"{site!r} holds a number of its own that is not its place in a list of layers"
    kinds = {*_kinds(host, above, len(holder._modules))}
    if len(kinds) > 1 and set(numbers) == {0}:  # of what this one keeps a cache tells its length
        return f"caches know layers of several kinds by their numbers, {sorted(kinds)}, and need the first one"
    return ""


def _kinds(host: nn.Module, name: str, length: int) -> list[str]:
    """The kind of each layer in a list; all alike where no configuration names them."""
    for config in _configs_around(host, name):
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and len(kinds) == length:
            return list(kinds)
    return [""] * length


def _numbers_of(module: nn.Module) -> list[str]:
    return [key for key in _OWN_NUMBERS if type(vars(module).get(key)) is int]


def _inside(block: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        found = block._modules.get(part)
        if found is None:
            return None
        block = found
    return block


@dataclass(frozen=True)
class _Cut:
    """How a list of layers changed."""

    name: str  # its name in the host
    length: int  # number of its layers before
    kept: tuple[int, ...]  # for each layer now its number before, or that of which it is a copy

    def before(self, number: int) -> int:
        """How many the first ``number`` layers are now, which is the new number of the state between two layers."""
        return sum(old < number for old in self.kept)

    def of(self, number: int) -> list[int]:
        """New numbers of a layer and its copies; none where it is gone."""
        return [new for new, old in enumerate(self.kept) if old == number]

    def numbers(self, values: Sequence[int]) -> list[int]:
        """New numbers of layers, from the end where the old ones were."""
        return [new - (len(self.kept) if v < 0 else 0) for v in values for new in self.of(v % self.length)]

    def states(self, values: Sequence[int]) -> list[int]:
        """New numbers of states, of which there is one more than layers; those that became one are named once."""
        total, after = self.length + 1, len(self.kept) + 1
        return list(dict.fromkeys(self.before(v % total) - (after if v < 0 else 0) for v in values))


def _configs_around(host: nn.Module, name: str) -> list[Any]:
    """The configurations of the modules around this name, the innermost first."""
    found: list[Any] = []
    for module in _around(host, name):
        config = vars(module).get("config")
        if is_of_transformers(config, *_CONFIGS) and not any(config is each or _within(each, config) for each in found):
            found.append(config)
    return found


def _around(host: nn.Module, name: str) -> list[nn.Module]:
    """The module of this name and those that contain it, the innermost first."""
    parts = name.split(".") if name else []
    return [host.get_submodule(".".join(parts[:i])) for i in range(len(parts), -1, -1)]


def _within(config: Any, outer: Any) -> bool:
    """Whether a configuration is a part of another, as that of the text is in a model of text and images."""
    parts = [value for value in vars(outer).values() if is_of_transformers(value, *_CONFIGS)]
    return any(part is config or _within(config, part) for part in parts)


def _counts(config: Any, name: str, length: int) -> list[str]:
    """Names of the entries of a configuration that count the layers in the list ``name``."""

    def counting(keys: Sequence[str]) -> list[str]:
        return [key for key in keys if getattr(config, key, None) == length]

    if "decoder" in name and (found := counting(_COUNTS_OF_ONE_SIDE)):
        return found
    specific, general = counting(_DECODER_COUNTS if "decoder" in name else _ENCODER_COUNTS), counting(_COUNTS)
    both_sides = getattr(config, "is_encoder_decoder", False) and not getattr(config, "is_decoder", False)
    return specific or general if both_sides else specific + general  # a decoder may have a configuration of its own


def _stage(config: Any, name: str, length: int) -> int | None:
    """The position in ``depths`` of the stage that the list ``name`` is a part of, or None."""
    depths, numbers = getattr(config, "depths", None), [int(part) for part in name.split(".") if part.isdigit()]
    if depths is None or len(numbers) != 1 or numbers[0] >= len(depths) or depths[numbers[0]] != length:
        return None
    return numbers[0]


def _counted_by(host: nn.Module, config: Any, name: str) -> set[str]:
    """Names of the entries of a configuration that count the members of a list, and of no list around it.

    A block may be made of as many parts as its stack has blocks: then the entry counts the blocks.
    """
    holder = host.get_submodule(name)
    if not name or not isinstance(holder, LISTS):
        return set()
    length, above = len(holder._modules), name.rpartition(".")[0]
    counts = {*_counts(config, name, length), *(["depths"] if _stage(config, name, length) is not None else [])}
    while above and counts:
        counts -= _counted_by(host, config, above)
        above = above.rpartition(".")[0]
    return counts


def _renumber(layer: nn.Module, shift: int) -> None:
    for module in layer.modules():
        for key in _OWN_NUMBERS:
            number = vars(module).get(key)
            if type(number) is int:
                vars(module)[key] = number - shift


def _edit(config: Any, cut: _Cut) -> dict[str, tuple[Any, Any]]:
    """Change a configuration; returns the entries that changed, before and after."""
    before = dict(vars(config))
    stage = _stage(config, cut.name, cut.length)
    if stage is not None:
        depths = list(config.depths)
        depths[stage] = len(cut.kept)
        config.depths = type(config.depths)(depths)
    elif counts := _counts(config, cut.name, cut.length):
        overrides = _per_layer_overrides(config)
        entries = {key: _follow(key, value, cut) for key, value in before.items() if _concerns(config, key, cut.name)}
        for key in counts:
            setattr(config, key, len(cut.kept))
        vars(config).update({key: value for key, value in entries.items() if value is not None})
        _follow_outputs(config, cut)
        if overrides is not None:
            config.per_layer_config = _by_number(overrides, cut)
    after = vars(config)
    return {key: (before[key], after[key]) for key in after if key in before and _unlike(before[key], after[key])}


def _concerns(config: Any, key: str, name: str) -> bool:
    """Whether an entry may speak of the layers in the list ``name``, and not of those on the other side."""
    decoder = "decoder" in name
    if "decoder" in key or "encoder" in key:
        return ("decoder" in key) == decoder
    both = getattr(config, "is_encoder_decoder", False) or any(hasattr(config, k) for k in _COUNTS_OF_ONE_SIDE)
    return not (both and decoder)


def _follow(key: str, value: Any, cut: _Cut) -> Any:
    """An entry after the deletion, or None if it does not speak of single layers."""
    words = key.split("_")
    about_layers = bool({"layer", "layers", "block", "blocks"} & set(words)) or key == "attention_window"
    if key in _FIRST and type(value) is int:
        return cut.before(value)
    if isinstance(value, Mapping) and about_layers and _numbers_layers(value, cut.length):
        return _by_number(value, cut)
    if not isinstance(value, list | tuple):
        return None
    ordered = words[-1] in ("layers", "blocks")
    if (ordered or words[-1] in _NUMBERS) and "token" not in words and _are_numbers(value, cut.length, ordered):
        return type(value)(cut.numbers(value))
    if about_layers and len(value) == cut.length and cut.kept:  # hosts ask for the largest entry, say
        return type(value)(value[i] for i in cut.kept)
    return None


def _are_numbers(values: Sequence[Any], length: int, ordered: bool) -> bool:
    """Whether these can be numbers of layers; flags and sizes of layers repeat themselves, or are in no order."""
    if not values or any(type(v) is not int or not -length <= v < length for v in values):
        return False
    places = [v % length for v in values]
    return len(set(places)) == len(places) and (not ordered or places == sorted(places))


def _numbers_layers(value: Mapping[Any, Any], length: int) -> bool:
    return bool(value) and all(str(key).isdigit() and int(key) < length for key in value)


def _by_number(value: Mapping[Any, Any], cut: _Cut) -> dict[Any, Any]:
    """A dictionary by layer number, whose keys stay what they were, numbers or strings."""
    return {type(key)(new): each for key, each in value.items() for new in cut.of(int(key))}


def _per_layer_overrides(config: Any) -> dict[Any, Any] | None:
    """What differs between layers in transformers' own ``per_layer_config``, which is checked as a whole when set."""
    if not getattr(config, "is_heterogeneous", False):
        return None
    overrides: dict[Any, Any] | None = config.to_dict().get("per_layer_config")
    return overrides


def _follow_outputs(config: Any, cut: _Cut) -> None:
    """Names and numbers of the states that a backbone returns: the first is what enters the first layer."""
    names, numbers = (getattr(config, key, None) for key in ("stage_names", "_out_indices"))
    if names is None or len(names) != cut.length + 1:
        return
    names = [*names, *(f"stage{i}" for i in range(len(names), len(cut.kept) + 1))][: len(cut.kept) + 1]
    changed: dict[str, Any] = {"stage_names": names}
    if numbers is not None:
        numbers = cut.states(numbers)
        changed |= {"_out_indices": numbers, "_out_features": [names[i] for i in numbers]}
    vars(config).update(changed)


def _mend_modules(modules: Sequence[nn.Module], cut: _Cut, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Copies of a configuration's entries in the modules around the list and in its layers."""
    for module in modules:
        for key, value in list(vars(module).items()):
            if key in changed and not _unlike(value, changed[key][0]):
                new = changed[key][1]
                vars(module)[key] = type(value)(new) if isinstance(value, list | tuple) else new
            elif value is True and "layer_types" in changed and (kind := _KIND.fullmatch(key)):
                vars(module)[key] = any(each.startswith(f"{kind[1]}_") for each in changed["layer_types"][1])
            elif key == "num_features" and "stage_names" in changed and len(value) == cut.length + 1:
                vars(module)[key] = [value[0], *(value[i + 1] for i in cut.kept)]


def _mend_counts(owners: Sequence[nn.Module], cut: _Cut) -> None:
    """Counts that the owner of the list holds, under whichever name."""
    for module in owners:
        for key in _COUNTS:
            if type(vars(module).get(key)) is int and vars(module)[key] == cut.length:
                vars(module)[key] = len(cut.kept)


def _unlike(a: Any, b: Any) -> bool:
    """Whether two entries differ; a list and a tuple of the same values do not."""
    a, b = (list(each) if isinstance(each, list | tuple) else each for each in (a, b))
    return type(a) is not type(b) or bool(a != b)


def _mend_generation(module: nn.Module, cut: _Cut) -> None:
    """Numbers of layers in the settings of generation: heads that align (Whisper), an early exit."""
    settings = vars(module).get("generation_config")
    heads, leave = getattr(settings, "alignment_heads", None), getattr(settings, "assistant_early_exit", None)
    edits: dict[str, Callable[[], Any]] = {}
    if heads and "decoder" in cut.name and all(0 <= layer < cut.length for layer, _ in heads):
        edits["alignment_heads"] = lambda: [[new, head] for l, head in heads for new in cut.of(l)]
    if type(leave) is int and "encoder" not in cut.name:
        edits["assistant_early_exit"] = lambda: cut.before(leave)
    if edits:
        vars(module)["generation_config"] = copy.deepcopy(settings)
        for key, value in edits.items():
            setattr(vars(module)["generation_config"], key, value())
