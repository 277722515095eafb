"""Where a finer time grid would change the loss: figures of the layers for refinement.

One step of a scheme on its full state z (the state y, and what the scheme carries beside it) is
z_{l+1} = Phi_{tau_l}(z_l); psi_l = dJ/dz_l is the adjoint state, J the mean loss.

    dual-weighted   eta_l = <psi_{l+1}, Phi_{(1-theta) tau_l}(Phi_{theta tau_l}(z_l)) - Phi_{tau_l}(z_l)>
    sensitivity     eta_l = <psi_{l+1}, dPhi^new_tau/dtau (z_{l+1}) at tau = 0>  (residual: <psi_{l+1}, f_new(y_{l+1})>)

The first is what J changes by, up to higher order, where layer l becomes two steps with the same parameters. The second
is dJ/dtau of a layer with step 0 that is inserted behind layer l. Both are computed as they are defined: the state
behind layer l is varied with a number s_l, which is 0,

    z_{l+1} + s_l (Phi(Phi(z_l)) - z_{l+1})     or     Phi^new_{s_l}(z_{l+1}),

and eta_l = dJ/ds_l. One backward pass gives all of them.

In the fractional scheme the later steps remember the new state, too. With h and g the states after the halves of layer
l, weights a' on the finer grid, and S_{k,l} = tau_{l+1} + .. + tau_k, step k > l changes by c_{k,l} e_l as well, where

    split       e_l = h - y_l - theta (g - y_l)                    c_{k,l} = a'_{k+1,l+1} - a'_{k+1,l}
    insertion   e_l = Gamma(2-gamma) (f_new(y_{l+1}) - f_l(y_l))   c_{k,l} = a_{k,l} - (1-gamma) (tau_k / S_{k,l})^gamma

(without f_l, a_{k,l} where the memory starts behind layer l). An insertion changes J by tau^gamma <psi, e> + ..: its
sensitivity is the derivative in tau^gamma, the new step's. That limit is reached when (tau / tau_l)^(1-gamma) is small.
Where each layer has an order of its own, a_{k,.} and c_{k,l} have that of layer k, e_l and tau that of layer l.

References:
    Hintermüller, Hinze, Korolev (2026), arXiv 2601.07397 (dual weighted residuals).
    Kreis, Herberg, Koehne, Schiela, Herzog (2023), SensLI, arXiv 2311.15995 (sensitivities of layers to be inserted).
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from .._batches import batches_of, check_loss, each_batch, leading
from .._calls import forwards
from .._counting import BY_SAMPLES, Mean, loss_counted
from .._distributed import alike
from .._errors import unknown_name
from .._undisturbed import undisturbed
from ..nn.finer_steps import check_theta
from ..nn.network import TimeVariableNetwork
from ..nn.pruned_models import prunable_of
from ..nn.schemes import Fractional, Scheme
from ..nn.skips import IdentitySkips, Skips
from ..nn.time_steps import TimeSteps, time_steps_of
from ..wrapping.block import blend
from ..wrapping.state_argument import Form
from ..wrapping.wrapped_model import Wrapping
from .estimate import Criterion

NAMES = ("dual-weighted", "sensitivity")

Indicator = str | Criterion | Callable[[Any, Any], Tensor]
NewLayer = Callable[[nn.Module], nn.Module]
_Next = Callable[[Any, Tensor], Any]
"""The state behind a layer, from the one before it and the layer's step."""


def indicators(
    model: nn.Module,
    indicator: Indicator,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    theta: float = 0.5,
    layer: NewLayer | None = None,
) -> Tensor:
    """The signed indicators of all layers: the mean over the batches, weighted by what each of them counts.

    The passes are in evaluation mode and leave model, gradients and random state as they were. A batch costs less than
    three of its forward and backward passes (fractional: of those that contract the memory step by step).

    Args:
        model: A network built here (residual, fractional, or a local scheme of your own), or a model that was wrapped
            per block.
        indicator: "dual-weighted" for splits, "sensitivity" for insertions behind each layer; or a function (model,
            batch) -> figures, of which the mean is taken; without data a function (tau, model) -> figures, or a
            ``taulearn.Criterion``.
        data: Batches or one batch, as for ``taulearn.prune``.
        loss: Maps (output, target) to a scalar. None: the model's own.
        theta: The share of a step that the first of two halves takes, in (0, 1).
        layer: Makes the layer that would be inserted, as for ``taulearn.refine``.

    Returns:
        One figure a layer, (num_steps,), float64; nan where :func:`not_refined` has a reason.

    Raises:
        ValueError: If an argument lies outside its range, data lack, the model's scheme or steps per branch allow no
            refinement, the loss is not finite, or a layer is not called on the data.
        TypeError: If the model has no time steps, or the indicator is neither name nor function.

    References:
        See the top of this file.

    Example:
        >>> from taulearn.nn import resnet
        >>> _ = torch.manual_seed(0)
        >>> batch = torch.ones(5, 2), torch.zeros(5, 1)
        >>> indicators(resnet(2, 3, 1, 4), "dual-weighted", batch, nn.functional.mse_loss).isnan().tolist()
        [True, False, False, False]
    """
    check_theta(theta)
    check_loss(loss)
    check_indicator(indicator)
    steps = time_steps_of(model)
    if not isinstance(indicator, str):
        given = _of_function(indicator, model, data)
        return given.new_tensor(alike(model, given.tolist()))
    if data is None:
        raise ValueError(
            f"data must be given with indicator {indicator!r}, got None: hand over batches on which the loss is taken, "
            "pairs (inputs, targets) or dictionaries; a few hundred samples do"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile compiled
    without, batches, mean = not_refined(model, indicator, layer), batches_of(data), Mean()
    found = torch.full((steps.num_steps,), math.nan, dtype=torch.float64, device=steps.values.device)
    if len(without) == steps.num_steps:
        return found
    with undisturbed(model, batches), _repeatable(model):
        varied = _Varied(indicator, steps.tau.detach(), float(theta), without)
        make = _in_blocks if isinstance(prunable_of(model), Wrapping) else _in_network
        with make(prunable_of(model), varied, layer):
            for batch in each_batch(batches, model, steps.values):
                with torch.enable_grad():
                    value, counting, targets = loss_counted(model, batch, loss)
                    (eta,) = torch.autograd.grad(value, varied.s)
                mean.add(eta, counting, targets)
    rest = [l for l in range(steps.num_steps) if l not in without]
    if unseen := set(rest) - varied.seen:
        raise ValueError(f"data must be such that every layer is called, got data on which {len(unseen)} are not")
    found[rest] = torch.tensor(alike(model, mean.value()[rest].tolist()), dtype=found.dtype, device=found.device)
    if not bool(found[rest].isfinite().all()):
        raise NotFinite(f"loss must be finite on data with finite gradients, got indicators {found.tolist()}")
    return found


class NotFinite(ValueError):
    """An indicator that is infinite or nan on the data."""


def check_indicator(indicator: Any) -> None:
    """Refuse what is no indicator."""
    if isinstance(indicator, str):
        if indicator not in NAMES:
            raise unknown_name("indicator", indicator, NAMES)
    elif isinstance(indicator, type) or not (isinstance(indicator, Criterion) or callable(indicator)):
        raise TypeError(f"indicator must be one of {NAMES}, or a function, got {indicator!r}: see taulearn.refine")


def made_by(layer: NewLayer, neighbour: nn.Module) -> nn.Module:
    """What the user's function makes of a copy of a layer."""
    made = layer(neighbour)
    if not isinstance(made, nn.Module):
        raise TypeError(f"layer must return a module, got {type(made).__name__}")
    return made


def not_refined(model: nn.Module, indicator: str, layer: NewLayer | None = None) -> dict[int, str]:
    """The positions of layers that cannot be split, or behind which nothing can be inserted, with the reasons.

    Args:
        model: As for :func:`indicators`.
        indicator: "dual-weighted" for splits, "sensitivity" for insertions.
        layer: As for :func:`indicators`.

    Raises:
        ValueError, TypeError: If the model allows no refinement at all.

    Example:
        >>> from taulearn.nn import resnet
        >>> not_refined(resnet(2, 3, 1, 4), "dual-weighted")
        {0: 'the skip past it is zero'}
    """
    inner = prunable_of(model)
    if isinstance(inner, Wrapping):
        if inner.per == "branch":
            raise ValueError(
                "model must be wrapped with per='block', got steps per branch: a branch is no step of its own that "
                "could be taken twice"
            )
        return {}
    if not isinstance(inner, TimeVariableNetwork):
        raise TypeError(
            f"model must be a TimeVariableNetwork or wrapped, got {type(model).__name__}: build it with taulearn.nn, "
            "or wrap it with taulearn.wrap"
        )
    scheme = inner.scheme
    local = not scheme.remembers and not scheme.runs_whole
    if not (scheme.deletes_exactly and (local or isinstance(scheme, Fractional))):
        raise ValueError(
            f"model must have a scheme whose layers are the identity at tau = 0, without a memory, or the fractional "
            f"one, got {scheme.name!r}: two half steps are no step of the same equation there; take residual"
        )
    if indicator == "dual-weighted":
        return inner.not_split()
    reason = "neither it nor the next layer keeps the width: say with layer= what comes behind it"
    places = [l for l in range(len(inner.layers)) if layer is None and inner.copied_behind(l) is None]
    return dict.fromkeys(places, reason)


def _of_function(indicator: Any, model: nn.Module, data: Any) -> Tensor:
    """The figures that a criterion, or a function of the user's, gives."""
    steps, mean = time_steps_of(model), Mean()
    if isinstance(indicator, Criterion):
        found: Any = indicator.scores(model)
    elif data is None:
        found = indicator(steps.tau.detach(), model)
    else:
        batches = batches_of(data)
        with undisturbed(model, batches):
            for batch in each_batch(batches, model, steps.values):
                parts = (batch, None) if isinstance(batch, Mapping) else batch
                mean.add(indicator(model, batch), BY_SAMPLES, leading(parts))
        found = mean.value()
    if not isinstance(found, Tensor) or found.shape != (steps.num_steps,):
        raise ValueError(f"indicator must return {steps.num_steps} figures, one a layer, got {found!r:.200}")
    return found.detach().double()


@dataclass
class _Varied:
    """The states behind the layers as functions of s, (num_steps,), which is 0."""

    indicator: str
    tau: Tensor
    theta: float
    without: Collection[int]
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.tau.dtype, torch.float32)
        self.s = torch.zeros(len(self.tau), dtype=dtype, device=self.tau.device, requires_grad=True)

    def steps(self, l: int, tau_l: Tensor) -> Tensor:
        """tau with another step of layer l."""
        position = torch.arange(len(self.tau), device=self.tau.device)
        return torch.where(position == l, tau_l.to(self.tau.dtype), self.tau)

    def halves(self, l: int) -> tuple[Tensor, Tensor]:
        """The steps of a layer's halves."""
        return self.theta * self.tau[l], (1.0 - self.theta) * self.tau[l]

    def behind(self, l: int, z: Any, after: Any, again: _Next, new: _Next) -> Any:
        """The state behind layer l, varied: by layer l ``again`` in two halves, or by a ``new`` layer."""
        self.seen.add(l)
        if l in self.without:
            return after
        if self.indicator == "sensitivity":
            held = _each(Tensor.detach, after)
            return _each(lambda y, x, now: y + (now - x), after, held, new(held, self.s[l]))
        first, second = self.halves(l)
        with torch.no_grad():
            change = _each(torch.sub, again(again(z, first), second), after)
        return _each(lambda y, now: self.towards(l, y, now), after, change)

    def towards(self, l: int, y: Tensor, change: Tensor) -> Tensor:
        """y + s_l change; the derivative's sum is taken in the wider type."""
        return y + (self.s[l] * change.to(torch.promote_types(change.dtype, torch.float32))).to(y.dtype)


def _each(function: Callable[..., Tensor], *states: Any) -> Any:
    """A function of each tensor of states with their carries."""
    return tree_map(lambda *each: function(*each) if isinstance(each[0], Tensor) else each[0], *states)


def _fitting(value: Tensor, y: Tensor) -> Tensor:
    """A value of a new layer, which must have the shape of the state."""
    if value.shape != y.shape:
        raise ValueError(
            f"layer must make a layer that keeps the state's shape {tuple(y.shape)}, got one that returns "
            f"{tuple(value.shape)}: what is inserted is the identity at step 0"
        )
    return value


@contextmanager
def _in_network(network: TimeVariableNetwork, varied: _Varied, layer: NewLayer | None) -> Iterator[None]:
    """The states of a network varied, in place of its scheme's steps."""
    scheme, number = network.scheme, len(network.layers)
    inner, past = scheme.step, IdentitySkips(number, from_input=True)
    like = [l if (fits := network.copied_behind(l)) is None else fits for l in range(number)]
    made = [] if layer is None else [made_by(layer, network.copy_of(l)).eval() for l in like]

    def new_layer(l: int) -> Callable[[Tensor], Tensor]:
        return (lambda y: _fitting(made[l](y), y)) if made else network.layers[like[l]]

    def step(l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        def again(z: Any, tau_l: Tensor, layer: Any = f) -> Any:
            return inner(l, layer, z[0], z[1], past, scheme.prepare(varied.steps(l, tau_l)))

        def new(z: Any, tau_l: Tensor) -> Any:
            return again(z, tau_l, new_layer(l))

        after = inner(l, f, y, carry, skips, coefficients)
        found: tuple[Tensor, Any] = varied.behind(l, (y, carry), after, again, new)
        return found

    with ExitStack() as stack:
        if isinstance(scheme, Fractional):
            step = _fractional_step(scheme, varied, new_layer)
            stack.enter_context(forward_ad.dual_level())  # its plain path, whose states are seen by autograd
        for name, method in (("step", step), ("last", partial(Scheme.last, scheme))):  # not in reversible memory
            vars(scheme)[name] = method
            stack.callback(vars(scheme).pop, name)
        yield


def _fractional_step(scheme: Fractional, varied: _Varied, new_layer: Callable[[int], Any]) -> Callable[..., Any]:
    """The steps of the fractional scheme, whose memory is varied as well as the state behind a layer."""
    tau, inner = varied.tau.double(), scheme.step
    gamma = tau.new_tensor(scheme.gamma).expand_as(tau)
    memory: dict[int, tuple[Tensor, Tensor]] = {}  # e_l and c_{.,l} of the layers so far
    t = torch.cat([tau.new_zeros(1), tau.cumsum(0)])

    def split(l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, after: Tensor) -> Tensor:
        first, second = varied.halves(l)
        again: dict[str, Any] = {"twice": l} if scheme.per_layer else {}
        finer = scheme.prepare(torch.cat([varied.tau[:l], first[None], second[None], varied.tau[l + 1 :]]), **again)
        past: Any = lambda state, j, k: skips(state, j - (j > l), k - (k > l))  # noqa: E731  past the half: identity
        half, carry = inner(l, f, y, carry, skips, finer)
        twice, _ = inner(l + 1, f, half, carry, past, finer)
        weights = finer.matrix()
        memory[l] = half - y - varied.theta * (twice - y), weights[1:, l + 1] - weights[1:, l]
        return twice - after

    def insert(l: int, f: nn.Module, y: Tensor, after: Tensor, weights: Tensor) -> Tensor:
        remembered = l >= scheme.memory_from
        value = new_layer(l)(after)
        e = math.gamma(2.0 - float(gamma[l])) * (value - f(y) if remembered else value)
        fading = (1.0 - gamma) * (tau / (t[1:] - t[l + 1])) ** gamma  # of use from k = l + 1 on
        memory[l] = e, weights[:, l] - fading if remembered else -fading
        return e

    def step(l: int, f: nn.Module, y: Tensor, carry: Any, skips: Skips, coefficients: Any) -> tuple[Tensor, Any]:
        after, states = inner(l, f, y, carry, skips, coefficients)
        varied.seen.add(l)
        if l == 0:
            memory.clear()  # another pass
        result = after
        for j, (e, c) in memory.items():
            carried = skips(e, j + 1, l + 1)
            assert carried is not None
            result = varied.towards(j, result, c[l].to(e.dtype) * carried)
        if l not in varied.without:
            with torch.no_grad():
                if varied.indicator == "sensitivity":
                    change = insert(l, f, y, after, coefficients.matrix())
                else:
                    change = split(l, f, y, carry, skips, after)
            result = varied.towards(l, result, change)
        return result, states

    return step


@contextmanager
def _with_steps(steps: TimeSteps, tau: Tensor) -> Iterator[None]:
    """Other steps for a while, whatever values are stored."""
    rule, steps.rule = steps.rule, copy.copy(steps.rule)
    vars(steps.rule)["tau"] = lambda _values: tau
    try:
        yield
    finally:
        steps.rule = rule


@contextmanager
def _in_blocks(wrapping: Wrapping, varied: _Varied, layer: NewLayer | None) -> Iterator[None]:
    """The states behind a wrapped model's blocks varied, in place of the blocks' forwards."""

    def varying(l: int) -> Callable[..., Any]:
        inner, form = wrapping.layers[l].forward, wrapping.present[l].form
        made = None if layer is None else _Inserted(wrapping, l, layer)

        def run(*args: Any, **kwargs: Any) -> Any:
            def again(z: Tensor, tau_l: Tensor) -> Any:
                others, named = form.handing(z, args, kwargs)
                with _with_steps(wrapping.time_steps, varied.steps(l, tau_l)):
                    return form.leaving(inner(*others, **named))

            def new(z: Tensor, tau_l: Tensor) -> Any:
                return again(z, tau_l) if made is None else made(z, tau_l, args, kwargs)

            output = inner(*args, **kwargs)
            z, after = form.arriving(args, kwargs), form.leaving(output)
            return form.replaced(output, varied.behind(l, z, after, again, new))

        return run

    with forwards({block: varying(l) for l, block in enumerate(wrapping.layers)}):
        yield


class _Inserted:
    """The block that a function of the user's makes of the block in front of it, with a step of its own."""

    def __init__(self, wrapping: Wrapping, l: int, layer: NewLayer) -> None:
        self.block, self.tau = made_by(layer, wrapping.copy_of(l)).eval(), torch.ones(())
        self.form = wrapping.present[l].form
        self.whole = wrapping.form == "whole"
        for branch, _ in wrapping.present[l].branches():
            self.block.get_submodule(branch.site).register_forward_hook(self._stepped(branch.form))

    def _stepped(self, form: Form) -> Callable[..., Any]:
        def multiply(_module: nn.Module, _args: Any, output: Any) -> Any:
            g = form.leaving(output)
            assert g is not None
            return form.replaced(output, g * self.tau.to(g.dtype))

        return multiply

    def __call__(self, z: Tensor, tau_l: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        self.tau, (others, named) = tau_l, self.form.handing(z, args, kwargs)
        y = self.form.leaving(self.block(*others, **named))
        assert y is not None
        return blend(z, _fitting(y, z), tau_l.to(y.dtype)) if self.whole else _fitting(y, z)


@contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """Blocks can be called again: caches of generation are off, and fast paths that leave steps out."""
    configurations = {id(found): found for module in model.modules() if (found := vars(module).get("config"))}
    caching = [each for each in configurations.values() if getattr(each, "use_cache", None) is True]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for each in caching:
            each.use_cache = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for each in caching:
            each.use_cache = True
