"""``save_pretrained`` of wrapped models: what it writes, plain loading loads as the same model, or nothing is written.

Models of transformers, diffusers and huggingface_hub's mixin, and whatever else has such a method, are written without
their time steps and built anew from a configuration when they are loaded. So the steps must be 1, or fold into the
weights, of which copies are written then, and a model that lost blocks must be what its configuration describes.
Whether it is cannot be read off the configuration: the model is written into a folder aside, loaded from there, and
compared with what it is, in tensors, in what its modules hold, and in its outputs on the example inputs. Only then its
own method writes to the folder that was asked for. A model that has all its blocks is what it was, and is not compared.

The guard stays on a pruned model when its steps are taken off, unless it is what its configuration describes.

A model around the wrapped one (of which only a part was wrapped, or that PEFT made later, say) is not known here, and
is not guarded.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._distributed import sharded
from .._errors import in_short
from .._undisturbed import undisturbed
from ..adaptivity.transaction import Snapshot
from ..nn.pruned_models import WRAPPING
from .comparison import STEPS, Description, other_outputs, other_values, type_of
from .configurations import is_pretrained, number_caches, numbers_kept
from .folding import Folding, check_plain, without_steps
from .remove_blocks import holders
from .single_branches import NoBranch
from .wrapped_model import ExampleInputs, Wrapping

_SAVE = "save_pretrained"
_PUSH = "push_to_hub"
_INSTEAD = "Save with taulearn.save_model and load with taulearn.load_model(path, host)"


@dataclass(frozen=True, eq=False)
class SavePretrained:
    """``save_pretrained`` of a wrapped model, or of a pruned one that was wrapped."""

    model: nn.Module  # the model that is saved
    host: nn.Module  # the wrapped model that it is, or is a part of
    inputs: ExampleInputs = field(default_factory=ExampleInputs)  # example inputs of the host
    pruned: bool = False  # whether blocks were deleted before the host was wrapped as it is now
    own: Callable[..., Any] | None = None  # what the instance had as ``save_pretrained`` before, or None

    @property
    def inner(self) -> Callable[..., Any]:
        """The model's own method."""
        return self.own or MethodType(getattr(type(self.model), _SAVE), self.model)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What ``inspect.signature`` shows."""
        return self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model without its time steps; those that fold are folded into the weights that are written.

        A sharded model is gathered first, in all processes at once, and the first writes.
        """
        if sharded(self.host) is not None and not self._has_state(args, kwargs):
            from .._together import gathered

            with gathered(self.host) as ranks:
                return ranks.told(lambda: self(*args, **kwargs))
        given = inspect.signature(self.inner).bind(*args, **kwargs)
        with _steps_of(vars(self.host).get(WRAPPING), _state_in(given)):
            return self._save(given)

    def _save(self, given: inspect.BoundArguments) -> Any:
        """Save the model with the steps that it has now."""
        wrapping = vars(self.host).get(WRAPPING)
        if wrapping is not None:
            check_plain(wrapping, _SAVE)
        if _writes_adapters(self.model) and wrapping is not None and bool((wrapping.time_steps.tau != 1).any()):
            raise ValueError(
                "the time steps must be 1 for save_pretrained where adapters alone are written, got others, which "
                "would fold into the weights under them, too: taulearn.unwrap folds them, then save what "
                "merge_and_unload gives"
            )
        with without_steps(wrapping) as changed, _zeros_for_branches(self.host) as zeros:
            given = self._folded(given, changed, zeros)
            if self.has_other_blocks():
                found = self.why_not(held=False) or self._loaded_unlike(given)
                if found:
                    raise ValueError(
                        "the model must be what its configuration describes for save_pretrained, got "
                        f"{len(found)} differences: {'; '.join(found[:5])}. {_INSTEAD}"
                    )
            return self._write(given)

    def _has_state(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the whole state was handed over, as trainers do after they gathered it."""
        return _state_in(inspect.signature(self.inner).bind(*args, **kwargs)) is not None

    def has_other_blocks(self) -> bool:
        """Whether blocks were deleted or came, now or before."""
        wrapping = vars(self.host).get(WRAPPING)
        return self.pruned or (wrapping is not None and wrapping.has_other_blocks())

    def why_not(self, known: dict[str, Description] | None = None, *, held: bool = True) -> list[str]:
        """Why a model that lost blocks cannot be saved, as far as it shows without saving it; empty: it may."""
        kind = type(self.model).__name__
        if _writes_adapters(self.model):
            return [
                "adapters alone are written, and are loaded into a model with all its blocks (merge_and_unload gives a "
                "model without adapters)"
            ]
        if not callable(getattr(type(self.model), "from_pretrained", None)):
            return [f"{kind} has no from_pretrained to try it with ({kind}.save_pretrained(model, ...) saves untried)"]
        try:
            expected = _described_by_configuration(self.model, {} if known is None else known)
        except Exception as error:  # noqa: BLE001  whatever the class raises, it cannot be loaded
            return [f"its configuration cannot be built ({in_short(error)})"]
        return [] if expected is None else expected.differences(Description.of(self.model), held=held)

    def _folded(
        self, given: inspect.BoundArguments, changed: Mapping[str, Folding], zeros: Collection[nn.Module]
    ) -> inspect.BoundArguments:
        """The arguments; a state dict among them, of averaged weights perhaps, with steps folded, and with zeros."""
        prefix = next(name for name, module in self.host.named_modules() if module is self.model)
        inside = f"{prefix}." if prefix else ""
        mine = {name.removeprefix(inside): each for name, each in changed.items() if name.startswith(inside)}
        places = {name: module for name, module in self.model.named_modules() if module in zeros}
        added = {f"{name}.{key}": each for name, part in places.items() for key, each in part.state_dict().items()}
        result = copy.copy(given)
        result.arguments = {k: dict(v) if k == _keywords(given) else v for k, v in given.arguments.items()}
        for holder in (result.arguments, result.arguments.get(_keywords(given), {})):
            if isinstance(holder.get("state_dict"), dict):
                state = added | holder["state_dict"]
                holder["state_dict"] = {k: mine[k].of(v) if k in mine else v for k, v in state.items()}
        return result

    def _write(self, given: inspect.BoundArguments, folder: str | None = None) -> Any:
        """Call the model's own method without the steps, in the model and in a state dict that was handed over."""
        own: dict[str, Any] = {k: dict(v) if k == _keywords(given) else v for k, v in given.arguments.items()}
        for holder in (own, own.get(_keywords(given), {})):
            if isinstance(holder.get("state_dict"), dict):  # which the method may empty
                holder["state_dict"] = {k: v for k, v in holder["state_dict"].items() if not k.startswith(STEPS)}
            if folder is not None and holder.get(_PUSH):
                holder[_PUSH] = False
        if folder is not None:
            first, target = _target(given)
            place = type(target)(folder) if isinstance(target, Path) else folder
            own[first] = place if own[first] is target else (place, *own[first][1:])
        arguments = copy.copy(given)
        arguments.arguments = own
        with _time_steps_aside(self.model):
            return self.inner(*arguments.args, **arguments.kwargs)

    def _loaded_unlike(self, given: inspect.BoundArguments) -> list[str]:
        """How what is loaded from a folder aside differs from the model."""
        target = Path(_target(given)[1]).absolute()
        if target.is_file():
            return []  # its own method says so
        beside = next(folder for folder in (target, *target.parents) if folder.is_dir())
        named = given.arguments | given.arguments.get(_keywords(given), {})
        with TemporaryDirectory(prefix=".taulearn-", dir=beside, ignore_cleanup_errors=True) as aside:
            self._write(given, aside)
            if not any(path.is_file() for path in Path(aside).rglob("*")):
                return []  # another process writes
            try:
                with torch.random.fork_rng([]):
                    loaded = self._load(aside, named.get("variant"))
            except Exception as error:  # noqa: BLE001  whatever the class raises, it cannot be loaded
                return [f"from_pretrained raises {in_short(error)}"]
            with _time_steps_aside(self.model):
                own = self.model.state_dict()
                return other_values(loaded, self.model, named.get("state_dict") or own) or self._acts_unlike(loaded)

    def _load(self, folder: str, variant: str | None) -> Any:
        kind: Any = type(self.model)
        options: dict[str, Any] = {} if variant is None else {"variant": variant}
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        if is_pretrained(self.model) and isinstance(attention, str):
            with suppress(Exception):  # a part, such as a backbone of convolutions, may know no attention
                return kind.from_pretrained(folder, attn_implementation=attention, **options)
        return kind.from_pretrained(folder, **options)

    def _acts_unlike(self, loaded: nn.Module) -> list[str]:
        """How outputs on the example inputs differ, and what modules hold, some of it only once they were called.

        The loaded model gets the tensors of this one: averaged weights may have been saved in their place.
        """
        loaded.load_state_dict(self.model.state_dict(), strict=False, assign=True)
        loaded.eval()
        with undisturbed(self.host):
            inputs, lines = self.inputs.value, list[str]()
            if inputs is not None:
                lines = other_outputs(loaded, self.model, self.host, inputs)
            return Description.of(loaded).differences(Description.of(self.model)) + lines


@contextmanager
def _zeros_for_branches(host: nn.Module) -> Iterator[list[nn.Module]]:
    """Modules with weights of zero in the places of deleted branches, which a model's class cannot leave out."""
    places = [(holder, key, part) for _, holder, key, part in holders(host) if isinstance(part, NoBranch)]
    if places:
        warnings.warn(
            f"{len(places)} branches that were deleted are written as weights of zero, as no configuration can leave "
            "them out: what is loaded computes the same, no faster than before. taulearn.save_model keeps the short "
            "form",
            stacklevel=5,  # whoever called save_pretrained
        )
    device = next((p.device for p in host.parameters()), torch.device("cpu"))
    with numbers_kept(host) if places else nullcontext():
        try:
            zeros = [part.zeros(device, type_of(host)) for _, _, part in places]
            for (holder, key, _), each in zip(places, zeros, strict=True):
                holder._modules[key] = each
            number_caches(host, {part.site for _, _, part in places})
            yield zeros
        finally:
            for holder, key, part in places:
                holder._modules[key] = part


def guard_saving(host: nn.Module, blocks: Sequence[nn.Module], inputs: ExampleInputs) -> None:
    """Guard the host, and every model in it that has ``save_pretrained`` and contains blocks."""
    for module in host.modules():
        held = any(part in blocks for part in module.modules()) or module is host
        if held and module not in blocks and callable(getattr(type(module), _SAVE, None)):
            before = guard_of(module)
            own = vars(module).get(_SAVE) if before is None else before.own
            pruned = before is not None and before.pruned
            vars(module)[_SAVE] = SavePretrained(module, host, inputs, pruned, own)


def release_saving(host: nn.Module) -> None:
    """Undo :func:`guard_saving`, while the host is wrapped; models that only a guard can save keep theirs."""
    for module in host.modules():
        guard = guard_of(module)
        if guard is None:
            continue
        del vars(module)[_SAVE]
        if guard.has_other_blocks() and (not _has_configuration(module) or guard.why_not()):
            vars(module)[_SAVE] = replace(guard, pruned=True)
        elif guard.own is not None:
            vars(module)[_SAVE] = guard.own


def find_unsaved(wrapping: Wrapping) -> dict[int, str]:
    """Without which single blocks ``save_pretrained`` would be refused, as far as it shows without saving."""
    host, number = wrapping.host, len(wrapping.layers)
    known: dict[str, Description] = {}
    reasons: dict[int, str] = {}
    if number == 1 or not any(map(guard_of, host.modules())):
        return {}
    before = Snapshot([host])
    for gone in sorted(set(range(number)) - wrapping.fixed_layers().keys()):
        try:
            wrapping.keep_layers_([l for l in range(number) if l != gone])
            reason = refused(host, known)
            if reason is not None:
                reasons[gone] = reason
        finally:
            before.restore()
    return reasons


def refused(host: nn.Module, known: dict[str, Description]) -> str | None:
    """Why ``save_pretrained`` would refuse the host as it is now, as far as it shows without saving.

    Of models within models the outermost counts: parts of it were built otherwise than alone, without a pooler, say.
    """
    inside: set[nn.Module] = set()
    for name, module in host.named_modules():
        guard = guard_of(module)
        if guard is None or module in inside:
            continue
        inside |= set(module.modules())
        found = guard.why_not(known)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"{name + ': ' if name else ''}{found[0]}{more}"
    return None


def guard_of(module: nn.Module) -> SavePretrained | None:
    """The guard of a model, or None."""
    saving = vars(module).get(_SAVE)
    saving = getattr(saving, "guard", saving)  # a trainer's, which holds the guard
    return saving if isinstance(saving, SavePretrained) else None


def _writes_adapters(model: nn.Module) -> bool:
    """Whether a model's own method writes adapters alone: one of PEFT, or of transformers with PEFT's adapters."""
    peft = any(cls.__module__.partition(".")[0] == "peft" for cls in type(model).__mro__)
    return peft or bool(vars(model).get("_hf_peft_config_loaded"))


def _has_configuration(model: nn.Module) -> bool:
    return is_pretrained(model) or _initial(model) is not None


def _initial(model: nn.Module) -> Callable[[], Any] | None:
    """What builds a model of diffusers or of huggingface_hub's mixin anew, or None."""
    kind: Any = type(model)
    config: Any = getattr(model, "config", None)
    if callable(getattr(kind, "from_config", None)) and isinstance(config, dict):
        return lambda: kind.from_config(copy.deepcopy(dict(config)))
    arguments = getattr(model, "_hub_mixin_config", None)
    if isinstance(arguments, dict):
        return lambda: kind(**copy.deepcopy(arguments))
    return None


def _described_by_configuration(model: nn.Module, known: dict[str, Description]) -> Description | None:
    """The description of the model that the configuration makes, built without memory; None: it has none."""
    kind: Any = type(model)
    config: Any = getattr(model, "config", None)
    if is_pretrained(model):
        written = config.to_json_string()
    elif _initial(model) is not None:
        written = repr(config if isinstance(config, dict) else getattr(model, "_hub_mixin_config", None))
    else:
        return None
    key = f"{kind.__module__}.{kind.__qualname__} {written}"
    if key not in known:
        with torch.device("meta"), torch.random.fork_rng([]):
            build = _initial(model) or (lambda: kind(_read_again(config)))
            known[key] = Description.of(build())
    return known[key]


def _read_again(config: Any) -> Any:
    """A configuration of transformers as it is read from the file in which it is written."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config.save_pretrained(folder)
        return type(config).from_pretrained(folder)


def _target(given: inspect.BoundArguments) -> tuple[str, Any]:
    """The name of a method's first parameter, and the folder that was given first."""
    first, value = next(iter(given.arguments.items()))
    return first, value[0] if isinstance(value, tuple) else value


def _state_in(given: inspect.BoundArguments) -> dict[str, Any] | None:
    """The state dict that was handed over, or None."""
    state = (given.arguments | given.arguments.get(_keywords(given), {})).get("state_dict")
    return state if isinstance(state, dict) else None


def _keywords(given: inspect.BoundArguments) -> str:
    """The name under which a method takes keywords that it does not name."""
    return next((p.name for p in given.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")


@contextmanager
def _steps_of(wrapping: Wrapping | None, state: dict[str, Any] | None) -> Iterator[None]:
    """The model with the steps of a state dict in the place of its own, if that has some; afterwards with its own."""
    given = {name: value for name, value in (state or {}).items() if name.startswith(STEPS)}
    if wrapping is None or not given:
        yield
        return
    own: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part, module in wrapping.time_steps.named_modules(prefix=STEPS.rstrip(".")):
            for held in (module._parameters, module._buffers):
                for key, value in list(held.items()):
                    new = given.get(f"{part}.{key}")
                    if new is None or value is None:
                        continue
                    if new.shape != value.shape:
                        raise ValueError(
                            f"{part}.{key} in state_dict must be of shape {tuple(value.shape)}, got "
                            f"{tuple(new.shape)}: hand over a state of the model with the layers that it has now"
                        )
                    own.append((held, key, value))
                    new = new.detach().to(value.device, value.dtype)
                    held[key] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
        yield
    finally:
        for held, key, value in own:
            held[key] = value


@contextmanager
def _time_steps_aside(model: nn.Module) -> Iterator[None]:
    steps = model._modules.pop("time_steps", None)
    try:
        yield
    finally:
        if steps is not None:
            model.add_module("time_steps", steps)
