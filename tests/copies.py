"""Models that many tests ask for are made once in a process, and copied."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch


def copied(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, called once with these arguments; each call gives a copy, and leaves torch's generator as making it does.

    Wrapping a small transformer takes thirty times as long as copying it. The arguments are told apart by repr.
    """
    made: dict[str, tuple[Any, torch.Tensor]] = {}

    @functools.wraps(make)
    def copy_of(*arguments: Any, **options: Any) -> Any:
        key = repr((arguments, options))
        if key not in made:
            made[key] = make(*arguments, **options), torch.get_rng_state()
        model, state = made[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copy_of
