"""Whether two models are the same, in tensors, in what their modules hold beside them, and in outputs."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._calls import call as call_model
from .._errors import in_short
from .block import PassThrough
from .observation import tensors_in

STEPS = "time_steps."


@dataclass(frozen=True)
class Description:
    """What a model is made of, for comparing it with another that should be the same."""

    shapes: dict[str, tuple[int, ...]]  # of its tensors, by name
    held: dict[str, Any]  # what its modules hold beside tensors and say of the architecture, by name
    placeholders: tuple[str, ...]  # names of the places of deleted blocks

    @classmethod
    def of(cls, model: nn.Module) -> "Description":
        """The description of a model; time steps are no part of it."""
        named = [(name, module) for name, module in model.named_modules() if not f"{name}.".startswith(STEPS)]
        return cls(
            {name: tuple(value.shape) for name, value in tensors_of(model.state_dict()).items()},
            {
                f"{name}.{key}".lstrip("."): list(value) if isinstance(value, tuple) else value
                for name, module in named
                for key, value in vars(module).items()
                if _matters(key) and _is_plain(value)
            },
            tuple(name for name, module in named if isinstance(module, PassThrough)),
        )

    def differences(self, found: "Description", *, held: bool = True) -> list[str]:
        """How another description differs from this one."""
        lines = [
            f"{name} is {found.shapes.get(name, 'absent')} for {self.shapes.get(name, 'absent')}"
            for name in {**self.shapes, **found.shapes}
            if found.shapes.get(name) != self.shapes.get(name)
        ]
        lines += [f"{name} is a placeholder of a deleted block" for name in found.placeholders]
        return lines + [
            f"{name} is {_text(found.held[name])} for {_text(value)}"
            for name, value in self.held.items()
            if held and name in found.held and (type(found.held[name]), found.held[name]) != (type(value), value)
        ]


def _matters(key: str) -> bool:
    """Whether an attribute belongs to the architecture: not to training, not private."""
    return (
        key not in ("p", "training", "name_or_path")
        and not key.startswith("_")
        and "drop" not in key
        and "gradient" not in key
    )


def _is_plain(value: Any) -> bool:
    """Numbers, words and lists of numbers; lists of words are kinds in no order."""
    if isinstance(value, list | tuple):
        return all(type(each) in (bool, int, float) for each in value)
    return value is None or type(value) in (bool, int, float, str)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in a state dict, without those of time steps."""
    return {k: v for k, v in state.items() if not k.startswith(STEPS) and isinstance(v, Tensor)}


def other_values(loaded: nn.Module, model: nn.Module, state: dict[str, Any]) -> list[str]:
    """How a loaded model's tensors differ; of two types the coarser one counts."""
    theirs, mine, own = tensors_of(loaded.state_dict()), tensors_of(state), tensors_of(model.state_dict())
    lines = [f"{name} is {'absent' if name in own else 'there'} when loaded" for name in own.keys() ^ theirs.keys()]
    if not theirs.keys() & mine.keys():
        lines.append("no tensor that was saved has a name of the loaded model's")
    for name in theirs.keys() & mine.keys():
        a, b = mine[name], theirs[name]
        if a.shape != b.shape:
            lines.append(f"{name} is {tuple(a.shape)} for {tuple(b.shape)}")
        elif not a.is_meta and not _equal(a.detach().to(b.device), b):  # on the meta device: offloaded
            lines.append(f"{name} has other values when loaded")
    return sorted(lines)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        coarse = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        a, b = a.to(coarse), b.to(coarse)
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def as_taken(inputs: Any, host: nn.Module, device: torch.device) -> Any:
    """Example inputs on a device; floating-point ones in the type of the host, which may have been cast since."""
    dtype = type_of(host)

    def moved(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return each.to(device, dtype if each.is_floating_point() else None)

    return tree_map(moved, inputs)


def type_of(host: nn.Module) -> torch.dtype | None:
    """The floating-point type of a host's parameters, but for its time steps; None where there are several."""
    types = {p.dtype for name, p in host.named_parameters() if p.is_floating_point() and not name.startswith(STEPS)}
    return types.pop() if len(types) == 1 else None


def other_outputs(loaded: nn.Module, model: nn.Module, host: nn.Module, inputs: Any) -> list[str]:
    """How a loaded model answers differently what the model is asked when its host is called."""
    devices = {p.device for p in host.parameters()}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        return []
    (device,) = devices
    called = _call_of(model, host, as_taken(inputs, host, device))
    if called is None:
        return []
    args, kwargs, expected = called
    try:
        torch.manual_seed(0)
        found = loaded.to(device)(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  whatever the loaded model raises, it is another one
        return [f"the loaded model raises {in_short(error)}"]
    return other_tensors(found, expected)


def _call_of(model: nn.Module, host: nn.Module, inputs: Any) -> tuple[Any, Any, Any] | None:
    """The arguments of a model's first call when its host is called, and its output; None if it is not called so."""
    arguments: list[tuple[Any, Any]] = []
    outputs: list[Any] = []

    def start(_module: nn.Module, args: Any, kwargs: Any) -> None:
        if not arguments:
            arguments.append((copy.deepcopy(args), copy.deepcopy(kwargs)))
            torch.manual_seed(0)

    before = model.register_forward_pre_hook(start, with_kwargs=True)
    after = model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        call_model(host, inputs)
    except Exception:  # noqa: BLE001  the inputs are not what the host takes any more: nothing can be compared
        return None
    finally:
        before.remove()
        after.remove()
    return (*arguments[0], outputs[0]) if outputs else None


def other_tensors(output: Any, expected: Any) -> list[str]:
    """How outputs differ by more than sums do that are taken in another order."""
    mine, theirs = ([v for _, v in tensors_in(each)] for each in (expected, output))
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return ["it gives outputs of other shapes on the example inputs"]
    for a, b in zip(mine, theirs, strict=True):
        eps = max((torch.finfo(t.dtype).eps for t in (a, b) if t.is_floating_point()), default=0.0)
        x, y = a.double().nan_to_num(), b.double().nan_to_num()
        scale = float(x.abs().amax()) if x.numel() else 0.0
        if not torch.allclose(x, y, rtol=0.0, atol=eps**0.5 * scale):
            by = float((x - y).abs().amax())
            return [f"it gives other outputs on the example inputs, by {by:.2g} of {scale:.2g}"]
    return []
