"""Antil, Diaz, Herberg (2022), An optimal time variable learning framework for deep neural networks: A1 to A8."""

from ..suite import Claim, Suite
from . import claims, figures
from .trainings import members

SUITE = Suite(
    name="antil2022",
    title="Antil, Díaz, Herberg (2022), An optimal time variable learning framework for deep neural networks",
    members=members,
    claims=(
        Claim(
            "A1",
            "Networks 6-50 train faster with learned than with fixed steps, with and without bias ordering; 2-50 gain "
            "less; the objective decreases monotonically (figure 1).",
            claims.learned_trains_faster,
        ),
        Claim(
            "A2",
            "In the network 5-10 with bias ordering tau_1, tau_3, tau_4 come near 0 at a relative error of 0.07, and "
            "deleting the three layers keeps it (figure 2).",
            claims.network_reduces,
        ),
        Claim(
            "A3", "The learned steps are those of table 1, all positive for 6-50.", claims.steps_are_those_of_the_table
        ),
        Claim(
            "A4",
            "On the cube the networks beat lowest order Nédélec elements for coarse h and stay stable for fine h; "
            "fractional networks do better there, residual ones in training; 2-50 beats 6-50 (figure 3).",
            claims.networks_against_elements,
        ),
        Claim(
            "A5",
            "On the square (-1, 1)^2 x {0.5} fractional networks 2-50 extrapolate better than residual ones, and the "
            "residual one slightly better with learned steps (figure 4).",
            claims.fractional_extrapolates,
        ),
        Claim(
            "A6",
            "In the cylinder the fractional network 2-50 keeps u3 within [-0.0051, 0.0077], and its arrows coincide "
            "with the exact ones; the residual network with learned steps does better (figure 5).",
            claims.third_component_is_small,
        ),
        Claim(
            "A7",
            "The gradients follow the recursions, and learned steps damp vanishing and exploding gradients (section 6, "
            "examples 6.3 and 6.8).",
            claims.gradients_are_damped,
        ),
        Claim(
            "A8",
            "The continuous fractional network depends stably on its initial value, with the printed growth "
            "(proposition 3.2).",
            claims.stable_in_the_initial_value,
        ),
    ),
    figures={
        "1": figures.figure_1,
        "2": figures.figure_2,
        "3": figures.figure_3,
        "4": figures.figure_4,
        "5": figures.figure_5,
    },
    shown=figures.SHOWN,
    tables={"1": figures.table_1, "toys": figures.toys, "optimisers": figures.optimizers},
    needs={
        "1": ("maxwell/6-50/*", "maxwell/*/learned/*"),  # figure 1 and table 1
        "2": ("reduction/*",),
        "3": ("maxwell/*", "fem/*"),
        "4": ("maxwell/2-50/*/plain",),
        "5": ("maxwell/2-50/fractional/learned/plain",),
        "toys": ("toys/*",),
        "optimisers": ("maxwell/6-50/resnet/*/plain", "optimisers/*"),
    },
)
