"""Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning: claims H1 to H8."""

from ..suite import Claim, Suite
from . import claims, figures
from .trainings import LEARNED, NETWORKS, PUBLISHED, members

SUITE = Suite(
    name="herberg2023",
    title="Herberg, Herzog, Köhne (2023), Time regularization in optimal time variable learning",
    members=members,
    claims=(
        Claim(
            "H1",
            "Networks reach higher accuracy sooner with learned time steps than with fixed ones (figure 4.1).",
            claims.learned_beats_fixed,
        ),
        Claim(
            "H2",
            "Residual network: free, l1, horizon and dependent reach similar accuracy; l1 and horizon show larger "
            "losses (figure 4.2).",
            claims.similar_accuracy_larger_loss,
        ),
        Claim(
            "H3",
            "Fractional network: the horizon penalty has lower accuracy in the first 100 of 200 epochs and larger loss "
            "throughout, and keeps the steps smallest (figure 4.3).",
            claims.horizon_restricts_fractional,
        ),
        Claim(
            "H4",
            "Residual network on Fashion-MNIST: tau_0 is far larger than the others; with the horizon penalty the sum "
            "is 1 in most iterations and some step is negative after a bit more than 100; l1 drives some steps to "
            "zero, where they remain (figure 4.4).",
            claims.residual_steps,
        ),
        Claim(
            "H5",
            "Fractional network on Fashion-MNIST: all steps grow without regularisation, tau_0 being the largest; l1 "
            "and horizon damp that; l1 brings none to zero; with horizon the sum exceeds 1 near iteration 1000 and "
            "comes back oscillating; the dependent step passes through zero without harm; with both penalties tau_1 "
            "to tau_4 get close to zero; it is better without regularisation (figure 4.5).",
            claims.fractional_steps,
        ),
        Claim(
            "H6",
            "Pruning while training succeeds with l1, each deletion removes 10,101 variables, at no noticeable cost; "
            "the training gets faster and keeps its accuracy (figure 4.6).",
            claims.pruning_succeeds,
        ),
        Claim(
            "H7",
            "Regularised or dependent time steps still beat fixed ones (figure 4.1 against 4.2 and 4.3).",
            claims.regularised_beats_fixed,
        ),
        Claim(
            "H8",
            "Pruning eliminates the search for the depth, from a sufficiently deep start.",
            claims.depth_is_found,
        ),
    ),
    figures={
        "4.1": figures.figure_4_1,
        "4.2": figures.figure_4_2,
        "4.3": figures.figure_4_3,
        "4.4": figures.figure_4_4,
        "4.5": figures.figure_4_5,
        "4.6": figures.figure_4_6,
        "as-published": figures.published_figure,
    },
    tables={"as-published": figures.published_table},
    needs={
        "4.1": tuple(f"*/{network}/{name}" for network in NETWORKS for name in ("free", "fixed")),
        "4.2": tuple(f"*/resnet/{name}" for name in LEARNED),
        "4.3": tuple(f"*/fractional/{name}" for name in LEARNED),
        "4.4": tuple(f"fashion-mnist/resnet/{name}" for name in figures.TRAJECTORIES),
        "4.5": tuple(f"fashion-mnist/fractional/{name}" for name in figures.TRAJECTORIES),
        "4.6": ("fashion-mnist/resnet/*-pruned",),
        "as-published": (
            "*/*-as-published/*",
            *(f"{data}/{network}/{name}" for data, network, name in PUBLISHED),
        ),
    },
)
