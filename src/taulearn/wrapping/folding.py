"""``unwrap``, and the other ways out for the steps of a wrapped model.

Branch steps fold into the weights of the ends (:func:`folded`), which is tried on the example inputs before it counts.
Steps of form "whole" can only be brought to 1 (:func:`anneal_to_one`), those in units of displacement become plain ones
first.
"""

import gc
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._calls import call as call_model
from .._distributed import refuse_distributed
from .._errors import is_number
from .._undisturbed import undisturbed
from ..adaptivity.optimizer_state import PROJECTIONS, has_session
from ..adaptivity.transaction import check_averaged
from ..nn.pruned_models import WRAPPING, set_follower, wrapping_of
from .block import Step
from .branches import WatchedBlock, folded, step_of
from .wrapped_model import Layer, Wrapping, has_save_pretrained

M = TypeVar("M", bound=nn.Module)


def unwrap(model: M, *, discard_steps: bool = False) -> M:
    """Take the time steps off again; deleted blocks stay deleted.

    Steps of form "branches" are folded into the weights: the model computes what it did, up to rounding. Those of form
    "whole" must be 1.

    Args:
        model: A wrapped model, changed in place.
        discard_steps: Whether the steps are thrown away rather than folded, which changes what the model computes
            where they are not 1.

    Returns:
        The same model, as it was before :func:`wrap` but for deleted blocks and folded weights.

    Raises:
        TypeError: If the model is compiled, or in a wrapper of data parallel training.
        ValueError: If the model is not wrapped, or sharded, a session of ``taulearn.attach`` or a projection of
            ``register_projection`` is at work on it, or a step differs from 1, cannot be folded, and ``discard_steps``
            is false; the model is then as before.

    Example:
        >>> import taulearn
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1))
        >>> unwrap(taulearn.wrap(model, "0"))
        Sequential(
          (0): Sequential(...)
          (1): Linear(in_features=4, out_features=1, bias=True)
        )
    """
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise TypeError("model must be the model itself, got it compiled: unwrap that one first, then compile")
    refuse_distributed("model", model, "unwrap")
    wrapping = wrapping_of(model)
    if wrapping is None:
        raise ValueError(f"model must be wrapped, got {type(model).__name__} without: {_where_steps_are(model)}")
    if remedy := _at_work(model):
        raise ValueError(f"model must have nothing at work on its time steps, got {remedy} before")
    if not discard_steps:
        fold_(wrapping)
    if has_save_pretrained(model):
        from .save_pretrained import release_saving

        release_saving(model)
    set_follower(model, None)
    for module in changed_modules(wrapping):
        take_off(module)
    for parameter, flag in wrapping.trained.items():
        parameter.requires_grad_(flag)
    del model.time_steps
    del vars(model)[WRAPPING]
    return model


def _where_steps_are(model: nn.Module) -> str:
    """Which model is to be unwrapped instead of one without steps of its own, in words."""
    inside = next((name for name, module in model.named_modules() if wrapping_of(module) is not None), None)
    if inside is not None:
        return f"unwrap its part {inside!r}, which is"
    if any(isinstance(step_of(module), Step | WatchedBlock) for module in model.modules()):
        return "its blocks have the steps of a model around it (before adapters were merged, say): unwrap that one"
    return "nothing is to be taken off"


def _at_work(model: nn.Module) -> str:
    """What acts on the time steps of a model after each step of an optimiser, and the way out; or nothing."""
    if has_session(model):
        return "a session of taulearn.attach: call session.detach()"

    def projected() -> bool:
        return any(part is model for each in PROJECTIONS for part in each.model.modules())

    if projected():
        gc.collect()  # a hook and its optimiser hold each other
    return "a projection of register_projection: call remove() of its handle" if projected() else ""


def changed_modules(wrapping: Wrapping) -> list[nn.Module]:
    """All modules whose forward is another than before they were wrapped."""
    sites = [site for layer in wrapping.present for site in layer.sites.values()]
    return [*sites, *dict.fromkeys(layer.block for layer in wrapping.present)]


def take_off(module: nn.Module) -> None:
    """Let a module have the forward that it had before it was wrapped."""
    step = step_of(module)
    del vars(module)["forward"]
    if step.own:
        vars(module)["forward"] = step.inner


@torch.no_grad()
def anneal_to_one(model: nn.Module, fraction: float, *, averaged: AveragedModel | None = None) -> None:
    """Bring every step of a wrapped model nearer to 1, tau <- tau + fraction (1 - tau), so that it can be unwrapped.

    Over the last E epochs, once what is to go has been pruned: fraction 1/E after the first of them, 1/(E-1) after the
    second, and 1 after the last, which leaves exact ones. The weights adapt meanwhile. Steps in units of displacement
    become plain ones first.

    Args:
        model: A wrapped model.
        fraction: Part of the way, in [0, 1].
        averaged: Averaged weights of the model, whose steps are brought nearer to 1 alike.

    Raises:
        TypeError: If ``averaged`` is no AveragedModel.
        ValueError: If the model is not wrapped, the fraction is no number in [0, 1], the constraint does not allow all
            steps to be 1, or ``averaged`` is of another model.

    Example:
        >>> import taulearn
        >>> model = taulearn.wrap(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), "0", init=0.5)
        >>> anneal_to_one(model, 0.5)
        >>> model.time_steps.tau.tolist()
        [0.75]
    """
    wrapping = wrapping_of(model)
    if wrapping is None:
        raise ValueError(f"model must be wrapped, got {type(model).__name__} without time steps of this kind")
    if not is_number(fraction) or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction!r}: it is a part of the way to 1")
    steps = wrapping.time_steps
    number = steps.num_steps
    if steps.rule.adds_up and not math.isclose(steps.horizon, number, rel_tol=1e-6):
        raise ValueError(
            f"the steps must be able to be 1 all at once, got constraint {steps.constraint!r} with horizon "
            f"{steps.horizon:g} for {number} blocks: wrap with constraint='free' to anneal"
        )
    fold_units(model, averaged=averaged)
    for values in (steps.values, *(() if averaged is None else (averaged.module.time_steps.values,))):
        values.copy_(torch.ones_like(values) if fraction == 1.0 else values + fraction * (1.0 - values))


@torch.no_grad()
def fold_units(model: nn.Module, *, averaged: AveragedModel | None = None) -> None:
    """Turn steps in units of displacement into plain ones, with which the model computes the same; others stay.

    Args:
        model: A wrapped model.
        averaged: Averaged weights of the model, folded alike, by units of their own. Those given to ``fit`` follow by
            themselves.

    Raises:
        TypeError: If ``averaged`` is no AveragedModel.
        ValueError: If the model is not wrapped, or ``averaged`` is of another one.

    Example:
        >>> import taulearn
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> model = taulearn.wrap(nn.Sequential(block), "0", units="displacement")
        >>> fold_units(model)
        >>> [name for name, _ in model.time_steps.named_buffers()]
        []
    """
    wrapping = wrapping_of(model)
    if wrapping is None:
        raise ValueError(f"model must be wrapped, got {type(model).__name__} without time steps of this kind")
    if averaged is not None:
        check_averaged(averaged, model)
    for each in (wrapping, None if averaged is None else wrapping_of(averaged.module)):
        if each is not None and each.units is not None:
            each.time_steps.values.copy_(plain_steps(each))
            drop_units(each)


@torch.no_grad()
def drop_units(wrapping: Wrapping) -> None:
    """Let the steps be plain ones from now on; their values stay."""
    for block in wrapping.layers:
        vars(block)["forward"] = replace(vars(block)["forward"], units=None)
    del wrapping.time_steps.units
    vars(wrapping.host)[WRAPPING] = replace(wrapping, units=None)


def fold_average(model: nn.Module, averaged: AveragedModel) -> None:
    """Fold averaged weights whose model has plain steps by now, without which they cannot be updated."""
    ours, theirs = wrapping_of(model), wrapping_of(averaged.module)
    if ours is not None and ours.units is None and theirs is not None and theirs.units is not None:
        fold_units(averaged.module)


@torch.no_grad()
def plain_steps(wrapping: Wrapping) -> Tensor:
    """The steps without units, (number of layers,): what multiplies B(x) - x now."""
    tau = wrapping.time_steps.tau
    return tau if wrapping.units is None else tau * wrapping.units.gains()


def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that a wrapped model would have with plain steps."""
    wrapping = wrapping_of(model)
    state = model.state_dict()
    if wrapping is not None and wrapping.units is not None:
        state = {name: value for name, value in state.items() if not name.startswith("time_steps.units.")}
        state["time_steps.values"] = plain_steps(wrapping)
    return state


def check_plain(wrapping: Wrapping, what: str = "unwrap") -> None:
    """Refuse steps without which the model would compute something else: not 1, and not to be folded."""
    tau = plain_steps(wrapping)
    if not bool((tau != 1).any()):
        return
    if wrapping.form == "whole":
        raise ValueError(
            f"the time steps must all be 1 for {what}, got {[round(t, 4) for t in tau.tolist()]}: without them the "
            f"model computes something else, and steps of form 'whole' do not fold ({wrapping.why}). Anneal them in "
            "the last epochs (taulearn.wrapping.anneal_to_one), pass discard_steps=True to unwrap, or save with "
            "taulearn.save_model and load with taulearn.load_model(path, host)"
        )
    foldings(wrapping)
    _try_folding(wrapping)


class Folding(NamedTuple):
    """The step that folds into a parameter."""

    tau: float
    offset: int

    def of(self, value: Tensor) -> Tensor:
        """The parameter with the step in it."""
        return folded(value.detach(), self.tau, self.offset)


def foldings(wrapping: Wrapping) -> dict[str, Folding]:
    """The parameters that folding changes, by name in the host; refused where one cannot be changed."""
    host = wrapping.host
    names = {module: name for name, module in host.named_modules()}
    parameters = dict(host.named_parameters(remove_duplicate=False))
    wrapping = _with_ends_of_now(wrapping, names, parameters)
    places = Counter(_memory(each) for each in parameters.values())
    result: dict[str, Folding] = {}
    for layer, tau in zip(wrapping.present, wrapping.time_steps.tau.tolist(), strict=True):
        for branch, _ in layer.branches() if tau != 1.0 else ():
            prefix = f"{names[layer.block]}."
            for end in branch.ends:
                name = prefix + end.parameter
                parameter = parameters.get(name)
                why = branch.not_folded
                if not math.isfinite(tau):
                    why = "it is no finite number, as training has diverged"
                elif parameter is None:
                    why = (
                        "it is not there any more: put adapters in before wrap, and unwrap before they are merged, or "
                        "weights quantised"
                    )
                elif not parameter.is_floating_point():
                    why = "it holds no floating-point numbers, as quantised weights do not"
                elif places[_memory(parameter)] > 1:
                    shared = [each for each in parameters if each != name and _same(parameters[each], parameter)]
                    why = f"it is shared with {shared[0]!r}, which must not change"
                if why or parameter is None:
                    raise ValueError(
                        f"the steps must fold into weights, got {layer.name!r} with a step of "
                        f"{tau:.4g}, which cannot fold into {name!r}: {why}. Anneal the steps to 1 "
                        "(taulearn.wrapping.anneal_to_one), or save with taulearn.save_model"
                    )
                result[name] = Folding(tau, end.offset)
    return result


def _with_ends_of_now(wrapping: Wrapping, names: Mapping[nn.Module, str], parameters: Collection[str]) -> Wrapping:
    """The wrapping, with ends found anew where those of then are gone: adapters came, or were merged."""
    present = [layer for layer in wrapping.present if layer.block in names]
    ends = [(layer, end) for layer in present for branch, _ in layer.branches() for end in branch.ends]
    here = all(f"{names[layer.block]}.{end.parameter}" in parameters for layer, end in ends)
    if here or (inputs := _example_inputs(wrapping)) is None:
        return wrapping
    from .find_branches import find_branches

    forms = {layer.block: layer.at_start.form for layer in present}
    with _own_forwards(wrapping):
        found = find_branches(wrapping.host, [names[b] for b in forms], list(forms.values()), inputs, alone=False)
    if isinstance(found, str):
        return wrapping
    now = {(block, each.site): each for block, some in zip(forms, found, strict=True) for each in some}

    def of(layer: Layer) -> Layer:
        branches = tuple(now.get((layer.block, each.site), each) for each in layer.at_start.branches)
        return replace(layer, at_start=replace(layer.at_start, branches=branches))

    return replace(wrapping, present=tuple(map(of, wrapping.present)))


def _example_inputs(wrapping: Wrapping) -> Any:
    """The example inputs where the host is, or None: there are none, or it is in several places or nowhere."""
    devices = {p.device for p in wrapping.host.parameters()}
    if wrapping.inputs.value is None or len(devices) != 1 or devices == {torch.device("meta")}:
        return None
    from .comparison import as_taken

    return as_taken(wrapping.inputs.value, wrapping.host, *devices)


@contextmanager
def _own_forwards(wrapping: Wrapping) -> Iterator[None]:
    """The model without its steps; afterwards it is as it was."""
    forwards = {module: vars(module)["forward"] for module in changed_modules(wrapping)}
    try:
        for module in forwards:
            take_off(module)
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward


def _memory(parameter: Tensor) -> tuple[int, int]:
    with suppress(RuntimeError):
        return parameter.untyped_storage().data_ptr(), int(parameter.storage_offset())
    return id(parameter), 0


def _same(a: Tensor, b: Tensor) -> bool:
    return _memory(a) == _memory(b)


@contextmanager
def without_steps(wrapping: Wrapping | None) -> Iterator[dict[str, Folding]]:
    """The model with its steps folded, in new tensors, and without its own forwards; afterwards it is as it was."""
    if wrapping is None or wrapping.form == "whole":
        yield {}
        return
    changed = foldings(wrapping)
    own: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, folding in changed.items():
            holder, _, key = name.rpartition(".")
            module = wrapping.host.get_submodule(holder)
            parameter = module._parameters[key]
            assert parameter is not None
            own.append((module, key, parameter))
            module._parameters[key] = nn.Parameter(folding.of(parameter), requires_grad=parameter.requires_grad)
        with _own_forwards(wrapping):
            yield changed
    finally:
        for module, key, parameter in own:
            module._parameters[key] = parameter


def _try_folding(wrapping: Wrapping) -> None:
    """Refuse folding where the model answers differently on the example inputs."""
    from .comparison import other_tensors

    host, inputs = wrapping.host, _example_inputs(wrapping)
    if inputs is None:
        return
    try:
        with undisturbed(host, inputs):
            expected = call_model(host, inputs)
    except Exception:  # noqa: BLE001  the inputs are not what the host takes any more: nothing can be compared
        return
    with undisturbed(host, inputs), without_steps(wrapping):
        found = other_tensors(call_model(host, inputs), expected)
    if found:
        raise ValueError(
            f"the model must answer the same with its steps folded, but {found[0]}: anneal them to 1 "
            "(taulearn.wrapping.anneal_to_one), or save with taulearn.save_model"
        )


@torch.no_grad()
def fold_(wrapping: Wrapping, what: str = "unwrap") -> None:
    """Fold the steps into the weights, or refuse what would change the model; the steps are to be taken off then."""
    check_plain(wrapping, what)
    if wrapping.form == "whole":
        return
    for name, folding in foldings(wrapping).items():
        parameter = wrapping.host.get_parameter(name)
        parameter.copy_(folding.of(parameter))
