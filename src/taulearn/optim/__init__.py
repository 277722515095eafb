"""Optimisers and time steps: parameter groups, the projection after each step, steepest descent with a line search."""

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from .groups import parameter_groups as parameter_groups
    from .projections import (
        constrain_ as constrain_,
        group_of as group_of,
        register_projection as register_projection,
    )
    from .steepest_descent import SteepestDescent as SteepestDescent

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        ".groups": ("parameter_groups",),
        ".projections": ("constrain_", "group_of", "register_projection"),
        ".steepest_descent": ("SteepestDescent",),
    },
)
