"""A model at a glance: its layers, their steps, their parameters, their time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._milliseconds import layer_milliseconds
from .._table import format_table
from ..adaptivity.estimate import shares_of
from ..depth.layers_and_states import layers_of, scheme_of
from ..nn.builders import FullyConnected
from ..nn.pruned_models import wrapping_of
from ..nn.time_steps import time_steps_of


@dataclass(frozen=True)
class Summary:
    """One entry per layer; prints as a table with a total line.

    Attributes:
        scheme: Name of the scheme.
        layers: Numbers of the layers at the start.
        tau: Effective steps.
        shares: abs(tau)^p / sum abs(tau)^p, with p = gamma for the fractional scheme and 1 otherwise: what pruning
            compares with its threshold.
        parameters: Numbers of variables of the layer functions (a shared variable counts where it comes first).
        kinds: What the layers are; in a wrapped model with their names when it was wrapped.
        milliseconds: Median time of each layer function in a forward pass, or None without example inputs.
        total_parameters: Number of variables of the whole model.
        total_milliseconds: Median time of the whole forward pass, or None.
        model: What the whole is called.
        must_stay: Of a wrapped model, the layers that cannot be deleted, with the reason.
        not_saved: Of a wrapped model, the layers without any one of which ``save_pretrained`` is refused, with the
            reason; ``save_model`` saves the model without them.
        form: Of a wrapped model, how steps enter its blocks, and why so.
    """

    scheme: str
    layers: tuple[int, ...]
    tau: tuple[float, ...]
    shares: tuple[float, ...]
    parameters: tuple[int, ...]
    kinds: tuple[str, ...]
    milliseconds: tuple[float, ...] | None
    total_parameters: int
    total_milliseconds: float | None
    model: str
    must_stay: Mapping[int, str] = field(default_factory=dict)
    not_saved: Mapping[int, str] = field(default_factory=dict)
    form: str = ""

    def __str__(self) -> str:
        rest = self.total_parameters - sum(self.parameters)
        columns: dict[str, list[object]] = {
            "layer": [*self.layers, None],
            "tau": [*self.tau, None],
            "share": [*self.shares, None],
            "parameters": [*self.parameters, rest],
            "kind": [*self.kinds, "all else"],
        }
        if self.must_stay or self.not_saved:
            columns["deletion"] = [*map(self._deletion, self.layers), ""]
        total: list[object] = [len(self.layers), sum(self.tau), None, self.total_parameters, self.model]
        total += [""] * ("deletion" in columns)
        if self.milliseconds is not None and self.total_milliseconds is not None:
            columns["ms"] = [*self.milliseconds, max(0.0, self.total_milliseconds - sum(self.milliseconds))]
            total.append(self.total_milliseconds)
        lines = [format_table(columns, total=total)]
        lines += [f"{which} must stay: {why}" for which, why in _by_reason(self.must_stay)]
        lines += [f"without {which}, save_pretrained is refused: {why}" for which, why in _by_reason(self.not_saved)]
        lines += [self.form] * bool(self.form)
        return "\n".join(lines)

    def _deletion(self, layer: int) -> str:
        return "must stay" if layer in self.must_stay else "not saved" if layer in self.not_saved else ""


def _by_reason(reasons: Mapping[int, str]) -> list[tuple[str, str]]:
    """The layers of each reason, and the reason; of many reasons the first three."""
    found = [(why, [l for l in reasons if reasons[l] == why]) for why in dict.fromkeys(reasons.values())]
    if len(found) > 3:
        found = [*found[:2], ("for reasons of the same kind", [l for _, layers in found[2:] for l in layers])]
    return [(f"layer{'s'[: len(layers) - 1]} {', '.join(map(str, layers))}", why) for why, layers in found]


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """The layers of a model with their steps, shares, parameters and, on example inputs, milliseconds.

    Args:
        model: A model with time steps and one layer per step, or a wrapped model.
        example_inputs: A batch (a tuple of arguments, or a dictionary of keywords) on which forward passes are timed,
            in evaluation mode and without gradients. None: nothing is timed.

    Returns:
        The summary; ``print`` it.

    Raises:
        TypeError: If the model has no time steps, or not one layer per step.

    Example:
        >>> from taulearn.nn import resnet
        >>> print(summary(resnet(4, 3, 2, 2, init=[0.75, 0.25])))
        layer     tau   share  parameters  kind
        -------------------------------------------------------------
            0  0.7500  0.7500          15  FullyConnected(4, 3, ReLU)
            1  0.2500  0.2500          12  FullyConnected(3, 3, ReLU)
                                        8  all else
        -------------------------------------------------------------
            2  1.0000                  35  residual network
    """
    steps, layers = time_steps_of(model), layers_of(model)
    scheme, power = scheme_of(model)
    tau = steps.tau.detach().double().cpu()
    seen: set[nn.Parameter] = set()
    counts = []
    for layer in layers:
        new = [p for p in layer.parameters() if p not in seen]
        seen.update(new)
        counts.append(sum(p.numel() for p in new))
    of_layers, total = None, None
    if example_inputs is not None:
        of_layers, total = layer_milliseconds(model, layers, example_inputs)
    wrapping = wrapping_of(model)
    kinds = [_kind(layer) for layer in layers]
    if wrapping is not None:
        kinds = [f"{layer.name} {kind}" for layer, kind in zip(wrapping.present, kinds, strict=True)]
    return Summary(
        scheme=scheme,
        layers=steps.origin,
        tau=tuple(tau.tolist()),
        shares=tuple(shares_of(tau, power).tolist()),
        parameters=tuple(counts),
        kinds=tuple(kinds),
        milliseconds=of_layers,
        total_parameters=sum(p.numel() for p in model.parameters()),
        total_milliseconds=total,
        model=f"{scheme} network" if wrapping is None else type(model).__name__,
        must_stay={} if wrapping is None else {steps.origin[l]: why for l, why in wrapping.fixed_layers().items()},
        not_saved={} if wrapping is None else {l: why for l, why in wrapping.not_saved.items() if l in steps.origin},
        form="" if wrapping is None else _form(wrapping.form, wrapping.why),
    )


def _form(form: str, why: str) -> str:
    unfolded = (
        "; such steps do not fold: for a plain checkpoint leave them at 1, parameter_groups(.., tau_lr=0), or bring "
        "them back there, taulearn.wrapping.anneal_to_one"
    )
    return f"form {form!r}, {why}{unfolded * (form == 'whole')}"


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, FullyConnected):
        linear = layer.linear
        return f"FullyConnected({linear.in_features}, {linear.out_features}, {type(layer.activation).__name__})"
    return type(layer).__name__
