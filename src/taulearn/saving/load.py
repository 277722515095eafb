"""Models on disk: model.safetensors with the weights, model.json with what it takes to rebuild the model. Never pickle.

The manifest, model.json, holds the digest of the weights that it belongs to. Saving writes the new manifest aside, then
the weights, and moves the manifest into place last; loading takes whichever of the two manifests has the digest of the
weights. So a crash at any moment leaves the old pair or the new one, and a mixed-up pair is noticed.

The tensors of a wrapped model are written with a dimension of size 1 in front. transformers passes over tensors that it
does not know, ``time_steps.values`` among them, and would load the file as another model without an error; sizes that
differ it refuses, as torch does.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar, overload

from torch import Tensor, nn

from ._architecture import build, describe, differences
from ._distributed import refuse_distributed
from ._manifest import Manifest, Network, Wrapped, read_manifest, short
from .adaptivity.coarsen import prune
from .adaptivity.transaction import all_or_nothing, prunable_of
from .files import check_tensors, move, read_tensors, tensor_bytes, write_bytes
from .nn.network import TimeVariableNetwork
from .nn.time_steps import TimeSteps
from .wrapping.folding import folded_state
from .wrapping.wrap_model import rewrap
from .wrapping.wrapped_model import drop_units, take_states, wrapping_of

M = TypeVar("M", bound=nn.Module)

_WEIGHTS, _MANIFEST, _ASIDE = "model.safetensors", "model.json", ".model.json.new"


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model, also a pruned one, as a folder with model.safetensors and model.json.

    A model that was saved there before is replaced: whatever happens meanwhile, one of the two can be loaded.

    Args:
        model: A model with time steps.
        path: The folder, made if missing. Other files in it are left alone.

    Raises:
        TypeError: If the model has no time steps, or its state dict holds something other than dense tensors of numbers
            (sparse, quantized, nested, on the meta device); nothing is written then.
        ValueError: If its parameters are sharded.
        OSError: If the files cannot be written.

    Example:
        >>> import tempfile
        >>> from taulearn.nn import resnet
        >>> folder = tempfile.mkdtemp()
        >>> save_model(resnet(784, 100, 10, 6), folder)
        >>> load_model(folder).time_steps.num_steps
        6
    """
    refuse_distributed("model", model, "save")
    inner = _check("model", model)
    state = folded_state(inner)
    check_tensors(state, "model")
    if wrapping_of(inner) is not None:
        state = {name: value.unsqueeze(0) for name, value in state.items()}
    content = tensor_bytes(state, {"kind": "taulearn weights"}, "model")
    manifest = describe(inner, hashlib.sha256(content).hexdigest())
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"path must be a folder, got the file {folder}: the model becomes two files in a folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / _ASIDE, manifest.model_dump_json(indent=2).encode() + b"\n")
    write_bytes(folder / _WEIGHTS, content)
    move(folder / _ASIDE, folder / _MANIFEST)


@overload
def load_model(path: str | os.PathLike[str]) -> TimeVariableNetwork: ...
@overload
def load_model(path: str | os.PathLike[str], host: None) -> TimeVariableNetwork: ...
@overload
def load_model(path: str | os.PathLike[str], host: M) -> M: ...
def load_model(path: str | os.PathLike[str], host: nn.Module | None = None) -> nn.Module:
    """Load what :func:`save_model` saved.

    Networks of the package's own parts are rebuilt from the manifest. A wrapped model, and one with parts of your own,
    needs ``host``, a model built by the same code: files never name code to run.

    Args:
        path: The folder; a run directory is one.
        host: A fresh model: not pruned, or pruned no further than the saved one. Layers that the saved model no longer
            has are deleted from it, and the weights are copied into it. For a wrapped model it need not be wrapped:
            then it gets its time steps here; steps in units of displacement become plain ones. None: rebuild the
            network.

    Returns:
        The host, or the rebuilt network (on the CPU, in training mode like every fresh module).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, of another format or not of the same save as the other, if the model needs a
            host, or if the host is another model than the saved one; the host is then as before.
        TypeError: If the host has no time steps.

    Example:
        >>> import tempfile, torch, taulearn
        >>> network, folder = taulearn.nn.resnet(2, 8, 1, 5), tempfile.mkdtemp()
        >>> report = taulearn.prune(network, keep=[0, 2, 4])
        >>> save_model(network, folder)
        >>> fresh = load_model(folder, host=taulearn.nn.resnet(2, 8, 1, 5))
        >>> fresh.time_steps.origin, bool((fresh(torch.ones(1, 2)) == network(torch.ones(1, 2))).all())
        ((0, 2, 4), True)
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    tensors, _ = read_tensors(folder / _WEIGHTS)
    if host is None:
        return _rebuilt(manifest, tensors, folder)
    if isinstance(manifest.model, Wrapped):
        tensors = {name: value.squeeze(0) if value.ndim else value for name, value in tensors.items()}
    inner: nn.Module = getattr(host, "_orig_mod", host)
    with all_or_nothing([inner], None):
        _wrap_as_saved(inner, manifest, folder)
        _check("host", inner)
        _delete_layers(inner, manifest, folder)
        if isinstance(manifest.model, Wrapped) and (wrapping := wrapping_of(inner)) is not None:
            take_states(wrapping, manifest.model.states)
        _refuse("host", _other_settings(inner, manifest) + differences(inner.state_dict(), tensors), folder)
    inner.load_state_dict(tensors)
    return host


def _check(argument: str, model: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile's wrapper."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    if not isinstance(getattr(inner, "time_steps", None), TimeSteps) or not hasattr(prunable_of(inner), "scheme"):
        raise TypeError(
            f"{argument} must be a model with time steps, got {type(inner).__name__}: build it with taulearn.nn or "
            "wrap it with taulearn.wrap, and hand over the model itself, not a wrapper around it"
        )
    return inner


def _read_manifest(folder: Path) -> Manifest:
    """The manifest that belongs to the weights in the folder."""
    weights = folder / _WEIGHTS
    present = [path for name in (_MANIFEST, _ASIDE) if (path := folder / name).is_file()]
    if not present or not weights.is_file():
        missing = weights if present else folder / _MANIFEST
        raise FileNotFoundError(
            f"{missing} does not exist: path must be a folder that save_model wrote, or a run directory"
        )
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    manifests = []
    for path in present:
        manifests.append(read_manifest(path))
        if manifests[-1].weights_sha256 == digest:
            return manifests[-1]
    raise ValueError(
        f"{weights} must have the sha256 {manifests[0].weights_sha256} that {present[0].name} names, got {digest}: "
        "it is damaged or from another save; take both files from one place, or save again"
    )


def _rebuilt(manifest: Manifest, tensors: dict[str, Tensor], folder: Path) -> TimeVariableNetwork:
    saved = manifest.model
    if not isinstance(saved, Network):
        because = "it is a wrapped model" if isinstance(saved, Wrapped) else short(saved.because)
        raise ValueError(
            f"host must be given for the {short(saved.saved_from)} in {folder}, which its files alone do not "
            f"rebuild ({because}): build the same model and call load_model(path, host=model)"
        )
    try:
        network = build(manifest)
    except ValueError as error:
        raise ValueError(
            f"{folder / _MANIFEST} must describe a network that can be built, got a contradiction ({error}): "
            "restore it, or save again"
        ) from error
    _refuse(f"{folder / _MANIFEST}", differences(network.state_dict(), tensors), folder)
    network.load_state_dict(tensors, assign=True)
    return network


def _wrap_as_saved(host: nn.Module, manifest: Manifest, folder: Path) -> None:
    """Give a host without time steps those of a saved wrapped model; names in the file are only looked up."""
    saved, steps, wrapping = manifest.model, manifest.time_steps, wrapping_of(host)
    if wrapping is not None and wrapping.units is not None:
        drop_units(wrapping)
    if not isinstance(saved, Wrapped) or hasattr(host, "time_steps"):
        return
    try:
        rewrap(
            host,
            saved.blocks,
            saved.shortened,
            constraint=steps.constraint,
            horizon=steps.horizon,
            lower_bound=steps.lower_bound,
        )
    except ValueError as error:
        raise ValueError(
            f"host must be a model like the {short(saved.saved_from)} in {folder}, got one that cannot be wrapped as "
            f"it was ({error}): build the same model, not pruned"
        ) from error


def _delete_layers(host: nn.Module, manifest: Manifest, folder: Path) -> None:
    """Delete the host's layers that the saved model does not have."""
    kept, present = manifest.time_steps.origin, prunable_of(host).time_steps.origin
    if not set(kept) <= set(present):
        raise ValueError(
            f"host must have the layers {short(kept)} that {folder} holds, got {short(present)}: "
            "build it with as many layers as the saved model had at the start"
        )
    if len(kept) < len(present):
        try:
            prune(host, keep=[present.index(layer) for layer in kept])
        except ValueError as error:
            raise ValueError(
                f"host must be a model whose layers can be deleted down to the {short(kept)} that {folder} holds, "
                f"got one where they cannot ({error}): build it as the saved model was"
            ) from error


def _other_settings(host: nn.Module, manifest: Manifest) -> list[str]:
    """What the manifest says of the saved model, tensors apart, that is not so in the pruned host."""
    found = describe(host, manifest.weights_sha256)
    parts = {"time_steps", "scheme"}
    if isinstance(manifest.model, Wrapped) != isinstance(found.model, Wrapped):
        which = "saved model" if isinstance(manifest.model, Wrapped) else "host"
        return [f"only the {which} is a wrapped model"]
    if isinstance(manifest.model, Network) and not isinstance(found.model, Network):
        because = getattr(found.model, "because", "")
        return [f"the saved model is a network of the package's own parts, the host is not ({because})"]
    if isinstance(manifest.model, Network | Wrapped):
        parts.add("model")
    there, here = (
        dict(_leaves(each.model_dump(include=parts, exclude={"model": {"states"}}))) for each in (manifest, found)
    )
    absent = "nothing"
    return [
        f"{name} must be {short(there.get(name, absent))}, got {short(here.get(name, absent))}"
        for name in dict.fromkeys([*there, *here])
        if there.get(name, absent) != here.get(name, absent)
    ]


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The values in nested dictionaries and sequences, each with its dotted name."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, tuple):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, each in items:
        yield from _leaves(each, f"{name}.{key}" if name else str(key))


def _refuse(what: str, found: list[str], folder: Path) -> None:
    if found:
        listed = "; ".join(found[:10]) + (f"; and {len(found) - 10} more" if len(found) > 10 else "")
        raise ValueError(
            f"{what} must be of the model whose tensors are in {folder / _WEIGHTS}, "
            f"got {len(found)} differences: {listed}"
        )
