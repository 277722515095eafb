"""Finding the residual branches of blocks, and verifying them, on what the blocks were called with.

Nothing here knows an architecture. Of a copy of the block, in double precision and evaluation mode, those parameters
are set to zero, module by module in the reverse order of execution, that change the block's output and make their own
module's output zero, until the output is the input, to the bit. What of them is not needed for that is left out again:
the rest are the ends. The site of an end is the outermost module, called once, whose output is zero then. Constant
parameters have noise in their place, as ends that start at zero would hide their branches.

Verified is, for each block:

1. the sites' outputs times 0 give the input, to the bit;
2. one site's output times s, the others' times 0: the increments for s = 2^-7 and 2^-8 have the ratio 2, where need be
   on those entries that a final ReLU does not clip (for the first of those with modules of the same names and classes);
3. the ends' parameters times s give the output that the sites' outputs times s give. Where this alone fails, the block
   has branch steps that do not fold.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._calls import call as call_model, forwards
from .._undisturbed import undisturbed
from .branches import Branch, End, folded
from .observation import noise_for, tensors_in
from .probe import kind
from .state_argument import Form, parameter_names

_SCALES = (2.0**-7, 2.0**-8)
_ROUNDING = 64
_LINEAR, _FOLDED = 1e-9, 1e-6
_FAILS = "a copy of it fails by itself, or with other weights"


class NotFound(Exception):
    """Why a block has no branches that can be found and verified."""


def find_branches(
    host: nn.Module, names: Sequence[str], forms: Sequence[Form], inputs: Any, *, alone: bool
) -> list[tuple[Branch, ...]] | str:
    """The branches of all blocks, or which block has none and which test failed.

    Args:
        host: The model.
        names: Its blocks.
        forms: Where their states are.
        inputs: Example inputs of the host.
        alone: Whether it shall be tried to delete single branches.
    """
    blocks = [host.get_submodule(name) for name in names]
    try:
        seen = _arguments(host, blocks, inputs)
    except Exception as error:  # noqa: BLE001  whatever cannot be copied
        return f"what its blocks are called with cannot be copied ({type(error).__name__})"
    known: dict[Any, list[tuple[Branch, ...]]] = {}
    result = []
    for name, block, form in zip(names, blocks, forms, strict=True):
        like = known.setdefault((kind(block), *((key, type(each)) for key, each in block.named_modules())), [])
        try:
            trial = _copied(block, *seen.pop(block), form)
            branches = _as_before(trial, like) or _found(trial)
            if alone:
                from .single_branches import tried_without

                branches = tuple(tried_without(trial, each) for each in branches)
        except NotFound as error:
            return f"block {name!r}: {_without_parameters(block) or error}"
        # blocks may raise anything with other weights, or outside of their model
        except Exception as error:  # noqa: BLE001
            return f"block {name!r}: {_FAILS} ({type(error).__name__})"
        like.append(branches)
        result.append(branches)
    return result


def _without_parameters(block: nn.Module) -> str | None:
    """Which part of a block keeps weights that cannot be set to zero, in words, or None."""
    for name, module in block.named_modules():
        held = [*module.parameters(), *module.buffers(), *module.children()]
        if not held and module.state_dict():
            return f"the weights of {name!r} are no parameters, as quantised ones may be: prune and unwrap before that"
    return None


def _arguments(host: nn.Module, blocks: Sequence[nn.Module], inputs: Any) -> dict[nn.Module, tuple[Any, Any]]:
    """What each block is called with; copies, as caches grow and states are changed in place."""
    seen: dict[nn.Module, tuple[Any, Any]] = {}

    def watching(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            seen[block] = copy.deepcopy((args, kwargs))
            return forward(*args, **kwargs)

        return run

    with undisturbed(host, inputs), forwards({block: watching(block) for block in blocks}):
        call_model(host, inputs)
    return seen


@dataclass
class _Pass:
    """One pass of the copy of a block."""

    before: Tensor  # the state
    after: Tensor
    calls: list[str] = field(default_factory=list)  # names of the modules, in the order in which they begin
    outputs: dict[str, Form] = field(default_factory=dict)  # where each of them has its first tensor
    zero: set[str] = field(default_factory=set)  # those of which that tensor is 0
    others: list[tuple[str, Tensor]] = field(default_factory=list)  # all tensors in the block's output
    shapes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # arguments with a tensor's shape, and that shape

    @property
    def rounding(self) -> float:
        """How far rounding takes the state."""
        eps = torch.finfo(self.after.dtype).eps
        return _ROUNDING * eps * float(self.before.abs().max())


class Trial:
    """A copy of a block on the arguments that it was called with."""

    def __init__(self, block: nn.Module, args: Any, kwargs: Any, form: Form) -> None:
        self.block, self.arguments, self.form = block, (args, kwargs), form
        self.modules = {
            name: each for name, each in block.named_modules() if name and not isinstance(each, torch.jit.ScriptModule)
        }
        self.parameters = dict(block.named_parameters())
        self.bare = self.run(watch=True)

    def run(
        self,
        values: Mapping[str, Tensor] | None = None,
        scales: Mapping[str, tuple[Form, float]] | None = None,
        *,
        watch: bool = False,
    ) -> _Pass:
        """The block's state before and after, with other values of parameters, and with outputs of sites scaled."""
        args, kwargs = copy.deepcopy(self.arguments)
        before = self.form.arriving(args, kwargs)
        assert before is not None
        result = _Pass(before.clone(), before)

        def stop(name: str, output: Any, arguments: list[tuple[Any, Any]]) -> None:
            form = Form.of(output)
            tensor = form.leaving(output)
            if tensor is None or not tensor.is_floating_point():
                return
            result.outputs[name] = form
            result.shapes[name] = (
                [(key, tuple(each.shape)) for key, each in arguments if isinstance(each, Tensor)],
                tuple(tensor.shape),
            )
            if not bool(tensor.any()):
                result.zero.add(name)

        def watching(name: str, module: nn.Module) -> Callable[..., Any]:
            forward, form_and_scale = module.forward, (scales or {}).get(name)
            names = parameter_names(forward) if watch else []

            def run(*args: Any, **kwargs: Any) -> Any:
                result.calls.append(name)
                output = forward(*args, **kwargs)
                if form_and_scale is not None:
                    form, scale = form_and_scale
                    g = form.leaving(output)
                    if g is None:
                        raise NotFound(f"{name!r} returns no increment")
                    output = form.replaced(output, g * scale)
                if watch:
                    given = [(names[i] if i < len(names) else i, each) for i, each in enumerate(args)]
                    stop(name, output, [*given, *kwargs.items()])
                return output

            return run

        watched = self.modules if watch else {name: self.modules[name] for name in scales or {}}
        others = {each: watching(name, each) for name, each in watched.items()}
        with self._values(values or {}), forwards(others), torch.no_grad(), torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            output = self.block(*args, **kwargs)
        after = self.form.leaving(output)
        if after is None or after.shape != before.shape:
            raise NotFound("it returns no state of its input's shape")
        result.after, result.others = after, list(tensors_in(output))
        return result

    @contextmanager
    def _values(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        with torch.no_grad():
            own = {name: self.parameters[name].clone() for name in values}
            for name, value in values.items():
                self.parameters[name].copy_(value)
            yield
            for name, value in own.items():
                self.parameters[name].copy_(value)

    def like(self, name: str, value: float) -> Tensor:
        """A constant in the place of a parameter."""
        return torch.full_like(self.parameters[name], value)


def _copied(block: nn.Module, args: Any, kwargs: Any, form: Form) -> Trial:
    """A copy with noise in the place of constants, in double precision where that works, else in single."""
    x = form.arriving(args, kwargs)
    if x is None or any(each.is_complex() for each in (x, *block.parameters())):
        raise NotFound("its numbers are complex")
    for dtype in (torch.float64, torch.float32):  # some kernels do not know double precision, experts' for one
        try:
            exact_args, exact_kwargs = tree_map(partial(_as_type, dtype=dtype), (args, kwargs))
            trial = Trial(_with_noise(block).to(dtype), exact_args, exact_kwargs, form)
            if bool(torch.isfinite(trial.bare.after).all()):
                return trial
        except NotFound:
            raise
        # whatever else a block raises then
        except Exception:  # noqa: BLE001
            pass
    return Trial(_with_noise(block), args, kwargs, form)


def _with_noise(block: nn.Module) -> nn.Module:
    twin = copy.deepcopy(block).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter, noise in noise_for(twin).items():
            parameter.copy_(noise)
    return twin


def _as_type(each: Any, dtype: torch.dtype) -> Any:
    return each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each


def _found(trial: Trial) -> tuple[Branch, ...]:
    """Verified branches, if possible such that all of them fold."""
    choices = _searched(trial)
    first = _verified(trial, next(choices))
    if any(branch.not_folded for branch in first):
        for other in choices:
            branches = _verified(trial, other)
            if not any(branch.not_folded for branch in branches):
                return branches
    return first


def _searched(trial: Trial) -> Iterator[tuple[Branch, ...]]:
    """The branches that the zeroing test finds; several where parameters of one module could be the end."""
    bare = trial.bare
    if torch.equal(bare.after, bare.before):
        raise NotFound("it adds nothing to its state on the example inputs")
    number, zeros, now = Counter(bare.calls), dict[str, Tensor](), bare
    own = _parameters_of(trial, number)
    if not any(own.values()):
        raise NotFound(
            "none of its modules with parameters is called, as in a fast path (for torch's encoder: "
            "torch.backends.mha.set_fastpath_enabled(False))"
        )
    for name in dict.fromkeys(reversed(bare.calls)):
        if not own[name] or torch.equal(now.after, now.before):
            continue
        for values in _candidates(trial, own[name]):
            run = trial.run({**zeros, **values}, watch=True)
            if torch.equal(run.after, now.after):
                break
            if name in run.zero:
                zeros |= values
                now = run
                break
    if not torch.equal(now.after, now.before):
        raise NotFound(
            "zeroing test: its output is not its input with all of its last layers at zero, as in blocks that end in "
            "a normalisation of the sum"
        )
    holders = {parameter: name for name in own for parameter in own[name]}
    for order in (list(zeros), list(zeros)[::-1]):
        ends = zeros
        for name in order:  # what the identity does not need
            rest = {key: value for key, value in ends.items() if key != name}
            if torch.equal((run := trial.run(rest)).after, run.before):
                ends = rest
        yield _sites(bare, trial.run(ends, watch=True), ends, holders, trial.modules)


def _candidates(trial: Trial, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Values with which a module may give zero: all of its parameters 0; or one of them -1, where it is 1 + w."""
    zeros = {name: trial.like(name, 0.0) for name in names}
    yield zeros
    for name in names:
        if trial.parameters[name].is_floating_point():
            yield {**zeros, name: trial.like(name, -1.0)}


def _parameters_of(trial: Trial, number: Mapping[str, int]) -> dict[str, list[str]]:
    """The parameters of each module that was called, with those of modules inside that were not."""
    own: dict[str, list[str]] = {name: [] for name in number}
    for parameter in trial.parameters:
        holder = parameter.rpartition(".")[0]
        while holder and holder not in number:
            holder = holder.rpartition(".")[0]
        if holder:
            own[holder].append(parameter)
    return own


def _sites(
    bare: _Pass,
    zero: _Pass,
    ends: Mapping[str, Tensor],
    holders: Mapping[str, str],
    modules: Mapping[str, nn.Module],
) -> tuple[Branch, ...]:
    """The outermost modules that hold the ends, and whose outputs are 0 with them."""
    number = Counter(bare.calls)
    found: dict[str, list[End]] = {}
    for parameter, value in ends.items():
        parts = holders[parameter].split(".")
        outer = (".".join(parts[: i + 1]) for i in range(len(parts)))
        site = next((each for each in outer if number[each] == 1 and each in zero.zero - bare.zero), None)
        if site is None:
            raise NotFound(f"{holders[parameter]!r} is called {number[holders[parameter]]} times, not once")
        found.setdefault(site, []).append(End(parameter, int(bool(value.any()))))
    return tuple(
        Branch(site, *_shape_of(bare, site, modules[site].forward), tuple(found[site]))
        for site in dict.fromkeys(bare.calls)
        if site in found
    )


def _shape_of(bare: _Pass, site: str, forward: Callable[..., Any]) -> tuple[Form, tuple[tuple[int, int], ...]]:
    """An argument of a site with the dimensions of its increment, and those dimensions that differ."""
    (arguments, shape), output = bare.shapes[site], bare.outputs[site]
    fitting = [(key, each) for key, each in arguments if len(each) == len(shape)]
    differ = {key: sum(a != b for a, b in zip(each, shape, strict=True)) for key, each in fitting}
    if not fitting:
        return output, ()
    key, like = min(fitting, key=lambda each: differ[each[0]])
    taken = Form.taking(key, forward)
    sizes = tuple((i, b) for i, (a, b) in enumerate(zip(like, shape, strict=True)) if a != b)
    return replace(output, argument=key, position=taken.position), sizes


def _as_before(trial: Trial, known: Sequence[tuple[Branch, ...]]) -> tuple[Branch, ...] | None:
    """The branches of an earlier block of the same kind, where this one has the same."""
    for branches in dict.fromkeys(known):
        try:
            return _verified(trial, tuple(_here(trial, each) for each in branches), scaling=False)
        except NotFound:
            continue
    return None


def _here(trial: Trial, branch: Branch) -> Branch:
    """A branch of another block in this one, where it is not verified yet."""
    bare, named = trial.bare, all(end.parameter in trial.parameters for end in branch.ends)
    if not named or bare.calls.count(branch.site) != 1 or branch.site not in bare.outputs:
        raise NotFound("it has other modules")
    form, sizes = _shape_of(bare, branch.site, trial.modules[branch.site].forward)
    return Branch(branch.site, form, sizes, branch.ends)


def _scaled(branches: Sequence[Branch], scales: Sequence[float]) -> dict[str, tuple[Form, float]]:
    return {each.site: (each.form, scale) for each, scale in zip(branches, scales, strict=True)}


def _verified(trial: Trial, branches: tuple[Branch, ...], *, scaling: bool = True) -> tuple[Branch, ...]:
    """The branches, with why one of them cannot be folded; refused where they are none."""
    gone = trial.run(scales=_scaled(branches, [0.0] * len(branches)))
    if not torch.equal(gone.after, gone.before):
        raise NotFound("its output is not its input with the outputs of its branches at zero")
    for i, branch in enumerate(branches if scaling else ()):
        large, small = (
            trial.run(scales=_scaled(branches, [s if i == j else 0.0 for j in range(len(branches))])) for s in _SCALES
        )
        if not _twice(large, small):
            raise NotFound(
                f"scaling test: its increment is not proportional to the output of {branch.site!r}, as behind a "
                "normalisation"
            )
    # of both signs: a ReLU behind an end passes positive ones
    scales = [(-1) ** (i + 1) * (0.7 + 0.6 * i / len(branches)) for i in range(len(branches))]
    branches = tuple(replace(branch, not_folded=_never_called(trial, branch)) for branch in branches)
    if _folds(trial, branches, scales):
        return branches
    alone = [_folds(trial, [each], [-0.7]) for each in branches]
    return tuple(
        branch if good or branch.not_folded else replace(branch, not_folded=_why_not_folded(trial, branch))
        for branch, good in zip(branches, alone if not all(alone) else [False] * len(branches), strict=True)
    )


def _twice(large: _Pass, small: _Pass) -> bool:
    """Whether one increment is twice the other, on all entries or on those that a final ReLU leaves as they are."""
    positive = (large.before > 0) & (large.after > 0) & (small.after > 0)
    for open_ in (torch.ones_like(positive), positive):
        a, b = ((each.after - each.before)[open_] for each in (large, small))
        size = float(a.abs().max()) if a.numel() else 0.0
        if size > large.rounding and float((a - 2.0 * b).abs().max()) <= large.rounding + _LINEAR * size:
            return True
    return False


def _folds(trial: Trial, some: Sequence[Branch], scales: Sequence[float]) -> bool:
    """Whether scaled parameters of ends give what scaled outputs of sites do."""
    ends = [(end, scale) for branch, scale in zip(some, scales, strict=True) for end in branch.ends]
    if not all(trial.parameters[end.parameter].is_floating_point() for end, _ in ends):
        return False
    values = {e.parameter: folded(trial.parameters[e.parameter], scale, e.offset) for e, scale in ends}
    stepped, plain = trial.run(scales=_scaled(some, scales)), trial.run(values)
    size = float((stepped.after - stepped.before).abs().max())
    return float((stepped.after - plain.after).abs().max()) <= stepped.rounding + _FOLDED * size


def _why_not_folded(trial: Trial, branch: Branch) -> str:
    whole = [end.parameter for end in branch.ends if not trial.parameters[end.parameter].is_floating_point()]
    if whole:
        return f"{whole[0]!r} holds no floating-point numbers, as quantised weights do not"
    return f"the output of {branch.site!r} is not proportional to {branch.ends[-1].parameter!r}"


def _never_called(trial: Trial, branch: Branch) -> str:
    """Why ends may be missing, as in experts that no example input was routed to, or nothing."""
    ends = {end.parameter.rpartition(".")[0] for end in branch.ends}
    kinds = {type(trial.modules[end]) for end in ends if end in trial.bare.calls}
    for name, module in trial.modules.items():
        idle = name.startswith(f"{branch.site}.") and name not in trial.bare.calls and name not in ends
        if idle and type(module) in kinds:
            zeros = {f"{name}.{key}": trial.like(f"{name}.{key}", 0.0) for key, _ in module.named_parameters()}
            if torch.equal(trial.run(zeros).after, trial.bare.after):  # else its weights are used without a call
                return f"{name!r} is like an end, but takes no part on the example inputs: give inputs that reach it"
    return ""
