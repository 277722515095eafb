"""Checkpoints: everything a run needs to go on bit by bit, in one safetensors file each; the last two are kept.

Weights, buffers and kept layers; the optimiser's state by parameter name; schedulers; averaged weights; random
generators; position; the record so far. A file is written aside, synced and renamed, and carries a digest, so that a
torn or damaged one is noticed and the previous one is used.
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adaptivity.optimizer_state import check_follows, with_inner
from ..adaptivity.refine import take_grid
from ..files import check_tensors, read_tensors, write_tensors
from ..nn.grid import Grid
from ..nn.pruned_models import wrapping_of
from ..nn.time_steps import time_steps_of
from .check_arguments import OVER_EPOCHS
from .history import History
from .parts import Parts, Position, Start
from .state_without_pickle import from_plain, to_plain

FORMAT = 1
KEPT = 2

_KEEPER = "model, optimizer and scheduler"

_SHAPE = ("T_0", "T_max", "T_mult", "eta_min", "gamma", "power", "step_size", "total_iters", "total_steps")
"""Settings in the state of torch's schedulers, which they do not change as they step."""


def save_checkpoint(folder: Path, parts: Parts, position: Position, history: History, start: Start) -> Path:
    """Write one checkpoint and delete all but the last two."""
    tensors, plain = _contents(parts)
    check_tensors(tensors, _KEEPER)
    plain |= {
        "position": vars(position),
        "terms": dict(start.terms),
        "config": dict(start.config),
        "python": random.getstate(),
        "numpy": _numpy_state(),
    }
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    if parts.generator is not None:
        tensors["random/loader"] = parts.generator.get_state()
    tensors |= history.tensors()
    text = json.dumps(plain, default=str)
    metadata = {"format": str(FORMAT), "state": text, "digest": _digest(tensors, text)}
    folder.mkdir(exist_ok=True)
    file = folder / f"{position.iteration:010d}.safetensors"
    try:
        write_tensors(file, tensors, metadata)
    except OSError as error:
        older = _files(folder)
        rest = f"the previous one ({older[-1].name}) stands" if older else "there is no earlier one"
        message = (
            f"checkpoint {file} could not be written ({error.strerror}); {rest}: "
            f"free some space, then `taulearn resume {folder.parent}`"
        )
        raise OSError(error.errno, message) from error
    drop_old(folder)
    return file


def drop_old(folder: Path) -> None:
    """Delete all checkpoints but the last two."""
    for old in _files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)


def check_contents(parts: Parts) -> None:
    """Refuse what no checkpoint could keep, before anything is written."""
    check_tensors(_contents(parts)[0], _KEEPER)


def load_checkpoint(
    folder: Path, parts: Parts, terms: Mapping[str, Any]
) -> tuple[Position, History, Mapping[str, Any], list[str]]:
    """Put the newest undamaged checkpoint into freshly made parts, whose layers become those that there were."""
    tensors, plain, complaints = _newest(folder)
    position = Position(**plain["position"])
    differing = _disagreements(plain.get("terms", {}), terms)
    if differing:
        raise ValueError(f"{'; '.join(differing)}: resume with the same, or start a new run")
    if terms["epochs"] < position.epoch:
        raise ValueError(
            f"epochs must be at least {position.epoch}, the number that are done, got {terms['epochs']}: "
            "start a new run for fewer"
        )
    _restore(parts, tensors, plain)
    return position, History.from_tensors(tensors), plain.get("terms", {}), complaints


def read_start(folder: Path) -> tuple[Start, Position] | None:
    """Start and position of a run, from the newest undamaged checkpoint; None where there is none."""
    if not _files(folder):
        return None
    _, plain, _ = _newest(folder)
    return Start(plain.get("terms", {}), plain.get("config", {})), Position(**plain["position"])


def _newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Tensors and plain data of the newest undamaged checkpoint, and one line per damaged one."""
    complaints: list[str] = []
    for file in reversed(_files(folder)):
        try:
            tensors, metadata = read_tensors(file)
            text = metadata.get("state", "")
            if metadata.get("format") != str(FORMAT) or metadata.get("digest") != _digest(tensors, text):
                raise ValueError(
                    f"{file} must be a checkpoint of format {FORMAT} with a matching digest, got a damaged one"
                )
            return tensors, json.loads(text), complaints
        except ValueError as error:
            complaints.append(f"damaged checkpoint passed over: {error}")
    if complaints:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(complaints)}. Start the run anew")
    raise FileNotFoundError(
        f"{folder} holds no checkpoint: the run had not finished its first epoch; start it anew with --overwrite"
    )


def _restore(parts: Parts, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    model, optimizer = parts.model, parts.optimizer
    steps = time_steps_of(model)
    grid = Grid.from_plain(plain)
    try:
        grid.made_from(steps.origin)
    except ValueError as error:
        raise ValueError(
            f"model must have the layers {plain['origin']} of the checkpoint, got {list(steps.origin)}: "
            "build the network the run began with"
        ) from error
    if parts.scheduler is not None:
        _check_schedule(parts.scheduler.state_dict(), from_plain(plain["scheduler"], tensors))
    take_grid(model, grid, optimizer=optimizer, averaged=parts.averaged)
    _follow_folding(model, tensors, "model/")
    _load(model, tensors, "model/")
    if "frozen" in plain:
        steps.held = frozenset(plain["held"])
        for name, p in model.named_parameters():
            p.requires_grad_(name not in plain["frozen"])
    if parts.averaged is not None:
        _follow_folding(parts.averaged.module, tensors, "averaged/module.")
        _load(parts.averaged, tensors, "averaged/")
    optimizers, saved = list(with_inner([optimizer])), [plain, *plain.get("inner", [])]
    if len(optimizers) != len(saved):
        raise ValueError(
            f"optimizer must consist of {len(saved)} as at the start of the run, got {len(optimizers)}, those inside "
            "it counted: make it as then; a run of an earlier version of this package did not keep what is inside"
        )
    for each, its in zip(optimizers, saved, strict=True):
        _restore_optimizer(each, its["optimizer"], its["state"], dict(model.named_parameters()), tensors)
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(from_plain(plain["scheduler"], tensors))
    if parts.policies:
        parts.policies.load_state(from_plain(plain.get("pruner", {}), tensors))
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(plain["numpy"]))  # noqa: NPY002
    torch.set_rng_state(tensors["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    if parts.generator is not None:
        parts.generator.set_state(tensors["random/loader"])


def _restore_optimizer(
    optimizer: Any,
    saved_groups: Sequence[Mapping[str, Any]],
    saved_state: Mapping[str, Any],
    named: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    groups = optimizer.param_groups
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"optimizer must have {len(saved_groups)} parameter groups as in the checkpoint, got {len(groups)}: "
            "make it as at the start of the run"
        )
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if {id(p) for p in group["params"]} != {id(named[name]) for name in saved["params"] if name in named}:
            raise ValueError(
                f"optimizer must hold in group {i} the parameters {saved['params']} of the checkpoint: "
                "make it as at the start of the run"
            )
        group["params"][:] = [named[name] for name in saved["params"]]
        group.update(from_plain(saved["options"], tensors))
    on_device = [group for group in groups if group.get("fused") or group.get("capturable")]
    numbers_too = {id(p) for group in on_device for p in group["params"]}
    for name, saved in saved_state.items():
        p = named[name]
        state = _moved(from_plain(saved, tensors), p.device, numbers_too=id(p) in numbers_too)
        if isinstance(state, dict) and sharded_like(p):
            state = {key: laid_out(value, p) for key, value in state.items()}
        optimizer.state[p] = state


def _moved(state: Any, device: torch.device, *, numbers_too: bool) -> Any:
    """State on a device; single numbers, which most optimisers keep on the CPU, only where they are to be."""
    if isinstance(state, Tensor):
        return state.to(device) if state.ndim or numbers_too else state
    if isinstance(state, dict):
        return {key: _moved(value, device, numbers_too=numbers_too) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_moved(value, device, numbers_too=numbers_too) for value in state)
    return state


def _check_schedule(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a scheduler of another shape, which loading the saved state would silently undo."""
    for name in _SHAPE:
        if name in own and name in saved and own[name] != saved[name]:
            raise ValueError(
                f"scheduler must have {name} = {saved[name]!r} as at the start of the run, got {own[name]!r}: "
                "make it the same, or start a new run"
            )


def _follow_folding(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Take off units of displacement that the run had folded into plain steps by then."""
    wrapping = wrapping_of(model)
    if wrapping is not None and wrapping.units is not None and f"{prefix}time_steps.units.squares" not in tensors:
        from ..wrapping.folding import drop_units

        drop_units(wrapping)


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for name, p in module.named_parameters():
        if name in own and sharded_like(p):
            own[name] = laid_out(own[name], p)
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"model must be the one the run began with: {error}") from error


def sharded_like(p: Tensor) -> bool:
    """Whether a parameter is a part, of which other processes have the rest."""
    return hasattr(p, "full_tensor")


def laid_out(value: Any, p: Any) -> Any:
    """A tensor that belongs to a sharded parameter, sharded alike; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous().resolve_conj().resolve_neg()
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        flat = t.as_strided((t.numel(),), (1,), t.storage_offset())  # one element may have any stride
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _numpy_state() -> list[Any]:
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002  the global generator is what is to be kept
    name, words, *rest = state
    return [name, words.tolist(), *rest]


def _contents(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of all parts: named tensors, and plain data."""
    tensors: dict[str, Tensor] = {f"model/{name}": t for name, t in parts.model.state_dict().items()}
    steps = time_steps_of(parts.model)
    plain: dict[str, Any] = {**steps.grid.plain(), "held": sorted(steps.held)}
    plain["frozen"] = [name for name, p in parts.model.named_parameters() if not p.requires_grad]
    if parts.averaged is not None:
        tensors |= {f"averaged/{name}": t for name, t in parts.averaged.state_dict().items()}
    for i, optimizer in enumerate(with_inner([parts.optimizer])):
        groups, state = _optimizer(optimizer, parts.model, f"inner/{i}/" if i else "", tensors)
        if i:  # of a wrapper around another optimiser
            plain.setdefault("inner", []).append({"optimizer": groups, "state": state})
        else:
            plain["optimizer"], plain["state"] = groups, state
    if parts.scheduler is not None:
        plain["scheduler"] = to_plain(parts.scheduler.state_dict(), "scheduler", tensors)
    if parts.policies:
        plain["pruner"] = to_plain(parts.policies.state(), "pruner", tensors)
    return tensors, plain


def _optimizer(
    optimizer: Any, model: nn.Module, prefix: str, tensors: dict[str, Tensor]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parameter groups and state of an optimiser, by parameter name; tensors go to ``tensors``."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups, state = [], {}
    for i, group in enumerate(optimizer.param_groups):
        if any(id(p) not in names for p in group["params"]):
            raise ValueError(
                f"optimizer must hold parameters of the model alone where run is given, got others in group {i}: "
                "a checkpoint cannot name them; make them part of the model, or train without run"
            )
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                "options": to_plain(options, f"{prefix}group/{i}", tensors),
                "params": [names[id(p)] for p in group["params"]],
            }
        )
    for key, value in getattr(optimizer, "state", {}).items():
        if id(key) not in names:
            raise ValueError(
                f"optimizer must keep its state by parameter where run is given, got state {str(key)[:50]!r} of a "
                f"{type(optimizer).__name__}: a checkpoint cannot hold it; take another optimiser, or train without run"
            )
        name = names[id(key)]
        state[name] = to_plain(dict(value) if isinstance(value, dict) else value, f"{prefix}state/{name}", tensors)
    check_follows(optimizer, {p: name for name, p in model.named_parameters()}, (), by_parameter=False)
    return groups, state


def _disagreements(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between a resumed run and its start, in words; more epochs are none of them."""
    said = [
        f"{name} must be {began[name]!r} as at the start of the run, got {value!r}"
        for name, value in now.items()
        if name in began and began[name] != value and name not in ("epochs", OVER_EPOCHS)
    ]
    if now.get(OVER_EPOCHS) and began.get("epochs") != now["epochs"]:
        said.append(
            f"epochs must be {began.get('epochs')} as at the start of the run, over which "
            f"{' and '.join(now[OVER_EPOCHS])} is laid out, got {now['epochs']}"
        )
    return said
