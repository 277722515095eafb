"""``save_model``.

The tensors of a wrapped model are written with a dimension of size 1 in front. transformers passes over tensors that it
does not know, ``time_steps.values`` among them, and would load the file as another model without an error; sizes that
differ it refuses, as torch does.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import __version__
from .._distributed import refuse_distributed, sharded
from ..files import check_tensors, move, tensor_bytes, write_bytes
from ..nn.pruned_models import prunable_of, wrapping_of
from ..nn.time_steps import TimeSteps, time_steps_of
from ..wrapping.folding import check_plain, folded_state, without_steps
from ..wrapping.wrapped_model import Wrapping
from .manifest import ASIDE, FORMAT, MANIFEST, WEIGHTS
from .recipe import (
    NoRecipe,
    besides,
    build,
    classes_of,
    differences,
    modules_of,
    name_of_scheme,
    noted_recipe,
    plain_options,
    recipe_of_parts,
    tensors_of,
)
from .wrap_as_saved import states_of, stays_of, written_branch


def save_model(model: nn.Module, path: str | os.PathLike[str], *, plain: bool = False) -> None:
    """Save a model, also a pruned one, as a folder with model.safetensors and model.json.

    A model that was saved there before is replaced: whatever happens meanwhile, one of the two can be loaded.

    A sharded model is gathered, parameter by parameter, and the first process writes it; all must call this at once.

    Of a scheme or a constraint of your own the public attributes that JSON can hold are saved too, and a host must have
    the same; what changes from call to call needs a name that begins with an underscore. ``requires_grad`` and memory
    formats such as channels_last are not kept.

    Args:
        model: A model with time steps.
        path: The folder, made if missing. Other files in it are left alone.
        plain: Of a wrapped model, write weights with the steps folded into them (form "branches"; of form "whole" they
            must be 1): what ``load_model`` gives has no time steps and computes the same up to rounding. The model
            stays as it is.

    Raises:
        TypeError: If the model has no time steps, or its state dict holds something other than dense tensors of numbers
            (sparse, quantized, nested, on the meta device); nothing is written then.
        ValueError: If ``plain`` is asked for and steps can neither be folded nor are 1.
        OSError: If the files cannot be written.

    Example:
        >>> import tempfile, taulearn
        >>> from taulearn.nn import resnet
        >>> folder = tempfile.mkdtemp()
        >>> save_model(resnet(784, 100, 10, 6), folder)
        >>> taulearn.load_model(folder).time_steps.num_steps
        6
    """
    refuse_distributed("model", model, "save")
    inner = with_steps("model", model)
    if sharded(inner) is not None:
        from .._together import gathered

        with gathered(inner) as ranks:
            ranks.told(lambda: _save(inner, Path(path), plain=plain))
    else:
        _save(inner, Path(path), plain=plain)


def _save(inner: nn.Module, folder: Path, *, plain: bool) -> None:
    """Write the folder."""
    wrapping = wrapping_of(inner)
    if plain:
        state = _plain_state(inner, wrapping)
    else:
        state = folded_state(inner)
    check_tensors(state, "model")
    if wrapping is not None:
        state = {name: value.unsqueeze(0) for name, value in state.items()}
    content = tensor_bytes(state, {"kind": "taulearn weights"}, "model")
    manifest = describe(inner, plain=plain) | {"weights_sha256": hashlib.sha256(content).hexdigest()}
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"path must be a folder, got the file {folder}: the model becomes two files in a folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / ASIDE, json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n")
    write_bytes(folder / WEIGHTS, content)
    move(folder / ASIDE, folder / MANIFEST)


def _plain_state(model: nn.Module, wrapping: Wrapping | None) -> dict[str, Tensor]:
    """The state dict of a wrapped model without its steps."""
    if wrapping is None:
        raise ValueError(
            f"plain must be False for a {type(model).__name__} that is not wrapped, got True: the steps are a part of "
            "its formula"
        )
    check_plain(wrapping, "plain=True")
    with without_steps(wrapping):
        return {name: value for name, value in model.state_dict().items() if not name.startswith("time_steps.")}


def with_steps(argument: str, model: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile's wrapper; refused without time steps."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    if not isinstance(getattr(inner, "time_steps", None), TimeSteps) or not hasattr(prunable_of(inner), "scheme"):
        raise TypeError(
            f"{argument} must be a model with time steps, got {type(inner).__name__}: build it with taulearn.nn or "
            "wrap it with taulearn.wrap, and hand over the model itself, not a wrapper around it"
        )
    return inner


def describe(model: nn.Module, *, plain: bool = False) -> dict[str, Any]:
    """The manifest of a model, but for the digest of its weights."""
    prunable, wrapping = prunable_of(model), wrapping_of(model)
    steps = prunable.time_steps
    options = {name: getattr(steps, name) for name in ("constraint", "horizon", "lower_bound")}
    own = plain_options(steps.rule)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "taulearn": __version__,
        "time_steps": {**steps.grid.plain(), **options, **({"options": own} if own else {})},
        "scheme": name_of_scheme(prunable.scheme),
    }
    if wrapping is None:
        return manifest | {"model": _network_or_host(model, manifest)}
    wrapped = {
        "kind": "wrapped",
        "saved_from": type(model).__qualname__,
        "blocks": [block.name for block in wrapping.blocks],
        "shortened": sorted(wrapping.shorten),
        "states": [list(pair) for pair in states_of(wrapping)],
        "modules": classes_of(model),
        "form": wrapping.form,
        "per": wrapping.per,
        "branches": [
            [written_branch(branch) for branch in block.branches] for block in wrapping.blocks if block.branches
        ],
        "plain": plain,
        "stays": [{"block": number, "why": why} for number, why in stays_of(wrapping).items()],
        "not_saved": [{"block": number, "why": why} for number, why in wrapping.not_saved.items()],
    }
    return manifest | {"model": wrapped}


def _network_or_host(model: nn.Module, manifest: dict[str, Any]) -> dict[str, Any]:
    """A network by the first recipe that gives it again; a model without one needs a host."""
    dtype, because = str(time_steps_of(model).values.dtype).removeprefix("torch."), ""
    for recipe_of in (noted_recipe, recipe_of_parts):
        try:
            network = {"kind": "network", "dtype": dtype, **recipe_of(model)}
            rebuilt = build(manifest | {"model": network})
        except (NoRecipe, ValueError) as error:
            because = str(error)
            continue
        there, here = (modules_of(each) | tensors_of(each.state_dict()) | besides(each) for each in (rebuilt, model))
        if there == here:
            return network
        because = differences(there, here)[0]
    return {"kind": "host", "saved_from": type(model).__qualname__, "because": because, "modules": classes_of(model)}
