"""``load_model``."""

import os
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..adaptivity.refine import take_grid
from ..adaptivity.transaction import all_or_nothing
from ..files import read_tensors
from ..nn.constraints import CONSTRAINTS
from ..nn.grid import Grid
from ..nn.network import TimeVariableNetwork
from ..nn.pruned_models import prunable_of, wrapping_of
from ..wrapping.branches import Branch
from ..wrapping.folding import drop_units, unwrap
from .manifest import MANIFEST, WEIGHTS, read_manifest, short
from .recipe import build, classes_of, differences, modules_of, tensors_of, tied_unlike
from .save import describe, with_steps
from .wrap_as_saved import read_branch, rewrap, take_form, take_states

M = TypeVar("M", bound=nn.Module)


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
            has are deleted from it, those that were new are made anew as copies (refine the host alike where they were
            others), and the weights are copied into it. For a wrapped model it need not be wrapped, unless places of
            deleted blocks stay in it, which asks for a host wrapped with example_inputs: it gets its time steps here;
            steps in units of displacement become plain ones; what was saved with ``plain=True`` has none afterwards.
            None: rebuild the network.

    Returns:
        The host, or the rebuilt network (on the CPU, in training mode like every fresh module). What was frozen, by
        ``refine(train="new")`` or by hand, is not saved: parameters train as the host's do, without one all of them.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, of another format or not of the same save as the other, if the model needs a
            host, or if the host is another model than the saved one; the host is then as before. Compared are layers,
            time steps, classes of modules, and names, shapes, types and sharing of tensors; not what else a host was
            built with (the number of its attention heads, say): build it with the same configuration.
        TypeError: If the host has no time steps.

    Example:
        >>> import tempfile, torch, taulearn
        >>> network, folder = taulearn.nn.resnet(2, 8, 1, 5), tempfile.mkdtemp()
        >>> report = taulearn.prune(network, keep=[0, 2, 4])
        >>> taulearn.save_model(network, folder)
        >>> fresh = load_model(folder, host=taulearn.nn.resnet(2, 8, 1, 5))
        >>> fresh.time_steps.origin, bool((fresh(torch.ones(1, 2)) == network(torch.ones(1, 2))).all())
        ((0, 2, 4), True)
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    saved, (tensors, _) = manifest["model"], read_tensors(folder / WEIGHTS)
    if host is None:
        if saved["kind"] != "network":
            because = "it is a wrapped model" if saved["kind"] == "wrapped" else short(saved["because"])
            raise ValueError(
                f"host must be given for the {short(saved['saved_from'])} in {folder}, which its files alone do not "
                f"rebuild ({because}): build the same model and call load_model(path, host=model)"
            )
        network = _built(manifest, folder)
        _refuse(f"{folder / MANIFEST}", differences(tensors_of(network.state_dict()), tensors_of(tensors)), folder)
        network.load_state_dict(tensors, assign=True)
        return network
    if saved["kind"] == "wrapped":
        tensors = {name: value.squeeze(0) if value.ndim else value for name, value in tensors.items()}
        for name, value in tensors.items():
            if name.startswith("time_steps.") and value.dtype in (torch.float16, torch.bfloat16):
                tensors[name] = value.float()  # older models that were cast had such steps
    inner: nn.Module = getattr(host, "_orig_mod", host)
    with all_or_nothing([inner], None):
        _wrap_as_saved(inner, manifest, folder)
        with_steps("host", inner)
        _change_layers(inner, manifest, folder)
        if saved["kind"] == "wrapped" and (wrapping := wrapping_of(inner)) is not None:
            take_states(wrapping, saved["states"])
        _refuse("host", _differences(inner, manifest, tensors, folder) + tied_unlike(inner, tensors), folder)
        if saved["kind"] == "wrapped" and saved["plain"]:
            unwrap(inner, discard_steps=True)
    inner.load_state_dict(tensors)
    return host


def _built(manifest: dict[str, Any], folder: Path) -> TimeVariableNetwork:
    """The network of a manifest, without content."""
    try:
        return build(manifest)
    except ValueError as error:
        raise ValueError(
            f"{folder / MANIFEST} must describe a network that can be built, got a contradiction ({error}): "
            "restore it, or save again"
        ) from error


def _wrap_as_saved(host: nn.Module, manifest: dict[str, Any], folder: Path) -> None:
    """Give a host without time steps those of a saved wrapped model; names in the file are only looked up."""
    saved, wrapping = manifest["model"], wrapping_of(host)
    if wrapping is not None and wrapping.units is not None:
        drop_units(wrapping)
        wrapping = wrapping_of(host)
    branches = _branches(saved, folder)
    if saved["kind"] == "wrapped" and wrapping is not None and saved["per"] == "block":
        try:
            take_form(wrapping, branches)
        except ValueError as error:
            raise ValueError(
                f"host must be a model like the {short(saved['saved_from'])} in {folder}, got another ({error}): build "
                "the same model"
            ) from error
    if saved["kind"] != "wrapped" or hasattr(host, "time_steps"):
        return
    options = {key: manifest["time_steps"][key] for key in ("constraint", "horizon", "lower_bound")}
    reasons: dict[str, Any] = {
        key: {each["block"]: each["why"] for each in saved[key]} for key in ("stays", "not_saved")
    }
    try:
        rewrap(host, saved["blocks"], saved["shortened"], branches, per=saved["per"], **reasons, **options)
    except ValueError as error:
        remedy = "build the same model, not pruned"
        if options["constraint"] not in CONSTRAINTS:
            remedy = "wrap the host with that constraint of your own first, taulearn.wrap(host, constraint=...)"
        raise ValueError(
            f"host must be a model like the {short(saved['saved_from'])} in {folder}, got one that cannot be wrapped "
            f"as it was ({error}): {remedy}"
        ) from error


def _branches(saved: dict[str, Any], folder: Path) -> list[tuple[Branch, ...]]:
    """The branches of a saved model's blocks."""
    written = saved.get("branches", [])
    number = len(saved.get("blocks", ())) if saved.get("form") == "branches" else 0
    pairs = all(len(pair) == 2 for block in written for branch in block for pair in branch["sizes"])
    if len(written) != number or not pairs:
        raise ValueError(
            f"{folder / MANIFEST} must have branches for {number} blocks, got a contradiction: restore it, or save "
            "again"
        )
    return [tuple(map(read_branch, block)) for block in written]


def _change_layers(host: nn.Module, manifest: dict[str, Any], folder: Path) -> None:
    """Let the host have the layers of the saved model."""
    grid, steps = Grid.from_plain(manifest["time_steps"]), prunable_of(host).time_steps
    try:
        grid.made_from(steps.origin)
    except ValueError as error:
        raise ValueError(
            f"host must have the layers {short(grid.origin)} that {folder} holds, got {short(steps.origin)}: "
            "build it with as many layers as the saved model had at the start"
        ) from error
    try:
        take_grid(host, grid)
    except ValueError as error:
        raise ValueError(
            f"host must be a model whose layers can be changed to the {short(grid.origin)} that {folder} holds, "
            f"got one where they cannot ({error}): build, and wrap with example_inputs, as the saved model was"
        ) from error


def _differences(host: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> list[str]:
    """How the pruned host differs from the saved model."""
    if manifest["model"]["kind"] == "network":
        there, here = (modules_of(model) for model in (_built(manifest, folder), host))
    else:
        own = describe(host, plain=manifest["model"].get("plain", False))
        there, here = _said(manifest), _said(own)
        for where, (saved, given) in {
            "scheme": (manifest["scheme"]["options"], own["scheme"]["options"]),
            "constraint": (manifest["time_steps"]["options"], own["time_steps"].get("options", {})),
        }.items():
            both = saved.keys() & given.keys()
            there |= {f"{where}.{key}": value for key, value in saved.items() if key in both}
            here |= {f"{where}.{key}": value for key, value in given.items() if key in both}
    state = host.state_dict()
    if manifest["model"].get("plain"):
        state = {name: value for name, value in state.items() if not name.startswith("time_steps.")}
    found = differences(there, here) + differences(tensors_of(state), tensors_of(tensors))
    return found or differences(manifest["model"].get("modules") or classes_of(host), classes_of(host))


def _said(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest's entries on steps, scheme and blocks, but for options and what is only followed."""
    parts = ["time_steps", "scheme"] + ["model"] * (manifest["model"]["kind"] == "wrapped")
    noted = ("states", "stays", "not_saved")
    followed = (*noted, "options", "modules", "branches", "plain", "next_number", "parents")
    return {f"{part}.{key}": value for part in parts for key, value in manifest[part].items() if key not in followed}


def _refuse(what: str, found: list[str], folder: Path) -> None:
    if found:
        listed = "; ".join(found[:10]) + (f"; and {len(found) - 10} more" if len(found) > 10 else "")
        raise ValueError(
            f"{what} must be of the model whose tensors are in {folder / WEIGHTS}, "
            f"got {len(found)} differences: {listed}"
        )
