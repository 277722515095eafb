"""Which layers a refinement takes: those with the largest indicators, a number of them or the bulk."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .._errors import is_number, positive_integer


def largest(eta: Sequence[float] | Tensor, number: int, reasons: Mapping[int, str] | None = None) -> list[int]:
    """The layers with the largest abs(eta); of equal ones the first.

    Args:
        eta: Signed indicators, one a layer; nan: the layer cannot be refined.
        number: How many layers, at least 1.
        reasons: Why those with nan cannot be refined, for the error.

    Returns:
        Positions in increasing order.

    Raises:
        ValueError: If fewer can be refined, or an indicator is infinite.

    Example:
        >>> largest([float("nan"), 0.1, -0.3, 0.2], 2)
        [2, 3]
    """
    order = _by_size(eta, reasons, positive_integer("number", number, "so many layers are refined"))
    return sorted(l for _, l in order[:number])


def bulk(eta: Sequence[float] | Tensor, share: float, reasons: Mapping[int, str] | None = None) -> list[int]:
    """Dörfler's rule: the smallest set of layers with sum abs(eta) >= share of the total; of equal ones the first.

    Args:
        eta: As for :func:`largest`.
        share: In (0, 1]; small: few layers at a time.
        reasons: As for :func:`largest`.

    Returns:
        Positions in increasing order; none where all indicators are 0.

    Raises:
        ValueError: If no layer can be refined, an indicator is infinite, or share lies outside its range.

    References:
        Dörfler (1996), A convergent adaptive algorithm for Poisson's equation.

    Example:
        >>> bulk([0.1, -0.6, 0.3], 0.8)
        [1, 2]
    """
    if not (is_number(share) and 0.0 < share <= 1.0):
        raise ValueError(f"bulk must lie in (0, 1], got {share!r}: it is the share of sum |eta| that is refined")
    order = _by_size(eta, reasons, 1)
    total, number = share * math.fsum(size for size, _ in order), 0
    while math.fsum(size for size, _ in order[:number]) < total:
        number += 1
    return sorted(l for _, l in order[:number])


def _by_size(
    eta: Sequence[float] | Tensor, reasons: Mapping[int, str] | None, at_least: int
) -> list[tuple[float, int]]:
    """abs(eta) of the layers that can be refined, with their positions, the largest first."""
    values = [float(each) for each in eta]
    if any(math.isinf(each) for each in values):
        raise ValueError(f"indicator must be finite, or nan where a layer cannot be refined, got {values}")
    sizes = [(abs(each), l) for l, each in enumerate(values) if not math.isnan(each)]
    if len(sizes) < at_least:
        why = "".join(f"; layer {l} cannot: {reason}" for l, reason in sorted((reasons or {}).items())[:1])
        raise ValueError(
            f"number must be at most {len(sizes)}, the number of layers of {len(values)} that can be refined, got "
            f"{at_least}{why}"
        )
    return sorted(sizes, key=lambda each: (-each[0], each[1]))
