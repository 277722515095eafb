"""The public ``wrap``."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._distributed import refuse_distributed
from .._errors import unknown_name
from ..nn.constraints import Constraint
from ..nn.pruned_models import WRAPPING, refuse_inference_mode, wrapping_of
from ..nn.time_steps import TimeSteps
from .block import NESTED, PassingTimeSteps, Step
from .branches import Branch, BranchStep, WatchedBlock, step_of
from .find_blocks import SCRIPTED, blocks_of, matching, refusal
from .probe import Call, Probe, probe
from .state_argument import Form
from .state_path import OUTSIDE, follow_states
from .try_deletion import try_deletions
from .wrapped_model import BlockAtStart, ExampleInputs, Layer, Wrapping, has_save_pretrained, install, is_configured

M = TypeVar("M", bound=nn.Module)


def wrap(
    model: M,
    blocks: str | Iterable[str] | None = None,
    *,
    example_inputs: Any = None,
    constraint: str | Constraint = "free",
    init: float | Sequence[float] | Tensor = 1.0,
    horizon: float | None = None,
    lower_bound: float | None = None,
    train: str | Iterable[str] = "all",
    form: str = "auto",
    per: str = "block",
    units: str = "steps",
) -> M:
    """Give an existing model time steps: it is what it was at tau = 1, and a block is the identity at tau = 0.

    Steps have one of two forms. "branches": a block x <- x + g_1(x), x <- x + g_2(x) becomes x <- x + tau g_1(x),
    x <- x + tau g_2(x), and the steps fold into the weights, so that ``save_pretrained`` and :func:`unwrap` give a
    plain model that computes the same (MATH.md section 11). "whole": any block B becomes x + tau (B(x) - x), which does
    not fold: its steps must be 1 for a plain model.

    The model is changed in place. Names of its parameters stay, so that its checkpoints load; ``time_steps.values`` is
    added. A Sequential gets the time steps as a last member, which returns its input. To prune, to save and to load, go
    on with ``taulearn.prune``, ``save_model`` and ``load_model``.

    Args:
        model: Any model. Of nested modules, wrap the outermost: what lies outside cannot follow a deletion.
        blocks: Names of the blocks, or patterns, whose wildcards stay within one part of a name ("encoder.layers.*").
            None: found by forward passes: the outermost modules that own parameters, are called once and return a
            state of the shape of the one they got, which the block before them left. Left out are modules that only
            call others in turn, layers of torch.nn, normalisations and scalings, and those that are alone of their kind
            and add nothing to their input (embeddings, gates) or hold several blocks (encoders). Modules whose output
            the model itself adds to their input, x + f(x), cannot have steps in this form and are refused.
        example_inputs: Inputs for forward passes in evaluation mode: a tensor, a tuple of arguments or a
            dictionary of keywords. Needed to find blocks and branches, and to try whether the model can do without
            them: some choices of them at first, about three passes per block where one fails; so keep them small.
            Without them only members of a Sequential and of torch's encoder and decoder can be deleted.
            They are kept, on the CPU, for ``save_pretrained`` of a pruned model, and are in none of its files.
        constraint: Of the time steps, see :class:`taulearn.TimeSteps`.
        init: Step of every block, or one per block. At 1 the model computes what it did, to the bit.
        horizon: Time horizon T. None: the sum of ``init``.
        lower_bound: Smallest step.
        train: What trains besides the time steps: "all" (whatever trains now), "tau" (nothing), or names and patterns
            of parameters and of modules with all they contain, such as ["head", "blocks.*.norm"].
        form: "branches", "whole", or "auto": branches where the example inputs show those of every block, and tests
            confirm that they can be scaled; else whole. ``summary`` and the log ("taulearn") say which, and why. Put
            adapters (LoRA) in before. Without example inputs "auto" is "whole", as it is with units="displacement".
        per: What has a step: "block", or "branch": attention and MLP, say, have steps of their own and are deleted
            separately (form "branches" alone).
        units: "steps", or "displacement": tau_l is the root mean square of what block l adds to the state, over that
            on the first batch in training (:mod:`taulearn.wrapping.displacement`), so that no scaling of weights stands
            in for a step. Saved and unwrapped models have plain steps. Constraint "free" without bound only. For a
            block that is the identity at first the unit is a tenth of the state's root mean square.

    Returns:
        The same model, with ``time_steps``.

    Raises:
        TypeError: If ``model`` is no module, compiled, or a DistributedDataParallel.
        ValueError: If it is sharded, or has time steps already, no block is found (the message says why each module was
            refused), a name matches nothing, a named module cannot be a block, the form is not one that the model
            allows, or the steps contradict each other.

    Example:
        >>> import taulearn
        >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> model = nn.Sequential(nn.Linear(2, 4), block(), block(), block(), nn.Linear(4, 1))
        >>> _ = wrap(model, example_inputs=torch.ones(1, 2))
        >>> model.time_steps.tau
        Parameter containing:
        tensor([1., 1., 1.], requires_grad=True)
        >>> print(taulearn.prune(model, keep=[0, 2]))
        deleted layer 1 (share 0.33): 3 -> 2 layers, 80 -> 59 parameters
    """
    check_host(model)
    _check_names(form, per, units, example_inputs)
    if units == "displacement":
        from .displacement import DisplacementUnits, check_unrestricted

        check_unrestricted(constraint, lower_bound)
    try:
        result = None if example_inputs is None else probe(model, example_inputs)
    except Exception as error:
        error.add_note(
            f"Raised while wrap ran the model on example_inputs, a {type(example_inputs).__name__}: give what it is "
            "called with, keywords in a dictionary, positional arguments in a tuple or list, a single one as it is."
        )
        raise
    if blocks is None:
        if result is None:
            raise ValueError(
                "example_inputs must be given where blocks are to be found by a forward pass, got None: give a batch, "
                "or name the blocks"
            )
        calls = _found(result, example_inputs)
        names, forms = [call.name for call in calls], [call.form for call in calls]
    else:
        names = matching("blocks", blocks, [name for name, _ in model.named_modules() if name])
        for name in names:
            if isinstance(model.get_submodule(name), torch.jit.ScriptModule):
                raise ValueError(f"blocks must name modules that can have a time step, got {name!r}: {SCRIPTED}")
        forms = [Form.taking(None, model.get_submodule(name).forward) for name in names]
        if result is not None:
            names.sort(key=lambda name: result.calls[name][0].order if name in result.calls else -1)
            forms = [call.form for call in _named(names, result, example_inputs)]
    layers = [model.get_submodule(name) for name in names]
    check_blocks(model, names, layers)
    trained = _trained(model, train)
    found, why = _branches(model, names, forms, example_inputs, form, per, units)
    number = len(layers) if per == "block" else sum(map(len, found))
    steps = steps_for(layers, number, init, horizon, constraint, lower_bound)
    per_block = steps if per == "block" else steps_for(layers, len(layers), 1.0, None, "free", None)
    wrapping = of_blocks(model, per_block, names, layers, forms)
    shorten, keep = try_deletions(wrapping, example_inputs)
    wrapping = of_blocks(model, per_block, names, layers, forms, keep)
    wrapping = replace(
        with_branches(wrapping, found, per) if found else wrapping,
        time_steps=steps,
        shorten=shorten,
        trained={p: p.requires_grad for p, flag in trained.items() if p.requires_grad != flag},
        units=DisplacementUnits.like(steps.values) if units == "displacement" else None,
        inputs=ExampleInputs.of(example_inputs),
        why=why,
    )
    install(wrapping)
    if has_save_pretrained(model):
        from .save_pretrained import find_unsaved, guard_saving

        guard_saving(model, layers, wrapping.inputs)
        if per == "block":
            vars(model)[WRAPPING] = replace(wrapping, not_saved=find_unsaved(wrapping))
    for parameter, flag in trained.items():
        parameter.requires_grad_(flag)
    logging.getLogger("taulearn").info("wrap: form %r, %s", wrapping.form, why)
    return model


def _branches(
    model: nn.Module, names: Sequence[str], forms: Sequence[Form], inputs: Any, form: str, per: str, units: str
) -> tuple[list[tuple[Branch, ...]], str]:
    """The branches of all blocks, none for form "whole", and why the form is what it is."""
    if form == "whole":
        return [], "as asked for"
    if inputs is None:
        return [], "as there are no example inputs that could show branches"
    if units == "displacement":
        return [], "as units are 'displacement'"
    from .find_branches import find_branches

    found = find_branches(model, names, forms, inputs, alone=per == "branch")
    if isinstance(found, str):
        if form == "branches" or per == "branch":
            raise ValueError(
                f"form must be one that the model allows, got 'branches': {found}. Wrap with form='whole' (per block), "
                "or name blocks that have branches"
            )
        return [], found
    if per == "branch":
        from .single_branches import lost_branches
    for name, branches in zip(names, found, strict=True):
        if per == "branch" and len(branches) < 2 and not lost_branches(model.get_submodule(name)):
            raise ValueError(
                f"per must be 'block' where a block has one branch, got 'branch': {name!r} has {branches[0].site!r} "
                "alone, whose step is the block's"
            )
    return found, "as the branches of every block were found and verified"


def of_blocks(
    model: nn.Module,
    steps: TimeSteps,
    names: Sequence[str],
    modules: Sequence[nn.Module],
    forms: Sequence[Form],
    keep: Mapping[int, str] | None = None,
) -> Wrapping:
    """A wrapping with one step a block, of form "whole"; ``keep``: which cannot be deleted, with the reason."""
    blocks = tuple(BlockAtStart(name, form) for name, form in zip(names, forms, strict=True))
    layers = enumerate(zip(modules, blocks, strict=True))
    present = tuple(Layer(module, module, block, {}, (keep or {}).get(l, "")) for l, (module, block) in layers)
    return Wrapping(model, steps, blocks, present)


def with_branches(wrapping: Wrapping, found: Sequence[tuple[Branch, ...]], per: str) -> Wrapping:
    """A wrapping of blocks as one of branches, whose blocks are the layers, or hold them."""
    blocks, present = list[BlockAtStart](), list[Layer]()
    if per == "branch":
        from .single_branches import why_kept
    for layer, branches in zip(wrapping.present, found, strict=True):
        sites = {place: layer.block.get_submodule(branch.site) for place, branch in enumerate(branches)}
        placed = tuple(_placed(branch, site) for branch, site in zip(branches, sites.values(), strict=True))
        blocks.append(replace(layer.at_start, branches=placed, stays=bool(layer.keep)))
        whole = replace(layer, at_start=blocks[-1], sites=sites)
        for place, site in sites.items() if per == "branch" else ():
            why = why_kept(wrapping.host, layer.name, placed[place])
            present.append(replace(whole, module=site, sites={place: site}, keep=why))
        present += [whole] if per == "block" else []
    return replace(wrapping, per=per, blocks=tuple(blocks), present=tuple(present))


def _placed(branch: Branch, site: nn.Module) -> Branch:
    """A branch with the position of its site's argument, which is not saved."""
    if branch.form.argument is None:
        return branch
    return replace(branch, form=replace(branch.form, position=Form.taking(branch.form.argument, site.forward).position))


def _check_names(form: str, per: str, units: str, inputs: Any) -> None:
    if units not in ("steps", "displacement"):
        raise unknown_name("units", units, ("steps", "displacement"))
    if form not in ("auto", "branches", "whole"):
        raise unknown_name("form", form, ("auto", "branches", "whole"))
    if per not in ("block", "branch"):
        raise unknown_name("per", per, ("block", "branch"))
    if per == "branch" and form == "whole":
        raise ValueError("per must be 'block' with form='whole', got 'branch': only form='branches' knows branches")
    if form == "branches" or per == "branch":
        if units == "displacement":
            raise ValueError("units must be 'steps' with branches, got 'displacement': wrap with form='whole'")
        if inputs is None:
            raise ValueError(
                "example_inputs must be given where branches are to be found by forward passes, got None: give a "
                "batch, or wrap with form='whole'"
            )


def check_host(model: nn.Module) -> None:
    """Refuse what cannot be wrapped: no module, compiled, exported or distributed, and what has steps already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_inference_mode("wrapped")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            what = f"its module {name!r} compiled" if name else "it compiled"
            raise TypeError(f"model must be the model itself, got {what}: wrap it first, then compile")
        if isinstance(module, torch.jit.ScriptModule) and not name:
            raise TypeError(
                "model must be a Python module, got a ScriptModule, whose parts cannot be changed: wrap the module "
                "that it was made from"
            )
        if "train" in vars(module):  # torch.export forbids to change between training and evaluation
            raise TypeError(
                f"model must be a Python module, got {f'its module {name!r}' if name else 'a program'} from "
                "torch.export, whose mode is fixed: wrap the module that it was made from, then export"
            )
    refuse_distributed("model", model, "wrap")
    if wrapping_of(model) is not None:
        raise ValueError(
            "model must not be wrapped yet, got one that is: use its time_steps, or call taulearn.unwrap first"
        )
    if hasattr(model, "time_steps"):
        raise ValueError(
            f"model must not have time steps yet, got a {type(model).__name__} with time_steps: use those, or rename "
            "the attribute"
        )
    for name, module in model.named_modules():
        if isinstance(step_of(module), Step | BranchStep | WatchedBlock) or wrapping_of(module) is not None:
            raise ValueError(f"model must not contain wrapped modules, got {name!r}, which is: unwrap that one first")
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            raise ValueError(
                f"model must not use nested tensors, whose arithmetic is incomplete, got the TransformerEncoder "
                f"{name!r} that does: {NESTED}, or set its use_nested_tensor to False"
            )


def _found(result: Probe, inputs: Any) -> list[Call]:
    """The blocks that the probe shows, or an error that lists why there is none."""
    refused: dict[str, str] = {}
    if is_configured(result.host):
        from .configurations import refused_modules

        refused = refused_modules(result.host)
    calls, reasons = blocks_of(result, refused, inputs)
    if calls:
        return calls
    alike: dict[str, list[str]] = {}
    for name in sorted(reasons, key=lambda name: name.count(".")):  # the outermost first
        alike.setdefault(reasons[name], []).append(name)
    lines = []
    for why, names in alike.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"  {names[0]} ({type(result.host.get_submodule(names[0])).__name__}){more}: {why}")
    listed = "\n".join(lines[:30] + ([f"  and {len(lines) - 30} more reasons"] if len(lines) > 30 else []))
    raise ValueError(
        "model must have a block whose output has the shape of its input, got none. Seen in the forward pass:\n"
        f"{listed or '  no module was called'}\nName what is to be wrapped in blocks, or write each block as one module"
    )


def _named(names: Sequence[str], result: Probe, inputs: Any) -> list[Call]:
    """The calls of modules that the user named, or an error that says why one cannot be a block."""
    reasons = {name: refusal(result.calls.get(name, []), named=True) for name in names}
    if not any(reasons.values()):
        calls = [result.calls[name][0] for name in names]
        path = follow_states(result.host, calls, inputs)
        if path is None or not path.outside:
            return calls
        reasons = {names[min(path.outside)]: OUTSIDE}
    name, reason = next((name, reason) for name, reason in reasons.items() if reason)
    raise ValueError(f"blocks must name modules that can have a time step, got {name!r}: {reason}")


def check_blocks(model: nn.Module, names: Sequence[str], layers: Sequence[nn.Module]) -> None:
    """Refuse blocks that are in several places, or in each other."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    for name, layer in zip(names, layers, strict=True):
        holders = {id(model.get_submodule(each.rpartition(".")[0])) for each in places[layer]}
        keys = {each.rpartition(".")[2] for each in places[layer]}
        if len(holders) > 1 or len(keys) > 1:
            raise ValueError(
                f"blocks must have one place each, got {name!r}, which is also {', '.join(places[layer][1:])}"
                ": a block used in several places has no single time step; leave it out of blocks"
            )
        inner = [other for other in names if other.startswith(f"{name}.")]
        if inner:
            raise ValueError(f"blocks must not contain each other, got {name!r} and {inner[0]!r}: name one of them")
    if len(set(layers)) < len(layers):
        raise ValueError("blocks must be different modules")


def steps_for(
    layers: Sequence[nn.Module],
    number: int,
    init: float | Sequence[float] | Tensor,
    horizon: float | None,
    constraint: str | Constraint,
    lower_bound: float | None,
) -> TimeSteps:
    """Steps on the device of the first block, of its type (complex: of its parts'), at least of single precision."""
    floating = [p for p in layers[0].parameters() if p.is_floating_point() or p.is_complex()]
    dtype = floating[0].dtype.to_real() if floating else torch.get_default_dtype()
    start = torch.as_tensor(init, dtype=torch.float64)
    total = float(start.sum()) if start.ndim else float(start) * number
    return PassingTimeSteps(
        number,
        horizon=(total if total > 0 else float(number)) if horizon is None else horizon,
        constraint=constraint,
        lower_bound=lower_bound,
        init=init,
        dtype=torch.promote_types(dtype, torch.float32),
        device=floating[0].device if floating else None,
    )


def _trained(model: nn.Module, train: str | Iterable[str]) -> dict[nn.Parameter, bool]:
    """Which parameters are to train; empty: those that train now."""
    if train == "all":
        return {}
    named = dict(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen = set() if train == "tau" else set(matching("train", train, [*named, *modules]))
    inside = tuple(f"{name}." for name in chosen)
    training = {p for name, p in named.items() if name in chosen or name.startswith(inside)}
    return {p: p in training for p in named.values()}
