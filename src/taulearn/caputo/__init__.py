"""The Caputo derivative of order 0 < gamma < 1 on a non-uniform time grid: L1 scheme, explicit solver, fast memory.

Everything is computed and returned in float64, also for float32 arguments: callers cast the result. Gradients with
respect to tau are finite and accurate for any ratio of the steps. All functions are pure; they run under
``torch.compile(fullgraph=True)`` and ``torch.func``, where ``torch.func.vmap`` over tau needs ``validate=False``: it
hides the values that a check would read.
"""

from typing import TYPE_CHECKING

from .._lazy import lazily

if TYPE_CHECKING:
    from .exponentials import ExponentialKernel as ExponentialKernel, exponential_memory as exponential_memory
    from .solver import solve as solve
    from .weights import derivative as derivative, l1_weights as l1_weights

__getattr__, __dir__, __all__ = lazily(
    __name__,
    {
        ".exponentials": ("ExponentialKernel", "exponential_memory"),
        ".solver": ("solve",),
        ".weights": ("derivative", "l1_weights"),
    },
)
