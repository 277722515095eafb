"""Optimisers and time steps: parameter groups, the projection after each step, steepest descent with a line search."""

from .groups import (
    constrain_ as constrain_,
    group_of as group_of,
    parameter_groups as parameter_groups,
    register_projection as register_projection,
)
from .steepest_descent import SteepestDescent as SteepestDescent

__all__ = ["SteepestDescent", "constrain_", "group_of", "parameter_groups", "register_projection"]
