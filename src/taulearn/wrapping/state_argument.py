"""Which tensor of a block's arguments and of its output is the state, and how an output holds it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

CUSTOMARY = ("hidden_states", "x", "h", "hidden", "state", "src", "tgt")
"""Names of arguments that are taken for the state where no forward pass showed which one is."""


def parameter_names(forward: Callable[..., Any]) -> list[str]:
    """The names of what a function takes by position; none where it cannot be told, or after ``*args``."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]


def entries(output: Any) -> list[tuple[Any, Any]]:
    """The entries of a tuple, list, dictionary or ModelOutput with their positions or keys; of anything else none."""
    if isinstance(output, Mapping):
        return list(output.items())
    return list(enumerate(output)) if isinstance(output, tuple | list) else []


@dataclass(frozen=True)
class Form:
    """Where the state of a block is: the argument in which it arrives, and how the output holds it."""

    kind: type[Any] | None = None  # type of the output; None: it is the state, or not known
    key: int | str | None = None  # of the state in the output; None: it is the first tensor, or the output itself
    size: int = 1  # number of entries of a tuple or list
    argument: str | int | None = None  # name, or position; None: one with a customary name, else the first tensor
    position: int | None = None  # of a named argument; None: it is given by name only

    @classmethod
    def taking(cls, argument: str | int | None, forward: Callable[..., Any]) -> "Form":
        """The form of a block whose state arrives in an argument; None: in one with a customary name, if it has one."""
        names = parameter_names(forward)
        if argument is None:
            argument = next((name for name in CUSTOMARY if name in names), None)
        if isinstance(argument, str):
            return cls(argument=argument, position=names.index(argument) if argument in names else None)
        return cls(argument=argument, position=argument)

    @classmethod
    def of(cls, output: Any, like: "Form | None" = None) -> "Form":
        """The form of an output with a tensor in it, whose state is where ``like`` has it, else the first tensor."""
        like = cls() if like is None else like
        if isinstance(output, Tensor):
            return replace(like, kind=None, size=1)
        held = entries(output)
        return replace(like, kind=type(output), key=like._key(held), size=len(held))

    def _key(self, held: list[tuple[Any, Any]]) -> Any:
        """Where the state is among entries; None where none is a tensor."""
        found = [key for key, value in held if isinstance(value, Tensor)]
        return self.key if self.key in found else next(iter(found), None)

    def arriving(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The state among a block's arguments, or None if there is none."""
        if self.argument is not None:
            value = kwargs.get(self.argument) if isinstance(self.argument, str) else None
            if value is None and self.position is not None and self.position < len(args):
                value = args[self.position]
            return value if isinstance(value, Tensor) else None
        named = [kwargs[name] for name in CUSTOMARY if name in kwargs]
        return next((value for value in (*args, *named, *kwargs.values()) if isinstance(value, Tensor)), None)

    def handing(
        self, state: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another state in them."""
        x = self.arriving(args, kwargs)
        others = tuple(state if value is x else value for value in args)
        return others, {name: state if value is x else value for name, value in kwargs.items()}

    def leaving(self, output: Any) -> Tensor | None:
        """The state in a block's output, or None if there is none."""
        if isinstance(output, Tensor):
            return output
        held = entries(output)
        key = self._key(held)
        return None if key is None else dict(held)[key]

    def replaced(self, output: Any, state: Tensor) -> Any:
        """The same output with another state in it."""
        return state if isinstance(output, Tensor) else Form.of(output, self).around(state, dict(entries(output)))

    def around(self, state: Any, others: Mapping[Any, Any] | None = None) -> Any:
        """An output of this form: the state, with the other entries, None where there are none."""
        if self.kind is None:
            return state
        held: dict[Any, Any] = {**(others or {}), self.key: state}
        if issubclass(self.kind, Mapping):
            return held if self.kind is dict else self.kind(**held)
        values = [held.get(i) for i in range(self.size)]
        return self.kind(*values) if hasattr(self.kind, "_fields") else self.kind(values)
