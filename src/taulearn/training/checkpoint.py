"""Checkpoints: everything a run needs to go on bit by bit, in one safetensors file each; the last two are kept.

Weights, buffers and kept layers; the optimiser's state by parameter name; schedulers; averaged weights; random
generators; position; the record so far. A file is written aside, synced and renamed, and carries a digest, so that a
torn or damaged one is noticed and the previous one is used.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..files import read_tensors, write_tensors
from ..penalties import time_steps_of
from ..pruning import prune
from .history import History

FORMAT = 1
KEPT = 2


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: Number of finished epochs.
        batch: Number of batches taken of the epoch under way.
        iteration: Number of iterations taken.
        compiled: Whether the steps are compiled now.
        seconds: Time spent in the epoch under way.
    """

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    compiled: bool = False
    seconds: float = 0.0


@dataclass
class Parts:
    """The objects that a checkpoint saves and restores.

    Attributes:
        model: The model with time steps.
        optimizer: Its optimiser.
        scheduler: Learning rate scheduler, or None.
        averaged: Averaged weights, or None.
        generator: The generator of a DataLoader's order, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    averaged: AveragedModel | None = None
    generator: torch.Generator | None = None


def save_checkpoint(folder: Path, parts: Parts, position: Position, history: History) -> Path:
    """Write one checkpoint and delete all but the last two.

    Args:
        folder: The run's folder of checkpoints, made if missing.
        parts: What to save.
        position: Where the run stands.
        history: The record so far.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written; earlier checkpoints stand.
        TypeError: If a scheduler's or optimiser's state holds something that is neither a tensor nor plain data.
        ValueError: If the optimiser holds parameters that are not the model's.
    """
    tensors: dict[str, Tensor] = {f"model/{name}": t for name, t in parts.model.state_dict().items()}
    plain: dict[str, Any] = {
        "position": vars(position),
        "origin": list(time_steps_of(parts.model).origin),
        "python": random.getstate(),
        "numpy": _numpy_state(),
    }
    if parts.averaged is not None:
        tensors |= {f"averaged/{name}": t for name, t in parts.averaged.state_dict().items()}
    plain["optimizer"], plain["state"] = _optimizer(parts, tensors)
    if parts.scheduler is not None:
        plain["scheduler"] = _plain(parts.scheduler.state_dict(), "scheduler", tensors)
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    if parts.generator is not None:
        tensors["random/loader"] = parts.generator.get_state()
    tensors |= history.tensors()
    text = json.dumps(plain)
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
    for old in _files(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return file


def load_checkpoint(folder: Path, parts: Parts) -> tuple[Position, History, list[str]]:
    """Put the newest undamaged checkpoint into freshly made parts: layers that were deleted are deleted again.

    Args:
        folder: The run's folder of checkpoints.
        parts: Model, optimiser and the rest, made as at the start of the run.

    Returns:
        The position, the record so far, and one line per damaged checkpoint that was passed over.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If every checkpoint is damaged, or they do not fit the parts.
    """
    complaints: list[str] = []
    for file in reversed(_files(folder)):
        try:
            tensors, metadata = read_tensors(file)
            text = metadata.get("state", "")
            if metadata.get("format") != str(FORMAT) or metadata.get("digest") != _digest(tensors, text):
                raise ValueError(
                    f"{file} must be a checkpoint of format {FORMAT} with a matching digest, got a damaged one"
                )
            plain = json.loads(text)
        except ValueError as error:
            complaints.append(f"damaged checkpoint passed over: {error}")
            continue
        _restore(parts, tensors, plain)
        return Position(**plain["position"]), History.from_tensors(tensors), complaints
    if complaints:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(complaints)}. Start the run anew")
    raise FileNotFoundError(
        f"{folder} holds no checkpoint: the run had not finished its first epoch; start it anew with --overwrite"
    )


def _restore(parts: Parts, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    model, optimizer = parts.model, parts.optimizer
    steps = time_steps_of(model)
    kept = [i for i, layer in enumerate(steps.origin) if layer in plain["origin"]]
    if [steps.origin[i] for i in kept] != plain["origin"]:
        raise ValueError(
            f"model must have the layers {plain['origin']} of the checkpoint, got {list(steps.origin)}: "
            "build the network the run began with"
        )
    if len(kept) < steps.num_steps:
        prune(model, keep=kept, optimizer=optimizer, averaged=parts.averaged)
    _load(model, tensors, "model/")
    if parts.averaged is not None:
        _load(parts.averaged, tensors, "averaged/")
    named = dict(model.named_parameters())
    groups, saved_groups = optimizer.param_groups, plain["optimizer"]
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
        group.update(_full(saved["options"], tensors))
    for name, saved in plain["state"].items():
        p = named[name]
        optimizer.state[p] = {
            key: v.to(p.device) if isinstance(v, Tensor) and v.shape == p.shape and v.ndim else v
            for key, v in _full(saved, tensors).items()
        }
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(_full(plain["scheduler"], tensors))
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(plain["numpy"]))  # noqa: NPY002
    torch.set_rng_state(tensors["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    if parts.generator is not None:
        parts.generator.set_state(tensors["random/loader"])


def _load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"model must be the one the run began with: {error}") from error


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.safetensors"))


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _numpy_state() -> list[Any]:
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002  the global generator is what is to be kept
    name, words, *rest = state
    return [name, words.tolist(), *rest]


def _optimizer(parts: Parts, tensors: dict[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parameter groups and state of the optimiser, by parameter name; tensors go to ``tensors``."""
    names = {id(p): name for name, p in parts.model.named_parameters()}
    groups = []
    for i, group in enumerate(parts.optimizer.param_groups):
        if any(id(p) not in names for p in group["params"]):
            raise ValueError(
                f"optimizer must hold parameters of the model alone where run is given, got others in group {i}: "
                "a checkpoint cannot name them; make them part of the model, or train without run"
            )
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {"options": _plain(options, f"group/{i}", tensors), "params": [names[id(p)] for p in group["params"]]}
        )
    state = {names[id(p)]: _plain(dict(s), f"state/{names[id(p)]}", tensors) for p, s in parts.optimizer.state.items()}
    return groups, state


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it; tensors go to ``tensors`` and leave their name behind."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_plain(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        pairs = [[key, _plain(v, f"{name}/{key}", tensors)] for key, v in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{name} holds a {type(value).__name__}, which a checkpoint cannot keep without pickle: "
        "use an optimiser and a scheduler with plain state"
    )


def _full(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_plain`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind in ("dict", "counter"):
        pairs = {key: _full(v, tensors) for key, v in content}
        return Counter(pairs) if kind == "counter" else pairs
    items = [_full(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
