"""Time steps around the blocks of an existing model; README.md beside this file says which file answers what."""

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from ..nn.pruned_models import wrapping_of as wrapping_of
    from .block import PassThrough as PassThrough
    from .folding import anneal_to_one as anneal_to_one, fold_units as fold_units, unwrap as unwrap
    from .wrap_model import wrap as wrap
    from .wrapped_model import Wrapping as Wrapping

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        "..nn.pruned_models": ("wrapping_of",),
        ".block": ("PassThrough",),
        ".folding": ("anneal_to_one", "fold_units", "unwrap"),
        ".wrap_model": ("wrap",),
        ".wrapped_model": ("Wrapping",),
    },
)
