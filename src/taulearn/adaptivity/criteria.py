"""Criteria that look at the model at work: what a layer adds to the state, how it turns it, what the loss owes to it.

With z_l, what layer l adds to the state, and J_b the mean data loss of batch b:

    contribution   the mean over samples of norm(z_l)
    influence      the mean over tokens that count, or samples, of 1 - cos(y_l, y_{l+1})
    sensitivity    the mean over batches of abs(tau_l dJ_b/dtau_l)
    loss           J of the model without layer l   (:mod:`~taulearn.adaptivity.loss_without`)

In a wrapped block z_l is tau_l times the output minus the input. In a network it is y_{l+1} - y_l, which may be more
than the layer's value: a velocity moves the state, too. Schemes that add earlier states to it, and skips that are not
the identity, have z_l = tau_l^p f_l(y_l). Where tau_l enters by z_l alone, its sensitivity is abs(<dJ_b/dz_l, z_l>).

The steps say little about a layer whose function is large or small; in a network with normalisation the one makes up
for the other. The absolute value in the sensitivity is taken before the mean, since the mean gradient vanishes where
training has converged; so it depends on the batch size: small batches count the spread of the gradient, which does not
vanish, large ones its mean. In the fractional scheme tau_l^gamma takes the place of tau_l, the weights of the memory
held. A penalty that is differentiated through the states (a stage cost, a distillation) enters dJ_b/dz_l in training.

References:
    Men et al. (2024), ShortGPT: Layers in large language models are more redundant than you expect, arXiv 2403.03853
        (influence).
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._batches import MASK, batches_of, each_batch, inputs_and_targets, loss_on, with_decoder
from .._calls import call
from .._undisturbed import undisturbed
from ..nn.pruned_models import prunable_of, wrapping_of
from ..nn.schemes import Scheme
from ..wrapping.state_argument import Form, parameter_names
from .estimate import Criterion

if TYPE_CHECKING:
    from ..wrapping.wrapped_model import Layer

_FORGETTING = 0.2
_UNMEASURED = "what those are worth is unknown; give data that reach all layers, or another criterion, such as 'share'"


class Measured(Criterion):
    """A running mean of a figure of each layer, measured in passes that take place anyway.

    The figures stay on the device. A layer that is not called, or whose figure is not finite, keeps what is known of
    it: an overflow that a GradScaler skips, or a batch without a label or token that counts, says nothing.

    Args:
        model: A network with time steps, or a wrapped model.
        recording: Whether only forward passes count that record gradients.
        forgetting: Least weight of a new measurement in the running mean; 0: the mean of all.

    Attributes:
        values: The figures, (num_steps,), float32; 0 before the first measurement.
        number: Number of measurements since layers came in last.
        counts: How many of them gave a figure of each layer, (num_steps,).
    """

    name: str  # of the values in checkpoints

    def __init__(self, model: nn.Module, *, recording: bool = False, forgetting: float = _FORGETTING) -> None:
        self.model, self.recording, self.forgetting = model, recording, forgetting
        steps = prunable_of(model).time_steps
        self.values = torch.zeros(steps.num_steps, dtype=torch.float32, device=steps.values.device)
        self.number = 0
        self.counts = torch.zeros(steps.num_steps, dtype=torch.long, device=steps.values.device)

    @abstractmethod
    def _watch(self, found: dict[int, Tensor]) -> Iterable[Any]:
        """Hang up hooks that put the figures of layers into ``found``, and return their handles."""

    def _figure(self, value: Tensor) -> Tensor:
        """The figure of a layer from what the hooks found for it."""
        return value

    @property
    def unseen(self) -> list[int]:  # type: ignore[override]
        return (self.counts == 0).nonzero().flatten().tolist()

    def scores(self, model: nn.Module) -> Tensor:
        return self.values

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the passes of the body."""
        found: dict[int, Tensor] = {}
        hooks = [*self._watch(found)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._take(found)

    def look(self, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        """Measure on a batch; the model is called in the mode in which it is."""
        with self.measuring():
            call(self.model, with_decoder(self.model, *inputs_and_targets(batch)))

    def _take(self, found: dict[int, Tensor]) -> None:
        if not found:
            return
        self.number += 1
        seen, device = sorted(found), self.values.device
        index = torch.tensor(seen, device=device)
        now = torch.stack([self._figure(found[l]).float().to(device) for l in seen])
        counts, old = self.counts[index] + now.isfinite(), self.values[index]
        weights = counts.to(now.dtype).reciprocal().clamp(min=self.forgetting)
        now = torch.where(now.isfinite(), torch.lerp(old, now, weights), old)
        self.counts = self.counts.index_copy(0, index, counts)
        self.values = self.values.index_copy(0, index, now)

    def keep_(self, indices: Iterable[int]) -> None:
        kept = torch.tensor(list(indices), dtype=torch.long, device=self.values.device)
        self.values, self.counts = self.values[kept], self.counts[kept]

    def grow_(self, sources: Sequence[int], new: Collection[int]) -> None:
        self.keep_(sources)
        self.number = 0
        for each in (self.values, self.counts):
            each[list(new)] = 0

    def state(self) -> dict[str, Any]:
        return {self.name: self.values, "measurements": self.number, "counts": self.counts.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.values, self.number = state[self.name], state["measurements"]
        counts = state.get("counts") or [self.number] * len(self.values)
        self.counts = torch.tensor(counts, dtype=torch.long, device=self.values.device)

    def average_(self, mean: Callable[[Tensor], Tensor]) -> None:
        if self.number:
            self.values = mean(self.values)

    def _looked_at(self) -> bool:
        """Whether the forward pass under way is one to be measured."""
        return torch.is_grad_enabled() or not self.recording

    def _layers(self) -> "list[_Place]":
        """The layers; of blocks the state that arrives is seen, and what they add is the difference."""
        layers, wrapping = prunable_of(self.model).layers, wrapping_of(self.model)
        forms = [Form()] * len(layers) if wrapping is None else [layer.form for layer in wrapping.present]
        state = wrapping is not None and wrapping.per == "block"
        return [_Place(l, layer, form, state) for l, (layer, form) in enumerate(zip(layers, forms, strict=True))]

    def _sites(self) -> "list[_Place]":
        """The modules whose output a step multiplies: the layers, or the branches of each."""
        wrapping = wrapping_of(self.model)
        if wrapping is None or wrapping.form == "whole":
            return self._layers()
        places = [(l, *each) for l, layer in enumerate(wrapping.present) for each in layer.branches()]
        return [_Place(l, site, branch.form, False) for l, branch, site in places]

    def _on_outputs(self, places: "list[_Place]", act: Callable[[int, Form, Tensor | None, Any], Any]) -> list[Any]:
        """Hooks on the outputs of modules, which are handed l, the form, the state that arrives or None, the output."""

        def hook(place: _Place) -> "_Hook":
            def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                value = place.form.leaving(output)
                empty = value is None or value.numel() == 0
                x = place.form.arriving(args, kwargs) if place.state else None
                return None if empty or not self._looked_at() else act(place.layer, place.form, x, output)

            return _Hook(measure)

        return [place.module.register_forward_hook(hook(place), with_kwargs=True) for place in places]

    def _on_states(self, act: Callable[[int, Tensor, Tensor], None]) -> "list[Any]":
        """Hooks on the states of a network, which are handed l, y_l and y_{l+1}; reversible memory stores them then."""

        def measure(states: Callable[..., list[Tensor]], x: Tensor, *others: Any) -> list[Tensor]:
            found = states(x, *others)
            if self._looked_at() and x.numel() > 0:
                with torch.no_grad():
                    for l, (y, after) in enumerate(pairwise([x, *found])):
                        act(l, y, after)
            return found

        scheme = prunable_of(self.model).scheme
        last = _Around(scheme, "last", lambda _, *args: Scheme.last(scheme, *args))
        return [_Around(scheme, "states", measure), last]


class _Place(NamedTuple):
    """Where something is measured."""

    layer: int  # its position
    module: nn.Module
    form: Form
    state: bool  # whether the state passes the module, which otherwise returns what is added to it


class Contribution(Measured):
    """The mean over samples of the norm of what each layer adds to the state; see :class:`Measured`."""

    name = "contributions"

    def _watch(self, found: dict[int, Tensor]) -> Iterable[Any]:
        prunable, wrapped = prunable_of(self.model), wrapping_of(self.model) is not None
        moved = [] if wrapped else moved_by_steps(prunable)

        @torch.no_grad()
        def measure(l: int, form: Form, x: Tensor | None, output: Any) -> None:
            size = _mean_norm(_increment(form, x, output))
            found[l] = size if wrapped else size * prunable.scheme.factor(prunable.time_steps.tau.float())[l]

        def between(l: int, y: Tensor, after: Tensor) -> None:
            if l in moved:
                found[l] = _mean_norm(after - y)

        hooks = self._on_outputs([place for place in self._layers() if place.layer not in moved], measure)
        return [*hooks, *self._on_states(between)] if moved else hooks


class Sensitivity(Measured):
    """The mean over batches of abs(tau_l dJ_b/dtau_l), measured in backward passes; see :class:`Measured`.

    A network's scheme is handed steps of which the gradient is seen. In blocks, and where tau^p is what multiplies the
    layers, a factor 1 + s on what layer l adds changes J by s <dJ/dz_l, z_l> to first order, which is seen where the
    gradient passes the layer's output; a block with branch steps has a term for each branch. Parts of a batch, whose
    gradients accumulate, add up before the absolute value is taken.
    """

    name = "sensitivities"

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._outputs: list[Any] = []

    def look(self, batch: Any, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        """Measure on a batch, by a backward pass that leaves no gradient."""
        with self.measuring(), torch.enable_grad():
            value, _ = loss_on(self.model, batch, loss)
            if self._outputs and bool(value.isfinite().all()):
                torch.autograd.grad(value, self._outputs, allow_unused=True)

    def _watch(self, found: dict[int, Tensor]) -> Iterable[Any]:
        self._outputs = []
        scheme = prunable_of(self.model).scheme
        if wrapping_of(self.model) is None and scheme.step_power == 1.0:
            return [_Around(scheme, name, partial(self._with_steps_seen, found)) for name in ("states", "last")]

        def measure(l: int, form: Form, x: Tensor | None, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            value = form.leaving(output)
            assert value is not None
            # what is changed in place later is copied
            added = (value.clone() if x is None else _increment(form, x, output)).detach()
            frozen = not value.requires_grad  # nothing before it trains, nor does it itself
            value = value.detach().requires_grad_() if frozen else value

            @torch.no_grad()
            def take(gradient: Tensor) -> None:
                now = _product(gradient, added).sum()
                found[l] = found[l] + now if l in found else now

            value.register_hook(take)
            self._outputs.append(torch.autograd.graph.get_gradient_edge(value))  # before it is changed in place
            return form.replaced(output, value) if frozen else None

        return self._on_outputs(self._sites(), measure)

    def _with_steps_seen(
        self, found: dict[int, Tensor], run: Callable[..., Any], x: Tensor, layers: Any, skips: Any, tau: Tensor
    ) -> Any:
        """States of a network from steps with a hook; the last one may ask for all of them, with steps that have it."""
        seen = any(tau is each for each in self._outputs)
        if seen or not torch.is_grad_enabled() or x.numel() == 0:
            return run(x, layers, skips, tau)
        own = tau.clone() if tau.requires_grad else tau.detach().clone().requires_grad_()
        steps = own.detach()

        @torch.no_grad()
        def take(gradient: Tensor) -> None:
            for l, now in enumerate(_product(gradient, steps).unbind()):
                found[l] = found[l] + now if l in found else now

        own.register_hook(take)
        self._outputs.append(own)
        return run(x, layers, skips, own)

    def _take(self, found: dict[int, Tensor]) -> None:
        self._outputs = []
        super()._take(found)

    def _figure(self, value: Tensor) -> Tensor:
        return value.abs()


class Influence(Measured):
    """The mean of 1 - cos of the states before and after each layer; see :class:`Measured`.

    Of states (batch, tokens, width) it is the mean over the tokens that count in the model's ``attention_mask``,
    (batch, tokens); any other state is one vector a sample. A layer that changes the shape of the state has no
    influence, and its score is 0: the skip past it is not the identity, so that it must stay.
    """

    name = "influences"

    def _watch(self, found: dict[int, Tensor]) -> Iterable[Any]:
        wrapping, mask = wrapping_of(self.model), dict[str, Any]()
        position = dict(zip(parameter_names(self.model.forward), range(99), strict=False)).get(MASK)

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[position] if position is not None and position < len(args) else None
            mask["given"] = kwargs.get(MASK, given)

        @torch.no_grad()
        def measure(l: int, form: Form, x: Tensor | None, output: Any) -> None:
            found[l] = _turned(x, form.leaving(output), mask.get("given"))

        def between(l: int, y: Tensor, after: Tensor) -> None:
            found[l] = _turned(y, after, None)

        if wrapping is None:
            return self._on_states(between)
        hooks = [self.model.register_forward_pre_hook(_Hook(begin), with_kwargs=True)]
        if wrapping.per == "branch":
            return hooks + self._between_branches(found, wrapping.present, lambda: mask.get("given"))
        return hooks + self._on_outputs(self._layers(), measure)

    def _between_branches(
        self, found: dict[int, Tensor], layers: "Iterable[Layer]", mask: Callable[[], Any]
    ) -> list[Any]:
        """Hooks on blocks and on branches, whose state is that of the block and what those before them added to it."""
        states: dict[nn.Module, Tensor | None] = {}

        def begin(form: Form) -> "_Hook":
            def measure(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states[block] = form.arriving(args, kwargs) if self._looked_at() else None

            return _Hook(measure)

        def add(l: int, layer: "Layer") -> "_Hook":
            @torch.no_grad()
            def measure(_: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
                x, added = states.get(layer.block), layer.form.leaving(output)
                if x is not None and added is not None and x.numel() > 0:
                    y = x + added
                    found[l], states[layer.block] = _turned(x, y, mask()), y

            return _Hook(measure)

        forms = {layer.block: layer.at_start.form for layer in layers}
        starts = [block.register_forward_pre_hook(begin(form), with_kwargs=True) for block, form in forms.items()]
        ends = [layer.module.register_forward_hook(add(l, layer)) for l, layer in enumerate(layers)]
        return [*starts, *ends]


class _Hook:
    """A hook that measures; in a copy of the model, pickled or not, one that does nothing."""

    def __init__(self, measure: Callable[..., Any] | None = None) -> None:
        self.measure = measure

    def __call__(self, *args: Any) -> Any:
        return None if self.measure is None else self.measure(*args)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()


class _Around:
    """A method of a scheme with what measures around it; in a copy of the scheme, pickled or not, the method alone."""

    def __init__(self, scheme: Scheme, name: str, measure: Callable[..., Any]) -> None:
        self.scheme, self.name, self.measure = scheme, name, measure
        self.method, self.own = getattr(scheme, name), vars(scheme).get(name)
        vars(scheme)[name] = self

    def __call__(self, x: Tensor, layers: Any, skips: Any, tau: Tensor) -> Any:
        return self.measure(self.method, x, layers, skips, tau)

    def remove(self) -> None:
        vars(self.scheme).pop(self.name, None)
        if self.own is not None:
            vars(self.scheme)[self.name] = self.own

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Scheme, str]]:
        return getattr, (self.scheme, self.name)


def moved_by_steps(network: Any) -> list[int]:
    """The layers that add y_{l+1} - y_l to the state: with a step of 0 it would be y_l that comes behind them."""
    local = network.scheme.deletes_exactly and not network.scheme.remembers
    return [l for l in range(len(network.layers)) if local and network.skips.is_identity(l)]


def _product(gradient: Tensor, value: Tensor) -> Tensor:
    """The entries' products, in float32 at least."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(dtype) * value.to(dtype)


def _increment(form: Form, x: Tensor | None, output: Any) -> Tensor:
    """The state in an output, less the one that came in, where there was one."""
    value = form.leaving(output)
    assert value is not None
    return value if x is None else value - x.to(value.dtype)


def _mean_norm(values: Tensor) -> Tensor:
    """The mean over the batch of the norms of the samples."""
    samples = values.float().reshape(len(values), -1) if values.ndim > 1 else values.float().reshape(1, -1)
    return torch.linalg.vector_norm(samples, dim=1).mean()


def _turned(x: Tensor | None, y: Tensor | None, mask: Any) -> Tensor:
    """The mean of 1 - cos(x, y) = norm(x/norm(x) - y/norm(y))^2 / 2, which loses no digits where x is nearly y."""
    assert y is not None
    if x is None or x.shape != y.shape or x.numel() == 0:
        return torch.zeros((), device=y.device)
    if y.ndim != 3:
        x, y = (each.reshape(len(each), -1) if each.ndim > 1 else each[None] for each in (x, y))
    units = [nn.functional.normalize(each.float(), dim=-1) for each in (x, y)]
    each = 0.5 * (units[0] - units[1]).square().sum(-1)
    if y.ndim == 3 and isinstance(mask, Tensor) and mask.shape == each.shape:
        counts = (mask != 0).to(each)
        return (each * counts).sum() / counts.sum()
    return each.mean()


KINDS: dict[str, type[Measured]] = {
    "contribution": Contribution,
    "influence": Influence,
    "sensitivity": Sensitivity,
}


def on_data(
    name: str, data: Any, loss: Callable[[Any, Any], Tensor] | None = None
) -> Callable[[Tensor, nn.Module], Tensor]:
    """A measured criterion on given batches, in evaluation mode: the mean over the batches; see ``taulearn.prune``."""

    def criterion(_tau: Tensor, model: nn.Module) -> Tensor:
        running = KINDS[name](model, forgetting=0.0)
        batches = batches_of(data)
        with undisturbed(model, batches):
            for batch in each_batch(batches, model, running.values):
                running.look(batch, loss)
        return _known(running, "data")

    return criterion


def contribution(example_inputs: Any) -> Callable[[Tensor, nn.Module], Tensor]:
    """A criterion for ``taulearn.prune``: the mean norm of what each layer adds to the state, on these inputs.

    Args:
        example_inputs: A batch, or a tuple of arguments, or a dictionary of keywords; a few hundred samples do.

    Returns:
        A function (tau, model) -> one score per layer, from one forward pass in evaluation mode. It raises
        ValueError if a layer is not called on any sample, as nothing is known of what it contributes.

    Example:
        >>> from taulearn import prune
        >>> from taulearn.nn import resnet
        >>> network = resnet(2, 3, 1, 4)
        >>> with torch.no_grad():
        ...     _ = network.layers[2].linear.weight.zero_(), network.layers[2].linear.bias.zero_()
        >>> [d.layer for d in prune(network, criterion=contribution(torch.ones(8, 2)), budget=3).deleted]
        [2]
    """

    def criterion(_tau: Tensor, model: nn.Module) -> Tensor:
        running = Contribution(model)
        with undisturbed(model, example_inputs), running.measuring():
            call(model, example_inputs)
        return _known(running, "example_inputs")

    return criterion


def _known(running: Measured, argument: str) -> Tensor:
    """The values, where all layers have one."""
    if running.unseen:
        raise ValueError(
            f"{argument} must be such that every layer is called on at least one sample that counts, with a finite "
            f"figure, got {argument} on which {running.unseen} of {len(running.counts)} layers are not: {_UNMEASURED}"
        )
    return running.values
