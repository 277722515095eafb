"""Herberg, Herzog, Koehne (2023), Time regularization in optimal time variable learning: claims H1 to H8."""

from ..suite import Claim, Suite
from ._herberg import judges
from ._herberg.members import members

SUITE = Suite(
    name="herberg2023",
    title="Herberg, Herzog, Köhne (2023), Time regularization in optimal time variable learning",
    members=members,
    claims=(
        Claim(
            "H1",
            "Networks with learned time steps reach higher accuracy sooner than with fixed ones (figure 4.1).",
            judges.learned_beats_fixed,
        ),
    ),
)
