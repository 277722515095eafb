"""Hosts from Hugging Face transformers: their configurations follow deletions, and they save what plain loading loads.

A configuration says how many layers there are (``num_hidden_layers`` and its relatives, ``depths`` of stages) and, in
lists with one entry per layer, of which kind they are; attention modules hold the number of their layer, under which
the cache keeps their keys. All three must fit each other after a deletion. transformers saves and reloads without
complaint when they do not.

This module does not import transformers: its classes are known by their names.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .._deletion import prunable_of
from .blocks import PassThrough
from .structure import LISTS, Shortened

_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers")
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "block_idx")
_CONFIGS = ("PreTrainedConfig", "PretrainedConfig")
_SAVE = "save_pretrained"


def _is(value: object, *names: str) -> bool:
    """Whether the value is of a class of transformers with one of these names."""
    return any(cls.__module__.startswith("transformers.") and cls.__name__ in names for cls in type(value).__mro__)


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers.

    Example:
        >>> is_pretrained(nn.Linear(1, 1))
        False
    """
    return _is(module, "PreTrainedModel")


def _configs_around(host: nn.Module, name: str) -> list[Any]:
    """The configurations of the modules around this name, the innermost first."""
    parts = name.split(".") if name else []
    found: list[Any] = []
    for i in range(len(parts), -1, -1):
        config = vars(host.get_submodule(".".join(parts[:i]))).get("config")
        if _is(config, *_CONFIGS) and not any(config is each or _within(each, config) for each in found):
            found.append(config)
    return found


def _within(config: Any, outer: Any) -> bool:
    """Whether a configuration is a part of another, as that of the text is in a model of text and images."""
    parts = [value for value in vars(outer).values() if _is(value, *_CONFIGS)]
    return any(part is config or _within(config, part) for part in parts)


def _counts(config: Any, name: str, length: int) -> list[str]:
    """Names of the entries of a configuration that count the layers in the list ``name``."""
    of_side = _DECODER_COUNTS if "decoder" in name else _ENCODER_COUNTS
    specific, general = ([key for key in keys if getattr(config, key, None) == length] for keys in (of_side, _COUNTS))
    return specific or general if getattr(config, "is_encoder_decoder", False) else specific + general


def _stage(config: Any, name: str, length: int) -> int | None:
    """The position in ``depths`` of the stage that the list ``name`` is a part of, or None."""
    depths, numbers = getattr(config, "depths", None), [int(part) for part in name.split(".") if part.isdigit()]
    if depths is None or len(numbers) != 1 or numbers[0] >= len(depths) or depths[numbers[0]] != length:
        return None
    return numbers[0]


def refused_modules(host: nn.Module) -> dict[str, str]:
    """Modules of transformers' models that must not become blocks on their own account, with the reason.

    Args:
        host: The model.

    Returns:
        Reasons by name: everything but the members of the lists that a configuration counts.
    """
    reasons = {}
    for name, _ in host.named_modules():
        above = name.rpartition(".")[0]
        configs = _configs_around(host, above)
        if name and configs and not _counted_by(host, configs[0], above):
            reasons[name] = "it is not in a list of layers that the configuration of transformers counts"
    return reasons


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


def follow_deletion(host: nn.Module, shortened: Sequence[Shortened]) -> None:
    """Let configurations and layer numbers follow.

    A configuration is replaced by a changed copy wherever the host refers to it: other models may have been built from
    the same object.

    Args:
        host: The model.
        shortened: The lists that got shorter.
    """
    for each in shortened:
        configs = _configs_around(host, each.name)
        if not configs:
            continue
        for new, old in enumerate(each.kept):
            _renumber(each.before[old], old - new)
        memo: dict[int, Any] = {}
        for module in host.modules():
            for key, value in list(vars(module).items()):
                if _is(value, *_CONFIGS):
                    vars(module)[key] = copy.deepcopy(value, memo)
        for config in configs:
            _edit(memo[id(config)], each)


def _renumber(layer: nn.Module, shift: int) -> None:
    for module in layer.modules():
        for key in _NUMBERS:
            number = vars(module).get(key)
            if type(number) is int:
                vars(module)[key] = number - shift


def _edit(config: Any, each: Shortened) -> None:
    """Counts, and lists with one entry per layer."""
    length, after = len(each.before), len(each.kept)
    stage = _stage(config, each.name, length)
    if stage is not None:
        depths = list(config.depths)
        depths[stage] = after
        config.depths = type(config.depths)(depths)
        return
    lists = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == length and ("layer" in key or "block" in key)
    }
    for key in _counts(config, each.name, length):
        setattr(config, key, after)
    for key, value in lists.items():
        setattr(config, key, type(value)(value[i] for i in each.kept))


@dataclass(frozen=True, eq=False)
class SavePretrained:
    """``save_pretrained`` of a wrapped model: it writes what plain loading loads as the same model, or nothing.

    Attributes:
        model: The model of transformers.
        host: The wrapped model that it is, or is a part of.
        inner: The model's own method.
    """

    model: nn.Module
    host: nn.Module
    inner: Callable[..., Any]

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the model without its time steps.

        Args:
            save_directory: The folder.
            *args: Handed on.
            **kwargs: Handed on.

        Returns:
            What transformers returns.

        Raises:
            ValueError: If a step differs from 1, or the configuration cannot describe the pruned model.
        """
        tau = prunable_of(self.host).plain_steps()
        if bool((tau != 1).any()):
            raise ValueError(
                f"the time steps must all be 1 for save_pretrained, got {[round(t, 4) for t in tau.tolist()]}: plain "
                "loading would leave them out. Anneal them in the last epochs (taulearn.wrapping.anneal_to_one), or "
                "save with taulearn.save_model and load with taulearn.load_model(path, host)"
            )
        found = self._unlike_its_configuration()
        if found:
            raise ValueError(
                "the model must be what its configuration describes for save_pretrained, got "
                f"{len(found)} differences: {'; '.join(found[:5])}. Save with taulearn.save_model and load with "
                "taulearn.load_model(path, host)"
            )
        if isinstance(kwargs.get("state_dict"), dict):
            kwargs["state_dict"] = {k: v for k, v in kwargs["state_dict"].items() if not k.startswith("time_steps.")}
        own = self.model._modules.pop("time_steps", None)
        try:
            return self.inner(save_directory, *args, **kwargs)
        finally:
            if own is not None:
                self.model.add_module("time_steps", own)

    def _unlike_its_configuration(self) -> list[str]:
        """How the model differs from one that its configuration makes, in tensors and in numbers that modules hold."""
        config: Any = copy.deepcopy(self.model.config)
        with torch.device("meta"):
            fresh = type(self.model)(config)
        there, here = _shapes(fresh), _shapes(self.model)
        lines = [
            f"{name} is {here.get(name, 'absent')} for {there.get(name, 'absent')}"
            for name in {**there, **here}
            if here.get(name) != there.get(name)
        ]
        present = dict(self.model.named_modules())
        for name, module in fresh.named_modules():
            mine = present.get(name)
            if isinstance(mine, PassThrough):
                lines.append(f"{name} is a placeholder of a deleted block")
            elif mine is not None:
                lines += [
                    f"{name}.{key} is {vars(mine)[key]} for {value}"
                    for key, value in vars(module).items()
                    if type(value) in (int, float, str) and _matters(key) and vars(mine).get(key, value) != value
                ]
        return lines


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = model.state_dict()
    return {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith("time_steps.")}


def _matters(key: str) -> bool:
    """Whether an attribute belongs to the architecture: not to training, not private."""
    return not key.startswith("_") and key != "p" and "drop" not in key


def guard_saving(host: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Put :class:`SavePretrained` on every model of transformers in the host that contains blocks."""
    for module in host.modules():
        if is_pretrained(module) and any(part in blocks for part in module.modules()):
            vars(module)[_SAVE] = SavePretrained(module, host, cast(Any, module).save_pretrained)


def release_saving(host: nn.Module) -> None:
    """Undo :func:`guard_saving`."""
    for module in host.modules():
        saving = vars(module).get(_SAVE)
        if isinstance(getattr(saving, "guard", saving), SavePretrained):  # a trainer's, which holds the guard
            del vars(module)[_SAVE]
