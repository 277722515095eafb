"""Püttschneider, Heilig, Fischer, Faulwasser (2025), optimal control perspective of ResNet training: P1 and P2."""

from ..suite import Claim, Suite
from . import claims, figures
from .trainings import members

SUITE = Suite(
    name="puettschneider2025",
    title="Püttschneider, Heilig, Fischer, Faulwasser (2025), "
    "Towards an optimal control perspective of ResNet training",
    members=members,
    claims=(
        Claim(
            "P1",
            "With the stage cost the deeper residual blocks vanish: the first M blocks alone reach nearly the full "
            "accuracy.",
            claims.first_blocks_suffice,
        ),
        Claim(
            "P2",
            "The weighted mean of the training losses is bounded by what the optimal network of M blocks reaches, for "
            "every M (for global minimisers; a violation shows that training did not reach the minimum).",
            claims.bound_is_kept,
        ),
    ),
    figures={"depths": figures.depths, "bound": figures.bound},
    tables={"blocks": figures.first_blocks, "exits": figures.early_exits, "bound": figures.both_sides},
)
