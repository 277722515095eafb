"""Looks at a network and its steps: propagation of gradients, use of its depth, a summary.

Results are dataclasses that print as tables; figures are drawn from them alone.
"""

from ..depth.choose_layers import DepthDecision as DepthDecision, choose_layers as choose_layers
from ..depth.exits import EarlyExit as EarlyExit, early_exit as early_exit
from ..depth.profile import (
    DepthProfile as DepthProfile,
    depth_profile as depth_profile,
    depth_statistics as depth_statistics,
)
from .gradients import GradientPropagation as GradientPropagation, gradient_propagation as gradient_propagation
from .overview import Summary as Summary, summary as summary
from .propagation_figure import plot_propagation as plot_propagation, propagation_figure as propagation_figure

__all__ = [
    "DepthDecision",
    "DepthProfile",
    "EarlyExit",
    "GradientPropagation",
    "Summary",
    "choose_layers",
    "depth_profile",
    "depth_statistics",
    "early_exit",
    "gradient_propagation",
    "plot_propagation",
    "propagation_figure",
    "summary",
]
